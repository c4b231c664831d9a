"""The methods that a command can run, by name, in the order in which reports compare them."""

from compressm.experiments.methods.after_balanced import AfterBalanced
from compressm.experiments.methods.after_magnitude import AfterMagnitude
from compressm.experiments.methods.after_modal import AfterModal
from compressm.experiments.methods.base import Method
from compressm.experiments.methods.compressed import Compressed
from compressm.experiments.methods.distilled import Distilled
from compressm.experiments.methods.full import Full
from compressm.experiments.methods.hankel_norm import HankelNorm
from compressm.experiments.methods.random_subset import RandomSubset
from compressm.experiments.methods.small import Small
from compressm.experiments.methods.small_narrow import SmallNarrow
from compressm.experiments.methods.small_projected import SmallProjected
from compressm.experiments.methods.small_spread import SmallSpread
from compressm.experiments.methods.subspace import Subspace
from compressm.experiments.registry import Registry

METHODS: Registry[Method] = Registry(
    "runs", Compressed(), Full(), Small(), SmallNarrow(), SmallSpread(), SmallProjected(), RandomSubset(), Distilled(),
    HankelNorm(), AfterBalanced(), AfterMagnitude(), AfterModal(), Subspace(),
)  # fmt: skip
