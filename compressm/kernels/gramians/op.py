"""Gramians of diagonal discrete-time systems, straight from the logarithms of their eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import Candidate, choose
from compressm.kernels.gramians import reference

System = tuple[Tensor, Tensor, Tensor]


class Gramians(NamedTuple):
    """The four matrices that describe a complex diagonal system and the real system behind its real part.

    Attributes:
        P: (..., N, N) complex128 Hermitian, sum_t lam^t B B^H conj(lam)^t: P_ij = (B B^H)_ij / (1 - lam_i conj(lam_j)).
        S: (..., N, N) complex128 symmetric, S_ij = (B B^T)_ij / (1 - lam_i lam_j).
        Q: (..., N, N) complex128 Hermitian, Q_ij = (C^H C)_ij / (1 - conj(lam_i) lam_j).
        S_Q: (..., N, N) complex128 symmetric, S of the dual system (conj(lam), C^H).
    """

    P: Tensor
    S: Tensor
    Q: Tensor
    S_Q: Tensor


def gramians(log_lam: Tensor, B: Tensor, C: Tensor, *, backend: str | None = None) -> Gramians:
    """Gramians of one system or of a batch of systems of one shape, in float64 throughout.

    Args:
        log_lam: (..., N) complex or real, logarithms of the eigenvalues, real part below zero.
        B: (..., N, H_in).
        C: (..., H_out, N).
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or ``"reference"``; None chooses.

    Raises:
        ArgumentError: shapes do not fit.
        BackendError: the named backend cannot run.
    """
    check_system(log_lam, B, C)
    batch = torch.broadcast_shapes(log_lam.shape[:-1], B.shape[:-2], C.shape[:-2])
    log_lam, B, C = (t.expand(*batch, *t.shape[t.dim() - k :]) for t, k in ((log_lam, 1), (B, 2), (C, 2)))
    return gramians_many([(log_lam, B, C)], backend=backend)[0]


def gramians_many(systems: Sequence[System], *, backend: str | None = None) -> list[Gramians]:
    """Gramians of several systems of different shapes; one kernel launch on a GPU, except where gradients are needed.

    Args:
        systems: (log_lam, B, C) each, shapes as in :func:`gramians`, on one device.
        backend: as in :func:`gramians`.
    """
    if not systems:
        return []
    prepared: list[Any] = []
    for system in systems:
        check_system(*system)
        if system[0].device != systems[0][0].device:
            raise bad_argument("systems", got=f"{system[0].device}", expected=f"one device, {systems[0][0].device}")
        prepared.append(tuple(tensor.to(torch.complex128) for tensor in system))
    differentiate = torch.is_grad_enabled() and any(tensor.requires_grad for system in prepared for tensor in system)
    chosen = choose_backend(prepared[0][0].device.type, differentiate, backend)
    if chosen == "triton":
        from compressm.kernels.gramians import triton_gramians

        return [Gramians(*quad) for quad in triton_gramians.gramian_quads(prepared)]
    form = {"reference": reference.gramian_quad, "torch": real_products, "cpp": cpp_quotients}[chosen]
    return [Gramians(*form(*system)) for system in prepared]


def real_products(log_lam: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, S, Q, S_Q with three real matrix products a side in place of two complex ones."""
    hermitian, symmetric = reference.denominators(log_lam)
    P, S = _numerators(B.real, B.imag)
    Q, S_Q = _numerators(C.real.mT, -C.imag.mT)
    return P / hermitian, S / symmetric, Q / hermitian.conj(), S_Q / symmetric.conj()


def cpp_quotients(log_lam: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, S, Q, S_Q of a batch of systems: real matrix products, and denominators and quotients in one pass."""
    batch, n = log_lam.shape[:-1], log_lam.shape[-1]
    systems = zip(log_lam.reshape(-1, n), B.reshape(-1, *B.shape[-2:]), C.reshape(-1, *C.shape[-2:]), strict=True)
    quads = []
    for lam, b, c in systems:
        decay, phase = lam.real.contiguous(), lam.imag.contiguous()
        quads.append((*_quotients(decay, phase, b.real, b.imag), *_quotients(decay, -phase, c.real.mT, -c.imag.mT)))
    P, S, Q, S_Q = (torch.stack(part).view(*batch, n, n) for part in zip(*quads, strict=True))
    return P, S, Q, S_Q


def _quotients(decay: Tensor, phase: Tensor, re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    return gramian_quotients_op(decay, phase, re @ re.mT, im @ im.mT, re @ im.mT)


@custom_op("compressm::gramian_quotients")
def gramian_quotients_op(decay: Tensor, phase: Tensor, rr: Tensor, ii: Tensor, ri: Tensor) -> tuple[Tensor, Tensor]:
    """Hermitian and symmetric Gramian (N, N) from real products, by the C++ library."""
    return cpp.library().gramian_quotients(decay, phase, rr, ii, ri)


@gramian_quotients_op.register_fake
def _(decay, phase, rr, ii, ri):
    return rr.new_empty(rr.shape, dtype=torch.complex128), rr.new_empty(rr.shape, dtype=torch.complex128)


def _numerators(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    """B B^H and B B^T of B = re + i im."""
    rr, ii, ri = re @ re.mT, im @ im.mT, re @ im.mT
    return torch.complex(rr + ii, ri.mT - ri), torch.complex(rr - ii, ri.mT + ri)


def check_system(log_lam: Tensor, B: Tensor, C: Tensor) -> None:
    """Raise ArgumentError unless log_lam (..., N), B (..., N, H_in) and C (..., H_out, N) fit together."""
    if log_lam.dim() < 1:
        raise bad_argument("log_lam", got="a scalar", expected="a tensor (..., N)")
    n = log_lam.shape[-1]
    if B.dim() < 2 or B.shape[-2] != n:
        raise bad_argument("B", got=tuple(B.shape), expected=f"(..., {n}, H_in), as log_lam has {n} eigenvalues")
    if C.dim() < 2 or C.shape[-1] != n:
        raise bad_argument("C", got=tuple(C.shape), expected=f"(..., H_out, {n}), as log_lam has {n} eigenvalues")
    if not log_lam.device == B.device == C.device:
        raise bad_argument("log_lam, B, C", got=f"{log_lam.device}, {B.device}, {C.device}", expected="one device")


def choose_backend(device: str, differentiate: bool, backend: str | None) -> str:
    triton = Candidate("triton", lambda: _triton_why_not(device, differentiate))
    cpp = Candidate("cpp", lambda: _cpp_why_not(device, differentiate))
    others = [Candidate("torch", lambda: None), Candidate("reference", lambda: None)]
    return choose("gramians", [cpp, *others, triton] if device == "cpu" else [triton, *others, cpp], backend)


def _cpp_why_not(device: str, differentiate: bool) -> str | None:
    if device != "cpu":
        return f"the C++ kernels run on CPU tensors, not on {device}"
    return "it has no backward, and an argument requires a gradient" if differentiate else cpp.why_not()


def _triton_why_not(device: str, differentiate: bool) -> str | None:
    if differentiate:
        return "the kernel has no backward, and an argument requires a gradient"
    from compressm.kernels.gramians import triton_gramians

    return triton_gramians.why_not(device)
