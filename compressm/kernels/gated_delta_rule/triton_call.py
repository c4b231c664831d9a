"""What all launches of the gated delta rule and of linear attention share: tiles, operands, walks, outputs."""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compressm.kernels.core import triton_language
from compressm.kernels.gated_delta_rule import reference
from compressm.kernels.gated_delta_rule import triton_backward as bwd
from compressm.kernels.gated_delta_rule import triton_forward as fwd
from compressm.kernels.ssd.triton_chunks import Chunks, chunks_of, dense, precision, sequences_of, strides, wide

HEADS = 8  # of a program of the kernels of steps
SMALL = {"num_warps": 4, "enable_fp_fusion": True}  # launch options of these
# T; BK x BP, the tile of the states that walks; BN and BV, columns of tiles of keys and values elsewhere, BC in place of BN
# where each channel has its decay; threads, stages
Config = dict[str, int]


def config_of(keys: int, values: int, half: bool) -> Config:
    """half: operands of products are bfloat16; float32 takes two registers and three products where that takes one of each."""
    BK = max(16, 1 << (keys - 1).bit_length())
    T = 32 if keys <= 32 or not half else 64
    while T > 16 and T * BK > 64 * 128:
        T //= 2
    most = 64 if half else 32
    BN, BV = (min(most, max(16, 1 << (size - 1).bit_length())) for size in (keys, values))
    BP = max(16, min(BV, (4096 if half else 2048) // BK))
    threads = 256 if T == 64 or BK >= 128 else 128
    stages = 2 if half and not torch.version.hip else 1
    return {"T": T, "BK": BK, "BP": BP, "BN": min(BN, 32), "BC": 16, "BV": BV, "threads": threads, "stages": stages}


class Call(NamedTuple):
    """What the launches of a call share.

    Attributes:
        sizes: L, chunks of a batch row, value heads.
        K, V, padded: V padded to whole runs of 8.
        dtype: of operands and of what is kept between kernels.
        products: constants and launch options of the kernels that multiply.
    """

    chunks: Chunks
    config: Config
    sizes: tuple[int, int, int]
    K: int
    V: int
    padded: int
    dtype: torch.dtype
    products: dict

    def options(self, *names: str) -> dict:
        """Launch options, with these sizes of tiles."""
        return {name: self.config[name] for name in ("T", *names)} | self.products


class Operands(NamedTuple):
    """What the kernels between chunks work on; their module says what it is.

    Attributes:
        q, k, into: (batch, L, heads of them, K); no k where nothing is erased.
        own: value heads of each of their heads.
        rows: factors of steps; None where each channel has its decay.
        passing: (chunks, HV, 1 or K).
        reads, erased, inverse: (chunks, HV, T, T).
    """

    q: Tensor
    k: Tensor | None
    into: Tensor
    own: int
    rows: Tensor | None
    passing: Tensor
    reads: Tensor
    erased: Tensor | None
    inverse: Tensor | None

    @property
    def decays(self) -> str:
        return "head" if self.rows is not None else "channel"

    @property
    def wide(self) -> bool:
        return wide(self.q, self.k, self.into)


def launch_options(config: Config, lanes: int) -> dict:
    """Options of the kernels that multiply, for warps of ``lanes``."""
    warps = max(1, config["threads"] // lanes)
    return {"num_warps": warps, "num_stages": config["stages"], "enable_fp_fusion": True}


def square_options(T: int) -> dict:
    """T and launch options of a kernel that holds a few numbers of a triangle (T, T) a lane."""
    return {"T": T, "num_warps": T // 8, "enable_fp_fusion": True}


def call_of(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, config: Config | None) -> Call:
    """For q, k (batch, L, H, K) and v (batch, L, HV, V)."""
    length, heads, values = v.shape[1:]
    keys = q.shape[3]
    dtype = v.dtype if q.dtype == k.dtype == v.dtype else torch.float32
    half = dtype == torch.bfloat16
    config = config or config_of(keys, values, half)
    chunks = chunks_of(v, None, cu_seqlens, config["T"])
    products = {"PRECISION": precision(v.is_cuda, dtype)} | launch_options(config, triton_language.WARP)
    sizes, kept = (length, chunks.row, heads), dtype if half else torch.float32
    return Call(chunks, config, sizes, keys, values, -(-values // 8) * 8, kept, products)


def empty(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether there is nothing to launch."""
    return q.numel() == 0 or v.numel() == 0 or sequences_of(v, cu_seqlens) == 0


def lengths_of(q: Tensor, k: Tensor) -> list[Tensor]:
    """What q and k are multiplied by for length one, float32."""
    lengths = (torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32) for t in (q, k))
    return [length.square_().add_(reference.EPS).rsqrt_() for length in lengths]


def of_length_one(t: Tensor, grad: Tensor, length: Tensor | None) -> Tensor:
    """The gradient of t, from that which is right but for the change of what brings t to length one."""
    if length is None:
        return grad
    along = (t * grad).sum(-1, keepdim=True).mul_(length.square().unsqueeze(-1))
    return torch.empty_like(t).copy_(grad.addcmul_(t.float(), along, value=-1.0))


def inverse_of(erased: Tensor, call: Call) -> Tensor:
    """(I + N)^-1 of N (chunks, heads, T, T), strictly lower triangles."""
    inverse = torch.empty_like(erased, dtype=call.dtype)
    exact = "widened" if not erased.is_cuda else "ieee" if torch.version.hip else "tf32x3"
    fwd._delta_inverse_kernel[(erased.shape[0] * erased.shape[1],)](
        erased, inverse, EXACT=exact, **square_options(call.config["T"])
    )
    return inverse


def states_of(
    v: Tensor, operands: Operands, call: Call, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """States in front of the chunks, what is written, the last states."""
    chunks, (length, row, heads) = call.chunks, call.sizes
    last = v.new_empty((sequences_of(v, cu_seqlens), heads, call.K, call.V), dtype=torch.float32)
    states = v.new_empty((chunks.count, heads, call.K, call.padded), dtype=call.dtype)
    writes = v if operands.k is None else v.new_empty(v.shape, dtype=call.dtype)
    _, k, into, own, rows, passing, _, _, inverse = operands
    fwd._delta_states_kernel[(last.shape[0] * heads * -(-call.V // call.config["BP"]),)](
        v, k, into, rows, passing, inverse, chunks.firsts, chunks.ends, chunks.starts, chunks.counts, dense(initial), states,
        writes, last, length, row, heads, own, call.K, call.V, call.padded,
        *v.stride(), *strides(k), *into.stride(), *writes.stride(),
        WIDE=wide(v, writes), WIDE_K=operands.wide, DECAYS=operands.decays, **call.options("BK", "BP"),
    )  # fmt: skip
    return states, writes, last


def outputs(operands: Operands, writes: Tensor, states: Tensor, out: Tensor, call: Call) -> None:
    """Fill ``out``."""
    chunks, (length, row, heads), q = call.chunks, call.sizes, operands.q
    fwd._delta_outputs_kernel[(chunks.count * heads,)](
        q, operands.rows, writes, states, operands.reads, chunks.starts, chunks.counts, out,
        length, row, heads, operands.own, call.K, call.V, call.padded, *q.stride(), *writes.stride(), *out.stride(),
        WIDE=wide(writes, out), WIDE_K=operands.wide, **call.options("BN", "BV"),
    )  # fmt: skip


def reverse(
    grad_o: Tensor, operands: Operands, call: Call, grad_last: Tensor | None, grad_start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the states behind the chunks, of v, and of the first states."""
    chunks, (length, row, heads) = call.chunks, call.sizes
    states = grad_o.new_empty((chunks.count, heads, call.K, call.padded), dtype=call.dtype)
    grad_v = grad_o.new_empty(grad_o.shape, dtype=call.dtype)
    q, k, into, own, rows, passing, reads, _, inverse = operands
    bwd._delta_reverse_kernel[(grad_start.shape[0] * heads * -(-call.V // call.config["BP"]),)](
        grad_o, q, k, into, rows, passing, inverse, reads, chunks.firsts, chunks.ends, chunks.starts, chunks.counts,
        dense(grad_last), states, grad_v, grad_start, length, row, heads, own, call.K, call.V, call.padded,
        *grad_o.stride(), *q.stride(), *strides(k), *into.stride(), *grad_v.stride(),
        WIDE=wide(grad_o, grad_v), WIDE_K=operands.wide, DECAYS=operands.decays, **call.options("BK", "BP"),
    )  # fmt: skip
    return states, grad_v, grad_start


def pairs_of(grad_o: Tensor, writes: Tensor, grad_v: Tensor, operands: Operands, call: Call) -> list[Tensor | None]:
    """Gradients of ``reads``, of ``erased``, and those of the log decays of heads by both, where there are such."""
    chunks, (length, row, heads), reads = call.chunks, call.sizes, operands.reads
    of_erased = None if operands.k is None else torch.empty_like(reads)
    by_decay = None if operands.rows is None else reads.new_empty((*reads.shape[:3],), dtype=torch.float32)
    found = [torch.empty_like(reads), of_erased, by_decay]
    bwd._delta_pairs_kernel[(chunks.count * heads,)](
        grad_o, writes, grad_v, operands.rows, reads, operands.erased, chunks.starts, chunks.counts, *found, length, row, heads,
        call.V, *grad_o.stride(), *writes.stride(), *grad_v.stride(),
        WIDE=wide(grad_o, writes, grad_v), **call.options("BV"),
    )  # fmt: skip
    return found
