"""The least that each computation moves and computes, from its sizes.

Bytes: every input read once and every output written once, by the forward and again by the backward; what lies between
(states, step sizes, projections) costs nothing, as if all were fused.  Operations: those of the recurrence as it is defined,
an addition and a multiplication counted alike, states computed once for both passes.  Exponentials of a selective scan count
in both passes: keeping them would move eight bytes each, which takes longer on any machine of today.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from compressm.benchmarking.results import Counts
from compressm.kernels import OPS
from compressm.kernels.core.op import WORD


def add(*parts: Counts) -> Counts:
    """The sum."""
    return Counts(**{name: sum(getattr(part, name) for part in parts) for name in ("bytes", "flops", "exponentials")})


def scaled(part: Counts, times: int) -> Counts:
    """``times`` of the same."""
    return Counts(bytes=part.bytes * times, flops=part.flops * times, exponentials=part.exponentials * times)


def of_op(name: str, sizes: Mapping[str, int], word: int, backward: bool) -> Counts:
    """Of an op of ``compressm.kernels``, with ``word`` bytes per element of its inputs."""
    return Counts(**asdict(OPS[name].cost(sizes, word, backward)))


def linear(rows: int, inputs: int, outputs: int, backward: bool) -> Counts:
    """A matrix product between fused neighbours: its weight is all that it moves."""
    weight = WORD * inputs * outputs
    times = 3 if backward else 1
    return Counts(bytes=times * weight, flops=times * 2 * rows * inputs * outputs, exponentials=0)


def mamba(batch: int, length: int, d_model: int, states: int, word: int, backward: bool) -> Counts:
    """A Mamba layer: four projections, the convolution of four taps and the scan, d_inner = 2 d_model."""
    rows, inner, rank = batch * length, 2 * d_model, -(-d_model // 16)
    projections = ((d_model, 2 * inner), (inner, rank + 2 * states), (rank, inner), (inner, d_model))
    inside = [linear(rows, a, b, backward) for a, b in projections]
    within = {"batch": batch, "length": length, "channels": inner, "states": states, "width": 4}
    inside += [of_op(op, within, 0, backward) for op in ("causal_conv1d", "selective_scan")]
    edges = Counts(bytes=word * rows * d_model * (5 if backward else 2), flops=0, exponentials=0)
    return add(edges, *inside)


def adamw(parameters: int) -> Counts:
    """One update: value, gradient and two moments read, value and moments written."""
    return Counts(bytes=7 * WORD * parameters, flops=12 * parameters, exponentials=0)
