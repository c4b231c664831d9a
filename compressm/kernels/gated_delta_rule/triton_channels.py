"""Kernels of the gated delta rule, and of linear attention, where each channel of the keys has its decay: forward.

Across a border between steps, what is read behind it of what was written in front of it has decayed from the step that wrote
to the border, and from there to the step that reads: sums of log decays that are all of one sign, so that nothing is ever
divided by a decay, however strong, and no small decay is the difference of two large sums.  In front of a chunk and behind it,
between chunks, the decays are multiplied onto q, k and ``into``.  Within a chunk the borders are those of blocks of 16 steps,
and within a block the sums grow step by step.
"""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.ssd import triton_tiles as tiles


@jit
def factors(beta, q_lengths, k_lengths, line, start, t, count, L, scale, head, heads, own, beta_b, beta_t, beta_h):
    """Factors of q, of k as a key that reads, and of k as one that writes, at the steps t of a chunk, zero outside."""
    inside = (t >= 0) & (t < count)
    time = start + t.to(tl.int64)
    query = tl.where(inside, scale, 0.0)
    key = tl.where(inside, 1.0, 0.0)
    if q_lengths is not None:
        address = (line * L + time) * (heads // own) + head // own
        query *= tl.load(q_lengths + address, mask=inside, other=0.0)
        key *= tl.load(k_lengths + address, mask=inside, other=0.0)
    if beta is not None:
        gain = tl.load(beta + line * beta_b + time * beta_t + head * beta_h, mask=inside, other=0.0)
        return query, key, key * gain.to(tl.float32)
    else:
        return query, key, key


@jit
def rows_of(p, t, row_stride, stride, low, high, columns_left, COLUMNS: tl.constexpr):
    """Rows t of a tensor at p, float32, zeros where t is not in [low, high)."""
    n = tl.arange(0, COLUMNS)
    inside = ((t >= low) & (t < high))[:, None] & (n < columns_left)[None, :]
    address = p + (t.to(tl.int64) * row_stride)[:, None] + (n.to(tl.int64) * stride)[None, :]
    return tl.load(address, mask=inside, other=0.0).to(tl.float32)


@jit(
    do_not_specialize=[
        "q", "k", "g", "beta", "q_lengths", "k_lengths", "starts", "counts", "of_q", "of_k", "into", "passing", "L", "chunks",
        "heads", "own", "K", "padded", "scale", "q_b", "q_t", "q_h", "q_n", "k_b", "k_t", "k_h", "k_n", "g_b", "g_t", "g_h",
        "g_n", "beta_b", "beta_t", "beta_h",
    ]
)  # fmt: skip
def _channel_operands_kernel(
    q, k, g, beta, q_lengths, k_lengths, starts, counts, of_q, of_k, into, passing, L, chunks, heads, own, K, padded, scale,
    q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, g_b, g_t, g_h, g_n, beta_b, beta_t, beta_h, T: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q and k decayed from the front of one chunk, into to its end, (batch, L, heads, padded), for one head and BN columns."""
    columns = tl.cdiv(K, BN)
    chunk = (tl.program_id(0) // (columns * heads)).to(tl.int64)
    head = (tl.program_id(0) // columns % heads).to(tl.int64)
    n = tl.program_id(0) % columns * BN
    line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    t = tl.arange(0, T)
    decay = g + line * g_b + start * g_t + head * g_h + n * g_n.to(tl.int64)
    front = tl.exp(tl.cumsum(rows_of(decay, t, g_t, g_n, 0, count, K - n, BN), 0))
    later = rows_of(decay, t + 1, g_t, g_n, 1, count, K - n, BN)
    behind = tl.exp(tl.cumsum(later, 0, reverse=True))
    query, key, gain = factors(
        beta, q_lengths, k_lengths, line, start, t, count, L, scale, head, heads, own, beta_b, beta_t, beta_h
    )
    target = ((line * L + start) * heads + head) * padded + n
    source = q + line * q_b + start * q_t + head // own * q_h + n * q_n.to(tl.int64)
    operand = rows_of(source, t, q_t, q_n, 0, count, K - n, BN) * query[:, None] * front
    tiles.store(of_q + target, operand, heads * padded, 1, count, padded - n, True)
    source = k + line * k_b + start * k_t + head // own * k_h + n * k_n.to(tl.int64)
    operand = rows_of(source, t, k_t, k_n, 0, count, K - n, BN)
    if of_k is not None:
        tiles.store(of_k + target, operand * key[:, None] * front, heads * padded, 1, count, padded - n, True)
    tiles.store(into + target, operand * gain[:, None] * behind, heads * padded, 1, count, padded - n, True)
    column = n + tl.arange(0, BN)
    left = tl.exp(tl.sum(rows_of(decay, t, g_t, g_n, 0, count, K - n, BN), 0))
    tl.store(passing + (chunk * heads + head) * K + column, left, mask=column < K)


@jit
def up_to_border(k, g, gain, t, border, k_t, k_n, g_t, g_n, columns_left, COLUMNS: tl.constexpr):
    """What the steps t in front of a border write along, (T, COLUMNS), decayed to the border."""
    later = rows_of(g, t + 1, g_t, g_n, 1, border, columns_left, COLUMNS)
    key = rows_of(k, t, k_t, k_n, 0, border, columns_left, COLUMNS) * gain[:, None]
    return key * tl.exp(tl.cumsum(later, 0, reverse=True))


@jit(
    do_not_specialize=[
        "q", "k", "g", "beta", "q_lengths", "k_lengths", "starts", "counts", "reads", "erased", "L", "chunks", "heads", "own",
        "K", "scale", "q_b", "q_t", "q_h", "q_n", "k_b", "k_t", "k_h", "k_n", "g_b", "g_t", "g_h", "g_n", "beta_b", "beta_t",
        "beta_h",
    ]
)  # fmt: skip
def _channel_products_kernel(
    q, k, g, beta, q_lengths, k_lengths, starts, counts, reads, erased, L, chunks, heads, own, K, scale,
    q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, g_b, g_t, g_h, g_n, beta_b, beta_t, beta_h,
    PRECISION: tl.constexpr, T: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """16 rows of ``reads`` and ``erased`` (chunks, heads, T, T) of one chunk and head."""
    chunk = (tl.program_id(0) // (T // 16 * heads)).to(tl.int64)
    head = (tl.program_id(0) // (T // 16) % heads).to(tl.int64)
    border = tl.program_id(0) % (T // 16) * 16
    line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= 0:
        return
    DOT: tl.constexpr = reads.dtype.element_ty
    t = tl.arange(0, T)
    r = tl.arange(0, 16)
    c = tl.arange(0, BN).to(tl.int64)[None, :]
    q += line * q_b + start * q_t + head // own * q_h
    k += line * k_b + start * k_t + head // own * k_h
    g += line * g_b + start * g_t + head * g_h
    query, key, _gain = factors(
        beta, q_lengths, k_lengths, line, start, border + r, count, L, scale, head, heads, own, beta_b, beta_t, beta_h
    )
    _query, _key, gain = factors(
        beta, q_lengths, k_lengths, line, start, t, count, L, scale, head, heads, own, beta_b, beta_t, beta_h
    )
    of_q = tl.zeros([16, T], tl.float32)
    of_k = tl.zeros([16, T], tl.float32)
    for n in range(0, K, BN):
        gates = g + n * g_n.to(tl.int64)
        keys = k + n * k_n.to(tl.int64)
        reading = rows_of(q + n * q_n.to(tl.int64), border + r, q_t, q_n, 0, count, K - n, BN) * query[:, None]
        erasing = rows_of(keys, border + r, k_t, k_n, 0, count, K - n, BN) * key[:, None]
        since = tl.exp(tl.cumsum(rows_of(gates, border + r, g_t, g_n, 0, count, K - n, BN), 0))
        before = up_to_border(keys, gates, gain, t, tl.minimum(border, count), k_t, k_n, g_t, g_n, K - n, BN)
        before = tl.trans(before.to(DOT))
        of_q = tiles.product((reading * since).to(DOT), before, of_q, PRECISION)
        if erased is not None:
            of_k = tiles.product((erasing * since).to(DOT), before, of_k, PRECISION)
        decay = tl.zeros([16, BN], tl.float32)
        for turn in range(0, 16):
            s = 15 - turn
            at = border + s
            along = tl.load(keys + at.to(tl.int64) * k_t + c * k_n, mask=c < tl.where(at < count, K - n, 0), other=0.0)
            along = along.to(tl.float32) * tl.sum(tl.where(t == at, gain, 0.0), 0)
            inside = c < tl.where(at + 1 < count, K - n, 0)
            later = tl.load(gates + (at + 1).to(tl.int64) * g_t + c * g_n, mask=inside, other=0.0)
            decay = tl.where((r > s)[:, None], decay + later.to(tl.float32), 0.0)
            weight = along * tl.exp(decay)
            there = (t == at)[None, :]
            of_q += tl.where(there & (r >= s)[:, None], tl.sum(reading * weight, 1)[:, None], 0.0)
            if erased is not None:
                of_k += tl.where(there & (r > s)[:, None], tl.sum(erasing * weight, 1)[:, None], 0.0)
    square = (chunk * heads + head) * (T * T) + (border + r)[:, None] * T + t[None, :]
    tl.store(reads + square, of_q.to(DOT))
    if erased is not None:
        tl.store(erased + square, of_k)
