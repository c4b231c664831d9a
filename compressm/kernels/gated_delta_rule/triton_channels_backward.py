"""Kernels of the gated delta rule, and of linear attention, where each channel of the keys has its decay: backward."""

# mypy: ignore-errors
from __future__ import annotations

from compressm.kernels.core.triton_language import jit, tl
from compressm.kernels.gated_delta_rule import triton_channels as channels
from compressm.kernels.gated_delta_rule.triton_backward import through_states
from compressm.kernels.ssd import triton_tiles as tiles


@jit
def _from_border(q, g, factor, t, border, count, q_t, q_n, g_t, g_n, columns_left, COLUMNS: tl.constexpr):
    """What the steps t from a border on read along, (T, COLUMNS), decayed from the border."""
    since = tl.cumsum(channels.rows_of(g, t, g_t, g_n, border, count, columns_left, COLUMNS), 0)
    return channels.rows_of(q, t, q_t, q_n, border, count, columns_left, COLUMNS) * factor[:, None] * tl.exp(since)


@jit(
    do_not_specialize=[
        "q", "k", "g", "beta", "q_lengths", "k_lengths", "starts", "counts", "of_reads", "of_erased", "grad_q", "grad_k",
        "grad_into", "L", "chunks", "heads", "own", "K", "padded", "scale", "q_b", "q_t", "q_h", "q_n", "k_b", "k_t", "k_h",
        "k_n", "g_b", "g_t", "g_h", "g_n", "beta_b", "beta_t", "beta_h",
    ]
)  # fmt: skip
def _channel_within_kernel(
    q, k, g, beta, q_lengths, k_lengths, starts, counts, of_reads, of_erased, grad_q, grad_k, grad_into,
    L, chunks, heads, own, K, padded, scale,
    q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, g_b, g_t, g_h, g_n, beta_b, beta_t, beta_h,
    PRECISION: tl.constexpr, T: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """By ``reads`` and ``erased``, gradients of q, k and into with their factors, of 16 steps of one chunk, and BN columns.

    grad_q, grad_k and grad_into: (batch, L, heads, padded) float32.
    """
    columns = tl.cdiv(K, BN)
    blocks = columns * (T // 16)
    chunk = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    border = tl.program_id(0) % blocks // columns * 16
    n = tl.program_id(0) % columns * BN
    line, start, count = tiles.place(chunk, starts, counts, L, chunks, T)
    if count <= border:
        return
    DOT: tl.constexpr = of_reads.dtype.element_ty
    t = tl.arange(0, T)
    r = tl.arange(0, 16)
    end = border + 16
    q += line * q_b + start * q_t + head // own * q_h + n * q_n.to(tl.int64)
    k += line * k_b + start * k_t + head // own * k_h + n * k_n.to(tl.int64)
    g += line * g_b + start * g_t + head * g_h + n * g_n.to(tl.int64)
    place = (chunk * heads + head) * (T * T)
    query, key, gain = channels.factors(
        beta, q_lengths, k_lengths, line, start, t, count, L, scale, head, heads, own, beta_b, beta_t, beta_h
    )
    before = channels.up_to_border(k, g, gain, t, tl.minimum(border, count), k_t, k_n, g_t, g_n, K - n, BN).to(DOT)
    since = tl.exp(tl.cumsum(channels.rows_of(g, border + r, g_t, g_n, 0, count, K - n, BN), 0))
    rows = place + (border + r)[:, None] * T + t[None, :]
    given = tl.load(of_reads + rows)
    to_query = tiles.product(given, before, tl.zeros([16, BN], tl.float32), PRECISION) * since
    later = channels.rows_of(g, border + r + 1, g_t, g_n, 1, tl.minimum(end, count), K - n, BN)
    later = tl.exp(tl.cumsum(later, 0, reverse=True))
    after = _from_border(q, g, query, t, end, count, q_t, q_n, g_t, g_n, K - n, BN).to(DOT)
    rows = place + t[:, None] * T + (border + r)[None, :]
    given = tl.trans(tl.load(of_reads + rows))
    to_into = tiles.product(given, after, tl.zeros([16, BN], tl.float32), PRECISION)
    to_key = tl.zeros([16, BN], tl.float32)
    if of_erased is not None:
        given = tl.load(of_erased + place + (border + r)[:, None] * T + t[None, :])
        to_key = tiles.product(given, before, to_key, PRECISION) * since
        after = _from_border(k, g, key, t, end, count, k_t, k_n, g_t, g_n, K - n, BN).to(DOT)
        to_into = tiles.product(tl.trans(tl.load(of_erased + rows)), after, to_into, PRECISION)
    to_into *= later
    c = tl.arange(0, BN).to(tl.int64)[None, :]
    decay = tl.zeros([16, BN], tl.float32)
    for turn in range(0, 16):
        s = 15 - turn
        at = border + s
        along = tl.load(k + at.to(tl.int64) * k_t + c * k_n, mask=c < tl.where(at < count, K - n, 0), other=0.0)
        along = along.to(tl.float32) * tl.sum(tl.where(t == at, gain, 0.0), 0)
        passed = tl.load(g + (at + 1).to(tl.int64) * g_t + c * g_n, mask=c < tl.where(at + 1 < count, K - n, 0), other=0.0)
        decay = tl.where((r > s)[:, None], decay + passed.to(tl.float32), 0.0)
        weight = along * tl.exp(decay)
        column = place + (border + r) * T + at
        to_query += tl.load(of_reads + column).to(tl.float32)[:, None] * weight
        if of_erased is not None:
            to_key += tl.load(of_erased + column).to(tl.float32)[:, None] * weight
    decay = tl.zeros([16, BN], tl.float32)
    for i in range(0, 16):
        at = border + i
        inside = c < tl.where(at < count, K - n, 0)
        passed = tl.load(g + at.to(tl.int64) * g_t + c * g_n, mask=inside, other=0.0)
        decay = tl.where((r < i)[:, None], decay + passed.to(tl.float32), 0.0)
        across = place + at * T + border + r
        along = tl.load(q + at.to(tl.int64) * q_t + c * q_n, mask=inside, other=0.0).to(tl.float32)
        along = along * tl.sum(tl.where(t == at, query, 0.0), 0)
        added = tl.load(of_reads + across).to(tl.float32)[:, None] * along
        if of_erased is not None:
            along = tl.load(k + at.to(tl.int64) * k_t + c * k_n, mask=inside, other=0.0).to(tl.float32)
            along = along * tl.sum(tl.where(t == at, key, 0.0), 0)
            added += tl.load(of_erased + across).to(tl.float32)[:, None] * along
        to_into += added * tl.exp(decay)
    target = ((line * L + start + border) * heads + head) * padded + n
    tiles.store(grad_q + target, to_query, heads * padded, 1, count - border, padded - n, True)
    if of_erased is not None:
        tiles.store(grad_k + target, to_key, heads * padded, 1, count - border, padded - n, True)
    tiles.store(grad_into + target, to_into, heads * padded, 1, count - border, padded - n, True)


@jit(
    do_not_specialize=[
        "q", "k", "g", "beta", "q_lengths", "k_lengths", "starts", "counts", "grad_out", "grad_v", "writes", "passing",
        "of_q", "of_k", "of_into", "states", "grad_states", "grad_q", "grad_k", "grad_g", "by_gain", "L", "chunks", "heads",
        "own", "K", "V", "padded_k", "padded", "all_steps", "scale", "q_b", "q_t", "q_h", "q_n", "k_b", "k_t", "k_h", "k_n",
        "g_b", "g_t", "g_h", "g_n", "beta_b", "beta_t", "beta_h", "grad_b", "grad_t", "grad_h", "grad_p", "gv_b", "gv_t",
        "gv_h", "gv_p", "w_b", "w_t", "w_h", "w_p", "gq_b", "gq_t", "gq_h", "gq_n", "gk_b", "gk_t", "gk_h", "gk_n",
        "gg_b", "gg_t", "gg_h", "gg_n",
    ]
)  # fmt: skip
def _channel_keys_kernel(
    q, k, g, beta, q_lengths, k_lengths, starts, counts, grad_out, grad_v, writes, passing, of_q, of_k, of_into,
    states, grad_states, grad_q, grad_k, grad_g, by_gain, L, chunks, heads, own, K, V, padded_k, padded, all_steps, scale,
    q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, g_b, g_t, g_h, g_n, beta_b, beta_t, beta_h, grad_b, grad_t, grad_h, grad_p,
    gv_b, gv_t, gv_h, gv_p, w_b, w_t, w_h, w_p, gq_b, gq_t, gq_h, gq_n, gk_b, gk_t, gk_h, gk_n, gg_b, gg_t, gg_h, gg_n,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BN columns of the gradients of one chunk's q and k, summed over the heads of a group, and of g.

    of_q, of_k and of_into are the gradients from within the chunk, by_gain (blocks of columns, batch, L, heads) gets those of
    beta; all_steps = batch L.
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
    t = tl.arange(0, T)
    q += line * q_b + start * q_t + group * q_h + n * q_n.to(tl.int64)
    k += line * k_b + start * k_t + group * k_h + n * k_n.to(tl.int64)
    total_query = tl.zeros([T, BN], tl.float32)
    total_key = tl.zeros([T, BN], tl.float32)
    for h in range(0, own):
        head = group * own + h
        place = chunk * heads + head
        there = (place * K + n) * padded
        to_query, to_key, to_into, passed = through_states(
            grad_out + line * grad_b + start * grad_t + head * grad_h, grad_v + line * gv_b + start * gv_t + head * gv_h,
            writes + line * w_b + start * w_t + head * w_h, states + there, grad_states + there,
            grad_t, grad_p, gv_t, gv_p, w_t, w_p, count, K - n, V, padded, of_k is not None, WIDE, PRECISION, T, BN, BV,
        )  # fmt: skip
        query, key, gain = channels.factors(
            beta, q_lengths, k_lengths, line, start, t, count, L, scale, head, heads, own, beta_b, beta_t, beta_h
        )
        gates = g + line * g_b + start * g_t + head * g_h + n * g_n.to(tl.int64)
        front = tl.exp(tl.cumsum(channels.rows_of(gates, t, g_t, g_n, 0, count, K - n, BN), 0))
        within = ((line * L + start) * heads + head) * padded_k + n
        of_query = channels.rows_of(q, t, q_t, q_n, 0, count, K - n, BN) * query[:, None]
        to_query *= front
        inner = tiles.load(of_q + within, heads * padded_k, 1, count, K - n, True, T, BN)
        to_query += inner
        decay = of_query * to_query
        total_query += to_query * query[:, None]
        of_key = channels.rows_of(k, t, k_t, k_n, 0, count, K - n, BN)
        if of_k is not None:
            to_key = to_key * front + tiles.load(of_k + within, heads * padded_k, 1, count, K - n, True, T, BN)
            decay += of_key * key[:, None] * to_key
            total_key += to_key * key[:, None]
        inner = tiles.load(of_into + within, heads * padded_k, 1, count, K - n, True, T, BN)
        decay -= of_key * gain[:, None] * inner
        decay = tl.cumsum(decay, 0, reverse=True)
        later = channels.rows_of(gates, t + 1, g_t, g_n, 1, count, K - n, BN)
        to_into *= tl.exp(tl.cumsum(later, 0, reverse=True))
        added = to_into * of_key * gain[:, None]
        decay += tl.cumsum(added, 0) - added
        index = n + tl.arange(0, BN)
        decay += (passed * tl.load(passing + place * K + index, mask=index < K, other=0.0))[None, :]
        target = grad_g + line * gg_b + start * gg_t + head * gg_h + n * gg_n.to(tl.int64)
        tiles.store(target, decay, gg_t, gg_n, count, K - n, False)
        to_into += inner
        total_key += to_into * gain[:, None]
        if beta is not None:
            given = tl.sum(to_into * of_key, 1) * key
            steps = (column.to(tl.int64) * all_steps + line * L + start + t) * heads + head
            tl.store(by_gain + steps, given, mask=t < count)
    target = grad_q + line * gq_b + start * gq_t + group * gq_h + n * gq_n.to(tl.int64)
    tiles.store(target, total_query, gq_t, gq_n, count, K - n, False)
    target = grad_k + line * gk_b + start * gk_t + group * gk_h + n * gk_n.to(tl.int64)
    tiles.store(target, total_key, gk_t, gk_n, count, K - n, False)
