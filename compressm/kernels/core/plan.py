"""What runs: the plan of one kernel call, cheap to make, comparable and printable."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelPlan:
    """The backend and configuration that one op runs for given shapes.

    Attributes:
        op: name of the op, e.g. ``"lti_scan"``.
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``.
        form: algorithm, e.g. ``"scan"`` or ``"block"``.
        config: sorted ``(key, value)`` pairs of the configuration, e.g. ``(("tau", 32),)``.
        reason: one phrase that says why this one was chosen.
    """

    op: str
    backend: str
    form: str
    config: tuple[tuple[str, int], ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        config = " ".join(f"{key}={value}" for key, value in self.config)
        head = f"{self.op}: {self.backend} {self.form}" + (f" {config}" if config else "")
        return f"{head} ({self.reason})" if self.reason else head

    def get(self, key: str) -> int:
        """Value of one configuration key; KeyError if the plan has none."""
        return dict(self.config)[key]
