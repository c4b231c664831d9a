"""What the device sustains, measured in the run, and the least time that a computation takes by it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gpu.session import Session
from gpu.timing import Timer

BLOCK = 1024


@triton.jit
def _in_registers(out, turns, EXPONENTIALS: tl.constexpr, BLOCK: tl.constexpr):
    """Per lane 4 independent chains of ``turns`` exponentials each, or of multiply-adds."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = offset.to(tl.float32) * 1e-9 - 1.0
    b = a - 0.1
    c = a - 0.2
    d = a - 0.3
    for _ in range(0, turns):
        if EXPONENTIALS:
            a = tl.exp2(a)
            b = tl.exp2(b)
            c = tl.exp2(c)
            d = tl.exp2(d)
        else:
            a = a * a + b
            b = b * b + c
            c = c * c + d
            d = d * d + a
    tl.store(out + offset, a + b + c + d)


def measure(session: Session, timer: Timer) -> dict[str, float]:
    """Ceilings: bytes/s of a copy (read plus written), FLOP/s of matrix products, exponentials/s and instructions/s."""
    device = session.device
    count, size, blocks, turns = session.pick((1 << 28, 8192, 1 << 13, 4096), (1 << 16, 64, 1, 2))
    source, target = (torch.rand(count, device=device) for _ in range(2))
    out = torch.empty(blocks * BLOCK, device=device)
    cases: dict[str, Any] = {
        "copy": lambda: target.copy_(source),
        "exponentials": lambda: _in_registers[(blocks,)](out, turns, EXPONENTIALS=True, BLOCK=BLOCK),
        "instructions": lambda: _in_registers[(blocks,)](out, turns, EXPONENTIALS=False, BLOCK=BLOCK),
    }
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        cases[f"matmul_{name}"] = lambda a=a, b=b: a @ b
    times = timer.interleaved(cases, session.pick(2.0, 0.0))
    work = {"copy": 8 * count, **dict.fromkeys(("exponentials", "instructions"), 4 * turns * blocks * BLOCK)}
    return {name: work.get(name, 2 * size**3) / (t["minimum"] * 1e-3) for name, t in times.items() if "minimum" in t}


def share(counts: dict[str, float], ceilings: dict[str, float], milliseconds: float) -> dict[str, Any]:
    """The least time in ms for ``counts`` (by the ceilings' names), what sets it, and its share of the time measured."""
    least = {name: count / ceilings[name] * 1e3 for name, count in counts.items() if count and name in ceilings}
    if not least:
        return {}
    binding = max(least, key=least.__getitem__)
    return {"limit_ms": least[binding], "limit_by": binding, "share_of_limit": least[binding] / milliseconds}
