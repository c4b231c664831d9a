"""Triton backend of the matrix-valued scan: what runs for which shapes, and the launches.

A sequence is cut into chunks of T steps.  Within a chunk the output is a product of matrices (T, T), which the heads of a group
share but for their decays; between chunks only states pass, one a chunk, which the backward computes once more.  N and P are
run-time bounds of loops over tiles: no padding but to whole tiles, and no compilation for a new N.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compressm.kernels.core import triton_language
from compressm.kernels.core.custom_op import recomputed_gradients
from compressm.kernels.core.plan import KernelPlan
from compressm.kernels.ssd import reference
from compressm.kernels.ssd import triton_backward as bwd
from compressm.kernels.ssd import triton_forward as fwd
from compressm.kernels.ssd.triton_chunks import Chunks, chunks_of, dense, precision, sequences_of, strides, wide

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENOUGH_PROGRAMS = 512  # about four a multiprocessor of a large GPU
STEPS = (16, 32, 64)  # of a chunk: of fewer no products are made, and of more no program keeps the tiles in registers
HEADS = 8  # of a program of the kernels that only turn dt into decays and back
SMALL = {"num_warps": 4, "enable_fp_fusion": True}  # launch options of these
Config = dict[str, int]  # T, BP, BN, few (heads of a program), threads, stages; maxnreg, most registers a lane, where set


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """None if the Triton kernels run for tensors of this device type and dtype, else the reason."""
    if dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 runs on the reference"
    if dtype not in DTYPES:
        return f"the Triton kernels take {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    return triton_language.why_not(device, fwd._ssd_outputs_kernel)


def chunk_steps(states: int, chunk: int = 0) -> int:
    """T: that of ``STEPS`` which is no longer than ``chunk``, or the least.

    chunk 0: so that the products within a chunk cost about as much as those with the states.
    """
    if chunk:
        return max((steps for steps in STEPS if steps <= chunk), default=STEPS[0])
    return 32 if states <= 16 else 64


def _config(chunks: int, heads: int, groups: int, width: int, states: int, half: bool, T: int) -> Config:
    """half: operands of products are bfloat16; float32 takes two registers and three products where that takes one of each."""
    own = heads // groups
    few = own
    while few > 1 and chunks * groups * -(-own // few) < ENOUGH_PROGRAMS:
        few = -(-few // 2)
    most = 64 if half else 32
    BP, BN = (min(most, max(16, 1 << (size - 1).bit_length())) for size in (width, states))
    return {"T": T, "BP": BP, "BN": BN, "few": few, "threads": 4 * T, "stages": 2 if half else 1}


def plan(batch: int, length: int, heads: int, width: int, groups: int, states: int, dtype: torch.dtype) -> KernelPlan:
    """The plan for x (batch, length, heads, width) of ``dtype`` and N states of each of ``groups`` groups."""
    T = chunk_steps(states)
    chunks = batch * -(-length // T)
    config = _config(chunks, heads, groups, width, states, dtype == torch.bfloat16, T)
    programs = chunks * groups * -(-heads // groups // config["few"])
    reason = f"{programs} programs, which share products of B and C among {config['few']} heads"
    return KernelPlan("ssd", "triton", "chunks", tuple(sorted(config.items())), reason)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    scaled: bool,
    scale: float = 1.0,
    chunk: int = 0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, final states) as :func:`compressm.kernels.ssd` defines them; chunk 0 and config None: the plan's.

    Tensors may differ in dtype.  Products of matrices have bfloat16 operands where x, B and C are bfloat16.  scale: of C.
    """
    out = x.new_empty(x.shape)
    last = x.new_empty((sequences_of(x, cu_seqlens), *x.shape[2:], B.shape[3]), dtype=torch.float32)
    if out.numel() == 0 or last.numel() == 0:
        result, state = reference.ssd(
            x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, low, high, scaled
        )
        return out.copy_(result), last.copy_(state)
    call = _call(x, B, C, seq_idx, cu_seqlens, scale, chunk, config)
    with triton_language.on_device(x):
        decays = _decays(dt, A, dt_bias, call, dt_softplus, low, high, scaled)
        states = _states(x, None, B, decays, call, initial_states, last, False)
        _outputs(x, B, C, D, z, decays, states, out, call)
    return out, last


