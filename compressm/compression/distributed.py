"""Training on several processes with torch.distributed: DistributedDataParallel and FSDP2 (``fully_shard``).

The ranks of all layers are decided once.  Every process measures its own calibration batches; the measurements are added up
over the process group; every process then computes the same plan, takes the numbers of rank 0 where machines may round
differently (ranks, spectra, new parameters, optimizer state, averages), and compares hashes with the others: of the
parameters before, of the plan, and of what came out.  A difference or a failure anywhere raises everywhere, and nothing has
changed.

DistributedDataParallel cannot follow a change of its parameters: after every :meth:`Compressor.step` say

    model = compressor.rewrap()

which returns the same wrapper if nothing was reduced, and else a new one with the same options; the old one raises when it is
called.  A model under ``fully_shard`` is reduced in place, one layer gathered at a time, and needs nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compressm.compression._ddp import check_rewrappable
from compressm.compression._team import ReplicatedTeam, Team
from compressm.compression.planning import plain_model, wrapper_names
from compressm.errors import ModelError, OptimizerError

FULLY_SHARD = "fully_shard"


def team_of(model: Any, optimizers: Any = ()) -> Team:
    """The processes that train a model together, found by its wrapper.

    Args:
        model: a plain module, a ``DistributedDataParallel``, or a module some of whose modules went through
            ``fully_shard``; ``torch.compile`` may be inside of DistributedDataParallel.
        optimizers: those that train it.

    Raises:
        ArgumentError: not an nn.Module.
        ModelError: another wrapper, or one with options that a reduction would lose.
        OptimizerError: an optimizer that splits its state itself.
    """
    team = _team(model)
    for optimizer in optimizers:
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise OptimizerError(
                "optimizer: ZeroRedundancyOptimizer keeps each parameter's state on one process only, expected an ordinary "
                "optimizer. Shard the model with fully_shard, whose optimizer state is followed"
            )
    return team


def _team(model: Any) -> Team:
    if isinstance(model, DistributedDataParallel):
        check_rewrappable(model)
        return ReplicatedTeam(model, plain_model(model.module))
    if type(model).__name__ == "OptimizedModule" and isinstance(model._orig_mod, DistributedDataParallel):
        raise ModelError(
            "model: got a compiled DistributedDataParallel, expected DistributedDataParallel(torch.compile(module)): the "
            "wrapper is replaced at every reduction, the compiled module is not"
        )
    if isinstance(model, nn.Module) and wrapper_names(model) == {FULLY_SHARD}:
        from compressm.compression._fsdp import ShardedTeam

        return ShardedTeam(model.get_submodule("_orig_mod") if type(model).__name__ == "OptimizedModule" else model)
    return Team(plain_model(model))
