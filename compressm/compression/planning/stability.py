"""Does the ranking settle early?  What a Compressor saw at its measuring steps, and how far each was from the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, get_type_hints

import torch
from torch import Tensor

from compressm.compression.common.types import fits
from compressm.compression.planning.plans import Candidate
from compressm.errors import bad_argument


@dataclass(frozen=True)
class Sight:
    """One layer at one measuring step, before any reduction there.

    Attributes:
        spectrum: its Hankel singular values, descending.
        scores: how much each of its states counts by itself, the root of P_nn Q_nn; empty where the adapter does not say.
        kept: the states that a reduction would keep or has kept, or that take most part in what it keeps.
        bound: by how much no value of the spectrum can have moved more since the step before (Weyl); None where not known.
    """

    spectrum: tuple[float, ...]
    scores: tuple[float, ...]
    kept: tuple[int, ...]
    bound: float | None


@dataclass(frozen=True)
class LayerStability:
    """One layer over its measuring steps; entries that need what is not known, or another number of states, are None.

    Attributes:
        steps: optimizer steps at which it was measured.
        spectra: Hankel singular values then.
        drift: the largest move of one of these since the step before, per optimizer step.
        bound: Weyl's bound on it, the spectral norm of the change of Q^(1/2) P^(1/2) per optimizer step.
        correlation: Spearman's rank correlation of the states' scores with those at the last step.
        overlap: the fraction of the states that would have been kept which are those of the last step.
    """

    steps: tuple[int, ...]
    spectra: tuple[tuple[float, ...], ...]
    drift: tuple[float | None, ...]
    bound: tuple[float | None, ...]
    correlation: tuple[float | None, ...]
    overlap: tuple[float | None, ...]


@dataclass(frozen=True)
class Stability:
    """Whether spectra and rankings had settled, by layer.

    A rank correlation alone misleads: how fast states decay at initialisation ranks them much as training will, so that it
    begins high.  What counts is which of the states near the cut change sides (``overlap``).
    """

    layers: dict[str, LayerStability]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for name, layer in self.layers.items():
            for index, step in enumerate(layer.steps):
                words = {
                    "drift": layer.drift[index], "bound": layer.bound[index], "rank correlation": layer.correlation[index],
                    "overlap": layer.overlap[index],
                }  # fmt: skip
                known = ", ".join(f"{key} {value:.3g}" for key, value in words.items() if value is not None)
                lines.append(f"{name or '(model)'}, step {step}: {known or 'nothing to compare with'}")
        return "\n".join(lines)


class Sightings:
    """What a Compressor has seen; the matrices whose change bounds drifts are kept for the last step alone.

    Args:
        bounded: whether these matrices are made at all.
        seen: so far, by step and layer.
    """

    def __init__(self, *, bounded: bool, seen: Mapping[int, dict[str, Sight]] | None = None) -> None:
        self.bounded = bounded
        self.seen = dict(seen or {})
        self._roots: dict[str, Tensor] = {}

    def add(self, step: int, candidates: Mapping[str, Candidate], kept: Mapping[str, Sequence[int]]) -> None:
        """Note the layers at a step."""
        sights, roots = {}, {}
        for name, item in candidates.items():
            root = item.analysis.root() if self.bounded else None
            bound = None
            if root is not None:
                roots[name], before = root, self._roots.get(name)
                if before is not None and before.shape == root.shape:
                    bound = float(torch.linalg.matrix_norm(root - before, 2).square().sum().sqrt())
            scores = item.analysis.scores()
            listed = () if scores is None else tuple(scores.tolist())
            sights[name] = Sight(tuple(item.analysis.hsv.tolist()), listed, tuple(kept[name]), bound)
        self.seen[step], self._roots = sights, roots

    def go_back(self, step: int) -> None:
        """Forget what came after a step."""
        self.seen = {seen: sights for seen, sights in self.seen.items() if seen <= step}
        self._roots = {}

    def stability(self) -> Stability:
        """How far each step was from the last one."""
        names = dict.fromkeys(name for sights in self.seen.values() for name in sights)
        return Stability({name: self._layer(name) for name in names})

    def _layer(self, name: str) -> LayerStability:
        steps = tuple(sorted(step for step, sights in self.seen.items() if name in sights))
        sights = [self.seen[step][name] for step in steps]
        last = sights[-1]
        drift: list[float | None] = [None]
        bound: list[float | None] = [None]
        for (before, now), (old, new) in zip(pairwise(steps), pairwise(sights), strict=True):
            same = len(old.spectrum) == len(new.spectrum)
            moved = max(abs(a - b) for a, b in zip(old.spectrum, new.spectrum, strict=True)) if same else None
            drift.append(None if moved is None else moved / (now - before))
            bound.append(None if new.bound is None else new.bound / (now - before))
        return LayerStability(
            steps,
            tuple(sight.spectrum for sight in sights),
            tuple(drift),
            tuple(bound),
            tuple(rank_correlation(sight.scores, last.scores) for sight in sights),
            tuple(_overlap(sight, last) for sight in sights),
        )

    def state_dict(self) -> list[dict[str, Any]]:
        """JSON-ready."""
        return [{"step": step, "layers": {k: asdict(v) for k, v in sights.items()}} for step, sights in self.seen.items()]


def parsed(state: Any) -> dict[int, dict[str, Sight]]:
    """Sights by step and layer.

    Raises:
        ArgumentError: it is not what ``Sightings.state_dict`` gave.
    """
    hints = get_type_hints(Sight)
    seen: dict[int, dict[str, Sight]] = {}
    try:
        for entry in state:
            if not fits(entry["step"], int):
                raise TypeError(f"step {entry['step']!r:.40}")
            layers = {}
            for name, values in entry["layers"].items():
                for field in fields(Sight):
                    if not fits(values[field.name], hints[field.name]):
                        raise TypeError(f"{field.name} {values[field.name]!r:.40}")
                lists = {key: tuple(values[key]) for key in ("spectrum", "scores", "kept")}
                layers[str(name)] = Sight(**lists, bound=values["bound"])
            seen[entry["step"]] = layers
    except (KeyError, TypeError, AttributeError) as error:
        raise bad_argument("state_dict seen", got=f"an entry with {error}", expected="Compressor.state_dict()") from error
    return seen


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, of lists of one length; None of others, of less than two values, and where all of a list are the same."""
    if len(one) != len(other) or len(one) < 2:
        return None
    ranks = [_ranks(torch.tensor(values, dtype=torch.float64)) for values in (one, other)]
    a, b = (part - part.mean() for part in ranks)
    size = a.norm() * b.norm()
    return float(a @ b / size) if size > 0 else None


def _ranks(values: Tensor) -> Tensor:
    """Mean places of equal values."""
    less = (values[:, None] > values).sum(1)
    return less + (values[:, None] == values).sum(1).double() / 2


def _overlap(sight: Sight, last: Sight) -> float | None:
    if len(sight.scores) != len(last.scores) or len(sight.spectrum) != len(last.spectrum) or not last.kept:
        return None
    return len(set(sight.kept) & set(last.kept)) / max(len(sight.kept), len(last.kept))
