"""Reference of the normalisations: torch's own, in the wider of the argument's and the weight's dtypes.

The oracle of every other form, in any real dtype including float64.  Autograd differentiates it as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """Output in x's dtype: a layer norm, or an RMS norm unless ``centred``."""
    work = torch.promote_types(x.dtype, weight.dtype)
    x_work, weight, bias = (None if t is None else t.to(work) for t in (x, weight, bias))
    shape = x.shape[-1:]
    out = F.layer_norm(x_work, shape, weight, bias, eps) if centred else F.rms_norm(x_work, shape, weight, eps)
    return out.to(x.dtype)
