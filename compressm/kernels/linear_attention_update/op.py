"""One step of linear attention, in place on the state: what a layer runs per generated token."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core.arguments import check_tensor
from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import Candidate, chooser
from compressm.kernels.linear_attention.arguments import check_step
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
    backend: str | None = None,
) -> Tensor:
    """Advance ``state`` by one token, in place: state = exp(g) state + k v^T, out = scale state^T q.

    It agrees with one step of :func:`compressm.kernels.linear_attention`.

    Args:
        state: (batch, HV, K, V), written in place; float32, bfloat16 or float16 (float64 on the reference).
        q, k: (batch, H, K); v: (batch, HV, V).
        g: None, (HV,), (batch, HV) or (batch, HV, K).
        scale: of the queries; None: K^-0.5.
        normalize: state has one more value channel, as that function says.
        backend: ``"triton"``, on a GPU, or ``"reference"``, torch's own operations; None chooses.

    Returns:
        (batch, HV, V) in v's dtype.  Differentiable (by the reference, which runs where an argument requires a gradient).

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
        BackendError: the named backend cannot run.
    """
    if q.dim() != 3 or not q.is_floating_point():
        raise bad_argument("q", got=f"{tuple(q.shape)} of {q.dtype}", expected="a real tensor (batch, H, K)")
    if v.dim() != 3:
        raise bad_argument("v", got=f"shape {tuple(v.shape)}", expected="(batch, HV, V)")
    check_step(q, k, v, g, scale)
    batch, _, keys = q.shape
    heads, values = v.shape[1:]
    check_tensor("state", state, (batch, heads, keys, values + normalize), q)
    tensors = [t for t in (state, q, k, v, g) if t is not None]
    differentiate = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else v.dtype
    chosen = choose_backend(q.device.type, dtype, differentiate, backend=backend)
    factor = default_scale(keys) if scale is None else float(scale)
    wide = with_ones(v) if normalize else v
    step = _reference if chosen == "reference" else linear_attention_update_op
    out = step(state, q, k, wide, g, factor)
    return (normalized(out) if normalize else out).to(v.dtype)


def _reference(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """As :func:`linear_attention_update_op`, the output in the state's dtype."""
    if g is not None:
        decay = g.to(state.dtype).exp()
        state.mul_(decay[..., None] if g.dim() == 3 else decay[..., None, None])
    q, k = (t.to(state.dtype).repeat_interleave(v.shape[1] // q.shape[1], 1) for t in (q, k))
    state.addcmul_(k.unsqueeze(-1), v.to(state.dtype).unsqueeze(-2))
    return (q.unsqueeze(-2) @ state).squeeze(-2) * scale


def _candidates(device: str, dtype: torch.dtype, differentiate: bool) -> tuple[Candidate, ...]:
    def triton() -> str | None:
        if differentiate:
            return "it has no backward, and an argument requires a gradient"
        from compressm.kernels.gated_delta_rule_update import triton_update

        return triton_update.why_not(device, dtype)

    found = Candidate("triton", triton), Candidate("reference", lambda: None)
    return found[::-1] if device == "cpu" else found


# Of (device type, dtype, whether an argument requires a gradient): Triton on a GPU, else the reference.
choose_backend = chooser("linear_attention_update", _candidates)


@custom_op("compressm::linear_attention_update", mutates=("state",))
def linear_attention_update_op(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """The outputs, not yet normalized, in float32, by the gated delta rule's Triton kernel, which then erases nothing."""
    from compressm.kernels.gated_delta_rule_update import triton_update

    decays = v.new_zeros(v.shape[:2]) if g is None else g.expand(v.shape[:2]) if g.dim() == 1 else g
    return triton_update.advance(state, None, q, k, v.float(), decays, None, scale, False)


@linear_attention_update_op.register_fake
def _(state, q, k, v, g, scale):
    return v.new_empty(v.shape, dtype=torch.float32)
