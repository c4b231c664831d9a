"""Linear Recurrent Unit (Orvieto et al., ICML 2023, arXiv 2303.06349)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import bad_argument, check_integer
from compressm.kernels.fused_cpu import lru_scan
from compressm.layers._lti_layer import LTILayer


class LRU(LTILayer):
    """y_t = Re(C h_t) + D x_t,  h_t = lam h_{t-1} + gamma (B x_t),  lam = exp(-exp(nu_log) + i exp(theta_log)).

    The eigenvalues start uniformly on the ring r_min <= |lam| <= r_max with phases in [0, max_phase] (eq. 5 and section
    3.3 of the paper); gamma starts at sqrt(1 - |lam|^2) and is trained on its own.

    Args:
        d_model: channels H in and out.
        d_state: complex states N.
        r_min, r_max: ring of the initial eigenvalues, 0 <= r_min < r_max < 1.
        max_phase: largest initial phase in radians, in (0, 2 pi].
        device, dtype: of the parameters (real floating point).

    Parameters: ``nu_log, theta_log, gamma_log`` (N,), ``B_re, B_im`` (N, H), ``C_re, C_im`` (H, N), ``D`` (H,).
    """

    nu_log: nn.Parameter
    theta_log: nn.Parameter
    gamma_log: nn.Parameter
    B_re: nn.Parameter
    B_im: nn.Parameter
    C_re: nn.Parameter
    C_im: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 6.28,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state)):
            check_integer(name, size, expected="an integer, at least 1")
        if not 0 <= r_min < r_max < 1:
            raise bad_argument("r_min, r_max", got=(r_min, r_max), expected="0 <= r_min < r_max < 1")
        if not 0 < max_phase <= 2 * math.pi:
            raise bad_argument("max_phase", got=max_phase, expected="a number in (0, 2 pi]")
        self.d_model = d_model
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        empty: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, shape in self.parameter_shapes(d_state).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **empty)))
        self.reset_parameters()

    def parameter_shapes(self, d_state: int) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter at a given number of states."""
        vector, b, c = (d_state,), (d_state, self.d_model), (self.d_model, d_state)
        shapes = {"nu_log": vector, "theta_log": vector, "gamma_log": vector}
        return {**shapes, "B_re": b, "B_im": b, "C_re": c, "C_im": c, "D": (self.d_model,)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        ring, angle = torch.rand_like(self.nu_log), torch.rand_like(self.theta_log)
        squared = ring * (self.r_max**2 - self.r_min**2) + self.r_min**2
        nu = -0.5 * squared.clamp_min(1e-12).log()
        self.nu_log.copy_(nu.log())
        self.theta_log.copy_((self.max_phase * angle).clamp_min(1e-6).log())
        self.gamma_log.copy_(0.5 * torch.log(-torch.expm1(-2 * nu)))
        for weight in (self.B_re, self.B_im):
            weight.normal_(std=1 / math.sqrt(2 * self.d_model))
        for weight in (self.C_re, self.C_im):
            weight.normal_(std=1 / math.sqrt(self.d_state))
        self.D.normal_()

    @property
    def d_state(self) -> int:
        """States N, read from the parameters."""
        return self.nu_log.shape[0]

    @property
    def _state_like(self) -> Tensor:
        return self.nu_log

    def forward(
        self, x: Tensor, initial_state: Tensor | None = None, return_last_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over a sequence.

        Args:
            x: (batch, L, H) real.
            initial_state: (batch, N) complex or None for zero.
            return_last_state: also return the state after the last step, (batch, N) complex.

        Returns:
            y (batch, L, H) in x's dtype, or (y, last state).
        """
        self._check_sequence(x)
        self.remember(x)
        return lru_scan(
            x, self.nu_log, self.theta_log, self.gamma_log, self.B_re, self.B_im, self.C_re, self.C_im, self.D,
            initial_state=initial_state, return_last_state=return_last_state,
        )  # fmt: skip

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of streaming inference: x (batch, H), state (batch, N) complex -> (y (batch, H), next state)."""
        self._check_step(x, state)
        work = state.real.dtype
        nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im, D = (
            getattr(self, name).to(work) for name in self.parameter_shapes(self.d_state)
        )
        lam = torch.exp(torch.complex(-nu_log.exp(), theta_log.exp()))
        drive = x.to(state.dtype) @ (gamma_log.exp()[:, None] * torch.complex(B_re, B_im)).T
        state = lam * state + drive
        y = (state @ torch.complex(C_re, C_im).T).real + D * x.to(work)
        return y.to(x.dtype), state
