"""What would happen (ReductionPlan) and what happened (ReductionReport, GuardReport), ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, get_type_hints

from compressm.compression.common.types import fits
from compressm.errors import bad_argument


@dataclass(frozen=True)
class LayerReduction:
    """One layer in a plan or report.

    Attributes:
        name: module name.
        rank_before, rank_after: states before and after; equal if the layer was left alone.
        spectrum: Hankel singular values before, descending; 2N of them in the real convention, N in the complex.
        spectrum_after: those of the reduced layer.  With data Gramians: the kept part of ``spectrum``, which is what the
            balanced data Gramians become; data-free: computed anew from the reduced system.
        convention: ``"real"`` (2N real states behind y = Re(C x)), ``"complex"`` (the paper's N complex states),
            ``"selective"`` (states h_t and output maps C_t of a selective scan) or ``"mean-LTI"`` (its time-invariant mean);
            ``"modal"`` and ``"scores"`` are a criterion's, of modes and of rows, and no Hankel singular values.
        gramians: ``"data"``, ``"data-free"``, or ``"data P, data-free Q"`` where the model allowed no backward pass.
        discarded: fraction of the sum of ``spectrum`` that was cut.
        error_bound: bound on the H-infinity norm of the error, 2 * sum of the cut values; None with data Gramians, to
            which it does not apply.
        method: how the reduced system was found (``"balanced"``, ``"balanced, data-free Q"``, ``"obs"``, ``"identity"``).
        kernel_plan_before, kernel_plan_after: which kernel the layer runs, one line each; empty if it has not run yet.
        output_error: relative root mean square error of the layer's output on the calibration data, where it is known.
        state_bytes_before, state_bytes_after: what the layer carries from one token to the next, per sequence, in bytes (see
            ``Adapter.state_bytes``); None in histories of versions that did not say.
        refine_error_before, refine_error_after: the same error before local distillation and after it, on sequences that were
            recorded and not trained on; None where there was none.  If it did not become less, the layer is what the cut alone
            made of it.
    """

    name: str
    rank_before: int
    rank_after: int
    spectrum: tuple[float, ...]
    spectrum_after: tuple[float, ...]
    convention: str
    gramians: str
    discarded: float
    error_bound: float | None
    method: str
    kernel_plan_before: str = ""
    kernel_plan_after: str = ""
    output_error: float | None = None
    state_bytes_before: int | None = None
    state_bytes_after: int | None = None
    refine_error_before: float | None = None
    refine_error_after: float | None = None

    @property
    def changed(self) -> bool:
        """Whether states are removed."""
        return self.rank_after < self.rank_before

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerReduction:
        """The inverse of ``dataclasses.asdict``, with lists for tuples allowed.

        Raises:
            KeyError, TypeError: keys are missing, or values have other types.
        """
        names = [field.name for field in fields(cls) if field.name in data or field.default is MISSING]
        values: dict[str, Any] = {name: data[name] for name in names}
        for key, hint in get_type_hints(cls).items():
            if key in values and not fits(values[key], hint):
                raise TypeError(f"{key} of type {hint}: {values[key]!r:.40}")
        values |= {key: tuple(value) for key, value in values.items() if key.startswith("spectrum")}
        return cls(**values)


class _OfLayers:
    """What a plan or a report says of all its ``layers`` together."""

    layers: tuple[LayerReduction, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """States per layer afterwards, by module name."""
        return {layer.name: layer.rank_after for layer in self.layers}

    @property
    def changed(self) -> bool:
        """Whether any layer loses states."""
        return any(layer.changed for layer in self.layers)

    @property
    def state_bytes_before(self) -> int | None:
        """Bytes of state per sequence before, over all layers; None where one does not say."""
        return _total([layer.state_bytes_before for layer in self.layers])

    @property
    def state_bytes_after(self) -> int | None:
        """The same afterwards."""
        return _total([layer.state_bytes_after for layer in self.layers])

    def _facts(self) -> dict[str, Any]:
        """JSON-ready."""
        sizes = {"state_bytes_before": self.state_bytes_before, "state_bytes_after": self.state_bytes_after}
        return {"ranks": self.ranks, **sizes, "layers": [_layer_dict(layer) for layer in self.layers]}

    def _size(self) -> str:
        """In words; empty where it is not known."""
        before, after = self.state_bytes_before, self.state_bytes_after
        if before is None or after is None:
            return ""
        now = f"{before:,} -> {after:,}" if self.changed else f"{after:,}"
        return f"{now} bytes of state per sequence"


@dataclass(frozen=True)
class ReductionPlan(_OfLayers):
    """What the next attempt would do; nothing has been changed."""

    layers: tuple[LayerReduction, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return self._facts()

    def __str__(self) -> str:
        return "\n".join(filter(None, [*map(describe, self.layers), self._size()]))


@dataclass(frozen=True)
class ReductionReport(_OfLayers):
    """One attempt that was made.

    Attributes:
        step: optimizer step after which it was made (0 for the one-shot).
        seconds: wall time of the whole attempt.
        reason: why it was made, and what was left alone and why.
        layers: every state-space layer, changed or not.
    """

    step: int
    seconds: float
    reason: str
    layers: tuple[LayerReduction, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"step": self.step, "seconds": self.seconds, "reason": self.reason, **self._facts()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReductionReport:
        """The inverse of :meth:`to_dict`.

        Raises:
            ArgumentError: keys are missing, or values have other types.
        """
        try:
            for key, hint in (("step", int), ("seconds", float), ("reason", str)):
                if not fits(data[key], hint):
                    raise TypeError(f"{key} of type {hint}: {data[key]!r:.40}")
            layers = tuple(LayerReduction.from_dict(layer) for layer in data["layers"])
        except (KeyError, TypeError, IndexError) as error:
            raise bad_argument("history", got=f"an entry without {error}", expected="ReductionReport.to_dict()") from error
        return cls(data["step"], float(data["seconds"]), data["reason"], layers)

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {describe(layer)}" for layer in self.layers)])

    @property
    def summary(self) -> str:
        """One line, without the layers."""
        words = "; ".join(filter(None, [self.reason, self._size()]))
        return f"step {self.step}: {words} ({self.seconds:.2f} s)"


@dataclass(frozen=True)
class GuardReport:
    """What the guard decided about one reduction.

    Attributes:
        step: the Compressor's step count when it was decided.
        seconds: wall time of the decision, evaluation included.
        outcome: ``"accepted"`` after the recovery window, ``"rolled back"`` after it (parameters are new objects of the old
            size and values), or ``"refused"`` right after the cut (at every rank that was tried; nothing has changed, every
            parameter is the object that it was).
        reason: the figures behind it, and what happens next.
        ranks: states per layer now, by module name.
        metric: what ``evaluate`` returned; for ``"refused"`` what the last try gave.
        reference: the best value before any reduction that the guard watched; for ``"refused"`` the value just before this one.
        resumed_at: the Compressor's step count from here on; smaller than ``step`` after a rollback.
    """

    step: int
    seconds: float
    outcome: str
    reason: str
    ranks: dict[str, int]
    metric: float
    reference: float
    resumed_at: int

    @property
    def changed(self) -> bool:
        """Whether the model's parameters are other objects than before the step."""
        return self.outcome == "rolled back"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a metric that is not finite becomes a string."""
        data = asdict(self)
        return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GuardReport:
        """The inverse of :meth:`to_dict`.

        Raises:
            ArgumentError: keys are missing or malformed.
        """
        try:
            ranks = {str(name): int(rank) for name, rank in data["ranks"].items()}
            seconds, metric, reference = (float(data[key]) for key in ("seconds", "metric", "reference"))
            outcome, reason = str(data["outcome"]), str(data["reason"])
            return cls(int(data["step"]), seconds, outcome, reason, ranks, metric, reference, int(data["resumed_at"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise bad_argument("history", got=f"an entry with {error}", expected="GuardReport.to_dict()") from error

    def __str__(self) -> str:
        return f"step {self.step}: {self.outcome}, {self.reason} ({self.seconds:.2f} s)"


def report_from_dict(data: Mapping[str, Any]) -> ReductionReport | GuardReport:
    """The report that ``to_dict`` was called on.

    Raises:
        ArgumentError: it is neither.
    """
    if not isinstance(data, Mapping):
        raise bad_argument("history", got=type(data).__name__, expected="entries made by to_dict() of a report")
    return (GuardReport if "outcome" in data else ReductionReport).from_dict(data)


def describe(layer: LayerReduction) -> str:
    """One line: ranks, what was cut of which spectrum, and the kernel that runs."""
    name = layer.name or "(model)"
    if not layer.changed:
        return f"{name}: {layer.rank_before} states, unchanged"
    text = (
        f"{name}: {layer.rank_before} -> {layer.rank_after} states, {layer.discarded:.3g} of the sum of the "
        f"{layer.convention} {layer.gramians} spectrum cut, {layer.method}"
    )
    if layer.output_error is not None:
        text += f", {layer.output_error:.3g} relative error of its output"
    if layer.refine_error_before is not None and layer.refine_error_after is not None:
        before, after = layer.refine_error_before, layer.refine_error_after
        words = "refined" if after < before else "not refined, as its error would go"
        text += f", not refined, as its error is {before:.3g}" if after == before else f", {words} {before:.3g} -> {after:.3g}"
    if layer.kernel_plan_before != layer.kernel_plan_after:
        text += f"; kernel {layer.kernel_plan_before or 'none yet'} -> {layer.kernel_plan_after or 'none yet'}"
    return text


def _total(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _layer_dict(layer: LayerReduction) -> dict[str, Any]:
    data = asdict(layer)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
