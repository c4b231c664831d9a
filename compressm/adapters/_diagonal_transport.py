"""How gradient-like, squared-gradient-like and parameter-like tensors of a diagonal layer follow a change of basis.

Adam's first moment is a gradient, hence a covector: with J the embedding of the reduced parameters into the full ones it
becomes J^T m.  The second moment is carried by the element-wise square of J^T (independence of the entries).  Both go by way
of the system (log_lam, B, C): back from the old parameters to it, through the bases of the reduction, and on to the new
parameters.  Gradients of the eigenvalues follow by participation factors, the part of the full A's gradient that is available.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressm.adapters._diagonal_form import Coefficients, DiagonalForm, Modes, Slopes

MAX_MODULUS = 1 - 1e-6
MIN_MODULUS = 1e-12


@dataclass(frozen=True)
class DiagonalTransport:
    """Maps between the parameters of a layer before and after one reduction; all tensors float64 or complex128.

    Attributes:
        form: how the family writes a system.
        old, new: parameters before and after.
        right: (..., n, r) and
        left: (..., r, n): the reduction's bases in the scale of the new parameters; n = 2N in the real convention, else N.
        multiplicity: (..., r).
    """

    form: DiagonalForm
    old: Modes
    new: Modes
    right: Tensor
    left: Tensor
    multiplicity: Tensor
    _before: tuple[Coefficients, Slopes] = field(init=False, repr=False)
    _after: tuple[Coefficients, Slopes] = field(init=False, repr=False)
    _solved: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] = field(init=False, repr=False)

    @property
    def real(self) -> bool:
        """Whether the bases are those of the real 2N-state system."""
        return self.right.shape[-2] == 2 * self.old.b.shape[-2]

    def __post_init__(self) -> None:
        for name, modes in (("_before", self.old), ("_after", self.new)):
            object.__setattr__(self, name, (self.form.evaluate(modes.scalars), self.form.slopes(modes.scalars)))
        object.__setattr__(self, "_solved", _solved(*(self._before[1].log_lam[name] for name in self.form.free)))

    def _participation(self) -> tuple[Tensor, Tensor]:
        """p, q (..., N, r) with d lam_j = sum_i p_ij d lam_i + q_ij conj(d lam_i)."""
        right, left = self.right, self.left.mT
        if not self.real:
            return right * left, torch.zeros_like(right)
        (t1, t2), (w1, w2) = right.chunk(2, -2), left.chunk(2, -2)
        return (t1 + 1j * t2) * (w1 - 1j * w2) / 2, (t1 - 1j * t2) * (w1 + 1j * w2) / 2

    def _embeddings(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """p, q (..., N, r) for b, and for c: the full b_i = sum_j p_ij b_j + q_ij conj(b_j), columns of c alike."""
        (old, _), (new, _) = self._before, self._after
        right, left = self.right, self.left.mT
        if self.real:
            (t1, t2), (w1, w2) = (self.multiplicity[..., None, :] * right / 2).chunk(2, -2), (left / 2).chunk(2, -2)
            b, c = (t1 + 1j * t2, t1.conj() + 1j * t2.conj()), (w1 - 1j * w2, w1.conj() - 1j * w2.conj())
        else:
            b, c = (right, torch.zeros_like(right)), (left, torch.zeros_like(left))

        def in_gains(pair: tuple[Tensor, Tensor], before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
            before, after = before[..., :, None], after[..., None, :]
            return pair[0] * after / before, pair[1] * after.conj() / before

        return in_gains(b, old.beta, new.beta), in_gains(c, old.kappa, new.kappa)

    def first_moments(self, m: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient-like tensors of the old parameters, as gradients of the new ones."""
        given = self.form.unpack(m, gradients=True)
        (old, slopes), (new, after) = self._before, self._after
        rest = [given.scalars[name] - _gains(slopes, name, self.old, given) for name in self.form.free]
        g_log = torch.complex(*(row[0] * rest[0] + row[1] * rest[1] for row in self._solved))
        g_lam = g_log / _eigenvalues(old).conj()
        p, q = self._participation()
        g_log = _eigenvalues(new).conj() * _apply(p.mH, g_lam, q.mH, g_lam.conj())
        (p_b, q_b), (p_c, q_c) = self._embeddings()
        b = p_b.mH @ given.b + q_b.mT @ given.b.conj()
        c = given.c @ p_c.conj() + given.c.conj() @ q_c
        found = Modes({}, b, c)
        scalars = {
            name: (slope.conj() * g_log).real + _gains(after, name, self.new, found) for name, slope in after.log_lam.items()
        }
        return self.form.pack(Modes(scalars, b, c), gradients=True)

    def second_moments(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Squared-gradient-like tensors of the old parameters, carried to the new ones; non-negative."""
        given = self.form.unpack(v, gradients=True)
        (old, slopes), (new, after) = self._before, self._after
        re, im = (self._squares_of_log_lam(row, slopes, given) for row in self._solved)
        p, q = self._participation()
        v_lam = _apply((p.abs() ** 2 + q.abs() ** 2).mT, 0.5 * (re + im) / _eigenvalues(old).abs() ** 2)
        v_log = v_lam * _eigenvalues(new).abs() ** 2
        for_b, for_c = self._embeddings()
        single = (self.multiplicity == 1) & self.real
        b, c = _squares(for_b, given.b, single), _squares(for_c, given.c.mT, single).mT
        found = Modes({}, b, c)
        scalars = {
            name: slope.abs() ** 2 * v_log + _squared_gains(after.beta[name], after.kappa[name], self.new, found)
            for name, slope in after.log_lam.items()
        }
        return self.form.pack(Modes(scalars, b, c), gradients=True)

    def _squares_of_log_lam(self, row: tuple[Tensor, Tensor], slopes: Slopes, given: Modes) -> Tensor:
        """Of the real or the imaginary part of the gradient by log_lam."""
        (first, second), (a, b) = row, self.form.free
        beta, kappa = (first * slope[a] + second * slope[b] for slope in (slopes.beta, slopes.kappa))
        direct = first**2 * given.scalars[a] + second**2 * given.scalars[b]
        return direct + _squared_gains(beta, kappa, self.old, given)

    def values(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Another copy of the old parameters (an EMA), projected with the same bases and scales.

        B and C follow exactly; of the projected A the diagonal is kept, which is all of it where the copy equals the
        live parameters.  Phases take the branch nearest to the live one, so that averaging goes on smoothly.

        Raises:
            NumericalError: the copy holds NaN or infinite values.
        """
        given = self.form.unpack(other)
        full = self.form.evaluate(given.scalars)
        lam, B, C = _eigenvalues(full), full.beta[..., None] * given.b, given.c * full.kappa[..., None, :]
        p, q = self._participation()
        lam_new = _apply(p.mT, lam, q.mT, lam.conj())
        if self.real:
            b_new = self.left @ torch.cat([B.real, B.imag], -2).to(self.left)
            c_new = self.multiplicity[..., None, :] * (torch.cat([C.real, -C.imag], -1).to(self.right) @ self.right)
        else:
            b_new, c_new = self.left @ B, C @ self.right
        live = self._after[0].log_lam
        neutral = (self.left * self.right.mT).sum(-1).abs() < 0.5  # modes that only fill the rank up have no projection
        lam_new = torch.where(neutral, live.exp(), lam_new)
        decay = torch.log(lam_new.abs().clamp(MIN_MODULUS, MAX_MODULUS))
        turn = torch.remainder(lam_new.angle() - live.imag + math.pi, 2 * math.pi) - math.pi
        scalars = self.form.solve(torch.complex(decay, live.imag + turn), self.old, self.new.scalars)
        value = self.form.evaluate(scalars)
        modes = Modes(scalars, b_new / value.beta[..., None], c_new / value.kappa[..., None, :])
        return self.form.finite(modes, "the averaged copy holds")


def _solved(first: Tensor, second: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rows re, im of the matrices that give gradients G by log_lam from those by two scalars, m_k = Re(conj(slope_k) G)."""
    sizes = [torch.where(slope != 0, 1 / slope.abs(), 0.0) for slope in (first, second)]
    u, v = first * sizes[0], second * sizes[1]
    det = u.real * v.imag - u.imag * v.real
    return (
        (v.imag / det * sizes[0], -u.imag / det * sizes[1]),
        (-v.real / det * sizes[0], u.real / det * sizes[1]),
    )


def _eigenvalues(system: Coefficients) -> Tensor:
    """lam (..., N) complex128; the modulus is kept away from zero so that it can be divided by."""
    return torch.polar(system.log_lam.real.clamp(min=math.log(MIN_MODULUS)).exp(), system.log_lam.imag)


def _apply(matrix: Tensor, vector: Tensor, other: Tensor | None = None, also: Tensor | None = None) -> Tensor:
    """matrix @ vector, plus other @ also."""
    result = (matrix @ vector[..., None])[..., 0]
    return result if other is None or also is None else result + (other @ also[..., None])[..., 0]


def _gains(slopes: Slopes, name: str, modes: Modes, gradients: Modes) -> Tensor:
    """The part of a scalar's gradient, (..., N), that goes through beta and kappa."""
    by_beta = (slopes.beta[name].conj() * (modes.b.conj() * gradients.b).sum(-1)).real
    return by_beta + (slopes.kappa[name].conj() * (modes.c.conj() * gradients.c).sum(-2)).real


def _squared_gains(beta: Tensor, kappa: Tensor, modes: Modes, squares: Modes) -> Tensor:
    """The same for squares of independent gradients, with the slopes (..., N) by one scalar."""
    b, c = beta[..., None] * modes.b, kappa[..., None, :] * modes.c
    by_b = (b.real**2 * squares.b.real + b.imag**2 * squares.b.imag).sum(-1)
    return by_b + (c.real**2 * squares.c.real + c.imag**2 * squares.c.imag).sum(-2)


def _squares(embedding: tuple[Tensor, Tensor], squares: Tensor, single: Tensor) -> Tensor:
    """Squares of the gradients by the rows of a reduced b, from those by the rows of the full one.

    A single (real) mode has no imaginary gradient; copying the scale keeps Adam from a huge step on rounding noise.
    """
    p, q = embedding
    along, across = (p + q).mT, (p - q).mT
    re = along.real**2 @ squares.real + along.imag**2 @ squares.imag
    im = across.imag**2 @ squares.real + across.real**2 @ squares.imag
    return torch.complex(re, torch.where(single[..., None], re, im))
