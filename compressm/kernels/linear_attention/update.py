"""One step of linear attention, in place on the state: what a layer runs per generated token."""

from __future__ import annotations

from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.linear_attention.arguments import check_step, check_tensor
from compressm.kernels.linear_attention.op import default_scale, normalized, with_ones


def linear_attention_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """Advance ``state`` by one token, in place: state = exp(g) state + k v^T, out = scale state^T q.

    It agrees with one step of :func:`compressm.kernels.linear_attention`, in torch's own operations.

    Args:
        state: (batch, HV, K, V), written in place.
        q, k: (batch, H, K); v: (batch, HV, V).
        g: None, (HV,), (batch, HV) or (batch, HV, K).
        scale: of the queries; None: K^-0.5.
        normalize: state has one more value channel, as that function says.

    Returns:
        (batch, HV, V) in v's dtype.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
    """
    if q.dim() != 3 or not q.is_floating_point():
        raise bad_argument("q", got=f"{tuple(q.shape)} of {q.dtype}", expected="a real tensor (batch, H, K)")
    if v.dim() != 3:
        raise bad_argument("v", got=f"shape {tuple(v.shape)}", expected="(batch, HV, V)")
    check_step(q, k, v, g, scale)
    batch, groups, keys = q.shape
    heads, values = v.shape[1:]
    check_tensor("state", state, (batch, heads, keys, values + normalize), q)
    if g is not None:
        decay = g.to(state.dtype).exp()
        state.mul_(decay[..., None] if g.dim() == 3 else decay[..., None, None])
    q, k = (t.to(state.dtype).repeat_interleave(heads // groups, 1) for t in (q, k))
    wide = (with_ones(v) if normalize else v).to(state.dtype)
    state.addcmul_(k.unsqueeze(-1), wide.unsqueeze(-2))
    out = (q.unsqueeze(-2) @ state).squeeze(-2) * (default_scale(keys) if scale is None else scale)
    return (normalized(out) if normalize else out).to(v.dtype)
