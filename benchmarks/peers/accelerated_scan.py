"""accelerated-scan: its complex scan, a Triton kernel on a GPU and its torch form elsewhere, between matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.benchmarking.layer_problems import lru_operands
from compressm.benchmarking.problems import Contender, Problem
from peers.base import Peer


def scan_with(states_of):
    """Of the arguments of ``lti_scan_planar`` by name, around (gates (batch, N, L), tokens (batch, N, L)) -> states."""

    def call(p: dict[str, Tensor]) -> Tensor:
        u = p["u"]
        lam = torch.exp(torch.complex(p["log_decay"], p["phase"]))
        tokens = torch.complex(u @ p["B_re"].T, u @ p["B_im"].T).mT.contiguous()
        h = states_of(lam[:, None].expand_as(tokens).contiguous(), tokens).mT
        return h.real @ p["C_re"].T - h.imag @ p["C_im"].T + p["D"] * u

    return call


def _scan(device: torch.device):
    if device.type == "cuda":
        from accelerated_scan.complex import scan
    else:
        from accelerated_scan.ref import scan
    return scan_with(scan)


def lti_scan(problem: Problem) -> Contender:
    """The op."""
    return problem.contender(_scan(problem.device))


def lru(problem: Problem) -> Contender:
    """The layer."""
    call = _scan(problem.device)
    return problem.contender(lambda p: call(lru_operands(p)))


PEERS = [Peer("accelerated-scan, complex", "accelerated_scan", "accelerated-scan", {"lti_scan": lti_scan, "lru": lru})]
