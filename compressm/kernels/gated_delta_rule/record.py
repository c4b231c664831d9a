"""The record of the gated delta rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.op import Cost, Function, Measured, Op, Sample, compiled
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.gated_delta_rule import chunked
from compressm.kernels.gated_delta_rule.form import chunk_length
from compressm.kernels.gated_delta_rule.op import gated_delta_rule, plan_for_shapes


def draw(
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    bounds: Sequence[int] | None = None,
    channelwise: bool = False,
    states: bool = False,
) -> Sample:
    """Keys and queries of any length, brought to length one by the op, gains in (0, 1) and decays as a layer begins with.

    Args:
        bounds: cu_seqlens of packed sequences.
        channelwise: each channel of the keys has its decay.
        states: with initial and final states.
    """
    batch, length, shared, heads = (sizes[name] for name in ("batch", "length", "groups", "heads"))
    keys, values = sizes["states"], sizes["channels"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    decays = (batch, length, heads, keys) if channelwise else (batch, length, heads)
    tensors = {
        "q": normal(batch, length, shared, keys).to(dtype),
        "k": normal(batch, length, shared, keys).to(dtype),
        "v": normal(batch, length, heads, values).to(dtype),
        "g": -normal(*decays).sub_(3.0).exp_().to(dtype),
        "beta": normal(batch, length, heads).sigmoid_().to(dtype),
    }
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "output_final_state": states}
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, device=device, dtype=torch.int32)
    if states:
        sequences = batch if bounds is None else len(bounds) - 1
        tensors["initial_state"] = normal(sequences, heads, keys, values)
    of_states = ("initial_state", "final_state")
    along = {}
    if bounds is None:
        along["batch"] = dict.fromkeys(("q", "k", "v", "g", "beta", "o", *of_states), 0)
    if shared == 1:
        along["heads"] = dict.fromkeys(("v", "g", "beta", "o"), 2) | dict.fromkeys(of_states, 1)
    return Sample(tensors, options, along)


def cost(sizes: Mapping[str, int], word: int, backward: bool) -> Cost:
    """With a decay a head, and keys and queries brought to length one."""
    batch, length, heads, keys = (sizes[name] for name in ("batch", "length", "heads", "states"))
    steps = batch * length * heads
    wide, cells = steps * sizes["channels"], steps * sizes["channels"] * keys
    shared = batch * length * sizes["groups"] * keys
    flops, exponentials = 7 * cells + 2 * wide + 6 * shared, steps
    moved = word * (2 * wide + 2 * shared + 2 * steps)
    if backward:
        flops += 18 * cells + 4 * wide + 12 * shared
        exponentials *= 2
        moved += word * (3 * wide + 4 * shared + 4 * steps)
    return Cost(moved, flops, exponentials)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, backend: str | None) -> KernelPlan:
    (batch, length, shared, keys), (rows, steps, heads, values) = shapes["k"], shapes["v"]
    if (batch, length) != (rows, steps) or shared == 0 or heads % shared:
        expected = "k (batch, L, H, K) and v (batch, L, HV, V), H dividing HV"
        raise bad_argument("shapes", got=dict(shapes), expected=expected)
    return plan_for_shapes(device, dtype, keys, length, values, backend)


def in_chunks(sizes: Mapping[str, int], dtype: torch.dtype) -> Function:
    """In torch's own products."""
    chunk = chunk_length(sizes["states"], sizes["channels"], sizes["length"])

    def call(p: dict[str, Tensor]) -> Tensor:
        return chunked.gated_delta_rule(p["q"], p["k"], p["v"], p["g"], p["beta"], None, None, None, True, chunk)[0]

    return call


def measured(gpu: bool) -> tuple[Measured, ...]:
    large = {"batch": 8, "length": 2048, "groups": 16, "heads": 32}
    small = {"batch": 2, "length": 1024, "groups": 4, "heads": 4}
    base = {**(large if gpu else small), "channels": 128}
    return (Measured(tuple({**base, "states": n} for n in (128, 32))),)


OPS = (
    Op(
        name="gated_delta_rule",
        title="Gated delta rule",
        about="the gated delta rule of Gated DeltaNet, with keys of length one",
        function=gated_delta_rule,
        sizes={"batch": 2, "length": 1024, "groups": 4, "heads": 4, "states": 128, "channels": 128},
        small=tuple(
            {"batch": b, "length": n, "groups": h, "heads": v, "states": s, "channels": p}
            for b, n, h, v, s, p in ((2, 33, 2, 4, 5, 7), (1, 1, 3, 3, 13, 16), (3, 65, 1, 2, 1, 5), (1, 40, 1, 1, 100, 17))
        ),
        draw=draw,
        cost=cost,
        plan=plan,
        shapes={"k": "(batch, L, H, K)", "v": "(batch, L, HV, V)"},
        returns=("o", "final_state"),
        rivals={"torch in chunks": in_chunks},
        compiled=compiled(in_chunks),
        measured=measured,
        gpu="compressm.kernels.gated_delta_rule.gpu",
    ),
)
