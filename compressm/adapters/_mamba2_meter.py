"""What the scans of Mamba-2 layers are given on calibration data, and their states at some of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters._tokens import real_tokens
from compressm.adapters.base import Meter, layer_input
from compressm.control import MatrixMoments
from compressm.errors import NumericalError
from compressm.layers.mamba2_mixer import ScanInputs, limits, read
from compressm.layers.mamba_mixer import decay

LOOKS = 512  # at most so many times are the states of one sequence looked at, of all sequences together
KEPT_BYTES = 32 << 20  # of second moments of single looks, per layer


class Mamba2Meter(Meter):
    """E[B B^T] and E[C C^T] over all tokens, E[z z^T] and single second moments of the states over evenly spaced steps.

    Args:
        groups, order: G and N of the scan.
        device: where moments are summed.
        sequences, rows_per_state, seed: as in ``Adapter.meter``; there are at most LOOKS.
    """

    part = "in_proj"

    def __init__(
        self, groups: int, order: int, device: torch.device, sequences: int, rows_per_state: int | None, seed: int
    ) -> None:
        super().__init__()
        self.groups, self.sequences = groups, sequences
        self.looks = None if rows_per_state is None else min(LOOKS, rows_per_state * order)
        self.random = torch.Generator("cpu").manual_seed(seed)
        self.P, self.Q, self.Z = torch.zeros(3, groups, order, order, dtype=torch.float64, device=device)
        self.tokens = self.looked = 0
        self.projected: Tensor | None = None  # of the call that now runs
        self.left = max(1, KEPT_BYTES // (4 * groups * order**2))  # single looks that are still kept
        self.M: list[Tensor] = []
        self.C: list[Tensor] = []

    @property
    def reached(self) -> bool:
        return self.tokens > 0

    def begin(self, seed: int) -> None:
        self.random.manual_seed(seed)

    def merge(self, add: Callable[[Any], Any], join: Callable[[Tensor], Tensor]) -> None:
        self.P, self.Q, self.Z = add(self.P), add(self.Q), add(self.Z)
        self.tokens, self.looked = add(self.tokens), add(self.looked)
        self.M, self.C = ([join(part)] for part in self._kept())

    def part_output(self, output: Any) -> None:
        self.projected = output.detach() if isinstance(output, Tensor) and not self.replaying else None

    @torch.no_grad()
    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.replaying:
            return
        hidden = layer_input(module, args, kwargs)
        real = real_tokens(kwargs, hidden)
        projected, self.projected = self.projected, None
        if projected is not None and (projected.shape[:-1] != hidden.shape[:-1] or projected.dtype != hidden.dtype):
            projected = None  # of rows in another order, or rounded by autocast
        inputs, dt = read(module, hidden, kwargs.get("attention_mask"), projected)
        self.tokens += int(real.sum())
        for total, part in ((self.P, inputs.B), (self.Q, inputs.C)):
            rows = part[real].permute(1, 0, 2).to(_wide(part))
            total += (rows.mT @ rows).double()
        length = dt.shape[1]
        stride = 1 if self.looks is None else max(1, self.sequences * length // self.looks)
        first = int(torch.randint(min(stride, length), (1,), generator=self.random, device="cpu")) if length else 0
        state, begin = _initial(module, inputs), 0
        x, log_decays = _stepped(module, inputs.x, dt)
        for step in range(first, length, stride):
            part = slice(begin, step + 1)
            _advance(x[:, part], inputs.B[:, part], log_decays[:, part], state)
            self._look(state, inputs.C[:, step], real[:, step])
            begin = step + 1

    def _look(self, state: Tensor, C: Tensor, real: Tensor) -> None:
        """One step of all sequences: state (batch, H, P, N), C (batch, G, N), real (batch,)."""
        if not bool(real.all()):
            state, C = state[real], C[real]
        S = state.unflatten(1, (self.groups, -1)).flatten(2, 3)
        M, C = S.mT @ S, C.to(S.dtype)
        self.Z += (M * C[..., :, None] * C[..., None, :]).sum(0, dtype=torch.float64)
        self.looked += len(M)
        self.M.append(M[: self.left].float().cpu())
        self.C.append(C[: self.left].float().cpu())
        self.left -= len(self.M[-1])

    def _kept(self) -> tuple[Tensor, Tensor]:
        shape = self.P.shape
        M, C = torch.empty(0, *shape, device="cpu"), torch.empty(0, *shape[:2], device="cpu")
        return torch.cat([M, *self.M]), torch.cat([C, *self.C])

    def result(self, name: str) -> MatrixMoments:
        M, C = (part.to(self.P.device) for part in self._kept())
        P, Q, Z = self.P / self.tokens, self.Q / self.tokens, self.Z / max(1, self.looked)
        for letters, matrix in (("E[B B^T]", P), ("E[C C^T]", Q), ("E[z z^T]", Z)):
            if not bool(torch.isfinite(matrix).all()):
                raise NumericalError(
                    f"calibration: {letters} of layer {name!r} is not finite, expected finite states on the calibration "
                    "data. Look for NaN or infinity in the batches"
                )
        return MatrixMoments(P, Q, Z, M, C)


def _initial(module: nn.Module, inputs: ScanInputs) -> Tensor:
    """The states (batch, H, P, N) in front of a sequence, zero where a layer does not learn them."""
    states, (batch, _, heads, channels) = module._parameters.get("init_states"), inputs.x.shape
    zero = inputs.B.new_zeros(heads, channels, inputs.B.shape[-1], dtype=_wide(inputs.B))
    return (zero if states is None else states.to(zero)).repeat(batch, 1, 1, 1)


def _stepped(module: nn.Module, x: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """dt x (batch, L, H, P), and dt A (batch, L, H)."""
    bias: Any = module.dt_bias
    steps = F.softplus(dt.to(_wide(dt)) + bias).clamp(*limits(module))
    return x * steps[..., None], steps * decay(module)


def _advance(x: Tensor, B: Tensor, log_decays: Tensor, state: Tensor) -> None:
    """Take the states (batch, H, P, N), in place, over some of the steps; the other arguments are (batch, steps, ...)."""
    after = log_decays.flip(1).cumsum(1).flip(1)  # decay of a step and those behind it
    x = x * torch.exp(after - log_decays)[..., None]
    rows = x.unflatten(2, (B.shape[2], -1)).flatten(3).permute(0, 2, 3, 1).flatten(0, 1)
    state *= torch.exp(after[:, 0])[..., None, None]
    state.view(len(rows), -1, B.shape[-1]).baddbmm_(rows, B.to(x.dtype).transpose(1, 2).flatten(0, 1))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
