"""s5-pytorch: its ``apply_ssm``, an associative scan in plain torch, mapped over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.benchmarking.layer_problems import lru_operands
from compressm.benchmarking.problems import Contender, Problem
from peers.base import Peer


def scan(p: dict[str, Tensor]) -> Tensor:
    """Of the arguments of ``lti_scan_planar`` by name."""
    from s5.s5_model import apply_ssm

    lam = torch.exp(torch.complex(p["log_decay"], p["phase"]))
    B, C = torch.complex(p["B_re"], p["B_im"]), torch.complex(p["C_re"], p["C_im"])
    return torch.vmap(lambda u: apply_ssm(lam, B, C, p["D"], u)[0])(p["u"])


def lti_scan(problem: Problem) -> Contender:
    """The op."""
    return problem.contender(scan)


def lru(problem: Problem) -> Contender:
    """The layer."""
    return problem.contender(lambda p: scan(lru_operands(p)))


PEERS = [Peer("s5-pytorch", "s5", "s5-pytorch", {"lti_scan": lti_scan, "lru": lru})]
