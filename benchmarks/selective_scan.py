"""Selective scan on CPU at N = 128 and N = 12, forward and forward + backward, beside what users run today.

    python benchmarks/selective_scan.py [--rounds 9] [--no-loop] [--out benchmarks/results/selective_scan.json]

Every candidate's output is compared with the float64 reference first; a wrong one is not timed.  Both layouts are timed:
"BDL" is a contiguous (batch, D, L) tensor, "BLD" the transpose of a contiguous (batch, L, D) one.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import interleaved, save, table
from torch import Tensor
from torch.nn.functional import silu, softplus

from compressm.kernels import selective_scan

SHAPES = {"N128": (2, 512, 1024, 128), "N12": (2, 512, 1024, 12)}  # batch, channels, length, states
UNROLL = 8


def inputs_of(shape: tuple[int, int, int, int], channels_last: bool) -> dict[str, Tensor]:
    """Arguments of selective_scan by name, steps of 1e-3 to 1e-1 as a Mamba layer begins with."""
    batch, channels, length, states = shape

    def wide() -> Tensor:
        return torch.randn(batch, length, channels).transpose(1, 2) if channels_last else torch.randn(batch, channels, length)

    step = torch.exp(torch.empty(channels).uniform_(-6.9, -2.3))
    inputs = {
        "u": wide(),
        "delta": 0.3 * wide(),
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(batch, 1, states, length),
        "C": torch.randn(batch, 1, states, length),
        "D": torch.randn(channels),
        "z": wide(),
        "delta_bias": step.expm1().log(),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def ours(backend: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda p: selective_scan(**p, delta_softplus=True, backend=backend)


def steps(h: Tensor, dt: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A few unrolled steps for torch.compile: (state behind them, the output (batch, D) of each); time comes first."""
    outputs = []
    for t in range(dt.shape[0]):
        h = torch.exp(dt[t][..., None] * A) * h + drive[t][..., None] * B[t][:, None]
        outputs.append((h * C[t][:, None]).sum(-1))
    return h, tuple(outputs)


def compiled_scan() -> Callable[[dict[str, Tensor]], Tensor]:
    """torch.compile of UNROLL steps, called once per chunk."""
    torch._dynamo.config.recompile_limit = 64  # the chunk is compiled per N, with and without gradients
    chunk = torch.compile(steps, fullgraph=True, dynamic=False)

    def call(p: dict[str, Tensor]) -> Tensor:
        dt = softplus(p["delta"] + p["delta_bias"][:, None])
        along = (dt, dt * p["u"], p["B"][:, 0], p["C"][:, 0])
        pieces = [t.movedim(-1, 0).contiguous().split(UNROLL) for t in along]
        h = p["u"].new_zeros((p["u"].shape[0], *p["A"].shape))
        outputs = []
        for gain, drive, B, C in zip(*pieces, strict=True):
            h, y = chunk(h, gain, drive, p["A"], B, C)
            outputs += y
        return (torch.stack(outputs, 2) + p["D"][:, None] * p["u"]) * silu(p["z"])

    return call


def jax_scan(inputs: dict[str, Tensor], weight: Tensor) -> tuple[Callable[[], object], Callable[[], object], Tensor]:
    """jitted ``jax.lax.scan`` with the exponential inside the step: (forward, forward + backward, output for the check)."""
    import jax
    import jax.numpy as jnp

    p = {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in inputs.items()}
    w = jnp.asarray(weight.numpy())

    def forward(p):
        dt = jax.nn.softplus(p["delta"] + p["delta_bias"][:, None])

        def step(h, now):
            gain, drive, B, C = now
            h = jnp.exp(gain[..., None] * p["A"]) * h + drive[..., None] * B[:, None]
            return h, (h * C[:, None]).sum(-1)

        along = [jnp.moveaxis(t, -1, 0) for t in (dt, dt * p["u"], p["B"][:, 0], p["C"][:, 0])]
        _, y = jax.lax.scan(step, jnp.zeros((p["u"].shape[0], *p["A"].shape)), along)
        return (jnp.moveaxis(y, 0, -1) + p["D"][:, None] * p["u"]) * jax.nn.silu(p["z"])

    output = jax.jit(forward)
    gradient = jax.jit(jax.grad(lambda p: (forward(p) * w).sum()))
    check = torch.from_numpy(np.array(output(p)))
    return lambda: jax.block_until_ready(output(p)), lambda: jax.block_until_ready(gradient(p)), check


def gate(name: str, output: Tensor, oracle: Tensor) -> None:
    error = ((output.detach().double() - oracle).norm() / oracle.norm()).item()
    if not error < 1e-5:
        raise SystemExit(f"{name}: relative error {error:.1e} against the float64 reference; not timed")


def add(cases: dict[str, Callable], name: str, call: Callable[[dict[str, Tensor]], Tensor], p: dict, w: Tensor) -> None:
    """The forward without gradients and the forward + backward of one candidate."""

    def forward() -> Tensor:
        with torch.no_grad():
            return call(p)

    cases[f"{name} forward"] = forward
    cases[f"{name} forward+backward"] = lambda: torch.autograd.grad(call(p), list(p.values()), w)


def cases_of(name: str, shape: tuple[int, int, int, int], loop: bool) -> dict[str, Callable[[], object]]:
    cases: dict[str, Callable[[], object]] = {}
    weight = torch.randn(shape[0], shape[1], shape[2])
    compiled = compiled_scan()
    for layout in ("BLD", "BDL"):
        inputs = inputs_of(shape, layout == "BLD")
        with torch.no_grad():
            oracle = ours("reference")({key: tensor.double() for key, tensor in inputs.items()})
        gate(f"{name} compressm {layout}", ours("cpp")(inputs), oracle)
        add(cases, f"{name} compressm {layout}", ours("cpp"), inputs, weight)
    gate(f"{name} torch.compile", compiled(inputs), oracle)
    add(cases, f"{name} torch.compile", compiled, inputs, weight)
    if loop:
        add(cases, f"{name} loop", ours("reference"), inputs, weight)
    if importlib.util.find_spec("jax"):
        forward, both, output = jax_scan(inputs, weight)
        gate(f"{name} jax", output, oracle)
        cases[f"{name} jax lax.scan forward"] = forward
        cases[f"{name} jax lax.scan forward+backward"] = both
    else:
        print(f"{name}: jax lax.scan skipped, jax is not installed")
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-loop", dest="loop", action="store_false", help="leave out the reference loop (seconds a run)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "selective_scan.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases: dict[str, Callable[[], object]] = {}
    for name, shape in SHAPES.items():
        cases.update(cases_of(name, shape, arguments.loop))
    results = interleaved(cases, arguments.rounds)
    print(table(results))
    for layout in ("BLD", "BDL"):
        large, small = (results[f"{name} compressm {layout} forward+backward"].median for name in ("N128", "N12"))
        print(f"{layout} forward+backward N128 / N12: {large / small:.2f}x")
    save(arguments.out, results, {"shapes": SHAPES})


if __name__ == "__main__":
    main()
