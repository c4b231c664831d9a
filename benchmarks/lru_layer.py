"""Forward + backward of an LRU layer on CPU at the paper's shapes, beside peers and the layer's own matrix products.

    python benchmarks/lru_layer.py [--rounds 9] [--out benchmarks/results/lru_layer.json]

Every candidate's output is compared with the float64 reference first; a wrong one is not timed.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from lru_peers import fft_convolution, jax_scan, matrix_products
from timing import interleaved, save, table

from compressm.kernels import lti_scan_planar
from compressm.layers import LRU

SHAPES = {  # name: batch, length, channels, states
    "sMNIST N256": (50, 784, 8, 256),
    "sMNIST N28": (50, 784, 8, 28),
    "sCIFAR N384": (16, 1024, 512, 384),
    "sCIFAR N93": (16, 1024, 512, 93),
}


def reference(layer: LRU, x: torch.Tensor) -> torch.Tensor:
    """The layer's output in float64, by definition."""
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    gamma = p["gamma_log"].exp()[:, None]
    lam = (-p["nu_log"].exp(), p["theta_log"].exp())
    matrices = (gamma * p["B_re"], gamma * p["B_im"], p["C_re"], p["C_im"], p["D"])
    return lti_scan_planar(x.detach().double(), *lam, *matrices, backend="reference")


def gate(name: str, output: torch.Tensor, oracle: torch.Tensor) -> None:
    error = ((output.double() - oracle).norm() / oracle.norm()).item()
    if not error < 1e-4:
        raise SystemExit(f"{name}: relative error {error:.1e} against the float64 reference; not timed")


def gradient_of(forward: Callable[[LRU, torch.Tensor], torch.Tensor], layer: LRU, x: torch.Tensor, w: torch.Tensor):
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(forward(layer, x), inputs, w)


def cases_of(name: str, shape: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    batch, length, channels, states = shape
    layer = LRU(channels, states)
    x = torch.randn(batch, length, channels, requires_grad=True)
    w = torch.randn(batch, length, channels)
    oracle = reference(layer, x)
    gate(f"{name} compressm", layer(x), oracle)
    cases = {
        f"{name} compressm": gradient_of(lambda m, u: m(u), layer, x, w),
        f"{name} matrix products": matrix_products(layer, x),
    }
    if channels <= 8:
        gate(f"{name} FFT", fft_convolution(layer, x), oracle)
        cases[f"{name} FFT convolution"] = gradient_of(fft_convolution, layer, x, w)
    if importlib.util.find_spec("jax"):
        run, output = jax_scan(layer, x, w)
        gate(f"{name} jax", output(), oracle)
        cases[f"{name} jax lax.scan"] = run
    else:
        print(f"{name}: jax lax.scan skipped, jax is not installed")
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lru_layer.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases: dict[str, Callable[[], object]] = {}
    for name, shape in SHAPES.items():
        cases.update(cases_of(name, shape))
    results = interleaved(cases, arguments.rounds)
    print(table(results))
    for group, (full, small) in {"sMNIST": ("N256", "N28"), "sCIFAR": ("N384", "N93")}.items():
        ratio = results[f"{group} {full} compressm"].median / results[f"{group} {small} compressm"].median
        print(f"{group} {full} / {small}: {ratio:.2f}x")
    save(arguments.out, results, {"shapes": SHAPES})


if __name__ == "__main__":
    main()
