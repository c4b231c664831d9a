"""Backward kernels of the matrix-valued scan: gradients of the values (x, D, z), of the keys (B, C), and of the step sizes.

The states in front of the chunks come from the forward's kernel once more, the gradients of the states behind them from the
same one in reverse.  The log decay of a step gets what is read at or behind it of what was written in front of it, all sums of
products that decayed over it: none is a difference of two large ones.  Within a chunk that is ``by_decay``; of the states in
front of the chunk, a sum over the steps from the last one back (``reads``); of the states behind it, one from the first step on
(``writes``).
"""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.selective_scan import triton_tiles as shared
from compressm.kernels.ssd import triton_forward as forward
from compressm.kernels.ssd import triton_tiles as tiles


@jit
def _value_products(
    x, grad, z, x_t, x_p, grad_t, grad_p, z_t, z_p, count, P,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, T: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Products (T, T) of the rows of x and those of the output's gradient."""
    total = tl.zeros([T, T], tl.float32)
    for p in range(0, P, BP):
        gate = None
        if z is not None:
            gate = z + p * z_p.to(tl.int64)
        source = grad + p * grad_p.to(tl.int64)
        given = tiles.load_gated(source, grad_t, grad_p, gate, z_t, z_p, count, P - p, WIDE, T, BP).to(DOT)
        value = tiles.load(x + p * x_p.to(tl.int64), x_t, x_p, count, P - p, WIDE, T, BP).to(DOT)
        total = tiles.product(value, tl.trans(given), total, PRECISION)
    return total


@jit
def _across(products, PRECISION: tl.constexpr):
    """For every step t the sum of products (T, T) of an earlier step, the row, and t or a later one, the column."""
    T: tl.constexpr = products.shape[0]
    t = tl.arange(0, T)
    earlier = tl.where(t[None, :] < t[:, None], 1.0, 0.0).to(products.dtype)
    sums = tiles.product(earlier, products, tl.zeros([T, T], tl.float32), PRECISION)
    return tl.sum(tl.where(t[None, :] >= t[:, None], sums, 0.0), 1)


@jit
def _between_chunks(
    key, query, states, grad_states, k_t, k_n, q_t, q_n, count, rows_left, N, padded,
    WIDE_B: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Products (T, BP) of B with the gradients of the states behind a chunk, and of C with the states in front of it.

    And the sum of these states times those gradients, one by one.
    """
    written = tl.zeros([T, BP], tl.float32)
    read = tl.zeros([T, BP], tl.float32)
    passed = tl.zeros([BP, BN], tl.float32)
    for n in range(0, N, BN):
        state = tiles.load(states + n, padded, 1, rows_left, padded - n, True, BP, BN)
        grad_state = tiles.load(grad_states + n, padded, 1, rows_left, padded - n, True, BP, BN)
        a = tiles.load(key + n * k_n.to(tl.int64), k_t, k_n, count, N - n, WIDE_B, T, BN).to(state.dtype)
        written = tiles.product(a, tl.trans(grad_state), written, PRECISION)
        a = tiles.load(query + n * q_n.to(tl.int64), q_t, q_n, count, N - n, WIDE_B, T, BN).to(state.dtype)
        read = tiles.product(a, tl.trans(state), read, PRECISION)
        passed += state.to(tl.float32) * grad_state.to(tl.float32)
    return written, read, tl.sum(tl.sum(passed, 1), 0)


@jit
def _store_gate_gradient(
    grad, z, y, grad_z, grad_t, grad_p, z_t, z_p, y_t, y_p, gz_t, gz_p, count, rows_left,
    WIDE: tl.constexpr, T: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    gate = tiles.load(z, z_t, z_p, count, rows_left, WIDE, T, BP).to(tl.float32)
    given = tiles.load(grad, grad_t, grad_p, count, rows_left, WIDE, T, BP).to(tl.float32)
    output = tiles.load(y, y_t, y_p, count, rows_left, WIDE, T, BP).to(tl.float32)
    s = shared.sigmoid(gate, False)
    tiles.store(grad_z, given * output * (s + gate * s * (1.0 - s)), gz_t, gz_p, count, rows_left, WIDE)


@jit(
    do_not_specialize=[
        "x", "B", "C", "D", "z", "y", "grad_out", "decays", "segments", "starts", "counts", "states", "grad_states",
        "grad_x", "grad_z", "by_decay", "reads", "writes", "by_step", "grad_D", "L", "chunks", "heads", "own", "few", "P", "N",
        "padded", "scale", "x_b", "x_t", "x_h", "x_p",
        "B_b", "B_t", "B_g", "B_n", "C_b", "C_t", "C_g", "C_n", "z_b", "z_t", "z_h", "z_p", "y_b", "y_t", "y_h", "y_p",
        "grad_b", "grad_t", "grad_h", "grad_p", "gx_b", "gx_t", "gx_h", "gx_p", "gz_b", "gz_t", "gz_h", "gz_p", "D_h", "D_p",
    ]
)  # fmt: skip
def _ssd_values_kernel(
    x, B, C, D, z, y, grad_out, decays, segments, starts, counts, states, grad_states, grad_x, grad_z,
    by_decay, reads, writes, by_step, grad_D, L, chunks, heads, own, few, P, N, padded, scale,
    x_b, x_t, x_h, x_p, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    z_b, z_t, z_h, z_p, y_b, y_t, y_h, y_p, grad_b, grad_t, grad_h, grad_p, gx_b, gx_t, gx_h, gx_p, gz_b, gz_t, gz_h, gz_p,
    D_h, D_p, WIDE: tl.constexpr, WIDE_B: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's values, for ``few`` heads of a group, which share the products of B and C.

    by_decay, reads, writes and by_step (chunks, heads, T) get the gradients of the log decays and of the step sizes as factors
    of x, grad_D (chunks, heads, P) the chunk's sums; scale: of C, None for one.
    """
    blocks = tl.cdiv(own, few)
    groups = heads // own
    chunk = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    group = (tl.program_id(0) // blocks % groups).to(tl.int64)
    block = tl.program_id(0) % blocks
    row, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    DOT: tl.constexpr = grad_states.dtype.element_ty
    B += row * B_b + start * B_t + group * B_g
    C += row * C_b + start * C_t + group * C_g
    mixed = forward.scores(B, C, B_t, B_n, C_t, C_n, count, N, WIDE_B, PRECISION, DOT, T, BN)
    if scale is not None:
        mixed *= scale
    t = tl.arange(0, T)
    for k in range(block * few, tl.minimum(block * few + few, own)):
        head = group * own + k
        place = chunk * heads + head
        gain = decays + place * (5 * T)
        step = tl.load(gain + T + t)
        values = x + row * x_b + start * x_t + head * x_h
        grads = grad_out + row * grad_b + start * grad_t + head * grad_h
        gates = None
        if z is not None:
            gates = z + row * z_b + start * z_t + head * z_h
        share = mixed * tiles.decay_between(gain, segments, row, L, start, count, T, True, DOT)
        weighed = _value_products(
            values, grads, gates, x_t, x_p, grad_t, grad_p, z_t, z_p, count, P, WIDE, PRECISION, DOT, T, BP
        )
        within = _across(tl.where(t[:, None] < t[None, :], weighed * share * step[:, None], 0.0).to(DOT), PRECISION)
        tl.store(by_decay + place * T + t, within)
        share = share.to(DOT)
        front = tl.load(gain + 2 * T + t)
        if scale is not None:
            front *= scale
        behind = tl.load(gain + 3 * T + t)
        to_step = tl.zeros([T], tl.float32)
        read = tl.zeros([T], tl.float32)
        written = tl.zeros([T], tl.float32)
        passed = 0.0
        for p in range(0, P, BP):
            there = (place * P + p) * padded
            drive, entry, part = _between_chunks(
                B, C, states + there, grad_states + there, B_t, B_n, C_t, C_n, count, P - p, N, padded,
                WIDE_B, PRECISION, T, BP, BN,
            )  # fmt: skip
            passed += part
            given = grads + p * grad_p.to(tl.int64)
            gate = None
            if z is not None:
                gate = gates + p * z_p.to(tl.int64)
                source = y + row * y_b + start * y_t + head * y_h + p * y_p.to(tl.int64)
                target = grad_z + row * gz_b + start * gz_t + head * gz_h + p * gz_p.to(tl.int64)
                _store_gate_gradient(
                    given, gate, source, target, grad_t, grad_p, z_t, z_p, y_t, y_p, gz_t, gz_p, count, P - p, WIDE, T, BP
                )
            given = tiles.load_gated(given, grad_t, grad_p, gate, z_t, z_p, count, P - p, WIDE, T, BP)
            read += front * tl.sum(given * entry, 1)
            value = tiles.load(values + p * x_p.to(tl.int64), x_t, x_p, count, P - p, WIDE, T, BP).to(tl.float32)
            drive *= behind[:, None]
            written += step * tl.sum(drive * value, 1)
            drive = tiles.product(share, given.to(DOT), drive, PRECISION)
            to_step += tl.sum(drive * value, 1)
            drive *= step[:, None]
            if D is not None:
                skip = p + tl.arange(0, BP)
                drive += given * tl.load(D + head * D_h + skip * D_p, mask=skip < P, other=0.0)
                tl.store(grad_D + place * P + skip, tl.sum(given * value, 0), mask=skip < P)
            target = grad_x + row * gx_b + start * gx_t + head * gx_h + p * gx_p.to(tl.int64)
            tiles.store(target, drive, gx_t, gx_p, count, P - p, WIDE)
        tl.store(by_step + place * T + t, to_step)
        tl.store(reads + place * T + t, read)
        tl.store(writes + place * T + 1 + t, written, mask=t < T - 1)
        tl.store(writes + place * T, passed * tl.load(gain + 3 * T - 1))


@jit(
    do_not_specialize=[
        "x", "B", "C", "z", "grad_out", "decays", "segments", "starts", "counts", "states", "grad_states", "grad_B", "grad_C",
        "L", "chunks", "heads", "own", "few", "P", "N", "padded", "scale", "all_steps",
        "x_b", "x_t", "x_h", "x_p", "B_b", "B_t", "B_g", "B_n", "C_b", "C_t", "C_g", "C_n", "z_b", "z_t", "z_h", "z_p",
        "grad_b", "grad_t", "grad_h", "grad_p",
    ]
)  # fmt: skip
def _ssd_keys_kernel(
    x, B, C, z, grad_out, decays, segments, starts, counts, states, grad_states, grad_B, grad_C,
    L, chunks, heads, own, few, P, N, padded, scale, all_steps,
    x_b, x_t, x_h, x_p, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, z_b, z_t, z_h, z_p, grad_b, grad_t, grad_h, grad_p,
    WIDE: tl.constexpr, WIDE_B: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of the gradients of one chunk's B and C, summed over ``few`` heads of a group.

    grad_B and grad_C (blocks of heads, batch, L, groups, padded) have all_steps = batch L steps a block; scale: of C, None for
    one.
    """
    columns = tl.cdiv(N, BN)
    blocks = tl.cdiv(own, few)
    groups = heads // own
    program = tl.program_id(0)
    chunk = (program // (columns * blocks * groups)).to(tl.int64)
    group = (program // (columns * blocks) % groups).to(tl.int64)
    block = program // columns % blocks
    column = program % columns
    n = column * BN
    row, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    DOT: tl.constexpr = states.dtype.element_ty
    t = tl.arange(0, T)
    mixed = tl.zeros([T, T], tl.float32)
    to_key = tl.zeros([T, BN], tl.float32)
    to_query = tl.zeros([T, BN], tl.float32)
    for k in range(block * few, tl.minimum(block * few + few, own)):
        head = group * own + k
        place = chunk * heads + head
        gain = decays + place * (5 * T)
        step = tl.load(gain + T + t)
        front = tl.load(gain + 2 * T + t)
        written = step * tl.load(gain + 3 * T + t)
        weighed = tl.zeros([T, T], tl.float32)
        for p in range(0, P, BP):
            gate = None
            if z is not None:
                gate = z + row * z_b + start * z_t + head * z_h + p * z_p.to(tl.int64)
            source = grad_out + row * grad_b + start * grad_t + head * grad_h + p * grad_p.to(tl.int64)
            given = tiles.load_gated(source, grad_t, grad_p, gate, z_t, z_p, count, P - p, WIDE, T, BP)
            source = x + row * x_b + start * x_t + head * x_h + p * x_p.to(tl.int64)
            value = tiles.load(source, x_t, x_p, count, P - p, WIDE, T, BP)
            weighed = tiles.product(given.to(DOT), tl.trans(value.to(DOT)), weighed, PRECISION)
            there = (place * P + p) * padded + n
            state = tiles.load(states + there, padded, 1, P - p, padded - n, True, BP, BN)
            to_query = tiles.product((given * front[:, None]).to(DOT), state, to_query, PRECISION)
            state = tiles.load(grad_states + there, padded, 1, P - p, padded - n, True, BP, BN)
            to_key = tiles.product((value.to(tl.float32) * written[:, None]).to(DOT), state, to_key, PRECISION)
        weighed *= tiles.decay_between(gain, segments, row, L, start, count, T, False, DOT)
        mixed += weighed * step[None, :]
    key = tiles.load(B + row * B_b + start * B_t + group * B_g + n * B_n.to(tl.int64), B_t, B_n, count, N - n, WIDE_B, T, BN)
    query = tiles.load(C + row * C_b + start * C_t + group * C_g + n * C_n.to(tl.int64), C_t, C_n, count, N - n, WIDE_B, T, BN)
    to_query = tiles.product(mixed.to(DOT), key.to(DOT), to_query, PRECISION)
    if scale is not None:
        to_query *= scale
        mixed *= scale
    to_key = tiles.product(tl.trans(mixed.to(DOT)), query.to(DOT), to_key, PRECISION)
    target = ((block.to(tl.int64) * all_steps + row * L + start) * groups + group) * padded + n
    tiles.store(grad_B + target, to_key, groups * padded, 1, count, padded - n, True)
    tiles.store(grad_C + target, to_query, groups * padded, 1, count, padded - n, True)


@jit(
    do_not_specialize=[
        "dt", "A", "bias", "starts", "counts", "by_decay", "reads", "writes", "by_step", "grad_dt", "grad_A", "grad_bias",
        "L", "chunks", "heads", "low", "high", "dt_b", "dt_t", "dt_h", "gdt_b", "gdt_t", "gdt_h",
    ]
)  # fmt: skip
def _ssd_steps_kernel(
    dt, A, bias, starts, counts, by_decay, reads, writes, by_step, grad_dt, grad_A, grad_bias,
    L, chunks, heads, low, high, dt_b, dt_t, dt_h, gdt_b, gdt_t, gdt_h,
    SOFTPLUS: tl.constexpr, SCALED: tl.constexpr, BH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's step sizes, for BH heads; grad_A and grad_bias: (chunks, heads)."""
    blocks = tl.cdiv(heads, BH)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    row, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    t = tl.arange(0, T)
    inside = h < heads
    wide = h.to(tl.int64)
    all_steps = inside[:, None] & (t >= 0)[None, :]
    both = inside[:, None] & (t < count)[None, :]
    place = ((chunk * heads + wide) * T)[:, None] + t[None, :]
    read = tl.load(reads + place, mask=all_steps, other=0.0)
    written = tl.load(writes + place, mask=all_steps, other=0.0)
    decay = tl.load(by_decay + place, mask=all_steps, other=0.0)
    decay += tl.cumsum(read, 1, reverse=True) + tl.cumsum(written, 1)
    shift = None
    if bias is not None:
        shift = tl.load(bias + h, mask=inside, other=0.0)
    time = (start + t.to(tl.int64))[None, :]
    delta = tl.load(dt + row * dt_b + time * dt_t + (wide * dt_h)[:, None], mask=both, other=0.0).to(tl.float32)
    raw, free, step = forward.step_sizes(delta, shift, low, high, count, SOFTPLUS)
    slope = decay * tl.load(A + h, mask=inside, other=0.0)[:, None]
    if SCALED:
        slope += tl.load(by_step + place, mask=all_steps, other=0.0)
    if SOFTPLUS:
        slope *= shared.softplus_slope(raw, False)
    slope = tl.where(both & (free >= low) & (free <= high), slope, 0.0)
    target = grad_dt + row * gdt_b + time * gdt_t + (wide * gdt_h)[:, None]
    tl.store(target, slope.to(grad_dt.dtype.element_ty), mask=both)
    tl.store(grad_A + chunk * heads + wide, tl.sum(decay * step, 1), mask=inside)
    tl.store(grad_bias + chunk * heads + wide, tl.sum(slope, 1), mask=inside)
