"""jax: ``lax.scan`` and ``lax.associative_scan``, jitted, with products in full float32.

The associative scan of an LRU is written as the LRU paper describes the layer (Orvieto et al. 2023, appendix A): complex
eigenvalues repeated for every step, complex products in and out.  It stands for the original CompreSSM implementation, which is
in jax and builds its layers so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from compressm.benchmarking.cases import Case
from compressm.benchmarking.problems import Answers, Contender, Problem
from compressm.benchmarking.timing import Timed
from peers.base import Peer, too_many_states

ORIGINAL = "LRU paper's layer, jax associative_scan"
SIMPLIFIED = "S5 paper's layer, jax associative_scan"


def why_not(case: Case) -> str | None:
    """Where jax has no such device."""
    import jax

    kind = torch.device(case.device).type
    here = jax.default_backend()
    return None if here == {"cpu": "cpu", "cuda": "gpu"}[kind] else f"jax runs on {here} here, the case on {kind}"


def why_not_tree(case: Case) -> str | None:
    """A tree over all states at once."""
    return why_not(case) or too_many_states(case)


def to_jax(tensor: torch.Tensor) -> Any:
    """The same values as a jax array; real and imaginary parts of complex ones, on a new last axis."""
    import jax.numpy as jnp

    tensor = tensor.detach()
    return jnp.from_dlpack((torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous().clone())


def to_torch(array: Any) -> torch.Tensor:
    """The same values as a CPU tensor."""
    return torch.from_numpy(np.array(array, dtype=np.float32))


def contender(problem: Problem, forward: Callable[[dict[str, Any]], Any]) -> Contender:
    """From a jax function of the inputs; the pull-back of the same weight gives the gradients."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    p = {name: to_jax(tensor) for name, tensor in problem.inputs.items()}
    if problem.backward:
        w = to_jax(problem.weight)

        def both(p, w):
            out, pull = jax.vjp(forward, p)
            return out, pull(w)[0]

        compiled = jax.jit(both)
        run = lambda: jax.block_until_ready(compiled(p, w))  # noqa: E731
    else:
        compiled = jax.jit(forward)
        run = lambda: jax.block_until_ready((compiled(p), {}))  # noqa: E731

    def answers() -> Answers:
        out, gradients = run()
        found = {name: to_torch(value) for name, value in gradients.items()}
        whole = {name: torch.view_as_complex(g) if problem.inputs[name].is_complex() else g for name, g in found.items()}
        return {"out": to_torch(out), **whole}

    return Contender(Timed(run), answers)


def selective_scan(problem: Problem) -> Contender:
    """One step after another, the exponential inside the step."""
    import jax
    import jax.numpy as jnp

    def forward(p):
        along = _prepared(p)

        def step(h, now):
            gain, drive, B, C = now
            h = jnp.exp(gain[..., None] * p["A"]) * h + drive[..., None] * B[:, None]
            return h, (h * C[:, None]).sum(-1)

        _, y = jax.lax.scan(step, jnp.zeros((p["u"].shape[0], *p["A"].shape)), along)
        return _finished(p, jnp.moveaxis(y, 0, -1))

    return contender(problem, forward)


def selective_associative(problem: Problem) -> Contender:
    """All decays and states of the sequence at once."""
    import jax
    import jax.numpy as jnp

    def forward(p):
        gain, drive, B, C = _prepared(p)
        decay = jnp.exp(gain[..., None] * p["A"])
        pairs = (decay, drive[..., None] * B[:, :, None])
        _, h = jax.lax.associative_scan(_combine, pairs)
        return _finished(p, jnp.moveaxis((h * C[:, :, None]).sum(-1), 0, -1))

    return contender(problem, forward)


def _prepared(p):
    """Step sizes, drive, B and C of every step, time first."""
    import jax
    import jax.numpy as jnp

    dt = jax.nn.softplus(p["delta"].astype(jnp.float32) + p["delta_bias"][:, None])
    tensors = (dt, dt * p["u"], p["B"][:, 0].astype(jnp.float32), p["C"][:, 0].astype(jnp.float32))
    return [jnp.moveaxis(t, -1, 0) for t in tensors]


