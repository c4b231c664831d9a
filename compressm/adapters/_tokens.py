"""Which tokens of a calibration batch count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressm.errors import DataError


def real_tokens(kwargs: Mapping[str, Any], steps: Tensor) -> Tensor:
    """(batch, L) bool, where a mixer's call has a token and no padding; of the keyword arguments and a tensor (batch, L, ...).

    Raises:
        DataError: sequences are packed into rows.
    """
    for name in ("seq_idx", "cu_seqlens"):
        if kwargs.get(name) is not None:
            raise DataError(f"calibration: {name} packs several sequences into one, expected each in a row of its own")
    mask = kwargs.get("attention_mask")
    return torch.ones(steps.shape[:2], dtype=torch.bool, device=steps.device) if mask is None else mask.bool()
