"""Triton backend of the selective scan: what runs for which shapes, and the launches.

A program walks one sequence for R BD channels of one group, T steps at a time, and runs through the N states in each tile.
N is a run-time loop bound: no padding, and no compilation for a new N.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressm.kernels.core import triton_language
from compressm.kernels.core.custom_op import recomputed_gradients
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.selective_scan import reference
from compressm.kernels.selective_scan import triton_backward as bwd
from compressm.kernels.selective_scan import triton_forward as fwd
from compressm.kernels.selective_scan.triton_tiles import ANY, CHANNEL, TIME

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = 1.4426950408889634
THREADS = 128  # of a program; its warps share rows of B and C in the first-level cache
ENOUGH_WARPS = 1024  # that fill a large GPU (two for each of 4 schedulers on 132 multiprocessors)
Config = dict[str, int]  # R, BD, T and threads; maxnreg, most registers a lane, only where one is set
WARP = 32  # lanes that the plan counts with, on every GPU, so that a plan does not depend on the machine


def why_not(device: str, dtype: torch.dtype, constant: bool) -> str | None:
    """None if the Triton kernels run for tensors of this device type and dtype, else the reason.

    constant: B or C has no time axis.
    """
    if constant:
        return "the Triton kernels take B and C that depend on time; constant ones run on the reference"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 runs on the reference"
    if dtype not in DTYPES:
        return f"the Triton kernels take {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    return triton_language.why_not(device, fwd._selective_scan_fwd_kernel)


def _tile_steps(sequences: int, channels: int, length: int, states: int) -> int:
    """T: 64, or longer, to bound the checkpoints (4 N / T bytes per step and channel) or to spread few channels wide."""
    wide = 64
    while wide < 256 and sequences * channels * wide // 8 < ENOUGH_WARPS * WARP:
        wide *= 2
    while wide > 64 and wide >= 2 * length:
        wide //= 2
    return max(_least_tile_steps(states), wide)


def _least_tile_steps(states: int) -> int:
    return 64 if states <= 32 else 128 if states <= 128 else 256


def _config(sequences: int, channels: int, length: int, states: int, groups: int = 1, threads: int = THREADS) -> Config:
    """R row blocks of BD channels, T steps and the threads of a program (BD T / 8); channels: of all groups."""
    T = _tile_steps(sequences, channels, length, states)
    lanes = T // 8
    own = channels // groups
    while threads > 64 and threads // lanes >= 2 * own:
        threads //= 2
    BD = threads // lanes
    R = 2 if own > BD and sequences * channels * lanes >= 2 * ENOUGH_WARPS * WARP else 1
    return {"R": R, "BD": BD, "T": T, "threads": threads}


def plan(batch: int, channels: int, length: int, states: int, dtype: torch.dtype) -> KernelPlan:
    """The plan for u (batch, channels, length) of ``dtype`` and N states in one group."""
    config = _config(batch, channels, length, states)
    programs = batch * -(-channels // (config["R"] * config["BD"]))
    reason = f"{programs} programs, checkpoints of {4 * states / config['T']:.3g} bytes per step and channel"
    return KernelPlan("selective_scan", "triton", "tiles", tuple(sorted(config.items())), reason)


def checkpoint_shape(
    batch: int, channels: int, length: int, states: int, packed: bool, sequences: int, T: int | None = None
) -> tuple[int, int, int]:
    """Shape (slots, N, D) of the checkpoints: one in front of every tile of steps of every sequence, one behind its last.

    There is room for the shortest tiles that a plan has for N states, so that the shape does not depend on the plan; T: steps
    of the tiles of another configuration.
    """
    T = min(T or 256, _least_tile_steps(states))
    slots = length // T + 2 * sequences if packed else batch * (-(-length // T) + 1)
    return slots, states, channels


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    train: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, last state, checkpoints, y) as :func:`compressm.kernels.selective_scan.selective_scan_op` returns them.

    config: None for the plan's; a backward needs the T of its forward.
    """
    batch, channels, length = u.shape
    states, groups = A.shape[1], B.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    config = config or _config(sequences, channels, length, states, groups)
    out = torch.empty_like(u)
    last = A.new_empty((sequences, channels, states))
    y = torch.empty_like(u) if train and z is not None else u.new_empty((0,))
    shape = checkpoint_shape(batch, channels, length, states, cu_seqlens is not None, sequences, config["T"])
    carries = A.new_empty(shape if train else (0,))
    if out.numel() == 0 or last.numel() == 0:
        result, state = reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus
        )
        return out.copy_(result), last.copy_(state), carries, y
    memory = _memory(config["T"], length, sequences, cu_seqlens)
    B_packed, C_packed = (_pack(t, memory) for t in (B, C))
    kinds = [_kind(t, cu_seqlens, groups) for t in (u, delta, z, out)]
    kept = carries if train else A.new_empty((sequences, 2, states, channels))
    with triton_language.on_device(u):
        fwd._selective_scan_fwd_kernel[_grid(sequences, channels, groups, config)](
            u, delta, _decays(A, groups, config), B_packed, C_packed, _dense(D), z, _dense(delta_bias), _dense(initial_state),
            cu_seqlens, out, y if y.numel() else None, last, kept,
            length, states, B_packed.shape[-1], channels // groups, groups, 1,
            *u.stride(), *delta.stride(), *_strides(z), *out.stride(),
            SOFTPLUS=delta_softplus, TRAIN=train, U=kinds[0], DELTA=kinds[1], Z=kinds[2], OUT=kinds[3],
            **_constants(u, channels, groups, config),
        )  # fmt: skip
    return out, last, carries, y


