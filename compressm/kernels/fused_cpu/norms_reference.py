"""Reference of the normalisations: torch's own, in the wider of the argument's and the weight's dtypes.

The oracle of every other form, in any real dtype including float64.  Autograd differentiates it as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.kernels.core.dtypes import cast


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """Output in x's dtype: a layer norm, or an RMS norm unless ``centred``."""
    work = torch.promote_types(x.dtype, weight.dtype)
    wide, weight, bias = cast(x, work), cast(weight, work), cast(bias, work)
    shape = x.shape[-1:]
    out = F.layer_norm(wide, shape, weight, bias, eps) if centred else F.rms_norm(wide, shape, weight, eps)
    return cast(out, x.dtype)
