"""What the recurrences of linear attention layers are given on calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters import _rotary as rotary
from compressm.adapters._linear_mixer import features, log_decays, values
from compressm.adapters._moment_meter import MomentMeter
from compressm.adapters._state_meter import Advance, StateMeter
from compressm.control import MatrixMoments
from compressm.kernels import linear_attention


class LinearMeter(MomentMeter):
    """E[k k^T] and E[q q^T] over all tokens, the latter summed over the heads that share a key."""

    def vectors(self, module: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        q, k = features(module, hidden, kwargs.get("attention_mask"))
        return k, q.unflatten(2, (k.shape[2], -1))


class TurningMeter(StateMeter):
    """Where pairs of channels turn with their position: E[z z^T] of turned queries and the states of turned keys.

    Every head counts as a group.
    """

    def read(self, module: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Advance]:
        mask = kwargs.get("attention_mask")
        (q, k), v = features(module, hidden, mask), values(module, hidden, mask)
        share = q.shape[2] // k.shape[2]
        q, k, v = rotary.turned(module, q), rotary.turned(module, k).repeat_interleave(share, 2), v.repeat_interleave(share, 2)
        g = log_decays(module, hidden)
        g = None if g is None else g.to(torch.promote_types(q.dtype, torch.float32))

        def advance(state: Tensor | None, part: slice) -> Tensor:
            start = None if state is None else state.mT
            decays = g if g is None or g.dim() == 1 else g[:, part]
            inputs = q[:, part], k[:, part], v[:, part], decays
            _, last = linear_attention(*inputs, initial_state=start, output_final_state=True)
            assert last is not None  # asked for
            return last.mT

        return k, q, advance


class DecayingMeter(StateMeter):
    """Where every channel has a decay: E[S S^T] for keys, as states of channels that decay differently are not like their
    keys."""

    def read(self, module: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Advance]:
        mask = kwargs.get("attention_mask")
        (q, k), v, g = features(module, hidden, mask), values(module, hidden, mask), log_decays(module, hidden)
        assert g is not None  # one for every channel

        def advance(state: Tensor | None, part: slice) -> Tensor:
            start = None if state is None else state.mT
            inputs = q[:, part], k[:, part], v[:, part], g[:, part]
            _, last = linear_attention(*inputs, initial_state=start, output_final_state=True)
            assert last is not None  # asked for
            return last.mT

        return k, q, advance

    def moments(self, P: Tensor, Q: Tensor, Z: Tensor, S: Tensor, M: Tensor, q: Tensor) -> MatrixMoments:
        return MatrixMoments(S, Q, Z, M, q)
