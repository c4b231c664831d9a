"""A user's model as compression sees it: without wrappers, and with layers that can be compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from compressm.adapters import Adapter, find_layers, supported_layers
from compressm.control import Criterion, RowCriterion
from compressm.errors import ModelError, bad_argument

Layers = Mapping[str, tuple[nn.Module, Adapter]]  # state-space layers with their adapters, by module name

WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "DistributedDataParallel",
    "torch.nn.parallel.data_parallel.DataParallel": "DataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "FullyShardedDataParallel",
    "torch.distributed.fsdp.FSDPModule": "fully_shard",
    "torch.distributed._composable.replicate_with_fsdp.ReplicateModule": "replicate",
    "torch.distributed._composable.replicate.DDP": "replicate",
}


def plain_model(model: Any, *, ddp: bool = False) -> nn.Module:
    """The module behind ``torch.compile``'s wrapper; refuses models wrapped for parallel training.

    Args:
        ddp: look into DistributedDataParallel as well, as for reading and saving.

    Raises:
        ArgumentError: not an nn.Module.
        ModelError: DDP, DataParallel or FSDP.
    """
    if not isinstance(model, nn.Module):
        raise bad_argument("model", got=type(model).__name__, expected="a torch.nn.Module")
    for wrapper, inner in (("OptimizedModule", "_orig_mod"), ("DistributedDataParallel", "module")) * 2:
        if type(model).__name__ == wrapper and (ddp or inner == "_orig_mod"):
            model = getattr(model, inner)
    names = wrapper_names(model)
    if names:
        raise ModelError(
            f"model: got a model wrapped in {', '.join(sorted(names))}, expected a plain one, because replaced parameters "
            "would drop out of its gradient buckets. Compress the plain module first and wrap it afterwards, or give the "
            "wrapped model (DistributedDataParallel or fully_shard) to a Compressor, on every process"
        )
    return model


def wrapper_names(model: nn.Module) -> set[str]:
    """Names of the wrappers for parallel training that a model has, outside or inside."""
    found = set()
    for module in model.modules():
        for cls in type(module).__mro__:
            wrapper = WRAPPERS.get(f"{cls.__module__}.{cls.__qualname__}")
            if wrapper is not None:
                found.add(wrapper)
                break
    if not found and any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        found.add("DTensor (tensor parallelism)")
    return found


def compressible_layers(model: nn.Module) -> dict[str, tuple[nn.Module, Adapter]]:
    """find_layers, but at least one.

    Raises:
        ModelError: none.
    """
    layers = find_layers(model)
    if not layers:
        raise ModelError(
            f"model: {type(model).__name__} has no state-space layer that can be compressed; supported: "
            f"{', '.join(supported_layers())}. Register others with compressm.register_adapter"
        )
    return layers


def judged(layers: Layers, criterion: Criterion | RowCriterion | None, form: str, calibration: Any) -> Layers:
    """The layers with adapters whose states a criterion chooses; as they are without one.

    Args:
        layers: with their adapters.
        criterion: of the kind that they all take.
        form, calibration: as the Compressor was given them.

    Raises:
        ArgumentError: it is none, does not go with a layer, with the form or without data.
    """
    if criterion is None:
        return layers
    if not isinstance(criterion, Criterion | RowCriterion):
        got = f"the class {criterion.__name__}" if isinstance(criterion, type) else repr(criterion)
        expected = "a compressm.control.Criterion or RowCriterion instance, or None"
        raise bad_argument("criterion", got=got, expected=expected)
    if form == "projected":
        got = f"{criterion.name} with form='projected'"
        raise bad_argument("criterion", got=got, expected="form 'strict' or 'auto', as it keeps states as they are")
    if isinstance(criterion, RowCriterion) and criterion.wants_gradients and calibration is None:
        got = f"None with {criterion.name}"
        raise bad_argument("calibration", got=got, expected="batches, as this criterion looks at gradients")
    found = {}
    for name, (module, adapter) in layers.items():
        if adapter.ranked_by is None or not isinstance(criterion, adapter.ranked_by):
            got = f"{criterion.name} for layer {name!r} ({type(module).__name__})"
            kind = "None" if adapter.ranked_by is None else f"None or a compressm.control.{adapter.ranked_by.__name__}"
            raise bad_argument("criterion", got=got, expected=f"{kind} for such layers")
        found[name] = (module, adapter.judged_by(criterion, module, name))
    return found