def _finished(p, y):
    import jax

    return ((y + p["D"][:, None] * p["u"]) * jax.nn.silu(p["z"])).astype(p["u"].dtype)


def _combine(left, right):
    (a, x), (b, y) = left, right
    return a * b, b * x + y


def lru(problem: Problem) -> Contender:
    """Real and imaginary parts apart, as the products of real matrices are faster."""
    return contender(problem, lru_loop)


def lru_loop(p):
    """y of an LRU layer by ``lax.scan``."""
    import jax
    import jax.numpy as jnp

    u = p["x"]
    modulus, phase = jnp.exp(-jnp.exp(p["nu_log"])), jnp.exp(p["theta_log"])
    re, im = modulus * jnp.cos(phase), modulus * jnp.sin(phase)
    gamma = jnp.exp(p["gamma_log"])[:, None]
    b_re, b_im = u @ (gamma * p["B_re"]).T, u @ (gamma * p["B_im"]).T

    def step(carry, inputs):
        hr, hi = carry
        xr, xi = inputs
        state = (re * hr - im * hi + xr, re * hi + im * hr + xi)
        return state, state

    zero = jnp.zeros((u.shape[0], re.shape[0]))
    _, (hr, hi) = jax.lax.scan(step, (zero, zero), (b_re.swapaxes(0, 1), b_im.swapaxes(0, 1)))
    return (hr @ p["C_re"].T - hi @ p["C_im"].T).swapaxes(0, 1) + p["D"] * u


def lru_original(problem: Problem) -> Contender:
    """See the module."""
    return contender(problem, lru_paper)


def lru_paper(p):
    """y of an LRU layer as its paper writes it."""
    import jax
    import jax.numpy as jnp

    lam = jnp.exp(-jnp.exp(p["nu_log"]) + 1j * jnp.exp(p["theta_log"]))
    B = (p["B_re"] + 1j * p["B_im"]) * jnp.exp(p["gamma_log"])[:, None]
    C = p["C_re"] + 1j * p["C_im"]

    def sequence(u):
        eigenvalues = jnp.repeat(lam[None], u.shape[0], axis=0)
        _, h = jax.lax.associative_scan(_combine, (eigenvalues, u @ B.T))
        return (h @ C.T).real + p["D"] * u

    return jax.vmap(sequence)(p["x"])


def s5(problem: Problem) -> Contender:
    """See the module."""
    return contender(problem, s5_paper)


def s5_paper(p):
    """y of an S5 layer as its paper's code has it: zero-order hold, eigenvalues repeated for every step."""
    import jax
    import jax.numpy as jnp

    Lambda, B, C = (p[name][..., 0] + 1j * p[name][..., 1] for name in ("Lambda", "B", "C"))
    lam = jnp.exp(Lambda * jnp.exp(p["log_step"]))
    B = ((lam - 1) / Lambda)[:, None] * B

    def sequence(u):
        eigenvalues = jnp.repeat(lam[None], u.shape[0], axis=0)
        _, h = jax.lax.associative_scan(_combine, (eigenvalues, u @ B.T))
        return (h @ C.T).real + p["D"] * u

    return jax.vmap(sequence)(p["x"])


def original_step(problem: Problem) -> Contender:
    """The whole training step around that layer."""
    from peers import jax_lru_model

    return jax_lru_model.step(problem)


PEERS = [
    Peer("jax lax.scan", "jax", "jax", {"selective_scan": selective_scan, "lru": lru}, why_not),
    Peer("jax associative_scan", "jax", "jax", {"selective_scan": selective_associative}, why_not_tree),
    Peer(ORIGINAL, "jax", "jax", {"lru": lru_original, "smnist": original_step, "scifar": original_step}, why_not),
    Peer(SIMPLIFIED, "jax", "jax", {"s5": s5}, why_not),
]
