"""What the forward and the backward kernel of the selective scan share: a tile of R BD channels and T steps, held in pieces.

A lane owns 8 consecutive steps of one channel in each of R row blocks.  A tensor of a tile is a tuple of 8 pieces (BD, LN),
LN = T / 8; piece i holds step 8 lane + i.  All pieces have one layout, so that nothing moves between lanes but the aggregates
of the scan over lanes.

How a (batch, D, L) tensor lies in memory is a constant of the kernel: ``TIME``, steps are neighbours and every run of 8 is
aligned; ``CHANNEL``, the same of channels; ``ANY``.
"""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl

ANY, TIME, CHANNEL = 0, 1, 2


@jit
def compose(a1, b1, a2, b2):
    """The map h -> a2 (a1 h + b1) + b2."""
    return a1 * a2, a2 * b1 + b2


@jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x; FAST: by the special function unit of an NVIDIA GPU, within one unit in the last place."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@jit
def sigmoid(x, FAST: tl.constexpr):
    return reciprocal(1.0 + tl.exp2(x * -1.4426950408889634), FAST)


@jit
def softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|), with the minimax polynomial of log(1 + e) / e of degree 8 (error 3e-8)."""
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    p = e * 0.0052326940931379795 - 0.029505237936973572
    p = p * e + 0.07822594791650772
    p = p * e - 0.13663245737552643
    p = p * e + 0.19106006622314453
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return tl.maximum(x, 0.0) + e * p


@jit
def softplus_slope(x, FAST: tl.constexpr):
    """Derivative of softplus, without overflow."""
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    return tl.where(x >= 0, 1.0, e) * reciprocal(1.0 + e, FAST)


@jit
def split4(x, BD: tl.constexpr, LN: tl.constexpr):
    """Pieces of x (BD, 4 LN)."""
    even, odd = tl.split(tl.reshape(x, [BD, LN, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@jit
def split8(x, BD: tl.constexpr, LN: tl.constexpr):
    """Pieces of x (BD, 8 LN)."""
    even, odd = tl.split(tl.reshape(x, [BD, LN, 2, 2, 2]))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def join4(x0, x1, x2, x3, BD: tl.constexpr, LN: tl.constexpr):
    """The inverse of split4."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [BD, LN * 4])


