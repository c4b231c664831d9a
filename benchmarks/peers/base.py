"""What a peer is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from compressm.benchmarking.cases import Case
from compressm.benchmarking.running import Make

MOST_WRITTEN = {"cpu": 8e9, "cuda": 1e13}  # bytes
MOST_STATES = {"cpu": 1 << 25, "cuda": 1 << 30}


def always(case: Case) -> str | None:
    """No reason to skip anything."""
    return None


def too_many_states(case: Case) -> str | None:
    """For peers that keep several tensors of all states (batch, channels, L, N) at once for their backward."""
    most = MOST_STATES[torch.device(case.device).type]
    if case.passes == "forward":
        return None
    shape = case.shape
    states = shape["batch"] * shape["channels"] * shape["length"] * shape["states"] * (2 if case.op == "mamba" else 1)
    return None if states <= most else f"keeps several tensors of all {states:.2g} states: seconds to minutes a call"


def quadratic_backward(case: Case) -> str | None:
    """For loops that index the time axis: their backward makes a tensor of all states of the sequence at every step."""
    if case.passes == "forward":
        return None
    shape = case.shape
    inner = shape["channels"] * (1 if case.op == "selective_scan" else 2)
    written = 4 * shape["batch"] * inner * shape["states"] * shape["length"] ** 2
    if written <= MOST_WRITTEN[torch.device(case.device).type]:
        return None
    return f"indexes the time axis: its backward writes {written / 1e9:.0f} GB of zeros and sums a call"


@dataclass(frozen=True)
class Peer:
    """Another way to compute some of the ops.

    Attributes:
        name: in reports.
        module: that it imports; absent, it is skipped everywhere.
        package: the distribution, whose version is reported.
        ops: makers of its contenders by op.
        why_not: the reason why it cannot run a case, or None.
    """

    name: str
    module: str
    package: str
    ops: dict[str, Make]
    why_not: Callable[[Case], str | None] = always

    def reason(self, case: Case) -> str | None:
        """Why it is skipped for a case; None where it runs."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        return self.why_not(case)
