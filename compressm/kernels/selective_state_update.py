"""One step of the selective scan, in place on the state: what a Mamba layer runs per generated token."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels import _cpp, _selective_scan_cpu, _selective_scan_ref
from compressm.kernels._custom_op import custom_op
from compressm.kernels._dispatch import Candidate, chooser, compiled_first


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
    *,
    backend: str | None = None,
) -> Tensor:
    """Advance ``state`` by one token, in place: state = exp(dt A) state + dt B x, out = (C state + D x) silu(z).

    The meaning and argument order are those of mamba_ssm's function of this name; it agrees with one step of
    :func:`compressm.kernels.selective_scan`.

    Args:
        state: (batch, D, N), written in place; float32, bfloat16 or float16 (float64 on the reference).
        x: (batch, D); dt: (batch, D), before bias and softplus.
        A: (D, N) real; B and C: (batch, N) or (batch, G, N); D: (D,) or None; z: (batch, D) or None; dt_bias: (D,) or None.
        dt_softplus: the step size is softplus(dt + dt_bias).
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None chooses.

    Returns:
        (batch, D) in x's dtype.  Differentiable (by the reference, which runs where an argument requires a gradient).

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
        BackendError: the named backend cannot run.
    """
    B, C = (t.unsqueeze(1) if t.dim() == 2 else t for t in (B, C))
    arguments = (x, dt, A, B, C, D, z, dt_bias)
    _check(state, *arguments)
    differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, *arguments))
    double = torch.float64 in (state.dtype, x.dtype)
    dtype = torch.float64 if double else x.dtype
    chosen = choose_backend(x.device.type, dtype, differentiate, backend=backend)
    if chosen == "reference":
        out, new = _selective_scan_ref.selective_state_update(state, *arguments, dt_softplus)
        state.copy_(new)
        return out
    if chosen == "triton":
        return selective_state_update_op(state, *arguments, dt_softplus, chosen)
    work = state.float().contiguous()
    out = selective_state_update_op(work, *(None if t is None else t.float() for t in arguments), dt_softplus, chosen)
    if work is not state:
        state.copy_(work)
    return out.to(x.dtype)


def _candidates(device: str, dtype: torch.dtype, differentiate: bool) -> tuple[Candidate, ...]:
    def only_forward(reason: str | None) -> str | None:
        return "it has no backward, and an argument requires a gradient" if differentiate else reason

    return compiled_first(
        device,
        lambda: only_forward(_triton_why_not(device, dtype)),
        lambda: only_forward(_cpp.why_not_for(device, dtype)),
    )


# Of (device type, dtype, whether an argument requires a gradient): Triton on a GPU, C++ on a CPU, else the reference.
choose_backend = chooser("selective_state_update", _candidates)


def _triton_why_not(device: str, dtype: torch.dtype) -> str | None:
    from compressm.kernels import _selective_state_update_triton

    return _selective_state_update_triton.why_not(device, dtype)


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
    dt_softplus: bool,
    backend: str,
) -> Tensor:
    """selective_state_update on a compiled backend; B and C (batch, G, N).  C++: everything float32, state contiguous."""
    if backend == "cpp":
        return _selective_scan_cpu.state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    from compressm.kernels import _selective_state_update_triton

    return _selective_state_update_triton.state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


@selective_state_update_op.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, backend):
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
) -> None:
    if state.dim() != 3 or not state.is_floating_point():
        raise bad_argument("state", got=f"{tuple(state.shape)} of {state.dtype}", expected="a real tensor (batch, D, N)")
    batch, channels, states = state.shape
    groups = B.shape[1] if B.dim() == 3 else 0
    if groups == 0 or channels % groups:
        got = f"shape {tuple(B.shape)}"
        raise bad_argument("B", got=got, expected=f"(batch, N) or (batch, G, N) with G that divides D = {channels}")
    shapes = {
        "x": (x, (batch, channels)),
        "dt": (dt, (batch, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, groups, states)),
        "C": (C, (batch, groups, states)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels)),
        "dt_bias": (dt_bias, (channels,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=f"shape {shape}, as state is (batch, D, N)")
        if not tensor.is_floating_point():
            raise bad_argument(name, got=str(tensor.dtype), expected="a real floating point tensor")
        if tensor.device != state.device:
            raise bad_argument(name, got=f"device {tensor.device}", expected=f"{state.device}, where state is")
