"""Control theory on frozen systems; it knows no nn.Module."""

from compressm.control.balancing import Balanced, Reduction, balance
from compressm.control.coordinates import blend, real_gramians, slots, white_gramians
from compressm.control.factors import singular_values
from compressm.control.matrix_states import (
    MatrixMoments,
    MatrixReduction,
    pair_spectrum,
    projection,
    subset,
    subset_spectrum,
)
from compressm.control.selective import MeanSystem, SelectiveMoments, SelectiveReduction, mean_subset, refitted_subset
from compressm.control.siso import siso_hankel_singular_values
from compressm.control.state_space import StateSpace, sampled, singular_perturbation, truncation
from compressm.control.system import DiagonalSystem
from compressm.control.weighted_gramians import frequency_weighted_gramians, time_limited_gramians

__all__ = [
    "Balanced",
    "DiagonalSystem",
    "MatrixMoments",
    "MatrixReduction",
    "MeanSystem",
    "Reduction",
    "SelectiveMoments",
    "SelectiveReduction",
    "StateSpace",
    "balance",
    "blend",
    "frequency_weighted_gramians",
    "mean_subset",
    "pair_spectrum",
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
    "time_limited_gramians",
    "truncation",
    "white_gramians",
]
