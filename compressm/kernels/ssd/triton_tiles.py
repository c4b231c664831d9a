"""What the kernels of the matrix-valued scan share: chunks of T steps, and tiles of rows and columns of them.

A chunk holds up to T steps of one sequence.  A tensor of steps (batch, L, heads, width) is read in tiles (T, columns) of one
head.  ``WIDE`` says of such tensors that columns are neighbours and every run of 8 of them is aligned; widths are then
multiples of 8.  Chunks that no step falls into exist where sequences are packed; programs leave them alone.
"""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.selective_scan import triton_tiles as shared


@jit
def place(chunk, starts, counts, L, chunks, T: tl.constexpr):
    """Batch row, first step and number of steps of a chunk; chunks: of a batch row, where ``starts`` is None."""
    if starts is None:
        row = chunk // chunks
        start = (chunk - row * chunks) * T
        return row, start, tl.minimum(L - start, T).to(tl.int32)
    else:
        return chunk * 0, tl.load(starts + chunk), tl.load(counts + chunk)


@jit
def _addresses(p, row_stride, stride, rows_left, columns_left, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses (ROWS, COLUMNS) of a tile at p, and which of them are inside."""
    r = tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    rows = p + (r.to(tl.int64) * row_stride)[:, None]
    if WIDE:
        address = tl.max_contiguous(tl.multiple_of(rows + k[None, :], (1, 16)), (1, 8))
        k = k // 8 * 8
    else:
        address = rows + (k.to(tl.int64) * stride)[None, :]
    return address, (r < rows_left)[:, None] & (k < columns_left)[None, :]


@jit
def load(p, row_stride, stride, rows_left, columns_left, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile at p, zeros outside."""
    address, inside = _addresses(p, row_stride, stride, rows_left, columns_left, WIDE, ROWS, COLUMNS)
    return tl.load(address, mask=inside, other=0.0)


@jit
def store(p, x, row_stride, stride, rows_left, columns_left, WIDE: tl.constexpr):
    """Write x where ``load`` would read it."""
    address, inside = _addresses(p, row_stride, stride, rows_left, columns_left, WIDE, x.shape[0], x.shape[1])
    tl.store(address, x.to(p.dtype.element_ty), mask=inside)


@jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b; PRECISION as of tl.dot, or "widened": Triton's interpreter multiplies no bfloat16."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def silu(x):
    return x * shared.sigmoid(x, False)


@jit
def load_gated(
    p, row_stride, stride, z, z_row, z_stride, rows_left, columns_left,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile at p, float32, times silu(z) where there is a z."""
    x = load(p, row_stride, stride, rows_left, columns_left, WIDE, ROWS, COLUMNS).to(tl.float32)
    if z is not None:
        x *= silu(load(z, z_row, z_stride, rows_left, columns_left, WIDE, ROWS, COLUMNS).to(tl.float32))
    return x


@jit
def bounded(decay):
    """Log decays in float64, none below one of which float32 keeps nothing: in sums the small ones do not drown."""
    return tl.where(decay < -200.0, -200.0, decay)


@jit
def segment_of(segments, row, L, start, count, T: tl.constexpr):
    """Numbers of the sequences that a chunk's steps belong to, (T,); steps behind the last belong with it."""
    t = tl.minimum(tl.arange(0, T), count - 1)
    return tl.load(segments + row * L + start + t)


@jit
def decay_between(
    decays, segments, row, L, start, count, T: tl.constexpr, BACK: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """What is left at step i of an input of step j, (T, T), zero for j > i and where another sequence begins between.

    decays: of the head.  BACK: transposed.  DOT: type of the operands; in float32 a difference of two sums needs what they lost
    by rounding.
    """
    t = tl.arange(0, T)
    total = tl.load(decays + t)
    later, earlier = t[:, None], t[None, :]
    gap = total[:, None] - total[None, :]
    if DOT == tl.float32:
        lost = tl.load(decays + 4 * T + t)
        gap += lost[:, None] - lost[None, :]
    if BACK:
        later, earlier = t[None, :], t[:, None]
        gap = -gap
    seen = later >= earlier
    if segments is not None:
        segment = segment_of(segments, row, L, start, count, T)
        seen = seen & (segment[:, None] == segment[None, :])
    return tl.where(seen, tl.exp(tl.where(seen, gap, 0.0)), 0.0)
