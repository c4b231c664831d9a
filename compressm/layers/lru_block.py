"""The residual block of the LRU paper (Orvieto et al., ICML 2023, arXiv 2303.06349, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.errors import bad_argument
from compressm.kernels.fused_cpu import gelu_dropout, glu_dropout_add, linear_glu_dropout_add
from compressm.kernels.fused_cpu.lru_block import lru_block
from compressm.layers._plain import plain
from compressm.layers.lru import LRU
from compressm.layers.norms import LayerNorm


class LRUBlock(nn.Module):
    """x + dropout(GLU(dropout(GELU(LRU(norm(x)))))), the gated linear unit with a linear layer in front.

    Args:
        d_model: channels H in and out.
        d_state: complex states N of the LRU.
        dropout: probability, elementwise, in [0, 1].
        r_min, r_max, max_phase: initial eigenvalues, see :class:`compressm.layers.LRU`.
        device, dtype: of the parameters.

    Modules: ``norm`` (:class:`compressm.layers.LayerNorm`), ``lru``, ``glu`` (``nn.Linear``), ``dropout``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        dropout: float = 0.0,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 6.28,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise bad_argument("dropout", got=dropout, expected="a probability")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        lru = LRU(d_model, d_state, r_min=r_min, r_max=r_max, max_phase=max_phase, **options)  # it checks its arguments
        self.norm = LayerNorm(d_model, **options)
        self.lru = lru
        self.glu = nn.Linear(d_model, 2 * d_model, **options)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, H) -> the same shape.  In eager mode on a CPU one op computes all of it in float32."""
        out = self._in_one_op(x)
        if out is not None:
            return out
        y = self.lru(self.norm(x))
        if not plain(self.dropout, nn.Dropout):
            return x + self.dropout(F.glu(self.glu(self.dropout(F.gelu(y)))))
        p, training = self.dropout.p, self.dropout.training
        y = gelu_dropout(y, p, training)
        if not plain(self.glu, nn.Linear):
            return glu_dropout_add(self.glu(y), x, p, training)
        return linear_glu_dropout_add(y, self.glu.weight, self.glu.bias, x, p, training)

    def _in_one_op(self, x: Tensor) -> Tensor | None:
        """None where the steps have to run one by one: the op cannot run, or a module is more than its parameters."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        norm, lru, glu = self.norm, self.lru, self.glu
        whole = plain(norm, LayerNorm) and plain(lru, LRU) and plain(glu, nn.Linear) and plain(self.dropout, nn.Dropout)
        if not whole or norm.weight is None or x.dim() != 3 or x.shape[-1] != lru.d_model:
            return None
        out = lru_block(
            x, norm.weight, norm.bias, norm.eps, lru.nu_log, lru.theta_log, lru.gamma_log, lru.B_re, lru.B_im, lru.C_re,
            lru.C_im, lru.D, glu.weight, glu.bias, self.dropout.p if self.dropout.training else 0.0,
        )  # fmt: skip
        if out is not None:
            lru.remember(x)
        return out
