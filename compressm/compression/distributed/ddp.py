"""DistributedDataParallel: its options read back, and a new wrapper built with them.

Private attributes that are read (torch 2.10 to 2.13): ``_comm_hooks``, ``_delay_all_reduce_params``, ``bucket_bytes_cap`` and
its companions; the constructor of the new wrapper is public.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from compressm.errors import ModelError

MIB = 1 << 20
CALL = "model = compressor.rewrap()"


def check_rewrappable(ddp: DistributedDataParallel) -> None:
    """Refuse wrappers that cannot be built again from what they remember.

    Raises:
        ModelError: names the option.
    """
    hooks = getattr(ddp, "_comm_hooks", ())
    own_hooks = any((ddp._forward_hooks, ddp._forward_pre_hooks, ddp._backward_hooks, ddp._backward_pre_hooks))
    mesh = getattr(ddp, "device_mesh", None)
    kept = {
        "a communication hook with state of its own": any(
            not (state is None or isinstance(state, dist.ProcessGroup)) for _, state in hooks
        ),
        "delay_all_reduce_named_params": bool(getattr(ddp, "_delay_all_reduce_params", ())),
        "mixed_precision": getattr(ddp, "mixed_precision", None) is not None,
        "a device_mesh cut out of a larger one": mesh is not None and mesh.size() != dist.get_world_size(),
        "hooks on the wrapper itself": own_hooks,
        "compile() on the wrapper itself": ddp._compiled_call_impl is not None,
        "a buffer hook": hasattr(ddp, "buffer_hook"),
        "optimizers that run in the backward pass": any(hasattr(p, "_in_backward_optimizers") for p in ddp.parameters()),
    }
    lost = [name for name, there in kept.items() if there]
    if lost:
        raise ModelError(
            f"model: DistributedDataParallel with {', '.join(lost)}, which would be lost when it is wrapped again after a "
            "reduction, expected options that can be read back. Hook and compile the module inside, or do without"
        )


def options(ddp: DistributedDataParallel) -> dict[str, Any]:
    """Constructor arguments that build a wrapper like this one around the same module.

    ``init_sync`` is off: everything but the new parameters is in step already, and those have just been compared.
    """
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    several = [size / MIB for size in getattr(ddp, "bucket_bytes_cap_list", ())]
    sync = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    found = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "init_sync": False,
        "process_group": ddp.process_group,
        "bucket_cap_mb": None if ddp.bucket_bytes_cap_default else ddp.bucket_bytes_cap / MIB,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
        "skip_all_reduce_unused_params": getattr(ddp, "skip_all_reduce_unused_params", False),
        sync: ddp.broadcast_buffers,
    }
    if several:
        found |= {"bucket_cap_mb_list": several, "bucket_cap_mb": None}
    if getattr(ddp, "batched_grad_copy", False):
        found["batched_grad_copy"] = True
    return found


def rewrapped(ddp: DistributedDataParallel) -> DistributedDataParallel:
    """A new wrapper around the same module, with the same options and communication hooks."""
    result = DistributedDataParallel(ddp.module, **options(ddp))
    for hook, state in ddp._comm_hooks:
        result.register_comm_hook(state, hook)
    result.training = ddp.training
    return result


def retire(ddp: DistributedDataParallel) -> RemovableHandle:
    """Make the wrapper raise at its next forward pass: its gradient buckets hold replaced parameters.

    Returns:
        a handle whose ``remove()`` takes that back.
    """

    def refuse(module: nn.Module, args: Any) -> None:
        raise ModelError(
            "model: this DistributedDataParallel wrapper still synchronises parameters that a reduction has replaced, expected "
            f"the one that compressor.rewrap() returns. Call {CALL} after every compressor.step()"
        )

    return ddp.register_forward_pre_hook(refuse)
