"""One token of the gated delta rule, in place on the state: what a layer runs per generated token."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core import cpp, slots
from compressm.kernels.core.arguments import check_heads, check_tensor
from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import Candidate, chooser, compiled_first
from compressm.kernels.gated_delta_rule import reference
from compressm.kernels.gated_delta_rule.arguments import check_scale, check_step


def gated_delta_rule_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    state_batch_indices: Tensor | None = None,
    dst_state_batch_indices: Tensor | None = None,
    pad_slot_id: int = slots.PAD,
    *,
    backend: str | None = None,
) -> Tensor:
    """Advance ``state`` by one token, in place: S = diag(exp g) S, then S += beta k (v - S^T k)^T; o = scale S^T q.

    It agrees with one step of :func:`compressm.kernels.gated_delta_rule`; the last arguments are those of
    :func:`compressm.kernels.selective_state_update`.

    Args:
        state: (batch, HV, K, V), written in place; float32, bfloat16 or float16 (float64 on the reference).
        q, k: (batch, H, K), H a divisor of HV; head h of the values goes with head h // (HV / H).
        v: (batch, HV, V).
        g: (batch, HV) or (batch, HV, K), log decays.
        beta: (batch, HV).
        scale: of the queries; None: K^-0.5.
        use_qk_l2norm_in_kernel: q and k are brought to length one first.
        state_batch_indices: (batch,) int32 or int64: state is a pool (pool, HV, K, V) of states, of which each entry of q has
            the row of this index.  An entry whose index is negative or ``pad_slot_id`` has none: no state changes, its output
            is zero.
        dst_state_batch_indices: (batch,) likewise, the rows that the new states are written to; None for those that were read.
            Which entry's state stays in a row that several write to is not defined.
        pad_slot_id: the index of an entry that has no state.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        o (batch, HV, V) in v's dtype.  Differentiable (by the reference, which runs where an argument requires a gradient).

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or indices are not rows of the pool (which is looked at on CPU
            tensors only).
        BackendError: the named backend cannot run.
    """
    batch = _check(state, q, k, v, g, beta, state_batch_indices is not None)
    check_scale(scale)
    if dst_state_batch_indices is not None and state_batch_indices is None:
        state_batch_indices = torch.arange(batch, device=state.device)
    slots.check("state_batch_indices", state_batch_indices, state, batch, pad_slot_id)
    slots.check("dst_state_batch_indices", dst_state_batch_indices, state, batch, pad_slot_id)
    differentiate = torch.is_grad_enabled() and any(t.requires_grad for t in (state, q, k, v, g, beta))
    double = torch.float64 in (state.dtype, q.dtype, k.dtype, v.dtype, g.dtype, beta.dtype)
    chosen = choose_backend(q.device.type, torch.float64 if double else v.dtype, differentiate, backend=backend)
    given = (
        state, q, k, v, g, beta, state_batch_indices, dst_state_batch_indices, None if scale is None else float(scale),
        use_qk_l2norm_in_kernel, pad_slot_id,
    )  # fmt: skip
    return _reference(*given) if chosen == "reference" else gated_delta_rule_update_op(*given, chosen)


def _reference(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    indices: Tensor | None,
    targets: Tensor | None,
    scale: float | None,
    normalize: bool,
    pad: int,
) -> Tensor:
    """As :func:`gated_delta_rule_update_op`, by the reference."""

    def step(state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.gated_delta_rule_update(state, q, k, v, g, beta, scale, normalize)

    if indices is not None:
        return slots.through_copies(step, state, indices, targets, pad)
    out, new = step(state.clone())  # the backward needs it as it was
    state.copy_(new)
    return out


def _candidates(device: str, dtype: torch.dtype, differentiate: bool) -> tuple[Candidate, ...]:
    def only_forward(why_not: str | None) -> str | None:
        return "it has no backward, and an argument requires a gradient" if differentiate else why_not

    return compiled_first(
        device,
        lambda: only_forward(_triton_why_not(device, dtype)),
        lambda: only_forward(cpp.why_not_for(device, dtype)),
    )


# Of (device type, dtype, whether an argument requires a gradient): Triton on a GPU, C++ on a CPU, else the reference.
choose_backend = chooser("gated_delta_rule_update", _candidates)


def _triton_why_not(device: str, dtype: torch.dtype) -> str | None:
    from compressm.kernels.gated_delta_rule_update import triton_update

    return triton_update.why_not(device, dtype)


@custom_op("compressm::gated_delta_rule_update", mutates=("state",))
def gated_delta_rule_update_op(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_batch_indices: Tensor | None,
    dst_state_batch_indices: Tensor | None,
    scale: float | None,
    normalize: bool,
    pad_slot_id: int,
    backend: str,
) -> Tensor:
    """gated_delta_rule_update on a backend: ``"cpp"`` or ``"triton"``."""
    arguments = (
        state, q, k, v, g, beta, state_batch_indices, dst_state_batch_indices, reference.factor(k, scale), normalize,
        pad_slot_id,
    )  # fmt: skip
    if backend == "cpp":
        return cpp.library().gated_delta_rule_step(*arguments)
    from compressm.kernels.gated_delta_rule_update import triton_update

    return triton_update.step(*arguments)


@gated_delta_rule_update_op.register_fake
def _(state, q, k, v, g, beta, state_batch_indices, dst_state_batch_indices, scale, normalize, pad_slot_id, backend):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _check(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pooled: bool) -> int:
    """The batch."""
    for name, tensor, dims, axes in (("state", state, 4, "(batch, HV, K, V)"), ("q", q, 3, "(batch, H, K)")):
        if tensor.dim() != dims or not tensor.is_floating_point():
            raise bad_argument(name, got=f"{tuple(tensor.shape)} of {tensor.dtype}", expected=f"a real tensor {axes}")
    batch, shared, _ = q.shape
    rows, heads, keys, values = state.shape
    if not pooled and rows != batch:
        raise bad_argument("state", got=f"{rows} rows", expected=f"{batch}, one for each entry of q")
    check_heads(q, heads)
    check_tensor("q", q, (batch, shared, keys), q)
    check_tensor("state", state, (rows, heads, keys, values), q)
    check_step(q, k, v, g, beta, heads, values)
    return batch
