"""The scans as a user would hand them to torch.compile: some steps unrolled and compiled, called once per chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

UNROLL = 8
RECOMPILES = 64  # a chunk is compiled per shape, with and without gradients


def _selective_steps(h: Tensor, dt: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple:
    """A few steps of the selective scan: (state behind them, the output (batch, D) of each); time comes first."""
    outputs = []
    for t in range(dt.shape[0]):
        h = torch.exp(dt[t][..., None] * A) * h + drive[t][..., None] * B[t][:, None]
        outputs.append((h * C[t][:, None]).sum(-1))
    return h, tuple(outputs)


def _complex_steps(re: Tensor, im: Tensor, lam_re: Tensor, lam_im: Tensor, x_re: Tensor, x_im: Tensor):
    """A few steps of a complex diagonal recurrence, planar: (state behind them, all states (steps, batch, N))."""
    res, ims = [], []
    for t in range(x_re.shape[0]):
        re, im = lam_re * re - lam_im * im + x_re[t], lam_re * im + lam_im * re + x_im[t]
        res.append(re)
        ims.append(im)
    return re, im, torch.stack(res), torch.stack(ims)


def _compiled(function: Callable) -> Callable:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
    return torch.compile(function, fullgraph=True, dynamic=False)


def _first_state(like: Tensor, *shape: int) -> Tensor:
    """Zeros, a tensor of their own, with gradients where later states have them: one compilation serves all chunks."""
    return like.new_zeros(shape).requires_grad_(like.requires_grad)


def selective_scan() -> Callable[[dict[str, Tensor]], Tensor]:
    """Of the arguments of :func:`compressm.kernels.selective_scan` by name, one group, delta_softplus."""
    chunk = _compiled(_selective_steps)

    def call(p: dict[str, Tensor]) -> Tensor:
        dt = softplus(p["delta"].float() + p["delta_bias"][:, None])
        along = (dt, dt * p["u"], p["B"][:, 0].float(), p["C"][:, 0].float())
        pieces = [t.movedim(-1, 0).contiguous().split(UNROLL) for t in along]
        h = _first_state(p["A"], p["u"].shape[0], *p["A"].shape)
        outputs: list[Tensor] = []
        for gain, drive, B, C in zip(*pieces, strict=True):
            h, y = chunk(h, gain, drive, p["A"], B, C)
            outputs += y
        y = (torch.stack(outputs, 2) + p["D"][:, None] * p["u"]) * silu(p["z"].float())
        return y.to(p["u"].dtype)

    return call


def lti_scan() -> Callable[[dict[str, Tensor]], Tensor]:
    """Of the arguments of :func:`compressm.kernels.lti_scan_planar` by name: products, the compiled recurrence, products."""
    chunk = _compiled(_complex_steps)

    def call(p: dict[str, Tensor]) -> Tensor:
        modulus = p["log_decay"].exp()
        lam_re, lam_im = modulus * p["phase"].cos(), modulus * p["phase"].sin()
        u = p["u"].float()
        x_re, x_im = (((u @ p[name].T).transpose(0, 1)).contiguous().split(UNROLL) for name in ("B_re", "B_im"))
        re, im = (_first_state(lam_re, u.shape[0], lam_re.shape[0]) for _ in range(2))
        states_re, states_im = [], []
        for part_re, part_im in zip(x_re, x_im, strict=True):
            re, im, all_re, all_im = chunk(re, im, lam_re, lam_im, part_re, part_im)
            states_re.append(all_re)
            states_im.append(all_im)
        y = torch.cat(states_re) @ p["C_re"].T - torch.cat(states_im) @ p["C_im"].T
        return (y.transpose(0, 1) + p["D"] * u).to(p["u"].dtype)

    return call
