"""One step of the selective scan, in place on the state: what a Mamba layer runs per generated token."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels.core import cpp, slots
from compressm.kernels.core.custom_op import custom_op
from compressm.kernels.core.dispatch import Candidate, chooser, compiled_first
from compressm.kernels.selective_scan import cpu, reference


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    dst_state_batch_indices: Tensor | None = None,
    pad_slot_id: int = slots.PAD,
    *,
    backend: str | None = None,
) -> Tensor:
    """Advance ``state`` by one token, in place: state = exp(dt A) state + dt B x, out = (C state + D x) silu(z).

    The meaning and argument order are those of mamba_ssm's function of this name, and behind its last argument vLLM's; it
    agrees with one step of :func:`compressm.kernels.selective_scan`.  Where A, dt and dt_bias are one number a head, expanded
    over P and N (a stride of zero), the decay is computed once a head and nothing is expanded in memory.

    Args:
        state: (batch, D, N), or with heads (batch, H, P, N), written in place; float32, bfloat16 or float16 (float64 on the
            reference).
        x: (batch, D) or (batch, H, P); dt: like x, before bias and softplus.
        A: (D, N) or (H, P, N), real.
        B, C: (batch, N) or (batch, G, N); channel d reads group d // (D / G), head h reads group h // (H / G).
        D: (D,) or (H, P), or None; z: like x, or None; dt_bias: like D, or None.
        dt_softplus: the step size is softplus(dt + dt_bias).
        state_batch_indices: (batch,) int32 or int64: state is a pool (pool, ...) of states, of which each entry of x has the
            row of this index.  An entry whose index is negative or ``pad_slot_id`` has none: no state changes, its output is
            zero.
        dst_state_batch_indices: (batch,) likewise, the rows that the new states are written to; None for those that were read.
            Which entry's state stays in a row that several write to is not defined.
        pad_slot_id: the index of an entry that has no state.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        x's shape and dtype.  Differentiable (by the reference, which runs where an argument requires a gradient).

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or indices are not rows of the pool (which is looked at on CPU
            tensors only).
        BackendError: the named backend cannot run.
    """
    B, C = (t.unsqueeze(1) if t.dim() == 2 else t for t in (B, C))
    batch = x.shape[0] if x.dim() else 0
    _check(state, x, dt, A, B, C, D, z, dt_bias, batch, state_batch_indices is not None)
    if dst_state_batch_indices is not None and state_batch_indices is None:
        state_batch_indices = torch.arange(batch, device=state.device)
    slots.check("state_batch_indices", state_batch_indices, state, batch, pad_slot_id)
    slots.check("dst_state_batch_indices", dst_state_batch_indices, state, batch, pad_slot_id)
    arguments, headed = (state, x, dt, A, B, C, D, z, dt_bias), state.dim() == 4
    differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    if not headed:  # groups of channels are heads
        split = (B.shape[1], state.shape[1] // B.shape[1])
        state, A = state.unflatten(1, split), A.unflatten(0, split)
        x, dt, z = x.unflatten(1, split), dt.unflatten(1, split), None if z is None else z.unflatten(1, split)
        D, dt_bias = (None if t is None else t.unflatten(0, split) for t in (D, dt_bias))
    double = torch.float64 in (state.dtype, x.dtype)
    chosen = choose_backend(x.device.type, torch.float64 if double else x.dtype, differentiate, backend=backend)
    given = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices, dt_softplus, pad_slot_id)
    out = _reference(*given) if chosen == "reference" else selective_state_update_op(*given, chosen)
    return out if headed else out.flatten(1)


def _reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    targets: Tensor | None,
    dt_softplus: bool,
    pad: int,
) -> Tensor:
    """As :func:`selective_state_update_op`, by the reference."""

    def step(state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)

    if indices is not None:
        return slots.through_copies(step, state, indices, targets, pad)
    out, new = step(state.clone())  # the backward needs it as it was
    state.copy_(new)
    return out


def _candidates(device: str, dtype: torch.dtype, differentiate: bool) -> tuple[Candidate, ...]:
    def only_forward(reason: str | None) -> str | None:
        return "it has no backward, and an argument requires a gradient" if differentiate else reason

    return compiled_first(
        device,
        lambda: only_forward(_triton_why_not(device, dtype)),
        lambda: only_forward(cpp.why_not_for(device, dtype)),
    )


# Of (device type, dtype, whether an argument requires a gradient): Triton on a GPU, C++ on a CPU, else the reference.
choose_backend = chooser("selective_state_update", _candidates)


def _triton_why_not(device: str, dtype: torch.dtype) -> str | None:
    from compressm.kernels.selective_state_update import triton_update

    return triton_update.why_not(device, dtype)


@custom_op("compressm::selective_state_update", mutates=("state",))
def selective_state_update_op(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
    dst_state_batch_indices: Tensor | None,
    dt_softplus: bool,
    pad_slot_id: int,
    backend: str,
) -> Tensor:
    """selective_state_update on a compiled backend, with heads: state (pool, H, P, N), B and C (batch, G, N)."""
    arguments = (
        state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices, dt_softplus, pad_slot_id
    )  # fmt: skip
    if backend == "cpp":
        return cpu.state_update(*arguments)
    from compressm.kernels.selective_state_update import triton_update

    return triton_update.state_update(*arguments)


@selective_state_update_op.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices, dt_softplus, pad_slot_id, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    batch: int,
    pooled: bool,
) -> None:
    if state.dim() not in (3, 4) or not state.is_floating_point():
        expected = "a real tensor (batch, D, N), or with heads (batch, H, P, N)"
        raise bad_argument("state", got=f"{tuple(state.shape)} of {state.dtype}", expected=expected)
    *wide, states = state.shape[1:]
    groups = B.shape[1] if B.dim() == 3 else 0
    if groups == 0 or wide[0] % groups:
        expected = f"(batch, N) or (batch, G, N) with G that divides {'H' if len(wide) == 2 else 'D'} = {wide[0]}"
        raise bad_argument("B", got=f"shape {tuple(B.shape)}", expected=expected)
    if not pooled:
        batch = state.shape[0]
    axes = "(batch, H, P, N)" if len(wide) == 2 else "(batch, D, N)"
    shapes = {
        "x": (x, (batch, *wide)),
        "dt": (dt, (batch, *wide)),
        "A": (A, (*wide, states)),
        "B": (B, (batch, groups, states)),
        "C": (C, (batch, groups, states)),
        "D": (D, tuple(wide)),
        "z": (z, (batch, *wide)),
        "dt_bias": (dt_bias, tuple(wide)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"shape {shape}, as state is {axes}")
        if not tensor.is_floating_point():
            raise bad_argument(name, got=str(tensor.dtype), expected="a real floating point tensor")
        if tensor.device != state.device:
            raise bad_argument(name, got=f"device {tensor.device}", expected=f"{state.device}, where state is")
