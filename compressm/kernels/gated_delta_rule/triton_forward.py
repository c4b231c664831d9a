"""Forward kernels of the gated delta rule: factors of steps, products within chunks, states between chunks, outputs of chunks.

A step reads along its query q and its key k, and writes along ``into``, its key times beta.  In a chunk with the state S in
front of it, what the steps write is w = (I + N)^-1 (v - k S), the outputs are q S + A w, and the state behind is S + into^T w,
with A and N the products of q and k with the ``into`` of the steps before them (of A: up to them), all decayed from where they
are written to where they are read.

``rows`` (chunks, heads, 7, T) float32 holds for every step where each head has one decay: the cumulated log decays of its
chunk, the decay from the front of the chunk to the step, that from the step to the end of the chunk, the factor of q, what the
cumulated log decays lost by rounding, the factor of k as a key that reads, and that of k as one that writes.  Where each
channel has its decay there are no ``rows``: q, k and into hold it already.  ``passing`` is what a chunk leaves of a state, one
number a head or a channel.  Without k (of linear attention) w is v.
"""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.ssd import triton_forward as matrices
from compressm.kernels.ssd import triton_tiles as tiles


@jit
def row(rows, kind: tl.constexpr, T: tl.constexpr):
    """(T,) numbers of one kind, of the steps of a chunk and head."""
    return tl.load(rows + kind * T + tl.arange(0, T))


