"""The least that each computation moves and computes, from its sizes.

Bytes: every input read once and every output written once, by the forward and again by the backward; what lies between
(states, step sizes, projections) costs nothing, as if all were fused.  Operations: those of the recurrence as it is defined,
an addition and a multiplication counted alike, states computed once for both passes.  Exponentials of a selective scan count
in both passes: keeping them would move eight bytes each, which takes longer on any machine of today.
"""

from __future__ import annotations

from compressm.benchmarking.results import Counts

WORD = 4  # bytes of a float32, in which parameters and states are kept


def add(*parts: Counts) -> Counts:
    """The sum."""
    return Counts(**{name: sum(getattr(part, name) for part in parts) for name in ("bytes", "flops", "exponentials")})


def scaled(part: Counts, times: int) -> Counts:
    """``times`` of the same."""
    return Counts(bytes=part.bytes * times, flops=part.flops * times, exponentials=part.exponentials * times)


def lti_scan(batch: int, length: int, channels: int, states: int, word: int, backward: bool) -> Counts:
    """As many outputs as inputs, feedthrough included; ``word`` bytes per input."""
    rows, weights = batch * length, 4 * channels * states + 3 * states + channels
    flops = rows * (4 * states * channels * 2 + 8 * states + 2 * channels)
    moved = word * rows * 2 * channels + WORD * weights
    if backward:
        flops += rows * (4 * states * channels * 4 + 16 * states + 4 * channels)
        moved += word * rows * 3 * channels + 2 * WORD * weights
    return Counts(bytes=moved, flops=flops, exponentials=states)


def selective_scan(batch: int, length: int, channels: int, states: int, word: int, backward: bool) -> Counts:
    """With skip, gate and softplus, B and C of one group."""
    wide, shared, parameters = batch * channels * length, batch * states * length, channels * (states + 2)
    cells = wide * states
    flops, exponentials = 6 * cells + 8 * wide, cells + 3 * wide
    moved = word * (4 * wide + 2 * shared) + WORD * parameters
    if backward:
        flops += 18 * cells + 16 * wide
        exponentials *= 2
        moved += word * (7 * wide + 4 * shared) + 2 * WORD * parameters
    return Counts(bytes=moved, flops=flops, exponentials=exponentials)


def causal_conv1d(batch: int, length: int, channels: int, width: int, word: int, backward: bool) -> Counts:
    """With bias and SiLU."""
    wide, parameters = batch * channels * length, channels * (width + 1)
    flops, exponentials, moved = wide * (2 * width + 2), wide, word * 2 * wide + WORD * parameters
    if backward:
        flops, exponentials, moved = 3 * flops, 2 * exponentials, moved + word * 3 * wide + 2 * WORD * parameters
    return Counts(bytes=moved, flops=flops, exponentials=exponentials)


def selective_state_update(batch: int, channels: int, states: int, word: int) -> Counts:
    """One token, the state read and written."""
    wide, cells = batch * channels, batch * channels * states
    moved = WORD * (2 * cells + channels * (states + 2)) + word * (4 * wide + 2 * batch * states)
    return Counts(bytes=moved, flops=6 * cells + 8 * wide, exponentials=cells + 3 * wide)


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
    inside.append(causal_conv1d(batch, length, inner, 4, 0, backward))
    inside.append(selective_scan(batch, length, inner, states, 0, backward))
    edges = Counts(bytes=word * rows * d_model * (5 if backward else 2), flops=0, exponentials=0)
    return add(edges, *inside)


def adamw(parameters: int) -> Counts:
    """One update: value, gradient and two moments read, value and moments written."""
    return Counts(bytes=7 * WORD * parameters, flops=12 * parameters, exponentials=0)
