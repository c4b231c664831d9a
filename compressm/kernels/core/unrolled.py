"""Scans as a user would hand them to torch.compile: some steps unrolled and compiled, called once a chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

UNROLL = 8
RECOMPILES = 64  # a chunk is compiled per shape, with and without gradients


def compiled_chunk(function: Callable) -> Callable:
    """``function`` of a chunk's tensors, compiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
    return torch.compile(function, fullgraph=True, dynamic=False)


def first_state(like: Tensor, *shape: int) -> Tensor:
    """Zeros, a tensor of their own, with gradients where later states have them: one compilation serves all chunks."""
    return like.new_zeros(shape).requires_grad_(like.requires_grad)
