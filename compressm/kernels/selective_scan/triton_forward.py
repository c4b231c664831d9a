"""Forward kernel of the selective scan: per state a short scan over a tile of steps, the carries through memory."""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.selective_scan import triton_tiles as tiles


@jit
def _first_pass(dt, drive, B, decay, total, h0, prev, r: tl.constexpr):
    """Factors and inputs of the recurrence of row block r, the states at the lanes' ends, and those in front of the lanes.

    decay, h0: (BD,), A log2(e) and the state in front of the tile; total: (BD, LN), sums of dt over a lane's steps.
    """
    a = ()
    b = ()
    for i in tl.static_range(8):
        a = a + (tl.exp2(dt[r * 8 + i] * decay[:, None]),)  # noqa: RUF005
        b = b + (drive[r * 8 + i] * B[i],)  # noqa: RUF005
    h = b[0]
    for i in tl.static_range(1, 8):
        h = a[i] * h + b[i]
    factor = tl.exp2(total * decay[:, None])
    first = tl.arange(0, prev.shape[1])[None, :] == 0
    h = h + factor * (h0[:, None] * tl.where(first, 1.0, 0.0))
    _factors, ends = tl.associative_scan((factor, h), 1, tiles.compose)
    return a, b, ends, tl.where(first, h0[:, None], tl.gather(ends, prev, 1)), factor


