"""S5, the simplified state-space layer (Smith, Warrington and Linderman, ICLR 2023, arXiv 2208.04933)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import bad_argument, check_integer
from compressm.kernels import lti_scan
from compressm.layers._discretization import DISCRETIZATIONS
from compressm.layers._lti_layer import LTILayer

TRUNCATED = 0.87962566103423978  # standard deviation of a standard normal cut off at two


class S5(LTILayer):
    """y_t = Re(C x_t) + D u_t,  x_t = lam x_{t-1} + B_bar u_t: x' = Lambda x + B u at steps exp(log_step).

    Parameters are named, shaped and initialised as in s5-pytorch's ``S5SSM`` with ``bcInit="dense"``, whose parameters load:
    Lambda are the eigenvalues of the normal part of HiPPO-LegS in ``block_count`` equal blocks, V its eigenvectors, B = V^-1
    times a real matrix, C a complex matrix times V.

    Args:
        d_model: channels H in and out.
        d_state: complex states N.
        block_count: HiPPO blocks, a divisor of the states.
        conj_sym: keep one state of every conjugate pair of the blocks and take 2 Re(C x): twice the real states for the cost
            of N (the published JAX code's default; s5-pytorch keeps both).
        bidir: add a second scan from the end of the sequence, with the right half of C.
        discretization: ``"zoh"`` or ``"bilinear"``.
        shared_step: one step for all states in place of one per state.
        dt_min, dt_max: the steps start log-uniformly in this range.
        step_scale: factor of all steps, for sequences sampled at another rate than the layer was trained on.
        device, dtype: of the parameters; ``Lambda`` and ``C`` are complex of that precision, at least complex64.

    Parameters: ``Lambda`` (N,) complex, ``B`` (N, H, 2) real and imaginary parts, ``C`` (H, N) complex, or (H, 2N) with
    ``bidir``, ``D`` (H,), ``log_step`` (N,), or (1,) with ``shared_step``.
    """

    Lambda: nn.Parameter
    B: nn.Parameter
    C: nn.Parameter
    D: nn.Parameter
    log_step: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        block_count: int = 1,
        conj_sym: bool = False,
        bidir: bool = False,
        discretization: str = "zoh",
        shared_step: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        step_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state)):
            check_integer(name, size, expected="an integer, at least 1")
        if block_count < 1 or d_state % block_count:
            raise bad_argument("block_count", got=block_count, expected=f"a divisor of the {d_state} states")
        if discretization not in DISCRETIZATIONS:
            raise bad_argument("discretization", got=repr(discretization), expected=" or ".join(map(repr, DISCRETIZATIONS)))
        if not 0 < dt_min <= dt_max:
            raise bad_argument("dt_min, dt_max", got=(dt_min, dt_max), expected="0 < dt_min <= dt_max")
        if not step_scale > 0:
            raise bad_argument("step_scale", got=step_scale, expected="a positive number")
        self.d_model, self.block_count = d_model, block_count
        self.conj_sym, self.bidir, self.discretization, self.shared_step = conj_sym, bidir, discretization, shared_step
        self.dt_min, self.dt_max, self.step_scale = dt_min, dt_max, step_scale
        real = torch.get_default_dtype() if dtype is None else dtype
        wide = torch.promote_types(real, torch.float32).to_complex()
        options: dict[str, Any] = {"device": device}
        for name, shape in self.parameter_shapes(d_state).items():
            kind = wide if name in ("Lambda", "C") else real
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=kind, **options)))
        self.reset_parameters()

    def parameter_shapes(self, d_state: int) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter at a given number of states."""
        columns = 2 * d_state if self.bidir else d_state
        steps = 1 if self.shared_step else d_state
        shapes: dict[str, tuple[int, ...]] = {"Lambda": (d_state,), "B": (d_state, self.d_model, 2)}
        return shapes | {"C": (self.d_model, columns), "D": (self.d_model,), "log_step": (steps,)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial parameters.

        The entries of the matrices in front of V^-1 and V are normal, cut off at two standard deviations, of variance
        0.5987 over the fan-in, which is that of the whole tensor but its last axis.
        """
        N, H, blocks = self.d_state, self.d_model, self.block_count
        pairs = 2 if self.conj_sym else 1
        eigenvalues, vectors = hippo_normal(pairs * N // blocks)
        kept = N // blocks  # with conj_sym the half whose imaginary parts are negative
        V = torch.block_diag(*[vectors[:, :kept]] * blocks).to(self.C.dtype).to(self.C.device)
        self.Lambda.copy_(eigenvalues[:kept].repeat(blocks))
        self.B.copy_(torch.view_as_real(V.mH @ self._drawn((pairs * N, H), pairs * N).to(V.dtype)))
        directions = [torch.view_as_complex(self._drawn((H, pairs * N, 2), pairs * N * H)) @ V for _ in range(1 + self.bidir)]
        self.C.copy_(torch.cat(directions, 1))
        self.D.uniform_()
        self.log_step.uniform_(math.log(self.dt_min), math.log(self.dt_max))

    def _drawn(self, shape: tuple[int, ...], fan_in: int) -> Tensor:
        normal = nn.init.trunc_normal_(torch.empty(shape, dtype=self.C.dtype.to_real(), device=self.C.device))
        return normal * (TRUNCATED / math.sqrt(fan_in))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S5:
        """``.to(dtype)``, ``.double()`` and the like act on both parts of complex parameters, of which torch drops one.

        There is no complex half precision: parameters stay complex64.
        """

        def on_parts(tensor: Tensor) -> Tensor:
            if not tensor.is_complex():
                return fn(tensor)
            parts = torch.view_as_real(tensor.resolve_conj())
            converted = fn(parts)
            if converted.dtype not in (torch.float32, torch.float64):
                converted = parts.to(converted.device, torch.float32)
            return torch.view_as_complex(converted.contiguous())

        return super()._apply(on_parts, recurse)

    @property
    def d_state(self) -> int:
        """States N, read from the parameters."""
        return self.Lambda.shape[0]

    @property
    def _state_like(self) -> Tensor:
        return self.Lambda

    def system(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """log_lam (N,), B_bar (N, H) and, for every direction, C (H, N), all complex, of the scans that the layer runs."""
        log_lam, gain = DISCRETIZATIONS[self.discretization](self.Lambda, self.step_scale * self.log_step.exp())
        B = torch.complex(*self.B.to(log_lam.real.dtype).unbind(-1))
        C = 2 * self.C if self.conj_sym else self.C
        return log_lam, gain[:, None] * B, C.chunk(2, 1) if self.bidir else (C,)

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

        Raises:
            ArgumentError: wrong shapes, or a state of a bidirectional layer, which has none between two calls.
        """
        self._check_sequence(x)
        if self.bidir and (initial_state is not None or return_last_state):
            got = "a call with states" if initial_state is None else "an initial state"
            raise bad_argument("initial_state", got=got, expected="none: a bidirectional layer sees whole sequences")
        self.remember(x)
        log_lam, B, (C, *backwards) = self.system()
        y = lti_scan(x, log_lam, B, C, self.D, initial_state=initial_state, return_last_state=return_last_state)
        for reverse in backwards:
            y = y + lti_scan(x.flip(1), log_lam, B, reverse).flip(1)  # type: ignore[operator, union-attr]  # no state was asked for
        return y

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of streaming inference: x (batch, H), state (batch, N) complex -> (y (batch, H), next state)."""
        self._check_step(x, state)
        if self.bidir:
            raise bad_argument("state", got="a step of a bidirectional layer", expected="whole sequences, through forward")
        log_lam, B, (C,) = self.system()
        state = log_lam.exp().to(state.dtype) * state + x.to(state.dtype) @ B.T.to(state.dtype)
        y = (state @ C.T.to(state.dtype)).real + self.D * x.to(state.real.dtype)
        return y.to(x.dtype), state


def hippo_normal(order: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (order,), ascending imaginary parts, and unitary eigenvectors of HiPPO-LegS's normal part, complex128.

    A = -1/2 + S with S skew-symmetric, S_ij = -sqrt((i + 1/2)(j + 1/2)) for i > j (Gu et al. 2022, arXiv 2206.11893).
    """
    p = (torch.arange(order, dtype=torch.float64, device="cpu") + 0.5).sqrt()
    lower = torch.tril(p[:, None] * p[None, :], -1)
    frequency, vectors = torch.linalg.eigh(-1j * (lower.T - lower).to(torch.complex128))
    return torch.complex(torch.full_like(frequency, -0.5), frequency), vectors
