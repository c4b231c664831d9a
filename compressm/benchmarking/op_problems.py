"""Problems of the single ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from compressm import kernels
from compressm.benchmarking import compiled, counts
from compressm.benchmarking.problems import Answers, Contender, Op, Problem, in_slabs, leaves, slabs_for
from compressm.benchmarking.results import Pass
from compressm.benchmarking.timing import Timed

REFERENCE = "reference loop"
COMPILED = "torch.compile"
CONV1D = "F.conv1d"


def _ring(states: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """log_decay and phase (N,) of an LRU's initial eigenvalues, 0.9 <= |lam| <= 0.999."""
    squared = torch.rand(states, device=device) * (0.999**2 - 0.9**2) + 0.9**2
    return 0.5 * squared.log(), 2 * math.pi * torch.rand(states, device=device)


def lti_scan(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """y = Re(C h) + D u, h = lam h + B u, by planar operands."""
    batch, length, channels, states = (sizes[name] for name in ("batch", "length", "channels", "states"))
    log_decay, phase = _ring(states, device)
    gamma = torch.sqrt(-torch.expm1(2 * log_decay))[:, None]
    normal = functools.partial(torch.randn, device=device)
    inputs = leaves(
        {
            "u": normal(batch, length, channels).to(dtype),
            "log_decay": log_decay,
            "phase": phase,
            "B_re": gamma * normal(states, channels) / math.sqrt(2 * channels),
            "B_im": gamma * normal(states, channels) / math.sqrt(2 * channels),
            "C_re": normal(channels, states) / math.sqrt(states),
            "C_im": normal(channels, states) / math.sqrt(states),
            "D": normal(channels),
        },
        passes,
    )
    weight = normal(batch, length, channels).to(dtype) if passes != "forward" else None

    def call(p: dict[str, Tensor], backend: str | None = None) -> Tensor:
        return kernels.lti_scan_planar(**p, backend=backend)

    reference = functools.partial(call, backend="reference")
    slabs = slabs_for(batch * length * states, batch, device)
    oracle = in_slabs(reference, inputs, weight, {"u": 0}, 0, slabs)
    problem = Problem(
        passes, dtype, device, inputs, weight, oracle,
        counts.lti_scan(batch, length, channels, states, dtype.itemsize, weight is not None), dict(sizes),
    )  # fmt: skip
    problem.built_in.update(
        {
            "compressm": lambda: problem.contender(call),
            REFERENCE: lambda: problem.contender(reference),
            COMPILED: lambda: problem.contender(compiled.lti_scan()),
        }
    )
    return problem


def selective_scan(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """Mamba's scan with skip, gate and softplus, step sizes of 1e-3 to 1e-1 as a layer begins with.

    On a CPU the wide tensors lie in memory as (batch, L, D), on a GPU as (batch, D, L): as a Mamba layer hands them over.
    """
    batch, length, channels, states = (sizes[name] for name in ("batch", "length", "channels", "states"))
    normal = functools.partial(torch.randn, device=device)

    def wide() -> Tensor:
        if device.type == "cpu":
            return normal(batch, length, channels).to(dtype).transpose(1, 2)
        return normal(batch, channels, length).to(dtype)

    step = torch.exp(torch.empty(channels, device=device).uniform_(math.log(1e-3), math.log(1e-1)))
    inputs = leaves(
        {
            "u": wide(),
            "delta": 0.3 * wide(),
            "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
            "B": normal(batch, 1, states, length).to(dtype),
            "C": normal(batch, 1, states, length).to(dtype),
            "D": normal(channels),
            "z": wide(),
            "delta_bias": step.expm1().log(),
        },
        passes,
    )
    weight = wide() if passes != "forward" else None

    def call(p: dict[str, Tensor], backend: str | None = None) -> Tensor:
        return kernels.selective_scan(**p, delta_softplus=True, backend=backend)

    reference = functools.partial(call, backend="reference")
    axes = {"u": 1, "delta": 1, "A": 0, "D": 0, "z": 1, "delta_bias": 0}
    slabs = slabs_for(batch * length * channels * states, channels, device)
    oracle = in_slabs(reference, inputs, weight, axes, 1, slabs)
    problem = Problem(
        passes, dtype, device, inputs, weight, oracle,
        counts.selective_scan(batch, length, channels, states, dtype.itemsize, weight is not None), dict(sizes),
    )  # fmt: skip
    problem.built_in.update(
        {
            "compressm": lambda: problem.contender(call),
            REFERENCE: lambda: problem.contender(reference),
            COMPILED: lambda: problem.contender(compiled.selective_scan()),
        }
    )
    return problem


def causal_conv1d(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """A Mamba layer's short convolution with SiLU, on half the columns of its input projection."""
    batch, length, channels, width = (sizes[name] for name in ("batch", "length", "channels", "width"))
    normal = functools.partial(torch.randn, device=device)

    def wide(columns: int) -> Tensor:
        if device.type == "cpu":
            return normal(batch, length, columns).to(dtype)[..., :channels].mT
        return normal(batch, columns, length).to(dtype)[:, :channels]

    inputs = leaves({"x": wide(2 * channels), "weight": normal(channels, width), "bias": normal(channels)}, passes)
    weight = wide(channels) if passes != "forward" else None

    def call(p: dict[str, Tensor], backend: str | None = None) -> Tensor:
        return kernels.causal_conv1d(p["x"], p["weight"], p["bias"], activation="silu", backend=backend)

    def shifted(p: dict[str, Tensor]) -> Tensor:
        rows = torch.nn.functional.pad(p["x"].mT, (0, 0, width - 1, 0))
        taps = sum(p["weight"][:, k].to(rows.dtype) * rows[:, k : k + length] for k in range(width))
        return torch.nn.functional.silu(taps + p["bias"].to(rows.dtype)).mT

    def conv1d(p: dict[str, Tensor]) -> Tensor:
        w, bias = p["weight"].to(dtype)[:, None], p["bias"].to(dtype)
        out = torch.nn.functional.conv1d(p["x"], w, bias, padding=width - 1, groups=channels)
        return torch.nn.functional.silu(out[..., :length])

    reference = functools.partial(call, backend="reference")
    oracle = in_slabs(reference, inputs, weight, {"x": 1, "weight": 0, "bias": 0}, 1, 1)
    problem = Problem(
        passes, dtype, device, inputs, weight, oracle,
        counts.causal_conv1d(batch, length, channels, width, dtype.itemsize, weight is not None), dict(sizes),
    )  # fmt: skip
    problem.built_in.update(
        {
            "compressm": lambda: problem.contender(call),
            CONV1D: lambda: problem.contender(conv1d),
            COMPILED: lambda: problem.contender(torch.compile(shifted, dynamic=False)),
        }
    )
    return problem


def selective_state_update(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """One decoded token; the state is advanced in place, so every answer starts from the same copy of it."""
    batch, channels, states = (sizes[name] for name in ("batch", "channels", "states"))
    normal = functools.partial(torch.randn, device=device)
    inputs = {
        "state": normal(batch, channels, states),
        "x": normal(batch, channels).to(dtype),
        "dt": normal(batch, channels).to(dtype),
        "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
        "B": normal(batch, states).to(dtype),
        "C": normal(batch, states).to(dtype),
        "D": normal(channels),
        "z": normal(batch, channels).to(dtype),
        "dt_bias": normal(channels) - 4.0,
    }

    def call(p: dict[str, Tensor], backend: str | None = None) -> Tensor:
        return kernels.selective_state_update(**p, dt_softplus=True, backend=backend)

    reference = functools.partial(call, backend="reference")
    wide = {name: t.double() for name, t in inputs.items()}
    oracle = {"out": reference(wide), "state": wide["state"]}
    problem = Problem(
        passes, dtype, device, inputs, None, oracle,
        counts.selective_state_update(batch, channels, states, dtype.itemsize), dict(sizes),
    )  # fmt: skip
    problem.built_in.update(
        {
            "compressm": lambda: in_place(problem, call),
            REFERENCE: lambda: in_place(problem, reference),
            COMPILED: lambda: in_place(problem, torch.compile(reference, dynamic=False)),
        }
    )
    return problem


def in_place(problem: Problem, function) -> Contender:
    """A contender that advances the input ``"state"`` and returns the output."""
    own = {**problem.inputs, "state": problem.inputs["state"].clone()}

    @torch.no_grad()
    def run() -> Tensor:
        return function(own)

    def answers() -> Answers:
        own["state"].copy_(problem.inputs["state"])
        return {"out": run(), "state": own["state"].clone()}

    return Contender(Timed(run), answers)


BOTH: tuple[Pass, ...] = ("forward", "forward+backward")
OPS = {
    "lti_scan": Op(
        "op", {"batch": 16, "length": 1024, "channels": 512, "states": 384}, BOTH, lti_scan,
        "the scan of an LRU, S5 or S4D layer with its projections in and out",
    ),
    "selective_scan": Op(
        "op", {"batch": 2, "channels": 512, "length": 1024, "states": 128}, BOTH, selective_scan,
        "Mamba's scan with gate and softplus",
    ),
    "causal_conv1d": Op(
        "op", {"batch": 2, "channels": 512, "length": 1024, "width": 4}, BOTH, causal_conv1d,
        "Mamba's short convolution with SiLU",
    ),
    "selective_state_update": Op(
        "op", {"batch": 16, "channels": 512, "states": 128}, ("forward",), selective_state_update,
        "one decoded token of Mamba",
    ),
}  # fmt: skip
