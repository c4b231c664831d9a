"""A trained layer in a control loop."""

from __future__ import annotations

import torch
from torch import nn

from compressm.adapters.diagonal import DiagonalAdapter
from compressm.adapters.parameters import own_parameter, wide
from compressm.adapters.registry import find_layers
from compressm.control.streaming import Stream
from compressm.errors import ModelError


def stream(layer: nn.Module) -> Stream:
    """An LRU or S5 layer, as it is now, for one input at a time; its ``step`` in float64, without torch.

    Args:
        layer: ours, or s5-pytorch's.

    Raises:
        ModelError: no layer of that kind: one that is not linear, that looks ahead, or a model of several.
    """
    adapter = find_layers(layer).get("", (None, None))[1]
    if not isinstance(adapter, DiagonalAdapter) or adapter.bidirectional(layer) or adapter.read(layer).batch_shape:
        expected = "an LRU or S5 layer of one direction. Other layers have a step of their own"
        raise ModelError(f"layer: got {type(layer).__name__}, expected {expected}")
    return Stream(adapter.read(layer), torch.diag(wide(own_parameter(layer, f"{adapter.prefix}D"))))
