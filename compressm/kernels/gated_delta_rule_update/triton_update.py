"""Triton backend of the decode step: a program updates BV columns of one head's state, BK rows at a time."""

# mypy: ignore-errors
from __future__ import annotations

import torch
from torch import Tensor

from compressm.kernels.core import slots, triton_language
from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.gated_delta_rule import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS = 2048  # of a tile: 16 a lane of 4 warps
MAX_KEYS = 128  # of a tile
Config = dict[str, int | bool]


@jit
def _load(p, offset, mask):
    return tl.load(p + offset, mask=mask, other=0.0).to(tl.float32)


@jit
def _tile(state, rows, columns, state_k, state_v, K, V, DENSE: tl.constexpr):
    """Addresses of a tile of a state, and which of them are inside."""
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    if DENSE:
        return state + (rows.to(tl.int64) * state_k)[:, None] + columns[None, :], inside
    else:
        return state + (rows.to(tl.int64) * state_k)[:, None] + (columns.to(tl.int64) * state_v)[None, :], inside


@jit(
    do_not_specialize=[
        "state", "rows", "q", "k", "v", "g", "beta", "out", "heads", "own", "K", "V", "scale", "eps", "state_b", "state_h",
        "state_k", "state_v",
    ]
)  # fmt: skip
def _gated_delta_rule_update_kernel(
    state, rows, q, k, v, g, beta, out, heads, own, K, V, scale, eps, state_b, state_h, state_k, state_v,
    CHANNELWISE: tl.constexpr, UNIT: tl.constexpr, DENSE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """state (pool, heads, K, V) in place, and out (batch, heads, V), contiguous.

    rows (batch,) int64: each entry's row of the pool, negative for none; None: its own.  q and k (batch, heads / own, K), v
    (batch, heads, V), g (batch, heads) or, CHANNELWISE, (batch, heads, K) and beta (batch, heads) are contiguous.  UNIT: q and
    k are brought to length one.  DENSE: the state's last stride is 1.  A state is read twice, the second time from a cache.
    Without beta, as in linear attention, nothing is erased and a state is read once; UNIT is then False.
    """
    blocks = tl.cdiv(V, BV)
    entry = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    column = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    place = entry
    end = V
    if rows is not None:
        place = tl.load(rows + entry)
        end = tl.where(place >= 0, V, 0)
    state += place * state_b + head * state_h
    at = entry * heads + head
    keys = (entry * (heads // own) + head // own) * K
    fade = 0.0
    if not CHANNELWISE:
        fade = tl.exp(tl.load(g + at).to(tl.float32))
    written = _load(v, at * V + column, column < V)
    of_q = 1.0
    if beta is not None:
        held = tl.zeros([BV], tl.float32)
        of_k = 1.0
        squares_q = 0.0
        squares_k = 0.0
        for first in range(0, K, BK):
            n = first + tl.arange(0, BK)
            key = _load(k, keys + n, n < K)
            query = _load(q, keys + n, n < K)
            squares_q += tl.sum(query * query, 0)
            squares_k += tl.sum(key * key, 0)
            if CHANNELWISE:
                key *= tl.exp(_load(g, at * K + n, n < K))
            else:
                key *= fade
            address, inside = _tile(state, n, column, state_k, state_v, K, end, DENSE)
            held += tl.sum(_load(address, 0, inside) * key[:, None], 0)
        if UNIT:
            of_q = 1.0 / tl.sqrt(squares_q + eps)
            of_k = 1.0 / tl.sqrt(squares_k + eps)
        written = tl.load(beta + at).to(tl.float32) * (written - held * of_k) * of_k
    result = tl.zeros([BV], tl.float32)
    for first in range(0, K, BK):
        n = first + tl.arange(0, BK)
        address, inside = _tile(state, n, column, state_k, state_v, K, end, DENSE)
        tile = _load(address, 0, inside)
        if CHANNELWISE:
            tile *= tl.exp(_load(g, at * K + n, n < K))[:, None]
        else:
            tile *= fade
        tile += _load(k, keys + n, n < K)[:, None] * written[None, :]
        tl.store(address, tile.to(state.dtype.element_ty), mask=inside)
        result += tl.sum(tile * _load(q, keys + n, n < K)[:, None], 0)
    result = tl.where(column < end, result * (of_q * scale), 0.0)
    tl.store(out + at * V + column, result.to(out.dtype.element_ty), mask=column < V)


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """None if the Triton kernel runs for tensors of this device type and dtype, else the reason."""
    if dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 runs on the reference"
    if dtype not in DTYPES:
        return f"the Triton kernels take {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    return triton_language.why_not(device, _gated_delta_rule_update_kernel)


def config(keys: int, lanes: int = triton_language.WARP) -> Config:
    """Tile of BK rows and BV columns of a state, and launch options, for warps of ``lanes``."""
    BK = 16
    while BK < min(keys, MAX_KEYS):
        BK *= 2
    return {"BK": BK, "BV": min(64, ELEMENTS // BK), "num_warps": 128 // lanes, "enable_fp_fusion": True}


def step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    indices: Tensor | None,
    targets: Tensor | None,
    scale: float,
    normalize: bool,
    pad: int,
    launch: Config | None = None,
) -> Tensor:
    """Advance the picked rows of state in place and return o; launch: None for :func:`config`'s.

    Tensors may differ in dtype; the arithmetic is float32 and the state is rounded once, when it is stored.
    """
    rest = (q, k, v, g, beta, scale, normalize, launch)
    if targets is not None:  # no entry may write what another one has yet to read
        return slots.through_copies(lambda copies: (advance(copies, None, *rest), copies), state, indices, targets, pad)
    rows = None
    if indices is not None:
        picked, valid = slots.pick(indices, pad)
        rows = torch.where(valid, picked, -1)
    return advance(state, rows, *rest)


def advance(
    state: Tensor,
    rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    scale: float,
    normalize: bool,
    launch: Config | None = None,
) -> Tensor:
    """As :func:`step`; rows (batch,) int64, negative for an entry that has none; without beta nothing is erased."""
    slots.check_apart(state)
    heads, values = v.shape[1:]
    keys = q.shape[2]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    launch = launch or config(keys)
    q, k, v, g = (t.contiguous() for t in (q, k, v, g))
    beta = None if beta is None else beta.contiguous()
    if programs := v.shape[0] * heads * -(-values // launch["BV"]):
        with triton_language.on_device(v):
            _gated_delta_rule_update_kernel[(programs,)](
                state, rows, q, k, v, g, beta, out, heads, heads // q.shape[1], keys, values, scale, reference.EPS,
                *state.stride(), CHANNELWISE=g.dim() == 3, UNIT=normalize, DENSE=state.stride(3) == 1, **launch,
            )  # fmt: skip
    return out
