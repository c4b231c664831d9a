"""Stand-ins under the names of s5-pytorch's layers and the standalone S4D, float64: their parameters and ways of calling."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from compressm.layers import S4D, S5


def discretize_zoh(Lambda, B, step):
    lam = torch.exp(Lambda * step)
    return lam, (1 / Lambda * (lam - 1))[:, None] * B


def discretize_bilinear(Lambda, B, step):
    BL = 1 / (1 - step / 2 * Lambda)
    return BL * (1 + step / 2 * Lambda), (BL * step)[:, None] * B


class S5SSM(nn.Module):
    """One sequence (L, H) at a time."""

    def __init__(self, d_model, d_state, bidir=False, discretization="zoh", liquid=False, degree=1, bcInit="dense"):
        super().__init__()
        drawn = S5(d_model, d_state, bidir=bidir, dtype=torch.float64)
        for name, parameter in drawn.named_parameters():
            setattr(self, name, parameter)
        self.bidir, self.liquid, self.degree, self.bcInit = bidir, liquid, degree, bcInit
        self.discretize = {"zoh": discretize_zoh, "bilinear": discretize_bilinear}[discretization]

    def forward(self, signal, step_scale=1.0, state=None, return_state=False):
        lam, B = self.discretize(self.Lambda, torch.view_as_complex(self.B), step_scale * self.log_step.exp())
        drive = signal.to(lam.dtype) @ B.T
        seen, back = [], []
        state = torch.zeros_like(lam) if state is None else state
        for x in drive:
            state = lam * state + x
            seen.append(state)
        states = torch.stack(seen)
        if self.bidir:
            other = torch.zeros_like(lam)
            for x in drive.flip(0):
                other = lam * other + x
                back.append(other)
            states = torch.cat([states, torch.stack(back[::-1])], -1)
        y = (states @ self.C.T).real + self.D * signal
        return (y, state) if return_state else y


class S5Wrapper(nn.Module):
    """A batch, mapped over."""

    def __init__(self, width, state_width, **options):
        super().__init__()
        self.width = width
        self.seq = S5SSM(width, state_width, **options)

    def forward(self, signal, step_scale=1.0, state=None, return_state=False):
        scale = torch.ones(len(signal)) * step_scale
        return torch.vmap(lambda s, ss: self.seq(s, step_scale=ss, return_state=return_state))(signal, scale)


class StandaloneS4D(nn.Module):
    """Returns a pair, and counts its states in an attribute."""

    def __init__(self, d_model, d_state):
        super().__init__()
        drawn = S4D(d_model, d_state, dtype=torch.float64)
        self.h, self.n, self.transposed, self.D = d_model, d_state, True, drawn.D
        self.kernel, self.activation, self.dropout, self.output_linear = (
            drawn.kernel, drawn.activation, drawn.dropout, drawn.output_linear,
        )  # fmt: skip

    def forward(self, u, **kwargs):
        L = u.size(-1)
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(self.kernel(L), n=2 * L), n=2 * L)[..., :L]
        return self.output_linear(F.gelu(y + u * self.D.unsqueeze(-1))), None


for _cls, _name in ((S5SSM, "s5.s5_model.S5SSM"), (S5Wrapper, "s5.s5_model.S5"), (StandaloneS4D, "models.s4.s4d.S4D")):
    _cls.__module__, _, _cls.__qualname__ = _name.rpartition(".")
