"""How moments and averaged copies of an LRU follow a change of basis, every derivative written by hand: an oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressm.control import Reduction

MAX_MODULUS = 1 - 1e-6
MIN_MODULUS = 1e-12


@dataclass(frozen=True)
class LRUFormulas:
    """Maps between the parameters of an LRU before and after one reduction; all tensors float64.

    Attributes:
        old, new: parameters before and after.
        reduction: the reduced system and its bases; real convention if ``right`` has 2N rows, else complex.
        scale: (rank,) factor d_j by which rows of B_hat were divided and columns of C multiplied.
    """

    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    reduction: Reduction
    scale: Tensor

    @property
    def real(self) -> bool:
        """Whether the bases are those of the real 2N-state system."""
        return self.reduction.right.shape[0] == 2 * self.old["nu_log"].shape[0]

    def _bases(self) -> tuple[Tensor, Tensor, Tensor]:
        """right (n, rank), left (rank, n) complex128 and multiplicity (rank,) on the parameters' device."""
        like = self.old["nu_log"]
        r = self.reduction
        right, left = (basis.to(like.device, torch.complex128) for basis in (r.right, r.left))
        return right, left, r.multiplicity.to(like)

    def _participation(self) -> tuple[Tensor, Tensor]:
        """p, q (N, rank) with d lam_j = sum_i p_ij d lam_i + q_ij conj(d lam_i)."""
        right, left, _ = self._bases()
        if not self.real:
            return right * left.T, torch.zeros_like(right)
        n = right.shape[0] // 2
        t1, t2, w1, w2 = right[:n], right[n:], left[:, :n].T, left[:, n:].T
        return (t1 + 1j * t2) * (w1 - 1j * w2) / 2, (t1 - 1j * t2) * (w1 + 1j * w2) / 2

    def first_moments(self, m: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient-like tensors of the old parameters, as gradients of the new ones."""
        right, left, mult = self._bases()
        gamma_old, gamma_new = self.old["gamma_log"].exp()[:, None], self.new["gamma_log"].exp()[:, None]
        g_re, g_im = m["B_re"] / gamma_old, m["B_im"] / gamma_old
        if self.real:
            g_b = (mult * right).mH @ torch.cat([g_re, g_im]).to(right)
            g_c = torch.cat([m["C_re"], -m["C_im"]], 1).to(left) @ left.mH
        else:
            g_b = right.mH @ torch.complex(g_re, g_im)
            g_c = torch.complex(m["C_re"], m["C_im"]) @ left.mH
        g_b = g_b * (gamma_new * self.scale[:, None])
        g_c = g_c / self.scale
        lam = _eigenvalues(self.old)
        g_lam = torch.complex(-m["nu_log"] / self.old["nu_log"].exp(), m["theta_log"] / self.old["theta_log"].exp())
        g_lam = g_lam / lam.conj()
        p, q = self._participation()
        g_log = _eigenvalues(self.new).conj() * (p.mH @ g_lam + q.mH @ g_lam.conj())
        return {
            "nu_log": -self.new["nu_log"].exp() * g_log.real,
            "theta_log": self.new["theta_log"].exp() * g_log.imag,
            "gamma_log": (g_b.real * self.new["B_re"] + g_b.imag * self.new["B_im"]).sum(1),
            "B_re": g_b.real, "B_im": g_b.imag, "C_re": g_c.real, "C_im": g_c.imag,
        }  # fmt: skip

    def second_moments(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Squared-gradient-like tensors of the old parameters, carried to the new ones; non-negative."""
        right, left, mult = self._bases()
        gamma_old, gamma_new = self.old["gamma_log"].exp()[:, None], self.new["gamma_log"].exp()[:, None]
        v_re, v_im = v["B_re"] / gamma_old**2, v["B_im"] / gamma_old**2
        t_re, t_im, w_re, w_im = right.real**2, right.imag**2, left.real**2, left.imag**2
        if self.real:
            v_b, v_c = torch.cat([v_re, v_im]), torch.cat([v["C_re"], v["C_im"]], 1)
            b_re, b_im = (mult**2 * t_re).T @ v_b, (mult**2 * t_im).T @ v_b
            c_re, c_im = v_c @ w_re.T, v_c @ w_im.T
            # A real mode has no imaginary gradient; copying the scale keeps Adam from a huge step on rounding noise.
            b_im = torch.where(mult[:, None] == 1, b_re, b_im)
            c_im = torch.where(mult == 1, c_re, c_im)
        else:
            b_re, b_im = t_re.T @ v_re + t_im.T @ v_im, t_re.T @ v_im + t_im.T @ v_re
            c_re, c_im = v["C_re"] @ w_re.T + v["C_im"] @ w_im.T, v["C_im"] @ w_re.T + v["C_re"] @ w_im.T
        factor = (gamma_new * self.scale[:, None]) ** 2
        b_re, b_im, c_re, c_im = b_re * factor, b_im * factor, c_re / self.scale**2, c_im / self.scale**2
        v_log = v["nu_log"] / self.old["nu_log"].exp() ** 2 + v["theta_log"] / self.old["theta_log"].exp() ** 2
        p, q = self._participation()
        v_lam = (p.abs() ** 2 + q.abs() ** 2).T @ (0.5 * v_log / _eigenvalues(self.old).abs() ** 2)
        v_log = v_lam * _eigenvalues(self.new).abs() ** 2
        return {
            "nu_log": self.new["nu_log"].exp() ** 2 * v_log,
            "theta_log": self.new["theta_log"].exp() ** 2 * v_log,
            "gamma_log": (b_re * self.new["B_re"] ** 2 + b_im * self.new["B_im"] ** 2).sum(1),
            "B_re": b_re, "B_im": b_im, "C_re": c_re, "C_im": c_im,
        }  # fmt: skip

    def values(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Another copy of the old parameters (an EMA), projected with the same bases and scales.

        B and C follow exactly; of the projected A the diagonal is kept, which is all of it where the copy equals the
        live parameters.  Phases take the branch nearest to the live one, so that averaging goes on smoothly.
        """
        right, left, mult = self._bases()
        lam = _eigenvalues(other)
        B = other["gamma_log"].exp()[:, None] * torch.complex(other["B_re"], other["B_im"])
        C = torch.complex(other["C_re"], other["C_im"])
        p, q = self._participation()
        lam_new = p.T @ lam + q.T @ lam.conj()
        if self.real:
            b_new = left @ torch.cat([B.real, B.imag]).to(left)
            c_new = mult * (torch.cat([C.real, -C.imag], 1).to(right) @ right)
        else:
            b_new, c_new = left @ B, C @ right
        live = torch.exp(torch.complex(-self.new["nu_log"].exp(), self.new["theta_log"].exp()))
        neutral = (left * right.T).sum(1).abs() < 0.5  # modes that only fill the rank up have no projection
        lam_new = torch.where(neutral, live, lam_new)
        decay = -torch.log(lam_new.abs().clamp(MIN_MODULUS, MAX_MODULUS))
        theta_live = self.new["theta_log"].exp()
        turn = torch.remainder(lam_new.angle() - theta_live + math.pi, 2 * math.pi) - math.pi
        theta = torch.clamp(theta_live + turn, min=1e-3)
        gamma = torch.sqrt(-torch.expm1(-2 * decay))[:, None] * self.scale[:, None]
        b_new, c_new = b_new / gamma, c_new * self.scale
        result = {
            "nu_log": decay.log(), "theta_log": theta.log(), "gamma_log": (gamma[:, 0] / self.scale).log(),
            "B_re": b_new.real, "B_im": b_new.imag, "C_re": c_new.real, "C_im": c_new.imag,
        }  # fmt: skip
        return result


def _eigenvalues(parameters: Mapping[str, Tensor]) -> Tensor:
    """lam (N,) complex128; the modulus is kept away from zero so that it can be divided by."""
    decay = parameters["nu_log"].exp().clamp(max=-math.log(MIN_MODULUS))
    return torch.polar(torch.exp(-decay), parameters["theta_log"].exp())
