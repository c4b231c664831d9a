"""jax: Mamba-2's scan and the gated delta rule in chunks, jitted, with products in full float32."""

from __future__ import annotations

from typing import Any

from compressm.benchmarking.problems import Contender, Problem
from peers.base import Peer
from peers.jax_scans import contender, why_not

CHUNK = 64  # steps, as in the published forms of both


def ssd(problem: Problem) -> Contender:
    """The quadratic form within a chunk, a scan over the chunks' states between them (Dao and Gu 2024, listing 1)."""
    return contender(problem, ssd_chunked)


def ssd_chunked(p: dict[str, Any]) -> Any:
    """y of the scan with skip and softplus."""
    import jax
    import jax.numpy as jnp

    x, heads = p["x"], p["x"].shape[2]
    step = jax.nn.softplus(p["dt"] + p["dt_bias"])
    keys, queries = (jnp.repeat(_cut(p[name]), heads // p[name].shape[2], 3) for name in ("B", "C"))
    drive, decay = _cut(step[..., None] * x), jnp.cumsum(_cut(step * p["A"]), 2)
    scores = jnp.einsum("bcthn,bcshn->bchts", queries, keys) * _decays(jnp.moveaxis(decay, -1, 2))
    y = jnp.einsum("bchts,bcshp->bcthp", scores, drive)
    written = jnp.exp(decay[:, :, -1:] - decay)[..., None] * drive
    added = jnp.einsum("bcshp,bcshn->cbhpn", written, keys)
    passed = jnp.moveaxis(jnp.exp(decay[:, :, -1]), 1, 0)[..., None, None]
    _, before = jax.lax.scan(lambda h, now: (now[0] * h + now[1], h), jnp.zeros_like(added[0]), (passed, added))
    y = y + jnp.einsum("bcthn,cbhpn->bcthp", jnp.exp(decay)[..., None] * queries, before)
    return _joined(y, x.shape[1]) + p["D"][:, None] * x


def gated_delta_rule(problem: Problem) -> Contender:
    """The WY form of a chunk by a triangular system, a scan over chunks (Yang et al. 2025, section 3.3)."""
    return contender(problem, delta_chunked)


def delta_chunked(p: dict[str, Any]) -> Any:
    """o of the rule with keys and queries brought to length one."""
    import jax
    import jax.numpy as jnp

    def unit(t):
        return t * jax.lax.rsqrt((t * t).sum(-1, keepdims=True) + 1e-6)

    length, heads, width = p["v"].shape[1], p["v"].shape[2], p["q"].shape[-1]
    q, k = (jnp.repeat(unit(p[name]), heads // p[name].shape[2], 2) for name in ("q", "k"))
    q, k, v, beta, g = (jnp.moveaxis(_cut(t), 3, 2) for t in (q * width**-0.5, k, p["v"], p["beta"], p["g"]))
    decay = jnp.cumsum(g, -1)
    mask = _decays(decay)
    gain = beta[..., None]
    lower = jnp.tril(jnp.einsum("bchtk,bchsk->bchts", gain * k, k) * mask, -1) + jnp.eye(CHUNK)
    both = jnp.concatenate([gain * v, gain * k * jnp.exp(decay)[..., None]], -1)
    solved = jax.scipy.linalg.solve_triangular(lower, both, lower=True, unit_diagonal=True)
    values, keys = jnp.split(solved, [v.shape[-1]], -1)
    scores = jnp.einsum("bchtk,bchsk->bchts", q, k) * mask
    read, written = q * jnp.exp(decay)[..., None], k * jnp.exp(decay[..., -1:] - decay)[..., None]

    def chunk(S, now):
        values, keys, scores, read, written, passed = now
        new = values - keys @ S
        return passed[..., None, None] * S + jnp.swapaxes(written, -1, -2) @ new, read @ S + scores @ new

    along = tuple(jnp.moveaxis(t, 1, 0) for t in (values, keys, scores, read, written, jnp.exp(decay[..., -1])))
    _, o = jax.lax.scan(chunk, jnp.zeros((v.shape[0], heads, width, v.shape[-1])), along)
    return _joined(jnp.moveaxis(o, (0, 2), (1, 3)), length)


def _cut(t: Any) -> Any:
    """(batch, chunks, CHUNK, ...) of (batch, L, ...), filled up with zeros."""
    import jax.numpy as jnp

    filled = jnp.pad(t, [(0, 0), (0, -t.shape[1] % CHUNK), *[(0, 0)] * (t.ndim - 2)])
    return filled.reshape(t.shape[0], -1, CHUNK, *t.shape[2:])


def _joined(t: Any, length: int) -> Any:
    return t.reshape(t.shape[0], -1, *t.shape[3:])[:, :length]


def _decays(decay: Any) -> Any:
    """exp of the differences of (..., CHUNK) cumulated logarithms of decays, from a step to every later one; 0 before it."""
    import jax.numpy as jnp

    within = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    return jnp.exp(jnp.where(within, decay[..., :, None] - decay[..., None, :], -jnp.inf))


PEERS = [Peer("jax in chunks", "jax", "jax", {"ssd": ssd, "gated_delta_rule": gated_delta_rule}, why_not)]
