"""The methods that a command can run, by name, in the order in which reports compare them."""

from compressm.experiments.methods.after_aire import AfterAire
from compressm.experiments.methods.after_balanced import AfterBalanced
from compressm.experiments.methods.after_drrqr import AfterDrrqr
from compressm.experiments.methods.after_ghost import AfterGhost
from compressm.experiments.methods.after_last import AfterLast
from compressm.experiments.methods.after_magnitude import AfterMagnitude
from compressm.experiments.methods.after_modal import AfterModal
from compressm.experiments.methods.after_output_energy import AfterOutputEnergyKept
from compressm.experiments.methods.after_random import AfterRandom
from compressm.experiments.methods.after_taylor import AfterTaylorKept
from compressm.experiments.methods.base import Method
from compressm.experiments.methods.compressed import Compressed
from compressm.experiments.methods.compressed_data_free import CompressedDataFree
from compressm.experiments.methods.compressed_faster import CompressedFaster
from compressm.experiments.methods.compressed_paper import CompressedPaper
from compressm.experiments.methods.compressed_strict import CompressedStrict
from compressm.experiments.methods.compressed_twice import CompressedTwice
from compressm.experiments.methods.compressed_when_stable import CompressedWhenStable
from compressm.experiments.methods.distilled import Distilled
from compressm.experiments.methods.drrqr import Drrqr
from compressm.experiments.methods.full import Full
from compressm.experiments.methods.ghost import Ghost
from compressm.experiments.methods.hankel_norm import HankelNorm
from compressm.experiments.methods.modal_l1 import ModalL1
from compressm.experiments.methods.output_energy import OutputEnergyKept
from compressm.experiments.methods.random_subset import RandomSubset
from compressm.experiments.methods.small import Small
from compressm.experiments.methods.small_narrow import SmallNarrow
from compressm.experiments.methods.small_projected import SmallProjected
from compressm.experiments.methods.small_spread import SmallSpread
from compressm.experiments.methods.subspace import Subspace
from compressm.experiments.methods.taylor import TaylorKept
from compressm.experiments.methods.watched import Watched
from compressm.experiments.registry import Registry

METHODS: Registry[Method] = Registry(
    "runs", Compressed(), CompressedPaper(), CompressedDataFree(), CompressedWhenStable(), CompressedStrict(), Full(),
    Watched(), Small(), SmallNarrow(), SmallSpread(), SmallProjected(), RandomSubset(), Drrqr(), Ghost(), OutputEnergyKept(),
    TaylorKept(), Distilled(), HankelNorm(), ModalL1(), AfterBalanced(), AfterRandom(), AfterMagnitude(), AfterModal(),
    AfterLast(), AfterAire(), AfterDrrqr(), AfterGhost(), AfterOutputEnergyKept(), AfterTaylorKept(),
    Subspace(), CompressedFaster(), CompressedTwice(),
)  # fmt: skip
