"""Control theory on frozen systems; it knows no nn.Module."""

from compressm.control.balancing import Balanced, Reduction, balance
from compressm.control.coordinates import blend, real_gramians, slots, white_gramians
from compressm.control.criteria import (
    AIRE,
    LAST,
    Criterion,
    ImpulseEnergy,
    Magnitude,
    Modulus,
    PeakGain,
    RandomModes,
    best_modes,
    keep_modes,
)
from compressm.control.factors import cross_root, singular_values
from compressm.control.hankel_norm import hankel_nuclear_norm
from compressm.control.matrix_states import (
    MatrixMoments,
    MatrixReduction,
    best_rows,
    check_pairs,
    erasing_projection,
    pair_spectrum,
    predicted_subset,
    projection,
    subset,
    subset_spectrum,
    turning_spectrum,
    turning_subset,
)
from compressm.control.row_criteria import DRRQR, GHOST, OutputEnergy, RowCriterion, RowMoments, Taylor
from compressm.control.selective import (
    MeanSystem,
    SelectiveMoments,
    SelectiveReduction,
    best_states,
    mean_subset,
    refitted_subset,
)
from compressm.control.siso import siso_hankel_singular_values
from compressm.control.state_space import StateSpace, sampled, singular_perturbation, truncation
from compressm.control.streaming import Stream
from compressm.control.subspace import subspace_identification
from compressm.control.system import DiagonalSystem
from compressm.control.weighted_gramians import frequency_weighted_gramians, time_limited_gramians

__all__ = [
    "AIRE",
    "DRRQR",
    "GHOST",
    "LAST",
    "Balanced",
    "Criterion",
    "DiagonalSystem",
    "ImpulseEnergy",
    "Magnitude",
    "MatrixMoments",
    "MatrixReduction",
    "MeanSystem",
    "Modulus",
    "OutputEnergy",
    "PeakGain",
    "RandomModes",
    "Reduction",
    "RowCriterion",
    "RowMoments",
    "SelectiveMoments",
    "SelectiveReduction",
    "StateSpace",
    "Stream",
    "Taylor",
    "balance",
    "best_modes",
    "best_rows",
    "best_states",
    "blend",
    "check_pairs",
    "cross_root",
    "erasing_projection",
    "frequency_weighted_gramians",
    "hankel_nuclear_norm",
    "keep_modes",
    "mean_subset",
    "pair_spectrum",
    "predicted_subset",
    "projection",
    "real_gramians",
    "refitted_subset",
    "sampled",
    "singular_perturbation",
    "singular_values",
    "siso_hankel_singular_values",
    "slots",
    "subset",
    "subset_spectrum",
    "subspace_identification",
    "time_limited_gramians",
    "truncation",
    "turning_spectrum",
    "turning_subset",
    "white_gramians",
]
