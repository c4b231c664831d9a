"""Reference of the gates: the definition in plain torch, any real dtype, any device.

With a seed the masks are those of the C++ kernels, from the same generator in torch's integers; without one torch's own
dropout draws them.  Autograd differentiates it as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_BLOCK = 64
_WORD, _HALF = 2**32 - 1, 2**16 - 1
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)


def gelu_dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dropout(gelu(x)); seed () int64."""
    return _dropout(F.gelu(x), seed, p)


def glu_dropout_add(pre: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """residual + dropout(a sigmoid(b)), pre = [a | b]; seed () int64."""
    return residual + _dropout(F.glu(pre, -1), seed, p)


def linear_glu_dropout_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor | None, p: float
) -> Tensor:
    """residual + dropout(a sigmoid(b)), x weight^T + bias = [a | b]; seed () int64."""
    work = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(work)
    return glu_dropout_add(F.linear(x.to(work), weight.to(work), bias), residual, seed, p)


def keep_mask(seed: Tensor, p: float, count: int) -> Tensor:
    """Which of the elements 0 to count - 1 are kept, (count,) bool; the order of the bits is told in ``gates.h``."""
    blocks = -(-count // MASK_BLOCK)
    lanes = MASK_BLOCK // 4
    x, y = threefry(seed, torch.arange(blocks * lanes, device=seed.device))
    halves = torch.stack([x & _HALF, x >> 16, y & _HALF, y >> 16]).view(4, blocks, lanes)
    return halves.transpose(0, 1).reshape(-1)[:count] >= round(p * 2**16)


def threefry(key: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """The two words of Threefry-2x32 with 13 rounds (Salmon et al., SC 2011), int64 tensors of 32-bit values.

    Args:
        key: () int64, its low word first.
        counter: int64 of any shape, likewise.
    """
    low, high = key & _WORD, (key >> 32) & _WORD
    keys = (low, high, 0x1BD11BDA ^ low ^ high)
    x, y = (counter + low) & _WORD, ((counter >> 32) + high) & _WORD
    for step in range(13):
        turn = _ROTATIONS[step % 8]
        x = (x + y) & _WORD
        y = ((y << turn) & _WORD | y >> (32 - turn)) ^ x
        if step % 4 == 3:
            given = step // 4 + 1
            x, y = (x + keys[given % 3]) & _WORD, (y + keys[(given + 1) % 3] + given) & _WORD
    return x, y


def _dropout(y: Tensor, seed: Tensor | None, p: float) -> Tensor:
    if seed is None:
        return F.dropout(y, p)
    kept = keep_mask(seed, p, y.numel()).view(y.shape)
    return torch.where(kept, y / (1 - p) if p < 1 else y, 0)
