"""Backward kernel of the selective scan: every tile's states again from its checkpoint, then the adjoint against time.

With g_t the gradient of h_t, p_t = a_t g_t is what step t hands to the step in front of it; p obeys a recurrence with the
factors of the forward, in the other direction.  One exponential per state and step serves both.
"""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.selective_scan import triton_forward as forward
from compressm.kernels.selective_scan import triton_tiles as tiles


@jit
def _sum_channels(gB, gC, BD: tl.constexpr, LN: tl.constexpr, W: tl.constexpr):
    """Sums of gB and gC (pieces) over the channels of a warp, as a butterfly that leaves every lane a part of the sums.

    Returns:
        (W, DL, LN, V): with one channel a warp 16 values a lane, of B and then of C; with two or more half or a quarter:
        bit 0 of the channel tells C from B, bit 1 the second half of the steps from the first, and higher bits belong to
        sums over different channels.
    """
    DL: tl.constexpr = BD // W
    dl = tl.arange(0, DL)[None, :, None]
    if DL == 1:
        values = tl.join(tl.reshape(tiles.join8(gB, BD, LN), [BD, LN, 8]), tl.reshape(tiles.join8(gC, BD, LN), [BD, LN, 8]))
        return tl.reshape(tl.permute(values, (0, 1, 3, 2)), [W, DL, LN, 16])
    else:
        odd = (dl & 1) == 1
        other = tl.broadcast_to(dl ^ 1, [W, DL, LN])
        v = ()
        for i in tl.static_range(8):
            b = tl.reshape(gB[i], [W, DL, LN])
            c = tl.reshape(gC[i], [W, DL, LN])
            v = v + (tl.where(odd, c, b) + tl.gather(tl.where(odd, b, c), other, 1),)  # noqa: RUF005
        if DL == 2:
            even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
            return tl.reshape(tl.join(even, tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))), [W, DL, LN, 8])
        else:
            high = (dl & 2) == 2
            other = tl.broadcast_to(dl ^ 2, [W, DL, LN])
            q = ()
            for i in tl.static_range(4):
                swapped = tl.gather(tl.where(high, v[i], v[i + 4]), other, 1)
                q = q + (tl.where(high, v[i + 4], v[i]) + swapped,)  # noqa: RUF005
            return tl.reshape(tl.join(tl.join(q[0], q[2]), tl.join(q[1], q[3])), [W, DL, LN, 4])


