"""What recurrences with matrix-valued states are given on calibration data, and their states at some of the steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters._moment_meter import check_moments
from compressm.adapters._tokens import real_tokens
from compressm.adapters.base import Meter
from compressm.adapters.parameters import layer_input
from compressm.control import MatrixMoments

LOOKS = 512  # at most so many times are the states of one sequence looked at, of all sequences together
KEPT_BYTES = 32 << 20  # of second moments of single looks, per layer

# States (batch, H, P, N) behind a part of the steps, of those in front (None: of the sequence), whose memory it may take.
Advance = Callable[[Tensor | None, slice], Tensor]


class StateMeter(Meter):
    """E[k k^T] and E[q q^T] over all tokens, E[z z^T] and single second moments of the states over evenly spaced steps.

    Args:
        groups, order: G and N of the recurrence.
        projection: name of the first projection, whose precision the input takes.
        device: where moments are summed.
        sequences, rows_per_state, seed: as in ``Adapter.meter``; there are at most LOOKS.

    Attributes:
        letters: how messages call E[k k^T] and E[q q^T].
    """

    letters = ("E[k k^T]", "E[q q^T]")

    def __init__(
        self,
        groups: int,
        order: int,
        projection: str,
        device: torch.device,
        sequences: int,
        rows_per_state: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.groups, self.sequences, self.projection = groups, sequences, projection
        self.looks = None if rows_per_state is None else min(LOOKS, rows_per_state * order)
        self.random = torch.Generator("cpu").manual_seed(seed)
        self.P, self.Q, self.Z, self.S = torch.zeros(4, groups, order, order, dtype=torch.float64, device=device)
        self.tokens = self.looked = 0
        self.left = max(1, KEPT_BYTES // (4 * groups * order**2))  # single looks that are still kept
        self.M: list[Tensor] = []
        self.q: list[Tensor] = []

    @abstractmethod
    def read(self, module: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Advance]:
        """Of hidden states (batch, L, d_model): keys and queries (batch, L, G, N), and what carries the states on."""

    @property
    def reached(self) -> bool:
        return self.tokens > 0

    def begin(self, seed: int) -> None:
        self.random.manual_seed(seed)

    def merge(self, add: Callable[[Any], Any], join: Callable[[Tensor], Tensor]) -> None:
        self.P, self.Q, self.Z, self.S = (add(total) for total in (self.P, self.Q, self.Z, self.S))
        self.tokens, self.looked = add(self.tokens), add(self.looked)
        self.M, self.q = ([join(part)] for part in self._kept())

    @torch.no_grad()
    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.replaying:
            return
        hidden = layer_input(module, args, kwargs, self.projection)
        real = real_tokens(kwargs, hidden)
        keys, queries, advance = self.read(module, hidden, kwargs)
        self.tokens += int(real.sum())
        for total, part in ((self.P, keys), (self.Q, queries)):
            rows = part[real].permute(1, 0, 2).to(torch.promote_types(part.dtype, torch.float32))
            total += (rows.mT @ rows).double()
        length, begin, state = hidden.shape[1], 0, None
        stride = 1 if self.looks is None else max(1, self.sequences * length // self.looks)
        first = int(torch.randint(min(stride, length), (1,), generator=self.random, device="cpu")) if length else 0
        for step in range(first, length, stride):
            state = advance(state, slice(begin, step + 1))
            self._look(state, queries[:, step], real[:, step])
            begin = step + 1

    def _look(self, state: Tensor, q: Tensor, real: Tensor) -> None:
        """One step of all sequences: state (batch, H, P, N), q (batch, G, N), real (batch,)."""
        if not bool(real.all()):
            state, q = state[real], q[real]
        S = state.unflatten(1, (self.groups, -1)).flatten(2, 3)
        M, q = S.mT @ S, q.to(S.dtype)
        self.Z += (M * q[..., :, None] * q[..., None, :]).sum(0, dtype=torch.float64)
        self.S += M.sum(0, dtype=torch.float64)
        self.looked += len(M)
        self.M.append(M[: self.left].float().cpu())
        self.q.append(q[: self.left].float().cpu())
        self.left -= len(self.M[-1])

    def _kept(self) -> tuple[Tensor, Tensor]:
        shape = self.P.shape
        M, q = torch.empty(0, *shape, device="cpu"), torch.empty(0, *shape[:2], device="cpu")
        return torch.cat([M, *self.M]), torch.cat([q, *self.q])

    def result(self, name: str) -> MatrixMoments:
        M, q = (part.to(self.P.device) for part in self._kept())
        P, Q = self.P / self.tokens, self.Q / self.tokens
        Z, S = (total / max(1, self.looked) for total in (self.Z, self.S))
        check_moments(dict(zip((*self.letters, "E[z z^T]", "E[S S^T]"), (P, Q, Z, S), strict=True)), name)
        return self.moments(P, Q, Z, S, M, q)

    def moments(self, P: Tensor, Q: Tensor, Z: Tensor, S: Tensor, M: Tensor, q: Tensor) -> MatrixMoments:
        """What E[k k^T], E[q q^T], E[z z^T], E[S S^T] and single looks are to a reduction."""
        return MatrixMoments(P, Q, Z, M, q)
