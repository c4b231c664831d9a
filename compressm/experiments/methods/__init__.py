"""The methods that a command can run, by name, in the order in which reports compare them."""

from compressm.experiments.methods.base import Method
from compressm.experiments.methods.compressed import Compressed
from compressm.experiments.methods.full import Full
from compressm.experiments.methods.small import Small
from compressm.experiments.methods.small_narrow import SmallNarrow
from compressm.experiments.methods.small_projected import SmallProjected
from compressm.experiments.registry import Registry

METHODS: Registry[Method] = Registry("runs", Compressed(), Full(), Small(), SmallNarrow(), SmallProjected())
