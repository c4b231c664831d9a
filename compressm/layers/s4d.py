"""S4D, diagonal state spaces per channel (Gu, Gupta, Goel and Re, NeurIPS 2022, arXiv 2206.11893)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import bad_argument
from compressm.kernels import KernelPlan, diagonal_scan
from compressm.kernels.lti_scan.op import without_autocast
from compressm.layers._discretization import zoh
from compressm.layers._fft_convolution import convolve
from compressm.layers._vandermonde import last_state, response

INITIAL = ("lin", "inv", "real")
MODES = ("auto", "convolution", "recurrent")
FEW = 6  # modes up to which a step of the recurrence, 24 operations each, costs less than a step's 15 log2(2 L) of the FFTs


class S4DKernel(nn.Module):
    """The modes of H single-input single-output systems: A = -exp(log_A_real) + i A_imag, B = 1, C, at steps exp(log_dt).

    Args:
        d_model: channels H.
        N: real states of a channel; N / 2 complex modes stand for as many conjugate pairs.
        dt_min, dt_max: the steps start log-uniformly in this range.
        lr: learning rate of all but C, told to optimizers by the parameters' ``_optim``, as in the published code.
        init: ``"lin"`` A_n = -1/2 + i pi n, ``"inv"`` A_n = -1/2 + i N/pi (N / (2n + 1) - 1), ``"real"`` A_n = -(n + 1).
        device, dtype: of the parameters, real.

    Parameters: ``C`` (H, N/2, 2), ``log_dt`` (H,), ``log_A_real`` and ``A_imag`` (H, N/2).
    """

    def __init__(
        self,
        d_model: int,
        N: int = 64,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        lr: float | None = None,
        init: str = "lin",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if N < 2 or N % 2:
            raise bad_argument("d_state", got=N, expected="an even number of real states, two of every complex mode")
        if not 0 < dt_min <= dt_max:
            raise bad_argument("dt_min, dt_max", got=(dt_min, dt_max), expected="0 < dt_min <= dt_max")
        if init not in INITIAL:
            raise bad_argument("init", got=repr(init), expected=f"one of {', '.join(INITIAL)}")
        self.dt_min, self.dt_max, self.init = dt_min, dt_max, init
        modes, options = (d_model, N // 2), dict[str, Any](device=device, dtype=dtype)
        self.C = nn.Parameter(torch.empty(*modes, 2, **options))
        self.log_dt = nn.Parameter(torch.empty(d_model, **options))
        self.log_A_real = nn.Parameter(torch.empty(modes, **options))
        self.A_imag = nn.Parameter(torch.empty(modes, **options))
        for parameter in (self.log_dt, self.log_A_real, self.A_imag):
            vars(parameter)["_optim"] = {"weight_decay": 0.0} | ({} if lr is None else {"lr": lr})
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        modes = self.C.shape[1]
        n = torch.arange(modes, dtype=torch.float64, device=self.C.device)
        real, imag = torch.full_like(n, 0.5), math.pi * n
        if self.init == "inv":
            imag = 2 * modes / math.pi * (2 * modes / (2 * n + 1) - 1)
        elif self.init == "real":
            real, imag = n + 1, torch.zeros_like(n)
        self.C.normal_(std=math.sqrt(0.5))
        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
        self.log_A_real.copy_(real.log())
        self.A_imag.copy_(imag)

    def system(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """log_lam and gain, (H, N/2) complex: a channel's response to an impulse is Re sum_n gain_n lam_n^t.

        Args:
            dtype: real precision to compute in; that of the parameters, at least float32.
        """
        work = torch.promote_types(self.C.dtype, torch.float32) if dtype is None else dtype
        C, log_dt, log_A_real, A_imag = (p.to(work) for p in (self.C, self.log_dt, self.log_A_real, self.A_imag))
        log_lam, gain = zoh(torch.complex(-log_A_real.exp(), A_imag), log_dt.exp()[:, None])
        return log_lam, 2 * torch.complex(*C.unbind(-1)) * gain

    def forward(self, L: int) -> Tensor:
        """The convolution kernel, (H, L)."""
        log_lam, gain = self.system()
        return response(gain, log_lam, L)


class S4D(nn.Module):
    """GLU(W dropout(GELU(y))) of y = SSM(u) + D u, a state space of its own in every channel.

    Sub-modules, parameters and their initialisation are those of the standalone S4D of state-spaces/s4, whose checkpoints load.
    A sequence runs as a convolution by FFT, whose cost hardly depends on the states, or, where few are left, as a recurrence;
    :attr:`kernel_plan` says which.  A single-input system has little to give up: expect smaller gains from fewer states than of
    layers whose states are shared by all channels.

    Args:
        d_model: channels H in and out.
        d_state: real states N of a channel, twice the complex modes that the parameters hold; ranks count the modes.
        dropout: probability by which whole channels are dropped.
        transposed: (batch, H, L) in and out, as in the published code, or else (batch, L, H).
        mode: ``"convolution"``, ``"recurrent"``, or ``"auto"``: the recurrence of few modes, the convolution of more.
        dt_min, dt_max, lr, init: see :class:`S4DKernel`.
        device, dtype: of the parameters.

    Parameters: ``D`` (H,), ``kernel`` (:class:`S4DKernel`), ``output_linear.0`` (a convolution of one tap, H to 2H).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dropout: float = 0.0,
        transposed: bool = True,
        *,
        mode: str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        lr: float | None = None,
        init: str = "lin",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise bad_argument("d_model", got=d_model, expected="at least 1")
        if not 0 <= dropout <= 1:
            raise bad_argument("dropout", got=dropout, expected="a probability")
        if mode not in MODES:
            raise bad_argument("mode", got=repr(mode), expected=f"one of {', '.join(MODES)}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.transposed, self.mode = d_model, transposed, mode
        self._called = False
        self.D = nn.Parameter(torch.randn(d_model, **options))
        self.kernel = S4DKernel(d_model, d_state, dt_min, dt_max, lr, init, **options)
        self.activation = nn.GELU()
        self.dropout: nn.Module = nn.Dropout1d(dropout) if dropout > 0 else nn.Identity()
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, kernel_size=1, **options), nn.GLU(dim=-2))

    @property
    def d_state(self) -> int:
        """Real states N of a channel, read from the parameters."""
        return 2 * self.kernel.C.shape[1]

    @property
    def kernel_plan(self) -> KernelPlan | None:
        """How sequences run at the present number of states; None before the first call."""
        if not self._called:
            return None
        modes, form = self.kernel.C.shape[1], "recurrent" if self._recurrent else "convolution"
        why = f"{'at most' if modes <= FEW else 'more than'} {FEW} modes" if self.mode == "auto" else f"mode={self.mode!r}"
        return KernelPlan("s4d", "diagonal_scan" if self._recurrent else "fft", form, (("N", modes),), why)

    @property
    def _recurrent(self) -> bool:
        return self.mode == "recurrent" or (self.mode == "auto" and self.kernel.C.shape[1] <= FEW)

    def initial_state(self, batch: int) -> Tensor:
        """The zero state (batch, H, N/2), complex."""
        dtype = torch.promote_types(self.kernel.C.dtype, torch.float32).to_complex()
        return torch.zeros(batch, *self.kernel.C.shape[:2], dtype=dtype, device=self.kernel.C.device)

    def forward(
        self, u: Tensor, initial_state: Tensor | None = None, return_last_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over a sequence.

        Args:
            u: (batch, H, L), or (batch, L, H) if not ``transposed``.
            initial_state: (batch, H, N/2) complex or None for zero.
            return_last_state: also return the state after the last step, (batch, H, N/2) complex.

        Returns:
            the output in u's layout and dtype, or (output, last state).
        """
        if u.dim() != 3 or u.shape[1 if self.transposed else 2] != self.d_model:
            expected = f"(batch, {self.d_model}, length)" if self.transposed else f"(batch, length, {self.d_model})"
            raise bad_argument("u", got=f"shape {tuple(u.shape)}", expected=expected)
        u = u if self.transposed else u.mT
        if initial_state is not None:
            self._check_state(initial_state, u.shape[0])
        if not torch.compiler.is_compiling():
            self._called = True
        y, last = self.scan(u, initial_state, return_last_state)
        y = self.output_linear(self.dropout(self.activation(y)))
        y = y if self.transposed else y.mT
        return y if last is None else (y, last)

    def scan(self, u: Tensor, state: Tensor | None = None, return_last_state: bool = False) -> tuple[Tensor, Tensor | None]:
        """The state space and the skip alone: u (batch, H, L) -> the same shape, and the last state if asked for."""
        work = torch.promote_types(u.dtype, torch.float32)
        with without_autocast(u.device.type):
            log_lam, gain = self.kernel.system(work)
            run = _recurrence if self._recurrent else _convolution
            y, last = run(u.to(work), log_lam, gain, self.D.to(work), state, return_last_state)
            return y.to(u.dtype), last

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of streaming inference: u (batch, H), state (batch, H, N/2) complex -> (output (batch, H), next state)."""
        if u.dim() != 2 or u.shape[-1] != self.d_model:
            raise bad_argument("u", got=f"shape {tuple(u.shape)}", expected=f"(batch, {self.d_model})")
        self._check_state(state, u.shape[0])
        log_lam, gain = self.kernel.system()
        state = log_lam.exp().to(state.dtype) * state + u[..., None]
        y = ((gain.to(state.dtype) * state).sum(-1).real + self.D * u).to(u.dtype)
        return self.output_linear(self.dropout(self.activation(y[..., None])))[..., 0], state

    def _check_state(self, state: Tensor, batch: int) -> None:
        shape = (batch, *self.kernel.C.shape[:2])
        if state.shape != shape or not state.is_complex():
            remedy = "A state from before a reduction has more states: begin anew, from initial_state(batch)"
            got = f"{tuple(state.shape)} of {state.dtype}"
            raise bad_argument("state", got=got, expected=f"{shape}, complex", remedy=remedy)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, transposed={self.transposed}"


def _convolution(
    u: Tensor, log_lam: Tensor, gain: Tensor, D: Tensor, state: Tensor | None, return_last_state: bool
) -> tuple[Tensor, Tensor | None]:
    """y (batch, H, L) and the last state, by FFT; the skip is a part of the kernel's first entry."""
    length = u.shape[-1]
    first, *rest = response(gain, log_lam, length).split([1, length - 1], -1)
    y = convolve(u, torch.cat([first + D[:, None], *rest], -1))
    if state is not None:
        y = y + response(gain * log_lam.exp() * state, log_lam, length)
    if not return_last_state:
        return y, None
    last = last_state(u, log_lam)
    return y, last if state is None else last + torch.exp(length * log_lam) * state


def _recurrence(
    u: Tensor, log_lam: Tensor, gain: Tensor, D: Tensor, state: Tensor | None, return_last_state: bool
) -> tuple[Tensor, Tensor | None]:
    """The same, step by step: one scan over the modes of all channels."""
    batch, _, length = u.shape
    channels, modes = log_lam.shape
    drive = u.mT[..., None].expand(batch, length, channels, modes).flatten(2)
    start = None if state is None else torch.cat([state.real.flatten(1), state.imag.flatten(1)], 1)
    planar = diagonal_scan(
        torch.cat([drive, torch.zeros_like(drive)], -1), log_lam.real.flatten(), log_lam.imag.flatten(), initial_state=start
    ).unflatten(-1, (2, channels, modes))
    y = (planar[:, :, 0] * gain.real - planar[:, :, 1] * gain.imag).sum(-1).mT
    return y + u * D[:, None], torch.complex(planar[:, -1, 0], planar[:, -1, 1]) if return_last_state else None