def backward(
    grad_out: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    y: Tensor,
    delta_softplus: bool,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state); empty for an argument that was None.

    The gradients of B and C are sums over channels: by atomic additions, or, where torch.use_deterministic_algorithms(True)
    holds, by a buffer per block of channels and a sum in fixed order.  config: as in :func:`forward`.
    """
    batch, channels, length = u.shape
    states, groups = A.shape[1], B.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if u.numel() == 0 or states * sequences == 0:
        return recomputed_gradients(
            lambda *tensors: reference.selective_scan(*tensors, cu_seqlens, delta_softplus),
            (u, delta, A, B, C, D, z, delta_bias, initial_state),
            (grad_out, grad_last),
        )
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads = 2 * THREADS if deterministic else THREADS
    config = config or _config(sequences, channels, length, states, groups, threads)
    memory = _memory(config["T"], length, sequences, cu_seqlens)
    B_packed, C_packed = (_pack(t, memory) for t in (B, C))
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_z = None if z is None else torch.empty_like(z)
    scratch = A.new_empty((sequences, 2, 2, states, channels))
    shares = A.new_empty((2, sequences, channels))
    blocks = -(-channels // groups // (config["R"] * config["BD"]))
    shape = (batch, groups, blocks if deterministic else 1, 2, states, B_packed.shape[-1])
    grad_BC = A.new_empty(shape) if deterministic else A.new_zeros(shape)
    kinds = [_kind(t, cu_seqlens, groups) for t in (u, delta, z, grad_out, grad_u, grad_delta, grad_z)]
    constants = _constants(u, channels, groups, config)
    with triton_language.on_device(u):
        bwd._selective_scan_bwd_kernel[_grid(sequences, channels, groups, config)](
            u, delta, _decays(A, groups, config), B_packed, C_packed, _dense(D), z, _dense(delta_bias),
            None if z is None else y, grad_out, _dense(grad_last), cu_seqlens, checkpoints, scratch,
            grad_u, grad_delta, grad_z, grad_BC, shares[0], shares[1],
            length, states, B_packed.shape[-1], channels // groups, groups, 1,
            *u.stride(), *delta.stride(), *_strides(z), *grad_out.stride(),
            *grad_u.stride(), *grad_delta.stride(), *_strides(grad_z),
            SOFTPLUS=delta_softplus, DETERMINISTIC=deterministic, W=constants["num_warps"],
            U=kinds[0], DELTA=kinds[1], Z=kinds[2], GRAD=kinds[3], Y=kinds[4], GDELTA=kinds[5], GZ=kinds[6], **constants,
        )  # fmt: skip
    grad_B, grad_C = (_unpack(grad, like, memory) for grad, like in zip(grad_BC.sum(2).unbind(2), (B, C), strict=True))
    none = u.new_empty((0,))
    return (
        grad_u,
        grad_delta,
        torch.empty_like(A).copy_(scratch[:, 0, 1].sum(0).T),
        grad_B,
        grad_C,
        none if D is None else shares[0].sum(0),
        u.new_empty((0,)) if grad_z is None else grad_z,
        u.new_empty((0,)) if delta_bias is None else shares[1].sum(0),
        u.new_empty((0,)) if initial_state is None else torch.empty_like(initial_state).copy_(scratch[:, 0, 0].mT),
    )


def _grid(sequences: int, channels: int, groups: int, config: Config) -> tuple[int]:
    return (sequences * groups * -(-channels // groups // (config["R"] * config["BD"])),)


def _constants(u: Tensor, channels: int, groups: int, config: Config) -> dict[str, int | bool]:
    """Constants and launch options that both kernels share."""
    return {
        "FAST": u.is_cuda and torch.version.hip is None,
        "EVEN": channels // groups % (config["R"] * config["BD"]) == 0,
        **{key: config[key] for key in ("R", "BD", "T", "maxnreg") if key in config},
        "num_warps": max(1, config["threads"] // triton_language.WARP),
        "enable_fp_fusion": True,
    }


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()


def _kind(tensor: Tensor | None, cu_seqlens: Tensor | None, groups: int) -> int:
    """How a (batch, D, L) tensor lies, see triton_tiles."""
    if tensor is None or tensor.data_ptr() % 16:
        return ANY
    (_, channels, length), (batch_stride, row, step) = tensor.shape, tensor.stride()
    if step == 1 and length % 8 == row % 8 == batch_stride % 8 == 0 and cu_seqlens is None:
        return TIME
    return CHANNEL if row == 1 and channels // groups % 8 == step % 8 == batch_stride % 8 == 0 else ANY


def _decays(A: Tensor, groups: int, config: Config) -> Tensor:
    """A log2(e) as (N, channels), each group's channels padded by zeros to whole blocks."""
    rows = config["R"] * config["BD"]
    wide = (A * LOG2E).unflatten(0, (groups, -1))
    return pad(wide, (0, 0, 0, -wide.shape[1] % rows)).flatten(0, 1).T.contiguous()


