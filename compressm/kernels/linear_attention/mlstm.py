"""The mLSTM of xLSTM: linear attention with exponential gates, which no step lets overflow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from compressm.errors import bad_argument
from compressm.kernels.core.arguments import check_tensor
from compressm.kernels.linear_attention.arguments import check
from compressm.kernels.linear_attention.op import linear_attention, with_ones


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    *,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """h_t = scale C_t^T q_t / (max(|scale n_t q_t|, exp(-m_t)) + eps), the mLSTM (Beck et al. 2024, arXiv 2405.04517).

    With m_t = max(logsigmoid(f_t) + m_{t-1}, i_t), the state decays by exp(logsigmoid(f_t) + m_{t-1} - m_t) and gets
    exp(i_t - m_t) k_t v_t^T, the normaliser n the same without v_t.  It is :func:`compressm.kernels.linear_attention` with a
    decay a head and step, keys scaled by their gates, and a value channel of ones.  One step of decoding is a call of length 1.

    Args:
        q, k: (batch, L, H, K); v: (batch, L, HV, V), as that function takes them.
        i, f: (batch, L, HV), input and forget gates in front of their activations.
        scale: of the queries; None: K^-0.5.
        initial_state: C (batch, HV, K, V), n (batch, HV, K) and m (batch, HV) in front of the first step; None for zeros.
        output_final_state: also return those behind the last step.
        eps: added to what is divided by.
        chunk_size, backend: as that function takes them.

    Returns:
        (h, final states): h (batch, L, HV, V) in v's dtype, the states at least float32, or None unless they were asked for.
        Every real tensor argument is differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
        BackendError: the named backend cannot run.
    """
    check(q, k, v, None, scale, None, None, False, chunk_size)
    for name, gate in (("i", i), ("f", f)):
        check_tensor(name, gate, tuple(v.shape[:3]), q)
    check_state(initial_state, q, v)
    state, m = None, v.new_zeros((v.shape[0], v.shape[2]), dtype=torch.promote_types(v.dtype, torch.float32))
    if initial_state is not None:
        C, n, m = initial_state
        state = torch.cat([C, n.unsqueeze(-1).to(C.dtype)], -1)
    forget = logsigmoid(f.double())
    total = forget.cumsum(1)
    highest = total + torch.cat([m.double().unsqueeze(1), i - total], 1).cummax(1).values[:, 1:]
    before = torch.cat([m.double().unsqueeze(1), highest[:, :-1]], 1)
    wide = torch.promote_types(v.dtype, torch.float32)
    values = with_ones(v) * (i - highest).exp().to(wide).unsqueeze(-1)
    g = (forget + before[:, : v.shape[1]] - highest).to(wide)
    out, last = linear_attention(
        q, k, values, g, scale, state, output_final_state, chunk_size=chunk_size, backend=backend
    )
    least = (-highest).exp().to(wide).unsqueeze(-1)
    h = out[..., :-1] / (torch.maximum(out[..., -1:].abs(), least) + eps)
    if last is None:
        return h.to(v.dtype), None
    behind = torch.cat([m.double().unsqueeze(1), highest], 1)[:, -1].to(last.dtype)
    return h.to(v.dtype), (last[..., :-1], last[..., -1], behind)


def check_state(initial_state: tuple[Tensor, Tensor, Tensor] | None, q: Tensor, v: Tensor) -> None:
    """Raise ArgumentError unless these are three states that fit, or none."""
    if initial_state is None:
        return
    if len(initial_state) != 3:
        raise bad_argument("initial_state", got=f"{len(initial_state)} tensors", expected="three, C, n and m")
    batch, heads, keys = v.shape[0], v.shape[2], q.shape[3]
    shapes = (batch, heads, keys, v.shape[3]), (batch, heads, keys), (batch, heads)
    for name, tensor, shape in zip("Cnm", initial_state, shapes, strict=True):
        check_tensor(f"initial_state, {name}", tensor, shape, q)
