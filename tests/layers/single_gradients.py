"""Gradients of a layer in one op, asked for one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def check_single_gradients(
    layer: nn.Module, x: Tensor, everything: Mapping[str, Tensor], one_op: Callable[[Tensor], bool]
) -> None:
    """Each alone has the same bits as in ``everything``, gradients by name under weights from -1 to 2."""
    leaves = {"x": x, **dict(layer.named_parameters())}
    for name, leaf in leaves.items():
        for other in leaves.values():
            other.requires_grad_(other is leaf)
        y = layer(x)
        assert one_op(y)
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
        assert {key for key, t in leaves.items() if t.grad is not None} == {name}
        assert torch.equal(leaf.grad, everything[name])
        leaf.grad = None
