"""Problems of the reduction itself: balanced truncation of one system, and a whole attempt on a stack of layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import compressm
from compressm.benchmarking.problems import Answers, Contender, Op, Problem
from compressm.benchmarking.request import SIZES
from compressm.benchmarking.results import Counts, Pass
from compressm.benchmarking.timing import Timed
from compressm.compression.planning.policies import energy_order
from compressm.control.balancing import balance
from compressm.kernels import gramians
from compressm.kernels.lti_scan.record import ring
from compressm.layers import LRU, S5

FREQUENCIES = 12
TAU = 0.1
NOT_COUNTED = Counts(bytes=0, flops=0, exponentials=0)  # a singular value decomposition has no least number of operations
REDUCTION: tuple[Pass, ...] = ("step",)


def response(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """C (exp(i w) - A)^-1 B on a grid of frequencies w; the transfer function that does not depend on coordinates."""
    omega = torch.linspace(0.0, 3.0, FREQUENCIES, dtype=torch.float64, device=A.device)
    eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    return torch.stack([C @ torch.linalg.solve(torch.exp(1j * w) * eye - A, B) for w in omega])


def _planar(values: Tensor) -> Tensor:
    return torch.view_as_real(values)


def _factor(P: Tensor) -> Tensor:
    """F with F F^H = P, by eigenvalues."""
    values, vectors = torch.linalg.eigh(P)
    return vectors * values.clamp_min(0).sqrt()


def _exact(log_lam: Tensor, B: Tensor, C: Tensor, rank: int) -> Answers:
    """Square-root balanced truncation (Laub et al. 1987) on the reference Gramians, left in its dense coordinates."""
    g = gramians(log_lam, B, C, backend="reference")
    F, G = _factor(g.P), _factor(g.Q)
    left, hsv, right = torch.linalg.svd(G.mH @ F, full_matrices=False)
    root = hsv[:rank].rsqrt().to(F.dtype)
    into, back = (G @ left[:, :rank] * root).mH, F @ right.mH[:, :rank] * root
    A = into @ (log_lam.exp()[:, None] * back)
    return {"hsv": hsv, "response": _planar(response(A, into @ B, C @ back))}


def balanced_truncation(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """Gramians, all Hankel singular values and the reduced diagonal system of an LRU layer, complex convention, float64."""
    channels, states, rank = (sizes[name] for name in ("channels", "states", "rank"))
    decay, phase = ring(states, device)
    log_lam = torch.complex(decay, phase).to(torch.complex128)
    B = torch.randn(states, channels, dtype=torch.complex128, device=device) * (1 - (2 * decay.double()).exp()).sqrt()[:, None]
    C = torch.randn(channels, states, dtype=torch.complex128, device=device)
    oracle = _exact(log_lam, B, C, rank)
    inputs = {"log_lam": log_lam, "B": B, "C": C}
    problem = Problem("step", torch.float64, device, inputs, None, oracle, NOT_COUNTED, dict(sizes))

    def run() -> tuple[Tensor, compressm.DiagonalSystem]:
        balanced = balance(compressm.DiagonalSystem(log_lam, B, C), "complex")
        return balanced.hsv, balanced.reduce(rank).system

    def answers() -> Answers:
        hsv, system = run()
        return {"hsv": hsv, "response": _planar(response(torch.diag(system.log_lam.exp()), system.B, system.C))}

    problem.built_in["compressm"] = lambda: Contender(Timed(run), answers)
    return problem


class Stack(nn.Module):
    """Time-invariant layers with skip connections."""

    def __init__(self, kind: type[LRU] | type[S5], layers: int, channels: int, states: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(kind(channels, states) for _ in range(layers))

    def layers(self) -> list[LRU | S5]:
        """The layers."""
        return [mixer for mixer in self.mixers if isinstance(mixer, LRU | S5)]

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = x + nn.functional.gelu(mixer(x))
        return x


def trained_stack(
    sizes: Mapping[str, int], device: torch.device, kind: type[LRU] | type[S5] = LRU
) -> tuple[Stack, torch.optim.Optimizer]:
    """A stack whose optimizer has moments."""
    model = Stack(kind, sizes["layers"], sizes["channels"], sizes["states"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=kind is LRU)  # torch's does not take complex parameters
    model(torch.randn(2, 64, sizes["channels"], device=device)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def attempt(
    sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device, kind: type[LRU] | type[S5] = LRU
) -> Problem:
    """``Compressor.step`` on a stack of layers, data-free: from reading the layers to the audit of the optimizer."""
    layers = sizes["layers"]
    model, optimizer = trained_stack(sizes, device, kind)
    oracle = {"ranks": torch.tensor([_complex_rank(mixer) for mixer in model.layers()], dtype=torch.float64)}
    problem = Problem("step", torch.float32, device, {}, None, oracle, NOT_COUNTED, dict(sizes))

    def setup() -> compressm.Compressor:
        own_model, own_optimizer = copy.deepcopy((model, optimizer))
        schedule = compressm.At([1])
        return compressm.Compressor(
            own_model, own_optimizer, policy=compressm.Energy(tau=TAU), schedule=schedule, recipe="paper"
        )

    def run(compressor: compressm.Compressor):
        return compressor.step()

    def answers() -> Answers:
        ranks = run(setup()).ranks
        return {"ranks": torch.tensor([ranks[f"mixers.{i}"] for i in range(layers)], dtype=torch.float64)}

    problem.built_in["compressm"] = lambda: Contender(Timed(run, setup), answers)
    return problem


@torch.no_grad()
def _complex_rank(mixer: LRU | S5) -> int:
    """How many Hankel singular values of the complex system hold 1 - TAU of their sum, from the reference Gramians."""
    exact = copy.deepcopy(mixer).double()
    if isinstance(exact, LRU):
        log_lam = torch.complex(-exact.nu_log.exp(), exact.theta_log.exp())
        B, C = exact.gamma_log.exp()[:, None] * torch.complex(exact.B_re, exact.B_im), torch.complex(exact.C_re, exact.C_im)
    else:
        log_lam, B, (C,) = exact.system()
    g = gramians(log_lam, B, C, backend="reference")
    return energy_order(torch.linalg.svdvals(_factor(g.Q).mH @ _factor(g.P)), TAU)


OPS = {
    "balanced_truncation": Op(
        "reduction", SIZES["balanced_truncation"], REDUCTION, balanced_truncation,
        "Gramians, Hankel singular values and truncation of one system", "float64",
    ),
    "attempt": Op(
        "reduction", SIZES["attempt"], REDUCTION, attempt,
        "a whole reduction of a stack of LRU layers with its optimizer",
    ),
    "attempt-s5": Op(
        "reduction", SIZES["attempt-s5"], REDUCTION, functools.partial(attempt, kind=S5),
        "a whole reduction of a stack of S5 layers with its optimizer",
    ),
}  # fmt: skip
