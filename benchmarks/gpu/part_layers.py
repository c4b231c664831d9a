"""The part ``layers``: LRU and Mamba layers, forward and forward + backward, as their states shrink."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.layers import LRU, Mamba
from gpu.checks import TOLERANCES
from gpu.session import Part, Session, brief
from gpu.sweep import graphed
from gpu.timing import Timer

SHARE = 0.1  # of the budget


@dataclass(frozen=True)
class Layer:
    """A family of layers that differ in their states.

    Attributes:
        name: for tables.
        make: number of states -> layer.
        shape: (batch, L, H) of the input.
        states: the largest first.
        dtype: of the input; bfloat16 stands for autocast.
    """

    name: str
    make: Callable[[int], nn.Module]
    shape: tuple[int, int, int]
    states: tuple[int, ...]
    dtype: torch.dtype


LAYERS = (
    Layer("LRU, sMNIST B50 L784 H8", lambda n: LRU(8, n), (50, 784, 8), (256, 47, 28, 13), torch.float32),
    Layer("LRU, sCIFAR B50 L1024 H512", lambda n: LRU(512, n), (50, 1024, 512), (384, 161, 93, 57), torch.float32),
    Layer("Mamba B8 L2048 H768", lambda n: Mamba(768, n), (8, 2048, 768), (128, 64, 32, 16, 12), torch.bfloat16),
)
SMOKE = (
    Layer("LRU", lambda n: LRU(2, n), (1, 5, 2), (3, 2), torch.float32),
    Layer("Mamba", lambda n: Mamba(2, n), (1, 5, 2), (3, 2), torch.bfloat16),
)


def run(session: Session) -> Part:
    """Times of every layer that agrees with its float64 self."""
    part = Part(session, "layers", session.pick(SHARE, 1.0))
    timer = Timer(session.device, **session.pick({}, {"fewest": 1, "most": 1}))
    for layer in session.pick(LAYERS, SMOKE):
        if part.has_time(layer.name, session.pick(8.0, 0.0)):
            for row in _rows(layer, session, part, timer):
                part.add("layers", row)
    part.finish()
    return part


def _rows(layer: Layer, session: Session, part: Part, timer: Timer) -> Iterator[dict[str, Any]]:
    calls: dict[tuple[int, str], Callable[[], object]] = {}
    errors: dict[int, float] = {}
    for states in layer.states:
        torch.manual_seed(0)
        module = layer.make(states).to(session.device)
        x = torch.randn(layer.shape, device=session.device, requires_grad=True)
        try:
            errors[states] = _error(module, x, layer.dtype)
            if not errors[states] <= TOLERANCES[layer.dtype]:
                part.fail(f"{layer.name} N{states}", f"relative error {errors[states]:.1e} against float64")
                continue
            for name, call in _calls(module, x, layer.dtype).items():
                calls[states, name] = call
                if session.device == "cuda":
                    calls[states, f"{name}, graph"] = graphed(call, session.device)
        except Exception as error:  # of one size: it is a failure of its own
            part.fail(f"{layer.name} N{states}", brief(error))
    times = timer.interleaved({f"{n}|{name}": call for (n, name), call in calls.items()}, session.pick(4.0, 0.0))
    for (states, name), found in zip(calls, times.values(), strict=True):
        first = times.get(f"{layer.states[0]}|{name}", {}).get("median")
        speed_up = first / found["median"] if first and "median" in found else None
        yield {"layer": layer.name, "states": states, "pass": name, "error": errors[states], "speed_up": speed_up, **found}


def _calls(module: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    leaves = [x, *module.parameters()]
    weight = torch.randn_like(x)

    def forward() -> Tensor:
        with torch.no_grad(), autocast(x, dtype):
            return module(x)

    def both() -> tuple[Tensor, ...]:
        with autocast(x, dtype):
            y = module(x)
        return torch.autograd.grad(y, leaves, weight.to(y.dtype))

    return {"forward": forward, "forward+backward": both}


def autocast(x: Tensor, dtype: torch.dtype) -> Any:
    """Autocast to a half precision, nothing for float32; weights are converted anew at every use, as graphs need it."""
    half = dtype != torch.float32
    return torch.autocast(x.device.type, dtype=dtype, cache_enabled=False) if half else nullcontext()


@torch.no_grad()
def _error(module: nn.Module, x: Tensor, dtype: torch.dtype) -> float:
    """Relative error of the output for the last sequence against the same layer in float64, on the reference."""
    with autocast(x, dtype):
        y = module(x)[-1:].double()
    expected = copy.deepcopy(module).double()(x[-1:].double())
    return ((y - expected).norm() / expected.norm()).item()


def summary(body: dict[str, Any]) -> list[str]:
    """Lines of the last table."""
    lines = []
    for row in body.get("layers", []):
        if row["pass"].startswith("forward+backward") and "median" in row:
            faster = f", {row['speed_up']:.2f}x" if row["speed_up"] else ""
            lines.append(f"{row['layer']} N{row['states']} {row['pass']}: {row['median']:.3f} ms{faster}")
    return lines