def backward(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    scaled: bool,
    scale: float = 1.0,
    chunk: int = 0,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of (x, dt, A, B, C, D, z, dt_bias, initial_states); empty for an argument that was None.

    All sums have a fixed order: the same bits every time.
    """
    states = B.shape[3]
    sequences = sequences_of(x, cu_seqlens)
    if x.numel() == 0 or states * sequences == 0:
        return recomputed_gradients(
            lambda *tensors: reference.ssd(*tensors, seq_idx, cu_seqlens, dt_softplus, low, high, scaled),
            (x, dt, A, B, C, D, z, dt_bias, initial_states),
            (grad_out, grad_last),
        )
    if grad_out is None:
        grad_out = x.new_zeros(()).expand(x.shape)
    call = _call(x, B, C, seq_idx, cu_seqlens, scale, chunk, config)
    grad_start = x.new_empty((sequences, *x.shape[2:], states), dtype=torch.float32)
    with triton_language.on_device(x):
        decays = _decays(dt, A, dt_bias, call, dt_softplus, low, high, scaled)
        kept = _states(x, None, B, decays, call, initial_states, torch.empty_like(grad_start), False)
        y = None
        if z is not None:
            y = x.new_empty(x.shape)
            _outputs(x, B, C, D, None, decays, kept, y, call)
        grad_kept = _states(grad_out, z, C, decays, call, grad_last, grad_start, True)
        shares = decays.new_empty((4, *decays.shape[:2], decays.shape[3]))
        grad_x, grad_D, grad_z = _values(grad_out, x, B, C, D, z, y, decays, kept, grad_kept, shares, call)
        grad_B, grad_C = _keys(grad_out, x, B, C, z, decays, kept, grad_kept, call)
        grad_dt, grad_A, grad_bias = _steps(dt, A, dt_bias, shares, call, dt_softplus, low, high, scaled)
    return (
        grad_x,
        grad_dt,
        grad_A.to(A.dtype),
        grad_B,
        grad_C,
        x.new_empty((0,)) if D is None else grad_D.sum((0, 2) if D.dim() == 1 else 0).to(D.dtype),
        x.new_empty((0,)) if z is None else grad_z,
        x.new_empty((0,)) if dt_bias is None else grad_bias.to(dt_bias.dtype),
        x.new_empty((0,)) if initial_states is None else torch.empty_like(initial_states).copy_(grad_start),
    )


class _Call(NamedTuple):
    """What the launches of a call share.

    Attributes:
        sizes: L, chunks of a batch row, H, heads of a group, heads of a program, P, N and N padded.
        scale: of C; None for one.
        dtype: of operands and of the states between chunks.
        launch: constants and launch options of the kernels that multiply.
    """

    chunks: Chunks
    config: Config
    sizes: tuple[int, ...]
    scale: float | None
    dtype: torch.dtype
    launch: dict

    def blocks(self) -> int:
        """Programs for each chunk, by groups and blocks of heads."""
        _, _, heads, own, few, *_ = self.sizes
        return heads // own * -(-own // few)


def _call(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    config: Config | None,
) -> _Call:
    _, length, heads, width = x.shape
    groups, states = B.shape[2:]
    T = config["T"] if config else chunk_steps(states, chunk)
    chunks = chunks_of(x, seq_idx, cu_seqlens, T)
    dtype = x.dtype if x.dtype == B.dtype == C.dtype else torch.float32
    half = dtype == torch.bfloat16
    config = config or _config(chunks.count, heads, groups, width, states, half, T)
    sizes = (length, chunks.row, heads, heads // groups, config["few"], width, states, -(-states // 8) * 8)
    launch = launch_options(config, triton_language.WARP) | {"PRECISION": precision(x.is_cuda, dtype)}
    return _Call(chunks, config, sizes, None if scale == 1.0 else scale, dtype if half else torch.float32, launch)


def launch_options(config: Config, lanes: int) -> dict:
    """Constants and options of the kernels that multiply, for warps of ``lanes``."""
    own = {key: config[key] for key in ("T", "BP", "BN", "maxnreg") if key in config}
    warps = max(1, config["threads"] // lanes)
    return own | {"num_warps": warps, "num_stages": config["stages"], "enable_fp_fusion": True}


def keys_stages(config: Config, width: int) -> int:
    """Of the kernel of the keys' gradients: its tiles of x are fetched ahead, but not where one holds all P channels.

    Nor where they are for few states: fetching ahead would not fit into registers.
    """
    return 1 if width <= config["BP"] or config["BN"] == 16 else config["stages"]


def _decays(
    dt: Tensor, A: Tensor, bias: Tensor | None, call: _Call, softplus: bool, low: float, high: float, scaled: bool
) -> Tensor:
    chunks, T, heads = call.chunks, call.config["T"], dt.shape[2]
    decays = dt.new_empty((chunks.count, heads, 5, T), dtype=torch.float32)
    fwd._ssd_decays_kernel[(chunks.count * -(-heads // HEADS),)](
        dt, dense(A), dense(bias), chunks.segments, chunks.starts, chunks.counts, decays,
        *call.sizes[:3], low, high, *dt.stride(), SOFTPLUS=softplus, SCALED=scaled, BH=HEADS, T=T, **SMALL,
    )  # fmt: skip
    return decays


def _states(
    x: Tensor,
    z: Tensor | None,
    B: Tensor,
    decays: Tensor,
    call: _Call,
    initial: Tensor | None,
    last: Tensor,
    reverse: bool,
) -> Tensor:
    """States in front of the chunks, and ``last``; reverse: gradients of the states behind them, and of the first."""
    chunks, (length, row, heads, own, _, width, states, padded) = call.chunks, call.sizes
    kept = x.new_empty((chunks.count, heads, width, padded), dtype=call.dtype)
    tiles = -(-width // call.config["BP"]) * -(-states // call.config["BN"])
    fwd._ssd_states_kernel[(last.shape[0] * heads * tiles,)](
        x, z, B, decays, chunks.firsts, chunks.ends, chunks.starts, chunks.counts, dense(initial), kept, last,
        length, row, heads, own, width, states, padded, call.scale, *x.stride(), *strides(z), *B.stride(),
        REVERSE=reverse, WIDE=wide(x, z), WIDE_B=wide(B), **call.launch,
    )  # fmt: skip
    return kept


def _outputs(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    decays: Tensor,
    states: Tensor,
    out: Tensor,
    call: _Call,
) -> None:
    chunks = call.chunks
    fwd._ssd_outputs_kernel[(chunks.count * call.blocks(),)](
        x, B, C, dense(D), z, decays, chunks.segments, chunks.starts, chunks.counts, states, out, *call.sizes,
        call.scale, *x.stride(), *B.stride(), *C.stride(), *strides(z), *out.stride(), *_skip_strides(D),
        WIDE=wide(x, z, out), WIDE_B=wide(B, C), **call.launch,
    )  # fmt: skip


def _values(
    grad: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    y: Tensor | None,
    decays: Tensor,
    kept: Tensor,
    grad_kept: Tensor,
    shares: Tensor,
    call: _Call,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, D (chunks, H, P) and z; shares (4, chunks, H, T) of those of the step sizes are filled."""
    chunks = call.chunks
    grad_x, grad_z = torch.empty_like(x), None if z is None else torch.empty_like(z)
    grad_D = None if D is None else decays.new_zeros((chunks.count, *x.shape[2:]))  # chunks without steps write nothing
    bwd._ssd_values_kernel[(chunks.count * call.blocks(),)](
        x, B, C, dense(D), z, y, grad, decays, chunks.segments, chunks.starts, chunks.counts, kept,
        grad_kept, grad_x, grad_z, *shares, grad_D, *call.sizes, call.scale,
        *x.stride(), *B.stride(), *C.stride(), *strides(z), *strides(y), *grad.stride(), *grad_x.stride(),
        *strides(grad_z), *_skip_strides(D), WIDE=wide(x, z, y, grad, grad_x, grad_z), WIDE_B=wide(B, C), **call.launch,
    )  # fmt: skip
    return grad_x, grad_D, grad_z


def _keys(
    grad: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    decays: Tensor,
    kept: Tensor,
    grad_kept: Tensor,
    call: _Call,
) -> list[Tensor]:
    """Gradients of B and C."""
    chunks, (batch, length, groups, states) = call.chunks, B.shape
    blocks = call.blocks() // groups
    dtype = B.dtype if blocks == 1 and B.dtype == C.dtype else torch.float32
    sums = B.new_empty((2, blocks, batch, length, groups, kept.shape[3]), dtype=dtype)
    bwd._ssd_keys_kernel[(chunks.count * call.blocks() * -(-states // call.config["BN"]),)](
        x, B, C, z, grad, decays, chunks.segments, chunks.starts, chunks.counts, kept, grad_kept, sums[0], sums[1],
        *call.sizes, call.scale, batch * length,
        *x.stride(), *B.stride(), *C.stride(), *strides(z), *grad.stride(),
        WIDE=wide(x, z, grad), WIDE_B=wide(B, C), **call.launch | {"num_stages": keys_stages(call.config, x.shape[3])},
    )  # fmt: skip
    sums = sums[:, 0] if blocks == 1 else sums.sum(1)
    return [torch.empty_like(like).copy_(t) for like, t in zip((B, C), sums[..., :states], strict=True)]


def _steps(
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    shares: Tensor,
    call: _Call,
    softplus: bool,
    low: float,
    high: float,
    scaled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of dt, A and dt_bias."""
    chunks, (length, row, heads, *_) = call.chunks, call.sizes
    grad_dt = torch.empty_like(dt)
    sums = shares.new_zeros((2, chunks.count, heads))  # chunks without steps write nothing
    bwd._ssd_steps_kernel[(chunks.count * -(-heads // HEADS),)](
        dt, dense(A), dense(bias), chunks.starts, chunks.counts, *shares, grad_dt, sums[0], sums[1],
        length, row, heads, low, high, *dt.stride(), *grad_dt.stride(),
        SOFTPLUS=softplus, SCALED=scaled, BH=HEADS, T=call.config["T"], **SMALL,
    )  # fmt: skip
    return grad_dt, *sums.sum(1)


def _skip_strides(D: Tensor | None) -> tuple[int, int]:
    """Strides of D, made dense, for heads and for channels."""
    return (1, 0) if D is None or D.dim() == 1 else (D.shape[1], 1)