@jit
def _add_sums(target, values, plane, BD: tl.constexpr, LN: tl.constexpr, W: tl.constexpr, DETERMINISTIC: tl.constexpr):
    """Add the values of _sum_channels to the gradients of B at ``target`` and of C at ``target + plane``.

    DETERMINISTIC: store their sum over the warps instead.
    """
    DL: tl.constexpr = BD // W
    KEPT: tl.constexpr = 4 if DL > 4 else DL
    V: tl.constexpr = 16 // KEPT
    lane = tl.arange(0, LN)[None, None, :, None]
    v = tl.arange(0, V)[None, None, None, :]
    if DETERMINISTIC:
        values = tl.sum(tl.reshape(values, [BD // KEPT, KEPT, LN, V]), 0)[None, :, :, :]
        dl = tl.arange(0, KEPT)[None, :, None, None]
        w = tl.arange(0, 1)[:, None, None, None] * 0
    else:
        dl = tl.arange(0, DL)[None, :, None, None]
        w = tl.arange(0, W)[:, None, None, None] * 0
    if KEPT == 1:
        offset = (v // 8) * plane + lane * 8 + v % 8 + dl * 0
    elif KEPT == 2:
        offset = dl * plane + lane * 8 + v
    else:
        offset = (dl & 1) * plane + lane * 8 + ((dl >> 1) & 1) * 4 + v
    p = target + (offset + w)
    p = tl.max_contiguous(tl.multiple_of(p, (1, 1, 1, 16)), (1, 1, 1, 4))
    if DETERMINISTIC:
        tl.store(p, values)
    else:
        tl.atomic_add(p, values, sem="relaxed")


@jit(
    do_not_specialize=[
        "u", "delta", "A", "B", "C", "D", "z", "bias", "y", "grad_out", "grad_last", "cu_seqlens", "carries", "scratch",
        "grad_u", "grad_delta", "grad_z", "grad_BC", "grad_D", "grad_bias", "L", "N", "steps", "channels", "groups", "one",
        "u_b", "u_d", "u_t", "delta_b", "delta_d", "delta_t", "z_b", "z_d", "z_t", "grad_b", "grad_d", "grad_t",
        "y_b", "y_d", "y_t", "gdelta_b", "gdelta_d", "gdelta_t", "gz_b", "gz_d", "gz_t",
    ]
)  # fmt: skip
def _selective_scan_bwd_kernel(
    u, delta, A, B, C, D, z, bias, y, grad_out, grad_last, cu_seqlens, carries, scratch,
    grad_u, grad_delta, grad_z, grad_BC, grad_D, grad_bias, L, N, steps, channels, groups, one,
    u_b, u_d, u_t, delta_b, delta_d, delta_t, z_b, z_d, z_t, grad_b, grad_d, grad_t,
    y_b, y_d, y_t, gdelta_b, gdelta_d, gdelta_t, gz_b, gz_d, gz_t,
    SOFTPLUS: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr, DETERMINISTIC: tl.constexpr, W: tl.constexpr,
    U: tl.constexpr, DELTA: tl.constexpr, Z: tl.constexpr, GRAD: tl.constexpr,
    Y: tl.constexpr, GDELTA: tl.constexpr, GZ: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs of the forward kernel, where the arguments that both have are told.

    grad_u lies as y (y_b, y_d, y_t, Y).  grad_BC: (batch, groups, 2, N, steps) float32, zeros to begin with, for B and C;
    DETERMINISTIC: one of these a block of channels, (batch, groups, blocks, 2, N, steps), every number written once.
    scratch: (sequences, 2, 2, N, D) float32; [:, 0, 0] receives the gradient of the initial state, [:, 0, 1] the sequence's
    share of the gradient of A.  The two halves [:, 0] and [:, 1] take turns, so that no tile reads what it writes.
    grad_D, grad_bias: (sequences, D) float32, shares.
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
    plane = N.to(tl.int64) * steps
    if DETERMINISTIC:
        blocks = tl.cdiv(channels, R * BD)
        grad_BC += ((row * groups + group) * blocks + block) * 2 * plane + tile * T
    else:
        grad_BC += (row * groups + group) * 2 * plane + tile * T
    count_tiles = tl.cdiv(count, T)
    carries += slot * stretch + channel
    scratch += sequence * 4 * stretch + channel
    if grad_last is not None:
        grad_last += (sequence * width + channel) * N
    entry = scratch + (count_tiles & 1) * 2 * stretch
    for r in tl.static_range(R):
        tiles.copy_states(grad_last, entry, N, r * BD, rows_left, N, 1, 1, width, BD)
        tiles.copy_states(None, entry + stretch, N, r * BD, rows_left, N, 1, 1, width, BD)
    tl.debug_barrier()
    d = tl.arange(0, BD)
    lane = tl.arange(0, LN)
    prev = tl.broadcast_to(tl.maximum(lane - 1, 0)[None, :], [BD, LN])
    nxt = tl.broadcast_to(tl.minimum(lane + 1, LN - 1)[None, :], [BD, LN])
    last = lane[None, :] == LN - 1
    if_last = tl.where(last, 1.0, 0.0)
    channel = channel.to(tl.int64)
    begin = begin.to(tl.int64)
    u += row * u_b + channel * u_d + begin * u_t
    delta += row * delta_b + channel * delta_d + begin * delta_t
    grad_out += row * grad_b + channel * grad_d + begin * grad_t
    grad_u += row * y_b + channel * y_d + begin * y_t
    grad_delta += row * gdelta_b + channel * gdelta_d + begin * gdelta_t
    if z is not None:
        z += row * z_b + channel * z_d + begin * z_t
        y += row * y_b + channel * y_d + begin * y_t
        grad_z += row * gz_b + channel * gz_d + begin * gz_t
    sum_D = ()
    sum_bias = ()
    for _r in tl.static_range(R):
        sum_D = sum_D + (tl.zeros([BD, LN], tl.float32),)  # noqa: RUF005
        sum_bias = sum_bias + (tl.zeros([BD, LN], tl.float32),)  # noqa: RUF005
    for turn in range(0, count_tiles):
        c = count_tiles - 1 - turn
        at = c.to(tl.int64) * T
        left = count - c * T
        dt = ()
        drive = ()
        dy = ()
        totals = ()
        next_D = ()
        by_input = ()
        by_step = ()
        for r in tl.static_range(R):
            inside = r * BD + d < rows_left
            x = tiles.load_tile(u + at * u_t, r * BD, u_d, u_t, rows_left, left, U, BD, LN)
            grad = tiles.load_tile(grad_out + at * grad_t, r * BD, grad_d, grad_t, rows_left, left, GRAD, BD, LN)
            if z is not None:
                gate = tiles.load_tile(z + at * z_t, r * BD, z_d, z_t, rows_left, left, Z, BD, LN)
                output = tiles.load_tile(y + at * y_t, r * BD, y_d, y_t, rows_left, left, Y, BD, LN)
                by_gate = ()
                gated = ()
                for i in tl.static_range(8):
                    s = tiles.sigmoid(gate[i], FAST)
                    silu = gate[i] * s
                    by_gate = by_gate + (grad[i] * output[i] * (s + silu * (1.0 - s)),)  # noqa: RUF005
                    gated = gated + (grad[i] * silu,)  # noqa: RUF005
                tiles.store_tile(by_gate, grad_z + at * gz_t, r * BD, gz_d, gz_t, rows_left, left, GZ, BD, LN)
                grad = gated
            shift = None
            if bias is not None:
                shift = tiles.load_rows(bias, channel + r * BD + d, inside, EVEN)
            step = tiles.load_tile(delta + at * delta_t, r * BD, delta_d, delta_t, rows_left, left, DELTA, BD, LN)
            _raw, step = tiles.step_sizes(step, shift, left, SOFTPLUS, LN)
            totals = totals + (tiles.total(step),)  # noqa: RUF005
            dt = dt + step
            dy = dy + grad
            skipped = sum_D[r]
            for i in tl.static_range(8):
                drive = drive + (step[i] * x[i],)  # noqa: RUF005
                skipped += grad[i] * x[i]
                by_input = by_input + (tl.zeros([BD, LN], tl.float32),)  # noqa: RUF005
                by_step = by_step + (tl.zeros([BD, LN], tl.float32),)  # noqa: RUF005
            next_D = next_D + (skipped,)  # noqa: RUF005
        sum_D = next_D
        p_A = A
        p_B = B + at
        p_C = C + at
        p_grad = grad_BC + at
        before = carries + c * stretch
        source = scratch + ((c + 1) & 1) * 2 * stretch
        target = scratch + (c & 1) * 2 * stretch
        for _n in range(0, N):
            b_n = tiles.load_steps(p_B, BD, LN)
            c_n = tiles.load_steps(p_C, BD, LN)
            next_input = ()
            next_step = ()
            gB = ()
            gC = ()
            for r in tl.static_range(R):
                inside = r * BD + d < rows_left
                rows = (r * BD + d) * one
                decay = tl.load(p_A + r * BD + d)
                h0 = tiles.load_rows(before, rows, inside, EVEN)
                p0 = tiles.load_rows(source, rows, inside, EVEN)
                sum_A = tiles.load_rows(source + stretch, rows, inside, EVEN)
                a, b, _ends, h, factor = forward._first_pass(dt, drive, b_n, decay, totals[r], h0, prev, r)
                own = ()
                for i in tl.static_range(8):
                    own = own + (dy[r * 8 + i] * c_n[i],)  # noqa: RUF005
                p = own[7]
                for i in tl.static_range(1, 8):
                    p = a[8 - i] * p + own[7 - i]
                p = a[0] * p + factor * (p0[:, None] * if_last)
                _factors, starts = tl.associative_scan((factor, p), 1, tiles.compose, reverse=True)
                g = own[7] + tl.where(last, p0[:, None], tl.gather(starts, nxt, 1))
                gs = (g,)
                for i in tl.static_range(1, 8):
                    g = a[8 - i] * g + own[7 - i]
                    gs = (g,) + gs  # noqa: RUF005
                by_A = tl.zeros([BD, LN], tl.float32)
                next_B = ()
                next_C = ()
                for i in tl.static_range(8):
                    kept = a[i] * h
                    h = kept + b[i]
                    kept *= gs[i]
                    by_A += kept * dt[r * 8 + i]
                    next_input = next_input + (by_input[r * 8 + i] + gs[i] * b_n[i],)  # noqa: RUF005
                    next_step = next_step + (by_step[r * 8 + i] + kept * decay[:, None],)  # noqa: RUF005
                    to_B = gs[i] * drive[r * 8 + i]
                    to_C = h * dy[r * 8 + i]
                    if r > 0:
                        to_B += gB[i]
                        to_C += gC[i]
                    next_B = next_B + (to_B,)  # noqa: RUF005
                    next_C = next_C + (to_C,)  # noqa: RUF005
                gB = next_B
                gC = next_C
                by_A = sum_A[:, None] + tl.sum(by_A, 1)[:, None] + tl.zeros([BD, LN], tl.float32)
                first = (lane == 0)[None, :]
                if not EVEN:
                    first = first & inside[:, None]
                carry = target + rows[:, None] + lane[None, :]
                tl.store(carry, starts, mask=first)
                tl.store(carry + stretch, by_A, mask=first)
            by_input = next_input
            by_step = next_step
            _add_sums(p_grad, _sum_channels(gB, gC, BD, LN, W), plane, BD, LN, W, DETERMINISTIC)
            p_A += padded * groups
            p_B += steps
            p_C += steps
            p_grad += steps
            before += width
            source += width
            target += width
        tl.debug_barrier()
        next_bias = ()
        for r in tl.static_range(R):
            inside = r * BD + d < rows_left
            x = tiles.load_tile(u + at * u_t, r * BD, u_d, u_t, rows_left, left, U, BD, LN)
            shift = None
            if bias is not None:
                shift = tiles.load_rows(bias, channel + r * BD + d, inside, EVEN)
            raw = tiles.load_tile(delta + at * delta_t, r * BD, delta_d, delta_t, rows_left, left, DELTA, BD, LN)
            raw, _step = tiles.step_sizes(raw, shift, left, False, LN)
            skip = tl.zeros([BD], tl.float32)
            if D is not None:
                skip = tiles.load_rows(D, channel + r * BD + d, inside, EVEN)
            to_u = ()
            to_delta = ()
            for i in tl.static_range(8):
                to_u = to_u + (dt[r * 8 + i] * by_input[r * 8 + i] + skip[:, None] * dy[r * 8 + i],)  # noqa: RUF005
                slope = x[i] * by_input[r * 8 + i] + by_step[r * 8 + i] * 0.6931471805599453
                if SOFTPLUS:
                    slope *= tiles.softplus_slope(raw[i], FAST)
                to_delta = to_delta + (tl.where(lane[None, :] * 8 + i < left, slope, 0.0),)  # noqa: RUF005
            next_bias = next_bias + (sum_bias[r] + tiles.total(to_delta),)  # noqa: RUF005
            tiles.store_tile(to_u, grad_u + at * y_t, r * BD, y_d, y_t, rows_left, left, Y, BD, LN)
            p_delta = grad_delta + at * gdelta_t
            tiles.store_tile(to_delta, p_delta, r * BD, gdelta_d, gdelta_t, rows_left, left, GDELTA, BD, LN)
        sum_bias = next_bias
    for r in tl.static_range(R):
        inside = r * BD + d < rows_left
        rows = sequence * width + channel + r * BD + d
        tl.store(grad_D + rows, tl.sum(sum_D[r], 1), mask=inside)
        tl.store(grad_bias + rows, tl.sum(sum_bias[r], 1), mask=inside)
