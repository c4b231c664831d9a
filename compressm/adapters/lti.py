"""Layers that are linear time-invariant systems: their analysis by balanced truncation, and data Gramians.

P is the second moment of the states on calibration inputs.  Q is the second moment of the adjoint states
p_t = A^T p_{t+1} + C^T g_t, where g_t is the gradient at the layer's output of sum(out * v) for a random probe v ~ N(0, I)
on the model's output.  Both live in the real coordinates [Re x; Im x].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters.base import Adapter, Analysis, Meter
from compressm.control import (
    Balanced,
    Criterion,
    DiagonalSystem,
    Reduction,
    balance,
    best_modes,
    blend,
    cross_root,
    keep_modes,
    white_gramians,
)
from compressm.errors import DataError, NumericalError
from compressm.kernels import diagonal_scan

BLEND = 1e-2  # share of the data-free Gramians in the data Gramians
CHUNK_BYTES = 64 << 20  # states held at once


@dataclass(frozen=True)
class DataGramians:
    """Second moments of one layer on data.

    Attributes:
        P: (2N, 2N) float64, mean of x x^T.
        Q: (2N, 2N) float64, mean of p p^T; None where no gradient reached the layer.
        sequences: how many sequences were seen.
        rows: how many samples of the state entered P.
    """

    P: Tensor
    Q: Tensor | None
    sequences: int
    rows: int


@dataclass(frozen=True, eq=False)
class LTIAnalysis(Analysis[Reduction]):
    """A balanced system; see :class:`compressm.control.Balanced`."""

    balanced: Balanced
    gramians: str
    hsv: Tensor = field(init=False, repr=False)
    convention: str = field(init=False)
    bounded: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hsv", self.balanced.hsv)
        object.__setattr__(self, "convention", self.balanced.convention)
        object.__setattr__(self, "bounded", self.gramians == "data-free")

    def modes(self, order: int) -> int:
        return self.balanced.modes(order)

    def reduce(self, rank: int) -> Reduction:
        return self.balanced.reduce(rank)

    def spectrum_after(self, reduction: Reduction) -> Tensor:
        """Anew from the reduced system; with data Gramians the kept part, which is what they become in balanced form."""
        if self.bounded:
            return reduction.system.hankel_singular_values(convention=self.convention)
        return self.hsv[: reduction.real_order]

    def scores(self) -> Tensor:
        """Of a mode's two real coordinates together."""
        P, Q = (part.diagonal().real.clamp_min(0) for part in (self.balanced.P, self.balanced.Q))
        return (P * Q).view(-1, self.balanced.system.order).sum(0).sqrt()

    def root(self) -> Tensor:
        return cross_root(self.balanced.P, self.balanced.Q)


@dataclass(frozen=True, eq=False)
class ModalAnalysis(Analysis[Reduction]):
    """Modes ranked by a criterion, the best of which are kept as they are.

    Attributes:
        system: the layer's.
        criterion: that ranks them; the spectrum is its scores, one for every mode.
    """

    system: DiagonalSystem
    criterion: Criterion
    hsv: Tensor = field(init=False, repr=False)
    convention: str = field(init=False, default="modal")
    gramians: str = field(init=False, default="data-free")
    bounded: bool = field(init=False, default=False)
    _scores: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_scores", self.criterion.scores(self.system))
        object.__setattr__(self, "hsv", self._scores.sort(descending=True).values)

    def modes(self, order: int) -> int:
        return min(order, self.system.order)

    def reduce(self, rank: int) -> Reduction:
        return keep_modes(self.system, best_modes(self._scores, rank), self.criterion.name)

    def spectrum_after(self, reduction: Reduction) -> Tensor:
        return self.hsv[: reduction.order]

    def scores(self) -> Tensor:
        return self._scores