@jit(
    do_not_specialize=[
        "u", "delta", "A", "B", "C", "D", "z", "bias", "initial", "cu_seqlens", "out", "y", "last", "carries",
        "L", "N", "steps", "channels", "groups", "one", "u_b", "u_d", "u_t", "delta_b", "delta_d", "delta_t",
        "z_b", "z_d", "z_t", "out_b", "out_d", "out_t",
    ]
)  # fmt: skip
def _selective_scan_fwd_kernel(
    u, delta, A, B, C, D, z, bias, initial, cu_seqlens, out, y, last, carries, L, N, steps, channels, groups, one,
    u_b, u_d, u_t, delta_b, delta_d, delta_t, z_b, z_d, z_t, out_b, out_d, out_t,
    SOFTPLUS: tl.constexpr, TRAIN: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr,
    U: tl.constexpr, DELTA: tl.constexpr, Z: tl.constexpr, OUT: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """out (batch, D, L), the last state (sequences, D, N), and with TRAIN y, the output in front of the gate, where z is.

    A: (N, groups blocks R BD) float32, A log2(e) with each group's channels padded by zeros; B, C: (batch, groups, N, steps),
    padded to whole tiles by zeros; carries: (slots, N, D) float32, the state in front of every tile and behind the last one,
    or without TRAIN two slots a sequence, used in turns.  one: 1; the compiler must not see that channels are neighbours, or it
    would turn the store of the carries around.  U, DELTA, Z, OUT: how tensors lie, see triton_tiles.
    """
    LN: tl.constexpr = T // 8
    sequence, block, group, channel, row, begin, count, tile, slot = tiles.place(L, channels, groups, cu_seqlens, R, BD, T)
    width = channels * groups
    padded = tl.cdiv(channels, R * BD) * (R * BD)
    rows_left = channels - block * (R * BD)
    A += group * padded + block * (R * BD)
    B += (row * groups + group) * N * steps + tile * T
    C += (row * groups + group) * N * steps + tile * T
    stretch = N.to(tl.int64) * width
    count_tiles = tl.cdiv(count, T)
    if TRAIN:
        carries += slot * stretch + channel
        entry = carries
        exit_ = carries + count_tiles * stretch
    else:
        carries += sequence * 2 * stretch + channel
        entry = carries + (count_tiles & 1) * stretch
        exit_ = carries
    if initial is not None:
        initial += (sequence * width + channel) * N
    for r in tl.static_range(R):
        tiles.copy_states(initial, entry, N, r * BD, rows_left, N, 1, 1, width, BD)
    tl.debug_barrier()
    d = tl.arange(0, BD)
    lane = tl.arange(0, LN)
    prev = tl.broadcast_to(tl.maximum(lane - 1, 0)[None, :], [BD, LN])
    channel = channel.to(tl.int64)
    begin = begin.to(tl.int64)
    u += row * u_b + channel * u_d + begin * u_t
    delta += row * delta_b + channel * delta_d + begin * delta_t
    out += row * out_b + channel * out_d + begin * out_t
    if z is not None:
        z += row * z_b + channel * z_d + begin * z_t
    if y is not None:
        y += row * out_b + channel * out_d + begin * out_t
    for c in range(0, count_tiles):
        left = count - c * T
        dt = ()
        drive = ()
        totals = ()
        sums = ()
        for r in tl.static_range(R):
            inside = r * BD + d < rows_left
            x = tiles.load_tile(u, r * BD, u_d, u_t, rows_left, left, U, BD, LN)
            shift = None
            if bias is not None:
                shift = tiles.load_rows(bias, channel + r * BD + d, inside, EVEN)
            step = tiles.load_tile(delta, r * BD, delta_d, delta_t, rows_left, left, DELTA, BD, LN)
            _raw, step = tiles.step_sizes(step, shift, left, SOFTPLUS, LN)
            totals = totals + (tiles.total(step),)  # noqa: RUF005
            dt = dt + step
            skip = tl.zeros([BD], tl.float32)
            if D is not None:
                skip = tiles.load_rows(D, channel + r * BD + d, inside, EVEN)
            for i in tl.static_range(8):
                drive = drive + (step[i] * x[i],)  # noqa: RUF005
                sums = sums + (x[i] * skip[:, None],)  # noqa: RUF005
        if TRAIN:
            before = carries + c * stretch
            after = before + stretch
        else:
            before = carries + ((count_tiles - c) & 1) * stretch
            after = carries + ((count_tiles - c - 1) & 1) * stretch
        p_A = A
        p_B = B + c * T
        p_C = C + c * T
        for _n in range(0, N):
            b_n = tiles.load_steps(p_B, BD, LN)
            c_n = tiles.load_steps(p_C, BD, LN)
            next_sums = ()
            for r in tl.static_range(R):
                inside = r * BD + d < rows_left
                decay = tl.load(p_A + r * BD + d)
                h0 = tiles.load_rows(before, (r * BD + d) * one, inside, EVEN)
                a, b, ends, h, _factor = _first_pass(dt, drive, b_n, decay, totals[r], h0, prev, r)
                target = after + ((r * BD + d) * one)[:, None] + (lane - (LN - 1))[None, :]
                if EVEN:
                    tl.store(target, ends, mask=(lane == LN - 1)[None, :])
                else:
                    tl.store(target, ends, mask=(lane == LN - 1)[None, :] & inside[:, None])
                for i in tl.static_range(8):
                    h = a[i] * h + b[i]
                    next_sums = next_sums + (sums[r * 8 + i] + h * c_n[i],)  # noqa: RUF005
            sums = next_sums
            p_A += padded * groups
            p_B += steps
            p_C += steps
            before += width
            after += width
        tl.debug_barrier()
        for r in tl.static_range(R):
            result = ()
            for i in tl.static_range(8):
                result = result + (sums[r * 8 + i],)  # noqa: RUF005
            if z is not None:
                if y is not None:
                    tiles.store_tile(result, y, r * BD, out_d, out_t, rows_left, left, OUT, BD, LN)
                gate = tiles.load_tile(z, r * BD, z_d, z_t, rows_left, left, Z, BD, LN)
                gated = ()
                for i in tl.static_range(8):
                    gated = gated + (result[i] * (gate[i] * tiles.sigmoid(gate[i], FAST)),)  # noqa: RUF005
                result = gated
            tiles.store_tile(result, out, r * BD, out_d, out_t, rows_left, left, OUT, BD, LN)
        u += T * u_t
        delta += T * delta_t
        out += T * out_t
        if z is not None:
            z += T * z_t
        if y is not None:
            y += T * out_t
    last += (sequence * width + channel) * N
    for r in tl.static_range(R):
        tiles.copy_states(exit_, last, N, r * BD, rows_left, 1, width, N, 1, BD)
