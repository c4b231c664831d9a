"""The two conventions: a system in its N complex coordinates, or the real system of 2N states behind y = Re(C x)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressm.control.system import DiagonalSystem
from compressm.errors import bad_argument
from compressm.kernels import Gramians

CONVENTIONS = ("real", "complex")


def check_convention(convention: str) -> None:
    """Raise ArgumentError unless one of CONVENTIONS."""
    if convention not in CONVENTIONS:
        raise bad_argument("convention", got=repr(convention), expected='"real" or "complex"')


def slots(order: int, convention: str) -> int:
    """States of a layer that ``order`` values of a convention's spectrum take: half as many, rounded up, where it is the real
    system of 2N states behind N complex ones (``"real"``), else as many."""
    return -(-order // 2) if convention == "real" else order


def real_gramians(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
    """P and Q, each (..., 2N, 2N) float64, of the real system in the coordinates [Re x; Im x].

    P_R = 1/2 [[Re(P + S), Im(S - P)], [Im(S - P)^T, Re(P - S)]]; Q_R is that of the dual system (conj(lam), C^H).
    """
    return gramians_of_real(system.gramians())


def gramians_of_real(g: Gramians) -> tuple[Tensor, Tensor]:
    """P and Q as :func:`real_gramians` gives them, from those of the complex system; differentiable."""
    return real_gramian(g.P, g.S), real_gramian(g.Q, g.S_Q)


def real_gramian(P: Tensor, S: Tensor) -> Tensor:
    """The real system's Gramian in coordinates [Re x; Im x], of sums over x x^H and over x x^T."""
    off = (S - P).imag
    top = torch.cat([(P + S).real, off], -1)
    return 0.5 * torch.cat([top, torch.cat([off.mT, (P - S).real], -1)], -2)


def blend(P: Tensor, P_white: Tensor, share: float = 1e-2) -> Tensor:
    """A measured Gramian plus ``share`` of the data-free one, scaled to its trace; fills directions the data left empty."""
    trace, white = torch.trace(P), torch.trace(P_white)
    if not bool(white > 0):
        return P
    if not bool(trace > 0):
        return P_white
    return P + share * (trace / white) * P_white


@dataclass(frozen=True, eq=False)
class Coordinates:
    """A system as matrices in one convention.

    Attributes:
        A, B, C: (n, n), (n, H_in), (H_out, n); float64 and n = 2N for ``"real"``, complex128 and n = N for ``"complex"``.
        convention: which.
        order: N.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    convention: str
    order: int

    @classmethod
    def of(cls, system: DiagonalSystem, convention: str) -> Coordinates:
        """The matrices of an unbatched system."""
        lam, B, C = system.log_lam.exp(), system.B, system.C
        if convention == "complex":
            return cls(torch.diag(lam), B, C, convention, system.order)
        re, im = torch.diag(lam.real), torch.diag(lam.imag)
        A = torch.cat([torch.cat([re, -im], 1), torch.cat([im, re], 1)])
        return cls(A, torch.cat([B.real, B.imag]), torch.cat([C.real, -C.imag], 1), convention, system.order)

    @property
    def size(self) -> int:
        """n."""
        return self.A.shape[0]

    def mode_rows(self, modes: Tensor) -> Tensor:
        """(len(modes), n) complex128: rows that read the complex state of the system's own modes."""
        rows = torch.zeros(len(modes), self.size, dtype=torch.complex128, device=self.A.device)
        index = torch.arange(len(modes), device=self.A.device)
        rows[index, modes] = 1
        if self.convention == "real":
            rows.imag[index, modes + self.order] = 1
        return rows


def white_gramians(system: DiagonalSystem, convention: str) -> tuple[Tensor, Tensor]:
    """Data-free P and Q in a convention's coordinates."""
    if convention == "real":
        return real_gramians(system)
    g = system.gramians()
    return g.P, g.Q
