"""Run a model for measurement and leave no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module, layers: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Eval mode with gradients enabled; afterwards everything is as it was.

    Restored: training flags, buffers (values and identity), parameters' ``grad``, random states of torch (CPU and the
    model's devices), numpy and Python, and the plain attributes of ``layers``.  Compiled modules run eagerly meanwhile.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, dict(module._buffers), {k: b.clone() for k, b in module._buffers.items() if b is not None})
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
        if _compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for module, saved in attributes:
                vars(module).clear()
                vars(module).update(saved)
            for module, training in modes:
                module.training = training
            for parameter, grad in grads:
                parameter.grad = grad
            for module, references, values in buffers:
                _restore_buffers(module, references, values)


@torch.no_grad()
def _restore_buffers(module: nn.Module, references: dict, values: dict) -> None:
    module._buffers.clear()
    module._buffers.update(references)
    for key, value in values.items():
        buffer = references[key]
        if buffer.shape != value.shape:
            buffer.resize_(value.shape)
        buffer.copy_(value)


def _compiled(model: nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule" for module in model.modules()
    )
