"""The standalone form of S4D that state-spaces/s4 publishes, written from its formulas (Gu et al. 2022, arXiv 2206.11893).

All powers of all eigenvalues are one tensor (H, N, L), summed over the modes; the convolution is differentiated by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compressm.benchmarking.problems import Contender, Problem
from peers.base import Peer


def kernel(p: dict[str, Tensor], length: int) -> Tensor:
    """(H, L): 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n t)."""
    A = -torch.exp(p["kernel.log_A_real"]) + 1j * p["kernel.A_imag"]
    dtA = A * p["kernel.log_dt"].exp()[:, None]
    C = torch.view_as_complex(p["kernel.C"]) * (torch.exp(dtA) - 1) / A
    powers = torch.exp(dtA[..., None] * torch.arange(length, device=dtA.device))
    return 2 * torch.einsum("hn,hnl->hl", C, powers).real


def layer(p: dict[str, Tensor]) -> Tensor:
    """x (batch, L, H) and the parameters of a layer by name -> the same shape."""
    u, length = p["x"].mT, p["x"].shape[1]
    size = 2 * length
    y = torch.fft.irfft(torch.fft.rfft(u, n=size) * torch.fft.rfft(kernel(p, length), n=size), n=size)[..., :length]
    y = F.gelu(y + u * p["D"][:, None])
    return F.glu(F.conv1d(y, p["output_linear.0.weight"], p["output_linear.0.bias"]), dim=-2).mT


def s4d(problem: Problem) -> Contender:
    """The layer."""
    return problem.contender(layer)


PEERS = [Peer("standalone S4D", "torch", "torch", {"s4d": s4d})]
