"""Exponentials in registers, for the ceiling of a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
CHAINS = 4  # independent sums, so that no exponential waits for the one before


@triton.jit
def _sum_of_exponentials(x_ptr, out_ptr, repeats, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    a = tl.zeros_like(x)
    b = tl.zeros_like(x)
    c = tl.zeros_like(x)
    d = tl.zeros_like(x)
    for _ in range(0, repeats // 4):
        a += tl.exp2(x)
        b += tl.exp2(x - 1.0)
        c += tl.exp2(x - 2.0)
        d += tl.exp2(x - 3.0)
        x -= 0.001
    tl.store(out_ptr + place, a + b + c + d)


def exponentials(x: torch.Tensor, out: torch.Tensor, repeats: int) -> None:
    """out_i = the sum of ``repeats`` powers 2^(x_i - 0, 1, 2, 3 - 0.001 k); x (n,) with n a multiple of BLOCK."""
    assert x.numel() % BLOCK == 0
    assert repeats % CHAINS == 0
    _sum_of_exponentials[(x.numel() // BLOCK,)](x, out, repeats, BLOCK=BLOCK)
