"""Forward kernels of the matrix-valued scan: decays within chunks, states between chunks, outputs of chunks.

``decays`` (chunks, heads, 5, T) float32 holds for every step the cumulated log decays of its chunk, what scales its input, the
decay from the front of the chunk to the step, that from the step to the end of the chunk, both zero where another sequence
begins between, and what the cumulated log decays lost by rounding.
"""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.selective_scan import triton_tiles as shared
from compressm.kernels.ssd import triton_tiles as tiles


@jit
def step_sizes(dt, bias, low, high, left, SOFTPLUS: tl.constexpr):
    """In front of softplus, behind it, and behind the clamp, there zero from step ``left`` on; dt (heads, T), bias (heads,)."""
    raw = dt
    if bias is not None:
        raw += bias[:, None]
    free = raw
    if SOFTPLUS:
        free = shared.softplus(raw)
    t = tl.arange(0, dt.shape[1])[None, :]
    clamped = tl.maximum(free, low, propagate_nan=tl.PropagateNan.ALL)
    clamped = tl.minimum(clamped, high, propagate_nan=tl.PropagateNan.ALL)
    return raw, free, tl.where(t < left, clamped, 0.0)


@jit(
    do_not_specialize=[
        "dt", "A", "bias", "segments", "starts", "counts", "decays", "L", "chunks", "heads", "low", "high",
        "dt_b", "dt_t", "dt_h",
    ]
)  # fmt: skip
def _ssd_decays_kernel(
    dt, A, bias, segments, starts, counts, decays, L, chunks, heads, low, high, dt_b, dt_t, dt_h,
    SOFTPLUS: tl.constexpr, SCALED: tl.constexpr, BH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Decays of one chunk and BH heads; SCALED: the step sizes scale the inputs."""
    blocks = tl.cdiv(heads, BH)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    row, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    t = tl.arange(0, T)
    inside = h < heads
    wide = h.to(tl.int64)
    both = inside[:, None] & (t < count)[None, :]
    address = dt + row * dt_b + (start + t.to(tl.int64))[None, :] * dt_t + (wide * dt_h)[:, None]
    shift = None
    if bias is not None:
        shift = tl.load(bias + h, mask=inside, other=0.0)
    _raw, _free, step = step_sizes(tl.load(address, mask=both, other=0.0).to(tl.float32), shift, low, high, count, SOFTPLUS)
    decay = tiles.bounded(step.to(tl.float64) * tl.load(A + h, mask=inside, other=0.0).to(tl.float64)[:, None])
    exact = tl.cumsum(decay, 1)
    total = exact.to(tl.float32)
    front = tl.exp(total)
    behind = tl.exp((tl.sum(decay, 1)[:, None] - exact).to(tl.float32))
    if segments is not None:
        segment = tiles.segment_of(segments, row, L, start, count, T)
        before = tl.load(segments + row * L + tl.maximum(start - 1, 0))
        front = tl.where((segment == before)[None, :], front, 0.0)
        end = tl.load(segments + row * L + start + count - 1)
        behind = tl.where((segment == end)[None, :], behind, 0.0)
    out = decays + ((chunk * heads + wide) * (5 * T))[:, None] + t[None, :]
    kept = inside[:, None] & (t >= 0)[None, :]
    tl.store(out, total, mask=kept)
    if not SCALED:
        step = tl.where(both, 1.0, 0.0)
    tl.store(out + T, step, mask=kept)
    tl.store(out + 2 * T, front, mask=kept)
    tl.store(out + 3 * T, behind, mask=kept)
    tl.store(out + 4 * T, (exact - total.to(tl.float64)).to(tl.float32), mask=kept)


@jit(
    do_not_specialize=[
        "x", "z", "B", "decays", "firsts", "ends", "starts", "counts", "initial", "states", "last", "L", "chunks", "heads",
        "own", "P", "N", "padded", "scale", "x_b", "x_t", "x_h", "x_p", "z_b", "z_t", "z_h", "z_p", "B_b", "B_t", "B_g", "B_n",
    ]
)  # fmt: skip
def _ssd_states_kernel(
    x, z, B, decays, firsts, ends, starts, counts, initial, states, last, L, chunks, heads, own, P, N, padded, scale,
    x_b, x_t, x_h, x_p, z_b, z_t, z_h, z_p, B_b, B_t, B_g, B_n,
    REVERSE: tl.constexpr, WIDE: tl.constexpr, WIDE_B: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile (BP, BN) of a head's states, through all chunks of a sequence.

    states (chunks, heads, P, padded) gets the state in front of every chunk, last (sequences, heads, P, N) the one behind the
    last.  REVERSE: of the backward, where x is the output's gradient (gated by z), B is C, and what is kept of a chunk is the
    gradient of the state behind it.  own: heads of a group; scale: of C, None for one.
    """
    columns = tl.cdiv(N, BN)
    blocks = tl.cdiv(P, BP) * columns
    program = tl.program_id(0)
    sequence = (program // (blocks * heads)).to(tl.int64)
    head = (program // blocks % heads).to(tl.int64)
    p = program % blocks // columns * BP
    n = program % columns * BN
    if firsts is None:
        first = sequence * chunks
        end = first + chunks
    else:
        first = tl.load(firsts + sequence)
        end = tl.load(ends + sequence)
    edge = ((sequence * heads + head) * P + p) * N + n
    state = tl.zeros([BP, BN], tl.float32)
    if initial is not None:
        state = tiles.load(initial + edge, N, 1, P - p, N - n, False, BP, BN)
    x += head * x_h + p * x_p.to(tl.int64)
    B += head // own * B_g + n * B_n.to(tl.int64)
    if z is not None:
        z += head * z_h + p * z_p.to(tl.int64)
    t = tl.arange(0, T)
    for turn in range(0, (end - first).to(tl.int32)):
        chunk = first + turn
        if REVERSE:
            chunk = end - 1 - turn
        row, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
        kept = states + ((chunk * heads + head) * P + p) * padded + n
        tiles.store(kept, state, padded, 1, P - p, padded - n, True)
        gain = decays + (chunk * heads + head) * (5 * T)
        weight = tl.load(gain + 2 * T + t)
        if scale is not None:
            weight *= scale
        if not REVERSE:
            weight = tl.load(gain + T + t) * tl.load(gain + 3 * T + t)
        gate = None
        if z is not None:
            gate = z + row * z_b + start * z_t
        value = tiles.load_gated(x + row * x_b + start * x_t, x_t, x_p, gate, z_t, z_p, count, P - p, WIDE, T, BP)
        key = tiles.load(B + row * B_b + start * B_t, B_t, B_n, count, N - n, WIDE_B, T, BN)
        value = (value * weight[:, None]).to(states.dtype.element_ty)
        state *= tl.load(gain + 3 * T - 1)
        state = tiles.product(tl.trans(value), key.to(states.dtype.element_ty), state, PRECISION)
    tiles.store(last + edge, state, N, 1, P - p, N - n, False)


@jit
def scores(
    left, right, l_t, l_n, r_t, r_n, count, N,
    WIDE_B: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, T: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Products (T, T) of the rows of two tensors (T, N)."""
    total = tl.zeros([T, T], tl.float32)
    for n in range(0, N, BN):
        a = tiles.load(left + n * l_n.to(tl.int64), l_t, l_n, count, N - n, WIDE_B, T, BN).to(DOT)
        b = tiles.load(right + n * r_n.to(tl.int64), r_t, r_n, count, N - n, WIDE_B, T, BN).to(DOT)
        total = tiles.product(a, tl.trans(b), total, PRECISION)
    return total


@jit
def through_states(
    key, states, k_t, k_n, count, rows_left, N, padded,
    WIDE_B: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Products (T, BP) of the rows of a tensor (T, N) and those of a head's states (BP, padded)."""
    total = tl.zeros([T, BP], tl.float32)
    for n in range(0, N, BN):
        a = tiles.load(key + n * k_n.to(tl.int64), k_t, k_n, count, N - n, WIDE_B, T, BN).to(states.dtype.element_ty)
        b = tiles.load(states + n, padded, 1, rows_left, padded - n, True, BP, BN)
        total = tiles.product(a, tl.trans(b), total, PRECISION)
    return total


@jit(
    do_not_specialize=[
        "x", "B", "C", "D", "z", "decays", "segments", "starts", "counts", "states", "out", "L", "chunks", "heads", "own",
        "few", "P", "N", "padded", "scale", "x_b", "x_t", "x_h", "x_p", "B_b", "B_t", "B_g", "B_n", "C_b", "C_t", "C_g", "C_n",
        "z_b", "z_t", "z_h", "z_p", "out_b", "out_t", "out_h", "out_p", "D_h", "D_p",
    ]
)  # fmt: skip
def _ssd_outputs_kernel(
    x, B, C, D, z, decays, segments, starts, counts, states, out, L, chunks, heads, own, few, P, N, padded, scale,
    x_b, x_t, x_h, x_p, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, z_b, z_t, z_h, z_p, out_b, out_t, out_h, out_p, D_h, D_p,
    WIDE: tl.constexpr, WIDE_B: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk, for ``few`` heads of a group, which share the products of B and C; scale: of C, None for one."""
    blocks = tl.cdiv(own, few)
    groups = heads // own
    chunk = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    group = (tl.program_id(0) // blocks % groups).to(tl.int64)
    block = tl.program_id(0) % blocks
    row, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    DOT: tl.constexpr = states.dtype.element_ty
    B += row * B_b + start * B_t + group * B_g
    C += row * C_b + start * C_t + group * C_g
    mixed = scores(C, B, C_t, C_n, B_t, B_n, count, N, WIDE_B, PRECISION, DOT, T, BN)
    if scale is not None:
        mixed *= scale
    t = tl.arange(0, T)
    for k in range(block * few, tl.minimum(block * few + few, own)):
        head = group * own + k
        gain = decays + (chunk * heads + head) * (5 * T)
        share = tiles.decay_between(gain, segments, row, L, start, count, T, False, DOT)
        share = (mixed * share * tl.load(gain + T + t)[None, :]).to(DOT)
        front = tl.load(gain + 2 * T + t)
        if scale is not None:
            front *= scale
        for p in range(0, P, BP):
            kept = states + ((chunk * heads + head) * P + p) * padded
            result = through_states(C, kept, C_t, C_n, count, P - p, N, padded, WIDE_B, PRECISION, T, BP, BN)
            source = x + row * x_b + start * x_t + head * x_h + p * x_p.to(tl.int64)
            value = tiles.load(source, x_t, x_p, count, P - p, WIDE, T, BP)
            result = tiles.product(share, value.to(DOT), result * front[:, None], PRECISION)
            if D is not None:
                skip = p + tl.arange(0, BP)
                result += value.to(tl.float32) * tl.load(D + head * D_h + skip * D_p, mask=skip < P, other=0.0)
            target = row * out_b + start * out_t + head * out_h + p * out_p.to(tl.int64)
            if z is not None:
                source = z + row * z_b + start * z_t + head * z_h + p * z_p.to(tl.int64)
                result *= tiles.silu(tiles.load(source, z_t, z_p, count, P - p, WIDE, T, BP).to(tl.float32))
            tiles.store(out + target, result, out_t, out_p, count, P - p, WIDE)
