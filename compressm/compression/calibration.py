"""Data Gramians: which states the data really excite (P) and which the model's output really feels (Q).

P is the second moment of the states on calibration inputs.  Q is the second moment of the adjoint states
p_t = A^T p_{t+1} + C^T g_t, where g_t is the gradient at the layer's output of sum(out * v) for a random probe v ~ N(0, I)
on the model's output.  Both live in the real coordinates [Re x; Im x].  One forward and one backward pass per batch serve
all layers.  The model, its buffers, modes and gradients, and the random number generators are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters import Adapter
from compressm.compression._batches import default_forward, output_tensor, take
from compressm.compression._undisturbed import undisturbed
from compressm.control import DiagonalSystem
from compressm.errors import DataError, NumericalError, bad_argument
from compressm.kernels import diagonal_scan

CHUNK_BYTES = 64 << 20  # states held at once
ROWS_PER_STATE = 32  # samples of the state per real state that enter the outer products

Layers = Mapping[str, tuple[nn.Module, Adapter]]
Forward = Callable[[nn.Module, Any], Any]


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


def collect(
    model: nn.Module,
    layers: Layers,
    systems: Mapping[str, DiagonalSystem],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    sequences: int = 64,
    rows_per_state: int | None = ROWS_PER_STATE,
    seed: int = 0,
) -> dict[str, DataGramians]:
    """Measure P and Q of every layer.

    Args:
        model: run in eval mode.
        layers, systems: from ``find_layers`` and the adapters' ``read``, by module name.
        batches: each a tensor, a tuple or list whose first entry is the input, or a dict of keyword arguments.
        forward: ``forward(model, batch) -> output`` for models that are called differently.
        sequences: at most so many sequences are used; the first dimension of a batch counts them.
        rows_per_state: time steps are subsampled evenly, every sequence with an offset of its own, so that about
            ``rows_per_state * 2N`` samples enter the outer products of a layer; None uses all.
        seed: of the random probes and offsets.

    Raises:
        DataError: no batch, or a layer that no batch reaches.
        ArgumentError: a batch of unknown kind.
        NumericalError: the states or adjoint states are not finite.
    """
    if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
        raise bad_argument("sequences", got=repr(sequences), expected="a positive integer")
    with undisturbed(model, [module for module, _ in layers.values()]):
        taken = take(batches, sequences)
        total = sum(count for _, count in taken)
        meters = {name: _Meter(adapter, systems[name], total, rows_per_state, seed) for name, (_, adapter) in layers.items()}
        handles = [module.register_forward_hook(meters[name].observe, with_kwargs=True) for name, (module, _) in layers.items()]
        try:
            for index, (batch, _) in enumerate(taken):
                _probe(model, batch, forward or default_forward, meters, seed + index)
        finally:
            for handle in handles:
                handle.remove()
    unreached = [name for name, meter in meters.items() if meter.p_rows == 0]
    if unreached:
        raise DataError(
            f"calibration: no batch reached layer(s) {', '.join(map(repr, unreached))} through their forward, expected every "
            "state-space layer to run. Pass forward=lambda model, batch: ... that runs the whole model"
        )
    return {name: meter.result(name, total) for name, meter in meters.items()}


def _probe(model: nn.Module, batch: Any, forward: Forward, meters: Mapping[str, _Meter], seed: int) -> None:
    """One forward pass and one backward pass of a random probe."""
    out = output_tensor(forward(model, batch))
    watched = [(meter, signal) for meter in meters.values() for signal in meter.signals]
    if out.requires_grad and watched:
        generator = torch.Generator(device=out.device).manual_seed(seed)
        probe = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(out.dtype)
        grads = torch.autograd.grad([out], [signal for _, signal in watched], [probe], allow_unused=True)
        for (meter, _), grad in zip(watched, grads, strict=True):
            if grad is not None:
                meter.adjoint(grad)
    for meter in meters.values():
        meter.signals.clear()


class _Meter:
    """Accumulates P and Q of one layer."""

    def __init__(self, adapter: Adapter, system: DiagonalSystem, total: int, rows_per_state: int | None, seed: int) -> None:
        self.adapter = adapter
        self.log_lam = system.log_lam
        self.drive = torch.cat([system.B.real, system.B.imag])  # (2N, H)
        self.sense = torch.cat([system.C.real, -system.C.imag], 1).T.contiguous()  # (2N, H_out)
        self.total, self.rows_per_state = total, rows_per_state
        self.random = torch.Generator().manual_seed(seed)
        n = self.drive.shape[0]
        self.P = torch.zeros(n, n, dtype=torch.float64, device=self.drive.device)
        self.Q = torch.zeros_like(self.P)
        self.p_rows = self.q_rows = 0
        self.signals: list[Tensor] = []

    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook: add to P, and put a differentiable copy of the output signal in its place."""
        u, state = self.adapter.layer_input(args, kwargs)
        if u.dim() != 3:
            raise DataError(f"calibration: a layer got an input of shape {tuple(u.shape)}, expected (batch, length, H)")
        start = None if state is None else torch.cat([state.detach().real, state.detach().imag], -1)
        self.p_rows += self._add(self.P, u.detach(), self.drive, start, reverse=False)
        signal = self.adapter.layer_output(output)
        watched = signal if signal.requires_grad else signal.detach().requires_grad_()
        self.signals.append(watched)
        return self.adapter.with_output(output, watched.clone())

    def adjoint(self, grad: Tensor) -> None:
        """Add to Q: the gradient at the output, run backwards in time through A^T."""
        self.q_rows += self._add(self.Q, grad, self.sense, None, reverse=True)

    @torch.no_grad()
    def _add(self, moment: Tensor, signal: Tensor, weight: Tensor, start: Tensor | None, reverse: bool) -> int:
        """Run the states driven by weight @ signal and add their outer products; returns how many were added."""
        dtype = torch.promote_types(signal.dtype, torch.float32)
        device, (batch, length, _) = signal.device, signal.shape
        weight, log_lam = weight.to(device, dtype), self.log_lam.to(device)
        decay, phase = log_lam.real.to(dtype), log_lam.imag.to(dtype)
        n = weight.shape[0]
        stride = 1
        if self.rows_per_state is not None:
            stride = max(1, self.total * length // (self.rows_per_state * n))
        per_step = n * torch.finfo(dtype).bits // 8
        steps = max(1, min(length, CHUNK_BYTES // per_step))
        group = max(1, min(batch, CHUNK_BYTES // (per_step * steps)))
        rows = 0
        offsets = torch.randint(stride, (batch, 1), generator=self.random).to(device)
        for first in range(0, batch, group):
            part = signal[first : first + group].to(dtype)
            carry = None if start is None else start[first : first + group].to(device, dtype)
            offset = offsets[first : first + group]
            starts = range(0, length, steps)
            for t in reversed(starts) if reverse else starts:
                x = part[:, t : t + steps] @ weight.T
                states = diagonal_scan(x, decay, -phase if reverse else phase, initial_state=carry, reverse=reverse)
                carry = states[:, 0 if reverse else -1].contiguous()
                time = torch.arange(t, t + x.shape[1], device=device)[None, :]
                sample = states[(time + offset) % stride == 0] if stride > 1 else states.flatten(0, 1)
                sample = sample.to(moment.device, torch.float64)
                moment += sample.T @ sample
                rows += sample.shape[0]
        return rows

    def result(self, name: str, sequences: int) -> DataGramians:
        P = self.P / self.p_rows
        Q = self.Q / self.q_rows if self.q_rows else None
        for letter, gramian in (("P", P), ("Q", Q)):
            if gramian is not None and not bool(torch.isfinite(gramian).all()):
                raise NumericalError(
                    f"calibration: Gramian {letter} of layer {name!r} is not finite, expected finite states on the "
                    "calibration data. Look for NaN or infinity in the batches"
                )
        return DataGramians(P, Q, sequences, self.p_rows)
