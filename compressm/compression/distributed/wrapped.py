"""Finding the processes that train a model together, by its wrapper."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compressm.compression.common.models import plain_model, wrapper_names
from compressm.compression.distributed.ddp import check_rewrappable
from compressm.compression.distributed.team import ReplicatedTeam, Team
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
        from compressm.compression.distributed.fsdp import ShardedTeam

        return ShardedTeam(model.get_submodule("_orig_mod") if type(model).__name__ == "OptimizedModule" else model)
    return Team(plain_model(model))
