"""What mamba_ssm's Mamba-2 modules call, with its names and arguments, on compressm's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.errors import BackendError
from compressm.kernels import causal_conv1d, ssd
from compressm.layers.gated_norm import gated_rms_norm


def mamba_chunk_scan_combined(*args: Any, return_varlen_states: bool = False, **kwargs: Any) -> Any:
    """:func:`compressm.kernels.ssd`, whose arguments are those of mamba_ssm's function.

    Raises:
        BackendError: the states of packed sequences are wanted beside those of the rows.
    """
    if return_varlen_states:
        raise BackendError("return_varlen_states: not on a CPU. Run each sequence in a row of its own")
    return ssd(*args, **kwargs)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """A Mamba-2 mixer behind its first projection: convolution, scan, gate, norm and, with a weight, the last projection.

    Args:
        zxbcdt: (batch, L, 2 M + 2 H P + 2 G N + H): gate and input of an MLP beside the scan where M > 0, gate, x, B, C, dt.
        conv1d_weight: (H P + 2 G N, width); conv1d_bias: (H P + 2 G N,) or None; dt_bias, A: (H,); D: (H,) or (H, P).
        headdim: P, where D is (H,).
        rmsnorm_weight: (H P,); None: the scan has the gate, and there is no norm.
        initial_states, seq_idx, chunk_size, dt_limit, return_final_states: as in :func:`compressm.kernels.ssd`.

    Returns:
        (batch, L, d_model), or (batch, L, M + H P) without ``outproj_weight``; with ``return_final_states`` the states too.
    """
    heads, width = A.shape[0], D.shape[1] if D.dim() == 2 else int(headdim or 0)
    channels, features = heads * width, (conv1d_weight.shape[0] - heads * width) // 2
    beside = (zxbcdt.shape[-1] - channels - len(conv1d_weight) - heads) // 2
    z0, x0, z, xBC, dt = zxbcdt.split([beside, beside, channels, len(conv1d_weight), heads], dim=-1)
    convolved: Any = causal_conv1d(xBC.mT, conv1d_weight, conv1d_bias, seq_idx=seq_idx, activation=activation)
    x, B, C = convolved.mT.split([channels, features, features], dim=-1)
    y: Any = ssd(
        x.unflatten(-1, (heads, width)), dt, A, B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1)), chunk_size, D,
        z.unflatten(-1, (heads, width)) if rmsnorm_weight is None else None, dt_bias, initial_states, seq_idx,
        dt_softplus=True, dt_limit=dt_limit, return_final_states=return_final_states,
    )  # fmt: skip
    y, last = y if return_final_states else (y, None)
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = gated_rms_norm(y, z, rmsnorm_weight, ngroups, rmsnorm_eps, norm_before_gate)
    if beside:
        y = torch.cat([F.silu(z0) * x0, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, last) if return_final_states else y


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """:func:`~compressm.layers.gated_norm.gated_rms_norm` over groups of ``group_size`` channels (None: all), plus a bias."""
    if bias is not None and z is not None and norm_before_gate:
        return rmsnorm_fn(x, weight, bias, None, eps, group_size) * F.silu(z)
    y = gated_rms_norm(x, z, weight, 1 if group_size is None else x.shape[-1] // group_size, eps, norm_before_gate)
    return y if bias is None else y + bias
