"""Problems of the time-invariant layers beside the LRU: S5, S4D, and a system in a control loop."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from compressm.adapters import stream
from compressm.benchmarking import counts
from compressm.benchmarking.layer_problems import layer_problem
from compressm.benchmarking.op_problems import BOTH
from compressm.benchmarking.problems import Answers, Contender, Op, Problem
from compressm.benchmarking.request import SIZES
from compressm.benchmarking.results import Counts, Pass
from compressm.benchmarking.timing import Timed
from compressm.layers import LRU, S4D, S5

BLOCKS = (8, 4, 2, 1)  # the first that divides the states
LOOP_STEPS = 50
EAGER = "the layer's step, torch"


def s5(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """An S5 layer as it is initialised, in blocks as published, with zero-order hold.

    One block of 384 states has eigenvalues that turn thousands of radians a step, of which float32 keeps three digits.
    """
    batch, length, channels, states = (sizes[name] for name in ("batch", "length", "channels", "states"))
    blocks = next(count for count in BLOCKS if states % count == 0)
    layer = S5(channels, states, block_count=blocks, device=device)
    least = counts.of_op("lti_scan", sizes, dtype.itemsize, passes != "forward")
    return layer_problem(layer, sizes, passes, dtype, least, batch * length * states)


def s4d(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """An S4D layer as it is initialised; its states are complex modes of every channel."""
    batch, length, channels, states = (sizes[name] for name in ("batch", "length", "channels", "states"))
    layer = S4D(channels, 2 * states, transposed=False, device=device)
    backward = passes != "forward"
    least = counts.add(
        counts.linear(batch * length, channels, 2 * channels, backward),
        transforms(batch * channels, length, backward),
        Counts(bytes=dtype.itemsize * batch * length * channels * (5 if backward else 2), flops=0, exponentials=0),
    )
    return layer_problem(layer, sizes, passes, dtype, least, batch * length * channels)


def transforms(sequences: int, length: int, backward: bool) -> Counts:
    """Convolutions by FFT between fused neighbours: real transforms of twice the length, of signals and of their gradients."""
    one = round(2.5 * 2 * length * math.log2(2 * length))
    return Counts(bytes=0, flops=sequences * one * (4 if backward else 2), exponentials=0)


def loop(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """One step of an LRU layer of a control loop, float64: an input in, an output out."""
    channels, states = sizes["channels"], sizes["states"]
    layer = LRU(channels, states, dtype=torch.float64, device=device)
    u = torch.randn(LOOP_STEPS, channels, dtype=torch.float64, device=device)
    with torch.no_grad():
        oracle = {"out": layer(u[None])[0]}
    least = Counts(bytes=0, flops=2 * (2 * states + channels) ** 2, exponentials=0)  # the matrix stays in a core's cache
    problem = Problem("step", dtype, device, {"u": u}, None, oracle, least, dict(sizes), {"layer": layer})

    def ours() -> Contender:
        running, given = stream(layer), u.cpu().numpy()

        def answers() -> Answers:
            running.reset()
            return {"out": torch.from_numpy(np.stack([running.step(now) for now in given]))}

        return Contender(Timed(lambda: running.step(given[0])), answers)

    def eager() -> Contender:
        @torch.inference_mode()
        def walk() -> Answers:
            state, found = layer.initial_state(1), []
            for now in u:
                y, state = layer.step(now[None], state)
                found.append(y[0])
            return {"out": torch.stack(found)}

        first, state = u[:1], layer.initial_state(1)
        return Contender(Timed(torch.inference_mode()(lambda: layer.step(first, state))), walk)

    problem.built_in["compressm"], problem.built_in[EAGER] = ours, eager
    return problem


OPS = {
    "s5": Op("layer", SIZES["s5"], BOTH, s5, "an S5 layer"),
    "s4d": Op("layer", SIZES["s4d"], BOTH, s4d, "an S4D layer, its states complex modes of every channel"),
    "loop": Op("layer", SIZES["loop"], ("step",), loop, "a step of a linear layer in a control loop", "float64"),
}
