"""mambapy: its parallel scan, Blelloch's tree in plain torch over all states of the sequence at once."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.benchmarking.layer_problems import mamba_with, torch_convolution
from compressm.benchmarking.problems import Contender, Problem
from peers.base import Peer, too_many_states


def scan(p: dict[str, Tensor]) -> Tensor:
    """Of the arguments of ``selective_scan`` by name."""
    from mambapy.pscan import pscan

    dt = torch.nn.functional.softplus(p["delta"].float() + p["delta_bias"][:, None]).mT  # (batch, L, D)
    B, C = p["B"][:, 0].mT.float(), p["C"][:, 0].mT.float()  # (batch, L, N)
    decay = torch.exp(dt[..., None] * p["A"])
    h = pscan(decay, (dt * p["u"].mT)[..., None] * B[:, :, None])
    y = (h @ C[..., None])[..., 0] + p["D"] * p["u"].mT
    return (y * torch.nn.functional.silu(p["z"].mT)).mT.to(p["u"].dtype)


def selective_scan(problem: Problem) -> Contender:
    """The op."""
    return problem.contender(scan)


def mamba(problem: Problem) -> Contender:
    """The layer around it."""
    return problem.contender(mamba_with(scan, torch_convolution))


PEERS = [
    Peer("mambapy pscan", "mambapy", "mambapy", {"selective_scan": selective_scan, "mamba": mamba}, too_many_states),
]
