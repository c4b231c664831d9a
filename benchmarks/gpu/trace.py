"""Where the time of a training step goes: kernels by kind, the idle device, and what to fix next."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from compressm.kernels import OPS

KINDS = {
    "our kernels": "|".join([*OPS, "compressm::"]),
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|aten::(mm|addmm|bmm|matmul)",
    "optimizer": r"multi_tensor|fused_adam|foreach|adamw",
    "copies and conversions": r"copy|memcpy|memset|fill|CatArray|aten::(to|_to_copy|cat|clone)",
    "reductions": r"reduce|softmax|norm|nll|sum",
}
REST = "elementwise and other"
ADVICE = {
    "the idle device": "launches are too slow for it: capture the step in a CUDA graph, fuse the small kernels",
    "our kernels": "the kernels themselves: take the sweep's best configuration, then look at their counters",
    "matrix products": "the products: lower precision or larger tiles, they are the model's arithmetic",
    "optimizer": "the optimizer: one fused launch for all parameters",
    "copies and conversions": "copies: find the layout or dtype change that makes them and read the tensor as it lies",
    "reductions": "reductions: fuse norms, losses and the sums of parameter gradients",
    REST: "elementwise work: torch.compile of the block around our ops, or an activation inside the kernel",
}
STEPS, WARM, TOP = 3, 2, 12


def of(step: Callable[[], object], device: str) -> dict[str, Any]:
    """Milliseconds of a step, by kind and for the longest kernels, and a sentence on the largest share that can be saved."""
    cuda = device == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    for _ in range(WARM):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    wall = (time.perf_counter() - started) / STEPS * 1e3
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            step()
        wait()
    kernels = _kernels(recorded, cuda)
    kinds: dict[str, float] = {}
    for name, (milliseconds, _) in kernels.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + milliseconds
    busy = sum(kinds.values())
    if cuda:
        kinds["the idle device"] = max(0.0, wall - busy)
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "wall_ms": wall, "busy_ms": busy, "launches": round(sum(count for _, count in kernels.values())), "kinds": kinds,
        "top": [{"kernel": name[:120], "ms": ms, "calls": count, "kind": kind_of(name)} for name, (ms, count) in top],
        "next": advice(kinds, wall),
    }  # fmt: skip


def _kernels(recorded: Any, cuda: bool) -> dict[str, tuple[float, float]]:
    """name -> (milliseconds, calls) per step; on a CPU operators stand for kernels."""
    found = {}
    for event in recorded.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own > 0 and (not cuda or "CUDA" in str(event.device_type)):
            found[event.key] = (own / 1e3 / STEPS, event.count / STEPS)
    return found


def kind_of(name: str) -> str:
    """Kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def advice(kinds: dict[str, float], wall: float) -> str:
    """The largest kind but the model's own arithmetic, unless that is nearly all."""
    own = ("our kernels", "matrix products")
    others = {kind: ms for kind, ms in kinds.items() if kind not in own}
    worst = max(others, key=others.__getitem__, default=own[0])
    if others.get(worst, 0.0) < 0.1 * wall:
        worst = max(kinds, key=kinds.__getitem__)
    return f"{kinds.get(worst, 0.0):.2f} of {wall:.2f} ms are {worst}; {ADVICE[worst]}"