@jit
def join8(x, BD: tl.constexpr, LN: tl.constexpr):
    """The inverse of split8."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), [BD, LN * 8])


@jit
def _quads(p, rows, stride, first, LN: tl.constexpr):
    """Addresses (BD, 4 LN) of steps first to first + 3 of every lane's 8; p: aligned, stride: a multiple of 4."""
    k = tl.arange(0, 4 * LN)
    p = p + (rows * stride)[:, None] + (k // 4 * 8 + k % 4 + first)[None, :]
    return tl.max_contiguous(tl.multiple_of(p, (1, 16)), (1, 4))


@jit
def _quad_mask(rows_left, left, BD: tl.constexpr, LN: tl.constexpr):
    k = tl.arange(0, 4 * LN)
    return (tl.arange(0, BD) < rows_left)[:, None] & (k // 4 * 8 < left)[None, :]


@jit
def _addresses(p, rows, row_stride, step_stride, KIND: tl.constexpr, LN: tl.constexpr):
    """Addresses (BD, 8 LN) of a tile at p."""
    t = tl.arange(0, 8 * LN).to(tl.int64)
    if KIND == 1:
        p = p + (rows * row_stride)[:, None] + t[None, :]
        return tl.max_contiguous(tl.multiple_of(p, (1, 16)), (1, 8))
    elif KIND == 2:
        p = p + rows[:, None] + (t * step_stride)[None, :]
        return tl.max_contiguous(tl.multiple_of(p, (16, 1)), (8, 1))
    else:
        return p + (rows * row_stride)[:, None] + (t * step_stride)[None, :]


@jit
def _mask(rows_left, left, KIND: tl.constexpr, BD: tl.constexpr, LN: tl.constexpr):
    """What of a tile exists, (BD, 8 LN); its edges are multiples of 8 along the axis of neighbours."""
    d = tl.arange(0, BD)
    t = tl.arange(0, 8 * LN)
    if KIND == 1:
        t = t // 8 * 8
    elif KIND == 2:
        d = d // 8 * 8
    return (d < rows_left)[:, None] & (t < left)[None, :]


@jit
def load_tile(p, row, row_stride, step_stride, rows_left, left, KIND: tl.constexpr, BD: tl.constexpr, LN: tl.constexpr):
    """Pieces, float32, of the tile of rows ``row`` to row + BD at p; zeros from row ``rows_left`` and step ``left`` on."""
    rows = (row + tl.arange(0, BD)).to(tl.int64)
    rows_left = rows_left - row
    if KIND == 1 and p.dtype.element_ty == tl.float32:
        mask = _quad_mask(rows_left, left, BD, LN)
        a = split4(tl.load(_quads(p, rows, row_stride, 0, LN), mask=mask, other=0.0), BD, LN)
        b = split4(tl.load(_quads(p, rows, row_stride, 4, LN), mask=mask, other=0.0), BD, LN)
        return a + b
    else:
        mask = _mask(rows_left, left, KIND, BD, LN)
        x = tl.load(_addresses(p, rows, row_stride, step_stride, KIND, LN), mask=mask, other=0.0)
        return split8(x.to(tl.float32), BD, LN)


@jit
def store_tile(
    x, p, row, row_stride, step_stride, rows_left, left, KIND: tl.constexpr, BD: tl.constexpr, LN: tl.constexpr
):
    """Write pieces where load_tile would read them."""
    rows = (row + tl.arange(0, BD)).to(tl.int64)
    rows_left = rows_left - row
    if KIND == 1 and p.dtype.element_ty == tl.float32:
        mask = _quad_mask(rows_left, left, BD, LN)
        tl.store(_quads(p, rows, row_stride, 0, LN), join4(x[0], x[1], x[2], x[3], BD, LN), mask=mask)
        tl.store(_quads(p, rows, row_stride, 4, LN), join4(x[4], x[5], x[6], x[7], BD, LN), mask=mask)
    else:
        mask = _mask(rows_left, left, KIND, BD, LN)
        x = join8(x, BD, LN).to(p.dtype.element_ty)
        tl.store(_addresses(p, rows, row_stride, step_stride, KIND, LN), x, mask=mask)


@jit
def load_steps(p, BD: tl.constexpr, LN: tl.constexpr):
    """Pieces, float32, of the 8 LN numbers at p, the same in every row; p: float32 or bfloat16, aligned to 16 bytes."""
    zero = tl.arange(0, BD) * 0
    if p.dtype.element_ty == tl.bfloat16:
        k = tl.arange(0, 4 * LN)
        pairs = p.to(tl.pointer_type(tl.int32)) + (zero[:, None] + k[None, :])
        pairs = split4(tl.load(tl.max_contiguous(tl.multiple_of(pairs, (1, 16)), (1, 4))), BD, LN)
        out = ()
        for i in tl.static_range(4):
            low = (pairs[i] << 16).to(tl.float32, bitcast=True)
            high = (pairs[i] & -65536).to(tl.float32, bitcast=True)
            out = out + (low, high)  # noqa: RUF005, Triton has no starred tuples
        return out
    else:
        return split4(tl.load(_quads(p, zero, 0, 0, LN)), BD, LN) + split4(tl.load(_quads(p, zero, 0, 4, LN)), BD, LN)


@jit
def load_rows(p, rows, inside, EVEN: tl.constexpr):
    """p[rows], zeros where not ``inside``; EVEN: all are."""
    if EVEN:
        return tl.load(p + rows)
    else:
        return tl.load(p + rows, mask=inside, other=0.0)


@jit
def step_sizes(delta, bias, left, SOFTPLUS: tl.constexpr, LN: tl.constexpr):
    """Step sizes in front of softplus, and after it, in pieces; bias: (BD,) or None.

    Steps from ``left`` on have step size 0, which leaves a state as it is.
    """
    lane = tl.arange(0, LN)[None, :]
    raw = ()
    dt = ()
    for i in tl.static_range(8):
        x = delta[i]
        if bias is not None:
            x = x + bias[:, None]
        raw = raw + (x,)  # noqa: RUF005
        if SOFTPLUS:
            x = softplus(x)
        dt = dt + (tl.where(lane * 8 + i < left, x, 0.0),)  # noqa: RUF005
    return raw, dt


@jit
def total(x):
    """Sum of 8 pieces."""
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@jit
def place(L, channels, groups, cu_seqlens, R: tl.constexpr, BD: tl.constexpr, T: tl.constexpr):
    """What this program walks; channels: of one group.

    Returns:
        sequence, block (of channels within the group), group, first channel, batch row, first step, number of steps, and the
        first of the sequence's tiles in the packed B and C, and in the checkpoints (one more a sequence).
    """
    blocks = tl.cdiv(channels, R * BD)
    program = tl.program_id(0)
    sequence = (program // (blocks * groups)).to(tl.int64)
    group = program // blocks % groups
    block = program % blocks
    channel = group * channels + block * (R * BD)
    if cu_seqlens is None:
        tiles = (L + T - 1) // T
        return sequence, block, group, channel, sequence, L * 0, L, sequence * 0, sequence * (tiles + 1)
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), L).to(tl.int32)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), begin), L).to(tl.int32)
        tile = begin // T + sequence
        return sequence, block, group, channel, sequence * 0, begin, end - begin, tile, tile + sequence


@jit
def copy_states(source, target, N, row, rows_left, from_d, from_n, to_d, to_n, BD: tl.constexpr):
    """Copy the states of rows ``row`` to row + BD, with strides for channel and state; source None: zeros."""
    d = row + tl.arange(0, BD)
    for first in range(0, N, 16):
        n = first + tl.arange(0, 16)
        mask = (d < rows_left)[:, None] & (n < N)[None, :]
        if source is None:
            h = tl.zeros([BD, 16], tl.float32)
        else:
            h = tl.load(source + d[:, None] * from_d + n[None, :].to(tl.int64) * from_n, mask=mask, other=0.0)
        tl.store(target + d[:, None] * to_d + n[None, :].to(tl.int64) * to_n, h, mask=mask)
