"""Plain torch: the definition step by step, the same unrolled and compiled, and torch's own convolution."""

from __future__ import annotations

from compressm.benchmarking.guard_problems import DISK, SAVE
from compressm.benchmarking.op_problems import COMPILED, CONV1D, REFERENCE
from compressm.benchmarking.problems import Contender, Problem
from compressm.benchmarking.running import Make
from peers.base import Peer


def built_in(name: str) -> Make:
    """A contender that the package brings along."""

    def make(problem: Problem) -> Contender:
        return problem.built_in[name]()

    return make


SCANS = ("lti_scan", "selective_scan", "lru", "mamba")
PEERS = [
    Peer(REFERENCE, "torch", "torch", dict.fromkeys((*SCANS, "selective_state_update"), built_in(REFERENCE))),
    Peer(
        COMPILED, "torch", "torch",
        dict.fromkeys(("lti_scan", "selective_scan", "causal_conv1d"), built_in(COMPILED)),  # more would compile for minutes
    ),
    Peer(CONV1D, "torch", "torch", {"causal_conv1d": built_in(CONV1D)}),
    Peer(DISK, "torch", "torch", {"rollback": built_in(DISK)}),
    Peer(SAVE, "torch", "torch", {"rollback": built_in(SAVE)}),
]  # fmt: skip
