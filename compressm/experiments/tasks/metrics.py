"""What a task is judged by, and how its numbers are written."""

from __future__ import annotations

from dataclasses import dataclass

MISSING = "-"


@dataclass(frozen=True)
class Metric:
    """One measure of quality.

    Attributes:
        key: the field of ``report.json`` that holds it.
        name: in words.
        short: the name in the lines of a running command.
        higher_is_better: direction.
        factor: what is shown is ``factor`` times the value.
        digits: decimals of a result; two results that agree in them count as equal.
        unit: after a number whose name is said.
        heading: of a narrow column of results.
        gap_unit: of differences.
        better, worse: how a sentence says that a result is on that side of another.
        watched: the split that is measured while a run goes on; results at its end are always of the test split.
    """

    key: str
    name: str
    short: str
    higher_is_better: bool
    factor: float
    digits: int
    unit: str
    heading: str
    gap_unit: str
    better: str
    worse: str
    watched: str

    def number(self, value: float | None) -> str:
        """``97.24`` or ``1.923``."""
        return MISSING if value is None else f"{self.factor * value:.{self.digits}f}"

    def text(self, value: float | None) -> str:
        """``97.24 %`` or ``1.923``, where the name is said beside it."""
        return MISSING if value is None else f"{self.number(value)}{self.unit}"

    def live(self, value: float, digits: int | None = None) -> str:
        """``97.24%`` or ``1.923``, as short as possible."""
        shown = self.digits if digits is None else digits
        return f"{self.factor * value:.{shown}f}{self.unit.strip()}"

    def rounded(self, gap: float) -> float:
        """A difference as it is shown."""
        return round(self.factor * gap, self.digits) + 0.0  # no negative zero

    def signed(self, gap: float | None) -> str:
        """``-0.31`` (points) or ``+0.021`` (bits per byte)."""
        return MISSING if gap is None else f"{self.rounded(gap):+.{self.digits}f}"

    def compared(self, gap: float, other: str) -> str:
        """``0.31 points below OTHER``, ``0.021 better than OTHER``, ``equal to OTHER``; the gap is ours minus theirs."""
        shown = self.rounded(gap)
        if not shown:
            return f"equal to {other}"
        side = self.better if (shown > 0) == self.higher_is_better else self.worse
        return f"{abs(shown):.{self.digits}f} {side} {other}"

    def result(self, value: float) -> str:
        """Beginning of a sentence: ``test accuracy 97.24 %`` or ``1.923 bits per byte on the test set``."""
        if self.higher_is_better:
            return f"test {self.name} {self.text(value)}"
        return f"{self.text(value)} {self.name} on the test set"


ACCURACY = Metric(
    "accuracy", "accuracy", "accuracy", higher_is_better=True, factor=100.0, digits=2, unit=" %", heading="test %",
    gap_unit="points", better="points above", worse="points below", watched="test",
)  # fmt: skip
BITS_PER_BYTE = Metric(
    "bits_per_byte", "bits per byte", "bits/byte", higher_is_better=False, factor=1.0, digits=3, unit="",
    heading="bits/byte", gap_unit="bits per byte", better="better than", worse="worse than", watched="validation",
)  # fmt: skip
ERROR_DB = Metric(
    "error_db", "error", "error", higher_is_better=False, factor=1.0, digits=2, unit=" dB", heading="error, dB",
    gap_unit="dB", better="dB better than", worse="dB worse than", watched="test",
)  # fmt: skip
METRICS = {metric.key: metric for metric in (ACCURACY, BITS_PER_BYTE, ERROR_DB)}
