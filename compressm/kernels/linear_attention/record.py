"""The record of linear attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.op import Cost, Function, Measured, Op, Sample, compiled
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.linear_attention import chunked
from compressm.kernels.linear_attention.form import steps_of
from compressm.kernels.linear_attention.op import default_scale, linear_attention, plan_for_shapes


def draw(
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    bounds: Sequence[int] | None = None,
    decay: str = "channel",
    states: bool = False,
) -> Sample:
    """Log decays as a layer of gated linear attention begins with.

    Args:
        bounds: cu_seqlens of packed sequences.
        decay: "channel", "scalar" (of a head and step), "fixed" (of a head) or "none".
        states: with initial and final states.
    """
    batch, length, shared, heads = (sizes[name] for name in ("batch", "length", "key_heads", "heads"))
    keys, values = sizes["keys"], sizes["values"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    tensors = {
        "q": normal(batch, length, shared, keys).to(dtype),
        "k": normal(batch, length, shared, keys).to(dtype),
        "v": normal(batch, length, heads, values).to(dtype),
    }
    steps = (batch, length, heads)
    shapes = {"channel": (*steps, keys), "scalar": steps, "fixed": (heads,)}
    if decay in shapes:
        tensors["g"] = torch.nn.functional.logsigmoid(normal(*shapes[decay])).div_(16.0).to(dtype)
    options: dict[str, Any] = {"output_final_state": states}
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, device=device, dtype=torch.int32)
    if states:
        sequences = batch if bounds is None else len(bounds) - 1
        tensors["initial_state"] = normal(sequences, heads, keys, values)
    of_states = ("initial_state", "final_state")
    stepwise = ("g",) if decay in ("channel", "scalar") else ()
    along = {}
    if bounds is None:
        along["batch"] = dict.fromkeys(("q", "k", "v", *stepwise, "out", *of_states), 0)
    if shared == 1 and decay != "fixed":
        along["heads"] = dict.fromkeys(("v", *stepwise, "out"), 2) | dict.fromkeys(of_states, 1)
    return Sample(tensors, options, along)


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """With a decay a channel."""
    batch, length, heads, keys = (sizes[name] for name in ("batch", "length", "heads", "keys"))
    steps = batch * length * heads
    wide, decays, cells = steps * sizes["values"], steps * keys, steps * keys * sizes["values"]
    shared = batch * length * sizes["key_heads"] * keys
    flops, exponentials = 5 * cells + shared, decays
    moved = word * (2 * wide + 2 * shared + decays)
    if backward:
        flops += 13 * cells + shared
        exponentials *= 2
        moved += word * (3 * wide + 4 * shared + 2 * decays)
    return Cost(moved, flops, exponentials)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
    """Without a shape of g there is no decay."""
    q, v = shapes["q"], shapes["v"]
    if q[:2] != v[:2] or q[2] == 0 or v[2] % q[2]:
        expected = "q (batch, L, H, K) and v (batch, L, HV, V), H dividing HV"
        raise bad_argument("shapes", got=dict(shapes), expected=expected)
    return plan_for_shapes(device, dtype, q, v, len(shapes.get("g", ())) == 4, backend)


def in_chunks(sizes: Mapping[str, int], dtype: torch.dtype) -> Function:
    """With a decay a channel, in torch's own products."""
    chunk = steps_of("chunked", sizes["keys"], sizes["values"], sizes["length"])
    scale = default_scale(sizes["keys"])

    def call(p: dict[str, Tensor]) -> Tensor:
        return chunked.linear_attention(p["q"], p["k"], p["v"], p["g"], None, None, scale, chunk)[0]

    return call


def measured(gpu: bool) -> tuple[Measured, ...]:
    large, small = {"batch": 8, "length": 2048}, {"batch": 2, "length": 1024}
    base = {**(large if gpu else small), "key_heads": 4, "heads": 4, "values": 128}
    return (Measured(tuple({**base, "keys": n} for n in (64, 16))),)


OPS = (
    Op(
        name="linear_attention",
        title="Linear attention",
        about="linear attention with a decay for every key channel",
        function=linear_attention,
        sizes={"batch": 2, "length": 1024, "key_heads": 4, "heads": 4, "keys": 64, "values": 128},
        small=tuple(
            {"batch": b, "length": n, "key_heads": h, "heads": v, "keys": s, "values": p}
            for b, n, h, v, s, p in ((2, 33, 2, 4, 5, 7), (1, 1, 3, 3, 13, 16), (3, 65, 1, 2, 1, 5), (1, 40, 1, 1, 100, 17))
        ),
        draw=draw,
        cost=cost,
        plan=plan,
        shapes={"q": "(batch, L, H, K)", "v": "(batch, L, HV, V)"},
        returns=("out", "final_state"),
        rivals={"torch in chunks": in_chunks},
        compiled=compiled(in_chunks),
        measured=measured,
        gpu="compressm.kernels.linear_attention.gpu",
    ),
)
