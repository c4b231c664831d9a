"""Forward + backward of a Mamba layer's short causal convolution with SiLU on CPU, beside other ways to write it.

    python benchmarks/causal_conv1d.py [--rounds 21] [--out benchmarks/results/causal_conv1d.json]

x is the first half of the columns of a (batch, L, 2D) tensor, as the layer's input projection leaves it.  Every candidate's
output and gradient of x are compared with the float64 reference first; a wrong one is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleaved, save, table
from torch import Tensor
from torch.nn import functional as F

from compressm.kernels import causal_conv1d

BATCH, LENGTH, CHANNELS, WIDTH = 2, 1024, 512, 4
Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu")


def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=CHANNELS)[..., :LENGTH])


def shifted_products(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = F.pad(x.mT, (0, 0, WIDTH - 1, 0))
    return F.silu(sum(weight[:, k] * rows[:, k : k + LENGTH] for k in range(WIDTH)) + bias).mT


def gradients(convolve: Convolution, inputs: list[Tensor], w: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(convolve(*inputs), inputs, w)


def copies(x: Tensor, w: Tensor) -> Callable[[], None]:
    """The memory traffic alone: x read and out written, then x and the gradients read and written once."""
    to = torch.empty_like(w)

    def run() -> None:
        to.copy_(x)
        torch.add(x, w, out=to)

    return run


def gate(name: str, convolve: Convolution, inputs: list[Tensor], w: Tensor) -> None:
    wide = [t.detach().double().requires_grad_() for t in inputs]
    oracle = causal_conv1d(*wide, activation="silu", backend="reference")
    pairs = [(convolve(*inputs), oracle)]
    pairs += zip(gradients(convolve, inputs, w)(), torch.autograd.grad(oracle, wide, w.double()), strict=True)
    for actual, expected in pairs:
        error = ((actual.double() - expected).norm() / expected.norm()).item()
        if not error < 1e-5:
            raise SystemExit(f"{name}: relative error {error:.1e} against the float64 reference; not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "causal_conv1d.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, 2 * CHANNELS)[..., :CHANNELS].mT.requires_grad_()
    w = torch.randn(BATCH, LENGTH, CHANNELS).mT
    inputs = [x, torch.randn(CHANNELS, WIDTH, requires_grad=True), torch.randn(CHANNELS, requires_grad=True)]
    steps_next = [x.detach().contiguous().requires_grad_(), *inputs[1:]]
    candidates = {
        "compressm": (fused, inputs, w),
        "compressm, steps contiguous": (fused, steps_next, w.contiguous()),
        "F.conv1d": (torch_conv1d, inputs, w),
        "shifted products": (shifted_products, inputs, w),
        "shifted products, torch.compile": (torch.compile(shifted_products), inputs, w),
    }
    cases: dict[str, Callable[[], object]] = {"memory traffic": copies(x.detach(), w)}
    for name, candidate in candidates.items():
        gate(name, *candidate)
        cases[name] = gradients(*candidate)
    results = interleaved(cases, arguments.rounds)
    print(table(results))
    save(arguments.out, results, {"shape": {"batch": BATCH, "L": LENGTH, "D": CHANNELS, "width": WIDTH}})


if __name__ == "__main__":
    main()
