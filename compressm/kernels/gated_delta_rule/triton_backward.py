"""Backward kernels of the gated delta rule: gradients between chunks in reverse, of products within them, of keys and steps.

What the steps write and the states in front of the chunks come from the forward's kernels once more.  With the gradient dS of
the state behind a chunk, the gradients of what its steps write are dw = A^T do + into dS, those of its values dv = (I + N)^-T
dw, and that of the state in front is what the chunk leaves of dS, and q^T do - k^T dv.  The log decay of a step gets what is
read at or behind it of what was written in front of it: sums of products that decayed over it, none a difference of two large
ones.
"""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.gated_delta_rule import triton_forward as forward
from compressm.kernels.ssd import triton_tiles as tiles


@jit(
    do_not_specialize=[
        "grad_out", "q", "k", "into", "rows", "passing", "inverse", "reads", "firsts", "ends", "starts", "counts", "initial",
        "states", "grad_v", "last", "L", "chunks", "heads", "own", "K", "V", "padded", "grad_b", "grad_t", "grad_h", "grad_p",
        "q_b", "q_t", "q_h", "q_n", "k_b", "k_t", "k_h", "k_n", "into_b", "into_t", "into_h", "into_n",
        "gv_b", "gv_t", "gv_h", "gv_p",
    ]
)  # fmt: skip
def _delta_reverse_kernel(
    grad_out, q, k, into, rows, passing, inverse, reads, firsts, ends, starts, counts, initial, states, grad_v, last,
    L, chunks, heads, own, K, V, padded, grad_b, grad_t, grad_h, grad_p, q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n,
    into_b, into_t, into_h, into_n, gv_b, gv_t, gv_h, gv_p,
    DECAYS: tl.constexpr, WIDE: tl.constexpr, WIDE_K: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """BP columns of the gradients of a head's states, through all chunks of a sequence from the last one on.

    initial: the gradient of the state behind the last chunk, last: of that in front of the first.  states (chunks, heads, K,
    padded) gets the gradient of the state behind every chunk.
    """
    blocks = tl.cdiv(V, BP)
    sequence = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    p = tl.program_id(0) % blocks * BP
    first, end = forward.bounds(sequence, firsts, ends, chunks)
    DOT: tl.constexpr = states.dtype.element_ty
    edge = (sequence * heads + head) * K * V + p
    state = tl.zeros([BK, BP], tl.float32)
    if initial is not None:
        state = tiles.load(initial + edge, V, 1, K, V - p, False, BK, BP)
    grad_out += head * grad_h + p * grad_p.to(tl.int64)
    grad_v += head * gv_h + p * gv_p.to(tl.int64)
    q += head // own * q_h
    into += head // own * into_h
    if k is not None:
        k += head // own * k_h
    t = tl.arange(0, T)
    square = t[:, None] * T + t[None, :]
    for turn in range(0, (end - first).to(tl.int32)):
        chunk = end - 1 - turn
        place = chunk * heads + head
        line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
        tiles.store(states + place * K * padded + p, state, padded, 1, K, padded - p, True)
        given = tiles.load(grad_out + line * grad_b + start * grad_t, grad_t, grad_p, count, V - p, WIDE, T, BP)
        key = tiles.load(into + line * into_b + start * into_t, into_t, into_n, count, K, WIDE_K, T, BK).to(DOT)
        value = tiles.product(key, state.to(DOT), tl.zeros([T, BP], tl.float32), PRECISION)
        if rows is not None:
            value *= (forward.row(rows + place * (7 * T), 2, T) * forward.row(rows + place * (7 * T), 6, T))[:, None]
        share = tl.load(reads + place * (T * T) + square)
        value = tiles.product(tl.trans(share), given.to(DOT), value, PRECISION)
        if k is not None:
            solution = tl.load(inverse + place * (T * T) + square)
            value = tiles.product(tl.trans(solution), value.to(DOT), tl.zeros([T, BP], tl.float32), PRECISION)
        tiles.store(grad_v + line * gv_b + start * gv_t, value, gv_t, gv_p, count, V - p, WIDE)
        state *= forward.left_of(passing, place, K, DECAYS, BK)
        given = given.to(tl.float32)
        if rows is not None:
            given *= (forward.row(rows + place * (7 * T), 1, T) * forward.row(rows + place * (7 * T), 3, T))[:, None]
        key = tiles.load(q + line * q_b + start * q_t, q_t, q_n, count, K, WIDE_K, T, BK).to(DOT)
        state = tiles.product(tl.trans(key), given.to(DOT), state, PRECISION)
        if k is not None:
            if rows is not None:
                value *= (forward.row(rows + place * (7 * T), 1, T) * forward.row(rows + place * (7 * T), 5, T))[:, None]
            key = tiles.load(k + line * k_b + start * k_t, k_t, k_n, count, K, WIDE_K, T, BK).to(DOT)
            state = tiles.product(tl.trans(key), (-value).to(DOT), state, PRECISION)
    tiles.store(last + edge, state, V, 1, K, V - p, False)


@jit
def _across(products, PRECISION: tl.constexpr, DOT: tl.constexpr):
    """For every step t the sum of products (T, T) of a later step or t itself, the row, and an earlier one, the column."""
    T: tl.constexpr = products.shape[0]
    t = tl.arange(0, T)
    earlier = tl.where(t[:, None] < t[None, :], 1.0, 0.0).to(DOT)
    sums = tiles.product(products.to(DOT), earlier, tl.zeros([T, T], tl.float32), PRECISION)
    return tl.sum(tl.where(t[:, None] >= t[None, :], sums, 0.0), 0)


@jit(
    do_not_specialize=[
        "grad_out", "writes", "grad_v", "rows", "reads", "erased", "starts", "counts", "of_reads", "of_erased", "by_decay", "L",
        "chunks", "heads", "V", "grad_b", "grad_t", "grad_h", "grad_p", "w_b", "w_t", "w_h", "w_p", "gv_b", "gv_t", "gv_h",
        "gv_p",
    ]
)  # fmt: skip
def _delta_pairs_kernel(
    grad_out, writes, grad_v, rows, reads, erased, starts, counts, of_reads, of_erased, by_decay, L, chunks, heads, V,
    grad_b, grad_t, grad_h, grad_p, w_b, w_t, w_h, w_p, gv_b, gv_t, gv_h, gv_p,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients (chunks, heads, T, T) of A and N of one chunk and head, and where a head has one decay what it gets of them.

    These are then of the products before the factors of keys that write, and by_decay (chunks, heads, T) is of the log decays.
    """
    chunk = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    DOT: tl.constexpr = of_reads.dtype.element_ty
    to_reads = tl.zeros([T, T], tl.float32)
    to_erased = tl.zeros([T, T], tl.float32)
    for p in range(0, V, BV):
        source = writes + line * w_b + start * w_t + head * w_h + p * w_p.to(tl.int64)
        written = tl.trans(tiles.load(source, w_t, w_p, count, V - p, WIDE, T, BV).to(DOT))
        source = grad_out + line * grad_b + start * grad_t + head * grad_h + p * grad_p.to(tl.int64)
        given = tiles.load(source, grad_t, grad_p, count, V - p, WIDE, T, BV).to(DOT)
        to_reads = tiles.product(given, written, to_reads, PRECISION)
        if erased is not None:
            source = grad_v + line * gv_b + start * gv_t + head * gv_h + p * gv_p.to(tl.int64)
            given = tiles.load(source, gv_t, gv_p, count, V - p, WIDE, T, BV).to(DOT)
            to_erased = tiles.product(given, written, to_erased, PRECISION)
    t = tl.arange(0, T)
    place = chunk * heads + head
    square = place * (T * T) + t[:, None] * T + t[None, :]
    to_reads = tl.where(t[:, None] >= t[None, :], to_reads, 0.0)
    to_erased = tl.where(t[:, None] > t[None, :], -to_erased, 0.0)
    if rows is not None:
        passed = to_reads * tl.load(reads + square).to(tl.float32) + to_erased * tl.load(erased + square)
        passed = tl.where(t[:, None] > t[None, :], passed, 0.0)
        tl.store(by_decay + place * T + t, _across(passed, PRECISION, DOT))
        gain = rows + place * (7 * T)
        left = tiles.decay_between(gain, None, line, L, start, count, T, False, DOT)
        to_reads *= left * forward.row(gain, 3, T)[:, None]
        to_erased *= left * forward.row(gain, 5, T)[:, None]
    tl.store(of_reads + square, to_reads.to(DOT))
    if erased is not None:
        tl.store(of_erased + square, to_erased.to(DOT))


@jit
def through_states(
    grad_out, grad_v, writes, states, grad_states, grad_t, grad_p, gv_t, gv_p, w_t, w_p, count, rows_left, V, padded,
    ERASES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Products (T, BN) of a chunk's do with the state in front, of -dv with it, of what is written with the gradient behind.

    And the sums (BN,) of that state times that gradient.
    """
    to_query = tl.zeros([T, BN], tl.float32)
    to_key = tl.zeros([T, BN], tl.float32)
    to_into = tl.zeros([T, BN], tl.float32)
    passed = tl.zeros([BN], tl.float32)
    for p in range(0, V, BV):
        state = tiles.load(states + p, padded, 1, rows_left, padded - p, True, BN, BV)
        grad_state = tiles.load(grad_states + p, padded, 1, rows_left, padded - p, True, BN, BV)
        passed += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 1)
        state = tl.trans(state)
        given = tiles.load(grad_out + p * grad_p.to(tl.int64), grad_t, grad_p, count, V - p, WIDE, T, BV).to(state.dtype)
        to_query = tiles.product(given, state, to_query, PRECISION)
        if ERASES:
            given = tiles.load(grad_v + p * gv_p.to(tl.int64), gv_t, gv_p, count, V - p, WIDE, T, BV).to(state.dtype)
            to_key = tiles.product(given, state, to_key, PRECISION)
        given = tiles.load(writes + p * w_p.to(tl.int64), w_t, w_p, count, V - p, WIDE, T, BV).to(state.dtype)
        to_into = tiles.product(given, tl.trans(grad_state), to_into, PRECISION)
    return to_query, -to_key, to_into, passed


@jit(
    do_not_specialize=[
        "q", "k", "grad_out", "grad_v", "writes", "rows", "passing", "of_reads", "of_erased", "states", "grad_states", "starts",
        "counts", "grad_q", "grad_k", "read", "written", "by_gain", "L", "chunks", "heads", "own", "K", "V", "padded",
        "all_chunks", "q_b", "q_t", "q_h", "q_n", "k_b", "k_t", "k_h", "k_n", "grad_b", "grad_t", "grad_h", "grad_p",
        "gv_b", "gv_t", "gv_h", "gv_p", "w_b", "w_t", "w_h", "w_p", "gq_b", "gq_t", "gq_h", "gq_n", "gk_b", "gk_t", "gk_h",
        "gk_n",
    ]
)  # fmt: skip
def _delta_keys_kernel(
    q, k, grad_out, grad_v, writes, rows, passing, of_reads, of_erased, states, grad_states, starts, counts,
    grad_q, grad_k, read, written, by_gain, L, chunks, heads, own, K, V, padded, all_chunks,
    q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, grad_b, grad_t, grad_h, grad_p, gv_b, gv_t, gv_h, gv_p, w_b, w_t, w_h, w_p,
    gq_b, gq_t, gq_h, gq_n, gk_b, gk_t, gk_h, gk_n,
    WIDE: tl.constexpr, WIDE_K: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BN columns of the gradients of one chunk's q and k, summed over the heads of a group, each of which has one decay.

    read, written and by_gain (blocks of columns, all_chunks, heads, T) get the gradients of the log decays by what the steps
    read of the state in front, by what is left of it behind and what they add to that, and of the factors of keys that write.
    """
    columns = tl.cdiv(K, BN)
    groups = heads // own
    column = tl.program_id(0) % columns
    group = (tl.program_id(0) // columns % groups).to(tl.int64)
    chunk = (tl.program_id(0) // (columns * groups)).to(tl.int64)
    n = column * BN
    line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    DOT: tl.constexpr = states.dtype.element_ty
    t = tl.arange(0, T)
    source = q + line * q_b + start * q_t + group * q_h + n * q_n.to(tl.int64)
    query = tiles.load(source, q_t, q_n, count, K - n, WIDE_K, T, BN)
    source = k + line * k_b + start * k_t + group * k_h + n * k_n.to(tl.int64)
    key = tiles.load(source, k_t, k_n, count, K - n, WIDE_K, T, BN)
    total_query = tl.zeros([T, BN], tl.float32)
    total_key = tl.zeros([T, BN], tl.float32)
    for h in range(0, own):
        head = group * own + h
        place = chunk * heads + head
        gain = rows + place * (7 * T)
        there = (place * K + n) * padded
        to_query, to_key, to_into, passed = through_states(
            grad_out + line * grad_b + start * grad_t + head * grad_h, grad_v + line * gv_b + start * gv_t + head * gv_h,
            writes + line * w_b + start * w_t + head * w_h, states + there, grad_states + there,
            grad_t, grad_p, gv_t, gv_p, w_t, w_p, count, K - n, V, padded, True, WIDE, PRECISION, T, BN, BV,
        )  # fmt: skip
        front = forward.row(gain, 1, T)
        to_query *= (front * forward.row(gain, 3, T))[:, None]
        to_key *= (front * forward.row(gain, 5, T))[:, None]
        to_into *= forward.row(gain, 2, T)[:, None]
        factor = forward.row(gain, 6, T)
        first = ((column * all_chunks + chunk) * heads + head) * T
        partial = first + t
        tl.store(read + partial, tl.sum(to_query * query.to(tl.float32) + to_key * key.to(tl.float32), 1))
        added = factor * tl.sum(to_into * key.to(tl.float32), 1)
        square = place * (T * T) + t[:, None] * T + t[None, :]
        tl.store(written + partial + 1, added, mask=t < T - 1)
        tl.store(written + first, tl.sum(passed, 0) * tl.load(passing + place))
        along = (key.to(tl.float32) * factor[:, None]).to(DOT)
        products = tl.load(of_reads + square)
        total_query = tiles.product(products, along, total_query + to_query, PRECISION)
        to_into = tiles.product(tl.trans(products), query.to(DOT), to_into, PRECISION)
        products = tl.load(of_erased + square)
        total_key = tiles.product(products, along, total_key + to_key, PRECISION)
        to_into = tiles.product(tl.trans(products), key.to(DOT), to_into, PRECISION)
        tl.store(by_gain + partial, tl.sum(to_into * key.to(tl.float32), 1))
        total_key += to_into * factor[:, None]
    target = grad_q + line * gq_b + start * gq_t + group * gq_h + n * gq_n.to(tl.int64)
    tiles.store(target, total_query, gq_t, gq_n, count, K - n, WIDE_K)
    target = grad_k + line * gk_b + start * gk_t + group * gk_h + n * gk_n.to(tl.int64)
    tiles.store(target, total_key, gk_t, gk_n, count, K - n, WIDE_K)


@jit(
    do_not_specialize=[
        "k_lengths", "starts", "counts", "by_decay", "read", "written", "by_gain", "grad_g", "grad_beta", "L", "chunks",
        "heads", "own", "all_chunks", "columns", "gg_b", "gg_t", "gg_h", "gb_b", "gb_t", "gb_h",
    ]
)  # fmt: skip
def _delta_steps_kernel(
    k_lengths, starts, counts, by_decay, read, written, by_gain, grad_g, grad_beta, L, chunks, heads, own, all_chunks, columns,
    gg_b, gg_t, gg_h, gb_b, gb_t, gb_h, BH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's log decays and of beta, for BH heads."""
    blocks = tl.cdiv(heads, BH)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    t = tl.arange(0, T)
    inside = h < heads
    wide = h.to(tl.int64)
    all_steps = inside[:, None] & (t >= 0)[None, :]
    both = inside[:, None] & (t < count)[None, :]
    place = ((chunk * heads + wide) * T)[:, None] + t[None, :]
    reads = tl.zeros([BH, T], tl.float32)
    writes = tl.zeros([BH, T], tl.float32)
    gains = tl.zeros([BH, T], tl.float32)
    decay = tl.load(by_decay + place, mask=all_steps, other=0.0)
    for _ in range(0, columns):
        reads += tl.load(read + place, mask=all_steps, other=0.0)
        writes += tl.load(written + place, mask=all_steps, other=0.0)
        gains += tl.load(by_gain + place, mask=all_steps, other=0.0)
        place += all_chunks.to(tl.int64) * heads * T
    decay += tl.cumsum(reads, 1, reverse=True) + tl.cumsum(writes, 1)
    time = (start + t.to(tl.int64))[None, :]
    target = grad_g + line * gg_b + time * gg_t + (wide * gg_h)[:, None]
    tl.store(target, decay.to(grad_g.dtype.element_ty), mask=both)
    if k_lengths is not None:
        address = (line * L + time) * (heads // own) + (wide // own)[:, None]
        gains *= tl.load(k_lengths + address, mask=both, other=0.0)
    target = grad_beta + line * gb_b + time * gb_t + (wide * gb_h)[:, None]
    tl.store(target, gains.to(grad_beta.dtype.element_ty), mask=both)