@jit(
    do_not_specialize=[
        "g", "beta", "q_lengths", "k_lengths", "starts", "counts", "rows", "passing", "L", "chunks", "heads", "own", "scale",
        "g_b", "g_t", "g_h", "beta_b", "beta_t", "beta_h",
    ]
)  # fmt: skip
def _delta_rows_kernel(
    g, beta, q_lengths, k_lengths, starts, counts, rows, passing, L, chunks, heads, own, scale,
    g_b, g_t, g_h, beta_b, beta_t, beta_h, BH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """``rows`` and ``passing`` of one chunk and BH heads; lengths (batch, L, groups): what brings q and k to length one."""
    blocks = tl.cdiv(heads, BH)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    t = tl.arange(0, T)
    inside = h < heads
    wide = h.to(tl.int64)
    both = inside[:, None] & (t < count)[None, :]
    time = (start + t.to(tl.int64))[None, :]
    given = tl.load(g + line * g_b + time * g_t + (wide * g_h)[:, None], mask=both, other=0.0)
    decay = tiles.bounded(given.to(tl.float64))
    exact = tl.cumsum(decay, 1)
    total = exact.to(tl.float32)
    all_steps = tl.sum(decay, 1)
    gain = tl.load(beta + line * beta_b + time * beta_t + (wide * beta_h)[:, None], mask=both, other=0.0).to(tl.float32)
    query = tl.where(both, scale, 0.0)
    key = tl.where(both, 1.0, 0.0)
    if q_lengths is not None:
        groups = heads // own
        address = (line * L + time) * groups + (wide // own)[:, None]
        query *= tl.load(q_lengths + address, mask=both, other=0.0)
        key *= tl.load(k_lengths + address, mask=both, other=0.0)
    out = rows + ((chunk * heads + wide) * (7 * T))[:, None] + t[None, :]
    kept = inside[:, None] & (t >= 0)[None, :]
    tl.store(out, total, mask=kept)
    tl.store(out + T, tl.exp(total), mask=kept)
    tl.store(out + 2 * T, tl.exp((all_steps[:, None] - exact).to(tl.float32)), mask=kept)
    tl.store(out + 3 * T, query, mask=kept)
    tl.store(out + 4 * T, (exact - total.to(tl.float64)).to(tl.float32), mask=kept)
    tl.store(out + 5 * T, key, mask=kept)
    tl.store(out + 6 * T, key * gain, mask=kept)
    tl.store(passing + chunk * heads + wide, tl.exp(all_steps.to(tl.float32)), mask=inside)


@jit(
    do_not_specialize=[
        "q", "k", "rows", "starts", "counts", "reads", "erased", "L", "chunks", "heads", "own", "K",
        "q_b", "q_t", "q_h", "q_n", "k_b", "k_t", "k_h", "k_n",
    ]
)  # fmt: skip
def _delta_products_kernel(
    q, k, rows, starts, counts, reads, erased, L, chunks, heads, own, K, q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n,
    WIDE_K: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``reads``, A, and ``erased``, N, (chunks, heads, T, T) of one chunk and group, whose heads share the products."""
    groups = heads // own
    chunk = (tl.program_id(0) // groups).to(tl.int64)
    group = (tl.program_id(0) % groups).to(tl.int64)
    line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    DOT: tl.constexpr = reads.dtype.element_ty
    q += line * q_b + start * q_t + group * q_h
    k += line * k_b + start * k_t + group * k_h
    of_queries = matrices.scores(q, k, q_t, q_n, k_t, k_n, count, K, WIDE_K, PRECISION, DOT, T, BN)
    of_keys = matrices.scores(k, k, k_t, k_n, k_t, k_n, count, K, WIDE_K, PRECISION, DOT, T, BN)
    t = tl.arange(0, T)
    square = t[:, None] * T + t[None, :]
    for h in range(0, own):
        place = chunk * heads + group * own + h
        gain = rows + place * (7 * T)
        left = tiles.decay_between(gain, None, line, L, start, count, T, False, DOT) * row(gain, 6, T)[None, :]
        tl.store(reads + place * (T * T) + square, (of_queries * left * row(gain, 3, T)[:, None]).to(DOT))
        left = tl.where(t[:, None] > t[None, :], left, 0.0)
        tl.store(erased + place * (T * T) + square, of_keys * left * row(gain, 5, T)[:, None])


@jit(do_not_specialize=["erased", "inverse"])
def _delta_inverse_kernel(erased, inverse, EXACT: tl.constexpr, T: tl.constexpr):
    """(I + N)^-1 of one chunk and head: rows of blocks of 16 one after the other, then pairs of blocks."""
    place = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, T)
    square = t[:, None] * T + t[None, :]
    N = tl.load(erased + place * (T * T) + square)
    block = (t // 16)[:, None] == (t // 16)[None, :]
    near = tl.where(block, N, 0.0)
    found = tl.where(t[:, None] == t[None, :], 1.0, 0.0)
    for i in range(1, 16):
        chosen = (t % 16 == i)[:, None]
        factors = tl.sum(tl.where(chosen, near, 0.0), 0)
        solved = tl.sum(factors[:, None] * found, 0)
        found = tl.where(chosen & block, found - solved[None, :], found)
    size = 16
    while size < T:
        below = (t // (2 * size))[:, None] == (t // (2 * size))[None, :]
        below = below & ((t // size)[:, None] > (t // size)[None, :])
        between = tiles.product(tl.where(below, N, 0.0), found, tl.zeros([T, T], tl.float32), EXACT)
        found -= tiles.product(found, between, tl.zeros([T, T], tl.float32), EXACT)
        size = size * 2
    tl.store(inverse + place * (T * T) + square, found.to(inverse.dtype.element_ty))


@jit
def bounds(sequence, firsts, ends, chunks):
    """The first chunk of a sequence and the one behind its last."""
    if firsts is None:
        return sequence * chunks, sequence * chunks + chunks
    else:
        return tl.load(firsts + sequence), tl.load(ends + sequence)


@jit
def left_of(passing, place, K, DECAYS: tl.constexpr, BK: tl.constexpr):
    """What a chunk leaves of a state (BK, ...), (BK, 1) numbers; DECAYS: "head" or "channel"."""
    n = tl.arange(0, BK)
    if DECAYS == "channel":
        return tl.load(passing + place * K + n, mask=n < K, other=0.0)[:, None]
    else:
        return tl.load(passing + place + n * 0)[:, None]


@jit(
    do_not_specialize=[
        "v", "k", "into", "rows", "passing", "inverse", "firsts", "ends", "starts", "counts", "initial", "states", "writes",
        "last", "L", "chunks", "heads", "own", "K", "V", "padded", "v_b", "v_t", "v_h", "v_p", "k_b", "k_t", "k_h", "k_n",
        "into_b", "into_t", "into_h", "into_n", "w_b", "w_t", "w_h", "w_p",
    ]
)  # fmt: skip
def _delta_states_kernel(
    v, k, into, rows, passing, inverse, firsts, ends, starts, counts, initial, states, writes, last,
    L, chunks, heads, own, K, V, padded, v_b, v_t, v_h, v_p, k_b, k_t, k_h, k_n, into_b, into_t, into_h, into_n,
    w_b, w_t, w_h, w_p, DECAYS: tl.constexpr, WIDE: tl.constexpr, WIDE_K: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """BP columns of a head's states, through all chunks of a sequence.

    states (chunks, heads, K, padded) gets the state in front of every chunk, last (sequences, heads, K, V) the one behind the
    last, writes what the steps write.
    """
    blocks = tl.cdiv(V, BP)
    sequence = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    p = tl.program_id(0) % blocks * BP
    first, end = bounds(sequence, firsts, ends, chunks)
    DOT: tl.constexpr = states.dtype.element_ty
    edge = (sequence * heads + head) * K * V + p
    state = tl.zeros([BK, BP], tl.float32)
    if initial is not None:
        state = tiles.load(initial + edge, V, 1, K, V - p, False, BK, BP)
    v += head * v_h + p * v_p.to(tl.int64)
    into += head // own * into_h
    if k is not None:
        k += head // own * k_h
        writes += head * w_h + p * w_p.to(tl.int64)
    t = tl.arange(0, T)
    square = t[:, None] * T + t[None, :]
    for turn in range(0, (end - first).to(tl.int32)):
        place = (first + turn) * heads + head
        line, start, count = tiles.place(first + turn, starts, counts, L, chunks, T)
        tiles.store(states + place * K * padded + p, state, padded, 1, K, padded - p, True)
        value = tiles.load(v + line * v_b + start * v_t, v_t, v_p, count, V - p, WIDE, T, BP).to(tl.float32)
        if k is not None:
            key = tiles.load(k + line * k_b + start * k_t, k_t, k_n, count, K, WIDE_K, T, BK).to(DOT)
            held = tiles.product(key, state.to(DOT), tl.zeros([T, BP], tl.float32), PRECISION)
            if rows is not None:
                held *= (row(rows + place * (7 * T), 1, T) * row(rows + place * (7 * T), 5, T))[:, None]
            solution = tl.load(inverse + place * (T * T) + square)
            value = tiles.product(solution, (value - held).to(DOT), tl.zeros([T, BP], tl.float32), PRECISION)
            tiles.store(writes + line * w_b + start * w_t, value, w_t, w_p, count, V - p, WIDE)
        if rows is not None:
            value *= (row(rows + place * (7 * T), 2, T) * row(rows + place * (7 * T), 6, T))[:, None]
        key = tiles.load(into + line * into_b + start * into_t, into_t, into_n, count, K, WIDE_K, T, BK).to(DOT)
        state *= left_of(passing, place, K, DECAYS, BK)
        state = tiles.product(tl.trans(key), value.to(DOT), state, PRECISION)
    tiles.store(last + edge, state, V, 1, K, V - p, False)


@jit(
    do_not_specialize=[
        "q", "rows", "writes", "states", "reads", "starts", "counts", "out", "L", "chunks", "heads", "own", "K", "V", "padded",
        "q_b", "q_t", "q_h", "q_n", "w_b", "w_t", "w_h", "w_p", "out_b", "out_t", "out_h", "out_p",
    ]
)  # fmt: skip
def _delta_outputs_kernel(
    q, rows, writes, states, reads, starts, counts, out, L, chunks, heads, own, K, V, padded,
    q_b, q_t, q_h, q_n, w_b, w_t, w_h, w_p, out_b, out_t, out_h, out_p,
    WIDE: tl.constexpr, WIDE_K: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and head."""
    chunk = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    DOT: tl.constexpr = states.dtype.element_ty
    place = chunk * heads + head
    t = tl.arange(0, T)
    share = tl.load(reads + place * (T * T) + t[:, None] * T + t[None, :])
    q += line * q_b + start * q_t + head // own * q_h
    for p in range(0, V, BV):
        result = tl.zeros([T, BV], tl.float32)
        for n in range(0, K, BN):
            query = tiles.load(q + n * q_n.to(tl.int64), q_t, q_n, count, K - n, WIDE_K, T, BN).to(DOT)
            state = tiles.load(states + (place * K + n) * padded + p, padded, 1, K - n, padded - p, True, BN, BV)
            result = tiles.product(query, state, result, PRECISION)
        if rows is not None:
            result *= (row(rows + place * (7 * T), 1, T) * row(rows + place * (7 * T), 3, T))[:, None]
        source = writes + line * w_b + start * w_t + head * w_h + p * w_p.to(tl.int64)
        written = tiles.load(source, w_t, w_p, count, V - p, WIDE, T, BV).to(DOT)
        result = tiles.product(share, written, result, PRECISION)
        target = out + line * out_b + start * out_t + head * out_h + p * out_p.to(tl.int64)
        tiles.store(target, result, out_t, out_p, count, V - p, WIDE)
