"""What a peer is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from compressm.benchmarking.cases import Case
from compressm.benchmarking.running import Make


def always(case: Case) -> str | None:
    """No reason to skip anything."""
    return None


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
