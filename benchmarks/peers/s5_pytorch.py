"""s5-pytorch: its layer, and its ``apply_ssm`` of an LRU: an associative scan in plain torch, mapped over the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

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


def s5(problem: Problem) -> Contender:
    """Its own layer, with the problem's parameters."""
    from s5.s5_model import S5SSM

    channels, states = problem.sizes["channels"], problem.sizes["states"]
    eye = torch.eye(states, dtype=torch.complex64)
    layer = S5SSM(torch.zeros(states, dtype=torch.complex64), eye, eye, channels, states, 1e-3, 1e-1, bcInit="dense")
    layer.to(problem.device)

    def forward(p: dict[str, Tensor]) -> Tensor:
        parameters = {name: tensor for name, tensor in p.items() if name != "x"}
        return torch.vmap(lambda u: functional_call(layer, parameters, (u,)))(p["x"])

    return problem.contender(forward)


PEERS = [Peer("s5-pytorch", "s5", "s5-pytorch", {"lti_scan": lti_scan, "lru": lru, "s5": s5})]