def _memory(T: int, length: int, sequences: int, cu_seqlens: Tensor | None) -> tuple[int, Tensor | None, Tensor | None]:
    """How B and C are packed into whole tiles: steps of the packed memory, each one's source (-1: none) and each step's place.

    Sequence s begins with tile start // T + s, which leaves room for the incomplete tile at the end of every sequence.
    """
    if cu_seqlens is None:
        return -(-length // T) * T, None, None
    steps = (length // T + sequences) * T
    bounds = cu_seqlens.long().clamp(0, length)
    starts, ends = bounds[:-1].contiguous(), bounds[1:]
    first = (starts // T + torch.arange(sequences, device=cu_seqlens.device)) * T
    place = torch.arange(steps, device=cu_seqlens.device)
    owner = torch.searchsorted(first, place, right=True).sub_(1).clamp_(min=0)
    source = place - first[owner] + starts[owner]
    source = torch.where(source < ends[owner], source, -1)
    time = torch.arange(length, device=cu_seqlens.device)
    owner = torch.searchsorted(starts, time, right=True).sub_(1).clamp_(min=0)
    return steps, source, (first[owner] + time - starts[owner]).clamp_(0, steps - 1)


def _pack(tensor: Tensor, memory: tuple[int, Tensor | None, Tensor | None]) -> Tensor:
    """B or C (batch, G, N, L) as the kernels read it: contiguous, whole tiles with zeros, float32 or bfloat16."""
    steps, source, _ = memory
    if tensor.dtype == torch.float16:
        tensor = tensor.float()
    if source is not None:
        return torch.where(source >= 0, tensor.index_select(-1, source.clamp(min=0)), 0).contiguous()
    packed = pad(tensor, (0, steps - tensor.shape[-1])).contiguous()
    return packed.clone() if packed.data_ptr() % 16 else packed


def _unpack(grad: Tensor, like: Tensor, memory: tuple[int, Tensor | None, Tensor | None]) -> Tensor:
    """The gradient of B or C from the packed one (batch, G, N, steps) float32."""
    _, source, place = memory
    grad = grad[..., : like.shape[-1]] if source is None else grad.index_select(-1, place)
    return torch.empty_like(like).copy_(grad)
