"""The materialised impulse response of an LTI layer, convolved by FFT: what few channels allow."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.benchmarking.cases import Case
from compressm.benchmarking.layer_problems import lru_operands
from compressm.benchmarking.problems import Contender, Problem
from peers.base import Peer

MOST_CHANNELS = 16


def few_channels(case: Case) -> str | None:
    """The response holds channels^2 numbers a step."""
    channels = case.shape["channels"]
    return None if channels <= MOST_CHANNELS else f"its impulse response would hold {channels}^2 numbers a step"


def convolution(p: dict[str, Tensor]) -> Tensor:
    """y = K * u with K_t = Re(C diag(lam^t) B), of the arguments of ``lti_scan_planar`` by name."""
    u, length = p["u"], p["u"].shape[1]
    steps = torch.arange(length, dtype=u.dtype, device=u.device)
    powers = torch.exp(steps[:, None] * torch.complex(p["log_decay"], p["phase"]))
    B, C = torch.complex(p["B_re"], p["B_im"]), torch.complex(p["C_re"], p["C_im"])
    kernel = torch.einsum("hn,tn,ng->thg", C, powers, B).real
    size = 2 * length
    spectrum = torch.einsum("thg,btg->bth", torch.fft.rfft(kernel, n=size, dim=0), torch.fft.rfft(u, n=size, dim=1))
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, :length] + p["D"] * u


def lti_scan(problem: Problem) -> Contender:
    """The op."""
    return problem.contender(convolution)


def lru(problem: Problem) -> Contender:
    """The layer."""
    return problem.contender(lambda p: convolution(lru_operands(p)))


PEERS = [Peer("FFT convolution", "torch", "torch", {"lti_scan": lti_scan, "lru": lru}, few_channels)]