class LTIAdapter(Adapter[Reduction]):
    """Adapter of layers that :meth:`read` as a DiagonalSystem; says how calibration taps them."""

    ranked_by = Criterion

    @abstractmethod
    def read(self, module: nn.Module, name: str = "") -> DiagonalSystem:
        """The layer as a system, float64.

        Args:
            module: the layer.
            name: its name in the model, for messages.

        Raises:
            NumericalError: a parameter is NaN or infinite, or an eigenvalue is not inside the unit circle.
            ModelError: a parameter is not a plain parameter (parametrized, missing).
        """

    @abstractmethod
    def layer_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The driving signal (batch, L, H) real and the initial state (batch, N) complex or None of one call."""

    @abstractmethod
    def layer_output(self, output: Any) -> Tensor:
        """The output signal (batch, L, H_out) in what the module's forward returned."""

    @abstractmethod
    def with_output(self, output: Any, signal: Tensor) -> Any:
        """``output`` with its output signal replaced by ``signal``."""

    def bidirectional(self, module: nn.Module) -> bool:
        """Whether a second scan, from the end of the sequence, adds to the output: the lower half of the system's C is its."""
        return False

    def bounded(self, convention: str, measured: bool) -> bool:
        return self.criterion is None and (not measured or convention == "complex")

    def analyse(
        self, module: nn.Module, name: str, convention: str, measured: DataGramians | None
    ) -> Analysis[Reduction]:
        """Balanced with the data Gramians, or data-free where there are none or the convention is the paper's."""
        system = self.read(module, name)
        if self.criterion is not None:
            return ModalAnalysis(system, self.criterion)
        used = used_of(measured, convention)
        return LTIAnalysis(balanced(system, convention, white_gramians(system, convention), used), kind_of(used))

    def meter(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> LTIMeter:
        return LTIMeter(self, self.read(module, name), sequences, rows_per_state, seed, self.bidirectional(module))

    def slowest(self, module: nn.Module) -> float:
        return float(self.read(module).log_lam.real.exp().max())


def planar(weight: Tensor) -> Tensor:
    """[Re; Im], (..., 2N, H), of a complex matrix (..., N, H)."""
    return torch.cat([weight.real, weight.imag], -2).contiguous()


def used_of(measured: DataGramians | None, convention: str) -> DataGramians | None:
    """What of a measurement a convention uses: the complex one is the paper's, which is data-free."""
    return None if convention == "complex" else measured


def kind_of(used: DataGramians | None) -> str:
    """What Gramians are computed from, in words."""
    if used is None:
        return "data-free"
    return "data P, data-free Q" if used.Q is None else "data"


def balanced(
    system: DiagonalSystem, convention: str, white: tuple[Tensor, Tensor], used: DataGramians | None
) -> Balanced:
    """A system balanced with the data Gramians and a share of the data-free (``white``) ones, or with these alone."""
    white_P, white_Q = white
    if used is None:
        return balance(system, convention, white_P, white_Q)
    P = blend(used.P.to(white_P), white_P, BLEND)
    Q = white_Q if used.Q is None else blend(used.Q.to(white_Q), white_Q, BLEND)
    return balance(system, convention, P, Q, fallback_Q=white_Q)


class LTIMeter(Meter):
    """Accumulates P and Q of one layer.

    Two directions have the same states: P is the mean over both, Q the sum, that of a system with both C one above the other.
    """

    def __init__(
        self,
        adapter: LTIAdapter,
        system: DiagonalSystem,
        total: int,
        rows_per_state: int | None,
        seed: int,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.log_lam = system.log_lam
        self.drive = planar(system.B)
        self.senses = [planar(C.mH) for C in system.C.chunk(2 if bidirectional else 1, -2)]
        self.total, self.rows_per_state = total, rows_per_state
        self.random = torch.Generator("cpu").manual_seed(seed)
        n = self.drive.shape[-2]
        self.P = torch.zeros(*self.drive.shape[:-2], n, n, dtype=torch.float64, device=self.drive.device)
        self.Q = torch.zeros_like(self.P)
        self.p_rows = self.q_rows = 0

    def begin(self, seed: int) -> None:
        self.random.manual_seed(seed)

    def merge(self, add: Callable[[Any], Any], join: Callable[[Tensor], Tensor]) -> None:
        self.P, self.Q = add(self.P), add(self.Q)
        self.p_rows, self.q_rows = add(self.p_rows), add(self.q_rows)

    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook: add to P, and put a differentiable copy of the output signal in its place."""
        u, state = self.adapter.layer_input(args, kwargs)
        if u.dim() != 3:
            raise DataError(f"calibration: a layer got an input of shape {tuple(u.shape)}, expected (batch, length, H)")
        if not self.replaying:
            start = None if state is None else torch.cat([state.detach().real, state.detach().imag], -1)
            for backwards in range(len(self.senses)):
                self.p_rows += self._add(self.P, u.detach(), self.drive, start, reverse=bool(backwards), adjoint=False)
        signal = self.adapter.layer_output(output)
        signal = signal.clone() if signal.is_inference() else signal
        watched = signal if signal.requires_grad else signal.detach().requires_grad_()
        self.signals.append(watched)
        return self.adapter.with_output(output, watched.clone())

    def adjoint(self, grad: Tensor) -> None:
        """Add to Q: the gradient at the output, run through A^T against the time of each direction."""
        grad = grad if grad.dim() == 3 else grad[None]
        for backwards, sense in enumerate(self.senses):
            self.q_rows += self._add(self.Q, grad, sense, None, reverse=not backwards, adjoint=True)

    def driven(self, signal: Tensor, weight: Tensor) -> Tensor:
        """What a signal (batch, steps, H) adds to the states in every step, planar (batch, steps, 2 states)."""
        return signal @ weight.T

    def samples(self, states: Tensor) -> Tensor:
        """Planar states (rows, 2 states) in the layout of the Gramians, (..., rows, n)."""
        return states

    @torch.no_grad()
    def _add(
        self, moment: Tensor, signal: Tensor, weight: Tensor, start: Tensor | None, *, reverse: bool, adjoint: bool
    ) -> int:
        """Run the states driven by weight @ signal and add their outer products; returns how many were added.

        Args:
            reverse: from the end of the sequence.
            adjoint: with A^T in place of A.
        """
        dtype = torch.promote_types(signal.dtype, torch.float32)
        device, (batch, length, _) = signal.device, signal.shape
        weight, log_lam = weight.to(device, dtype), self.log_lam.to(device).flatten()
        decay, phase = log_lam.real.to(dtype), log_lam.imag.to(dtype) * (-1 if adjoint else 1)
        n = weight.shape[-2]
        stride = 1
        if self.rows_per_state is not None:
            stride = max(1, self.total * length // (self.rows_per_state * n))
        per_step = 2 * len(log_lam) * torch.finfo(dtype).bits // 8
        steps = max(1, min(length, CHUNK_BYTES // per_step))
        group = max(1, min(batch, CHUNK_BYTES // (per_step * steps)))
        rows = 0
        offsets = torch.randint(stride, (batch, 1), generator=self.random, device="cpu").to(device)
        for first in range(0, batch, group):
            part = signal[first : first + group].to(dtype)
            carry = None if start is None else start[first : first + group].to(device, dtype)
            offset = offsets[first : first + group]
            starts = range(0, length, steps)
            for t in reversed(starts) if reverse else starts:
                x = self.driven(part[:, t : t + steps], weight)
                states = diagonal_scan(x, decay, phase, initial_state=carry, reverse=reverse)
                carry = states[:, 0 if reverse else -1].contiguous()
                time = torch.arange(t, t + x.shape[1], device=device)[None, :]
                sample = states[(time + offset) % stride == 0] if stride > 1 else states.flatten(0, 1)
                rows += sample.shape[0]
                sample = self.samples(sample.to(moment.device, torch.float64))
                moment += sample.mT @ sample
        return rows

    @property
    def reached(self) -> bool:
        return self.p_rows > 0

    def result(self, name: str) -> DataGramians:
        P = self.P / self.p_rows
        Q = self.Q * (len(self.senses) / self.q_rows) if self.q_rows else None
        for letter, gramian in (("P", P), ("Q", Q)):
            if gramian is not None and not bool(torch.isfinite(gramian).all()):
                raise NumericalError(
                    f"calibration: Gramian {letter} of layer {name!r} is not finite, expected finite states on the "
                    "calibration data. Look for NaN or infinity in the batches"
                )
        return DataGramians(P, Q, self.total, self.p_rows)
