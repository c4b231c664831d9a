"""Run a model for measurement and leave no trace; keep what the caller has switched on out of the library's own work."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "privateuseone")
MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # a module made at run time


@contextmanager
def ordinary() -> Iterator[None]:
    """Outside of the caller's inference mode: tensors made meanwhile can be trained.  Gradients are as off as they were."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def exact() -> Iterator[None]:
    """Outside of the caller's autocast, inference mode and coarser float32 products: for our own arithmetic in the hooks of a
    model that runs with them."""
    with ExitStack() as stack:
        stack.enter_context(ordinary())
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        for matmul in MATMULS:
            stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
            matmul.fp32_precision = "ieee"
        yield


@contextmanager
def undisturbed(model: nn.Module, layers: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Eval mode with gradients enabled; afterwards everything is as it was.

    Restored: training flags, buffers (values and identity), parameters' ``grad``, random states of torch (CPU and the
    model's devices), numpy and Python, and the plain attributes of ``layers``.  Compiled code runs eagerly meanwhile, since
    it knows nothing of hooks that came later, and ordinary copies stand in for tensors of the model that were made in
    inference mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, dict(module._buffers), {k: b.clone() for k, b in module._buffers.items() if _restorable(b)})
        for module in model.modules()
        if module._buffers
    ]
    parameters = list(model.parameters())
    grads = [(parameter, parameter.grad) for parameter in parameters]
    attributes = [(module, dict(vars(module))) for module in layers]
    devices = sorted({p.device for p in parameters if p.device.type == "cuda"}, key=str)
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        replaced = _stand_ins(model)
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for slots, key, tensor in replaced:
                slots[key] = tensor
            for module, saved in attributes:
                vars(module).clear()
                vars(module).update(saved)
            for module, training in modes:
                module.training = training
            for parameter, grad in grads:
                parameter.grad = grad
            for module, references, values in buffers:
                _restore_buffers(module, references, values)


def _restorable(buffer: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a measurement can change a buffer in place: for those made in inference mode there are stand-ins."""
    return buffer is not None and not buffer.is_inference()


def _stores(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, vars(module)


def _stand_ins(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Put ordinary copies in the places of tensors made in inference mode, which autograd refuses.

    Returns:
        the places, and what was there.
    """
    places = [
        (slots, key, tensor)
        for module in model.modules()
        for slots in _stores(module)
        for key, tensor in slots.items()
        if isinstance(tensor, Tensor) and tensor.is_inference()
    ]
    copies: dict[int, Tensor] = {}
    for slots, key, tensor in places:
        if id(tensor) not in copies:
            copy = tensor.detach().clone()
            copies[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
        slots[key] = copies[id(tensor)]
    return places


@torch.no_grad()
def _restore_buffers(module: nn.Module, references: dict, values: dict) -> None:
    module._buffers.clear()
    module._buffers.update(references)
    for key, value in values.items():
        buffer = references[key]
        if buffer.shape != value.shape:
            buffer.resize_(value.shape)
        buffer.copy_(value)
