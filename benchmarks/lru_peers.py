"""What users run today for an LRU layer, as callables over the same parameters; each is checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from compressm.layers import LRU


def planar(layer: LRU) -> tuple[Tensor, Tensor, Tensor]:
    """Complex eigenvalues (N,), normalised B (N, H) and C (H, N)."""
    lam = torch.exp(torch.complex(-layer.nu_log.exp(), layer.theta_log.exp()))
    B = layer.gamma_log.exp()[:, None] * torch.complex(layer.B_re, layer.B_im)
    return lam, B, torch.complex(layer.C_re, layer.C_im)


def fft_convolution(layer: LRU, x: Tensor) -> Tensor:
    """y = K * x with the materialised impulse response K_t = Re(C diag(lam^t) B), t < L, by FFT along time."""
    length = x.shape[1]
    lam, B, C = planar(layer)
    steps = torch.arange(length, dtype=x.dtype)
    powers = torch.exp(steps[:, None] * torch.log(lam)[None])
    kernel = torch.einsum("hn,tn,ng->thg", C, powers, B).real
    size = 2 * length
    spectrum = torch.einsum("thg,btg->bth", torch.fft.rfft(kernel, n=size, dim=0), torch.fft.rfft(x, n=size, dim=1))
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, :length] + layer.D * x


def matrix_products(layer: LRU, x: Tensor) -> Callable[[], None]:
    """The six real matrix products of one forward and backward of the layer, and nothing else."""
    rows, channels, states = x.shape[0] * x.shape[1], layer.d_model, layer.d_state
    u, dy, h = torch.randn(rows, channels), torch.randn(rows, channels), torch.randn(rows, 2 * states)
    w_in, w_out = torch.randn(2 * states, channels), torch.randn(channels, 2 * states)

    def run() -> None:
        torch.mm(u, w_in.T)
        torch.mm(h, w_out.T)
        torch.mm(dy, w_out)
        torch.mm(h, w_in)
        torch.mm(h.T, u)
        torch.mm(dy.T, h)

    return run


def jax_scan(layer: LRU, x: Tensor, weight: Tensor) -> tuple[Callable[[], object], Callable[[], Tensor]]:
    """jitted ``jax.lax.scan`` with real split matrices: (forward + backward, output for the check)."""
    import jax
    import jax.numpy as jnp

    names = ["nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D"]
    parameters = {name: jnp.asarray(getattr(layer, name).detach().numpy()) for name in names}
    u, w = jnp.asarray(x.detach().numpy()), jnp.asarray(weight.numpy())

    def forward(p, u):
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

    gradient = jax.jit(jax.grad(lambda p, u: (forward(p, u) * w).sum(), argnums=(0, 1)))
    output = jax.jit(forward)
    return (
        lambda: jax.block_until_ready(gradient(parameters, u)),
        lambda: torch.from_numpy(np.array(output(parameters, u))),
    )
