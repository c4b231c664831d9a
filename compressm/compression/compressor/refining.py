"""Local distillation: what a cut leaves of a layer learns to give what the layer gave, before it takes the layer's place.

The model runs over calibration sequences as it is, and what layers get is recorded.  Then each layer by itself trains what the
cut has touched.  Nothing of the model changes: what comes out is another edit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters import Distiller, LayerEdit
from compressm.adapters.base import TensorMap
from compressm.compression.common.models import Layers
from compressm.compression.common.undisturbed import exact, undisturbed
from compressm.compression.distributed.team import ProcessTeam, Team
from compressm.compression.planning.batches import default_forward, take
from compressm.compression.planning.calibration import attached
from compressm.compression.planning.loaders import at_rest
from compressm.compression.planning.plans import Calibration
from compressm.errors import bad_argument, check_integer

STEPS = 200  # where nothing trains afterwards
RECORDED_BYTES = 1 << 30  # of records at a time; layers that do not fit in have a pass over the sequences of their own
TOKENS, LONGEST = 8192, 1024  # recorded of a layer, and of one sequence
STEP_TOKENS = 512  # of a step of training, in whole sequences
WATCHED = 8  # one sequence of so many is not trained on, but decides
LOSSLESS = 1e-5  # relative error of an output that is the layer's own but for float32's rounding
BETAS = (0.9, 0.95)  # Adam's
SEED = 0

Errors = tuple[float, float]  # relative root mean square error of a layer's output, before and after


@dataclass(frozen=True)
class Refinement:
    """How edits are refined.

    Attributes:
        steps: of training, per layer.
        calibration: whose sequences are recorded.
    """

    steps: int
    calibration: Calibration


def chosen_steps(refine: int | None, default: int, layers: Layers, calibration: Any, team: Team) -> int:
    """The steps asked for; None: the default, where it is possible.

    Raises:
        ArgumentError: not a number of steps, or it is not possible.
    """
    known = any(adapter.distils for _, adapter in layers.values())
    if refine is None:
        return default if known and calibration is not None else 0
    check_integer("refine", refine, least=0, expected="a number of steps, 0 for none, or None")
    kinds = ", ".join(sorted({type(module).__name__ for module, _ in layers.values()}))
    reasons = {
        "without calibration data, whose sequences would be recorded. Pass calibration=batches": calibration is None,
        f"for layers that are not distilled ({kinds})": not known,
        "for a model wrapped for several processes, each of which would train layers of its own": isinstance(team, ProcessTeam),
    }
    if refine and (words := next((words for words, wrong in reasons.items() if wrong), None)):
        raise bad_argument("refine", got=f"{refine} {words}", expected="0 or None")
    return refine


def refine(
    model: nn.Module, layers: Layers, edits: Mapping[str, LayerEdit], refinement: Refinement
) -> tuple[dict[str, LayerEdit], dict[str, Errors]]:
    """Edits whose tensors have learnt what the layers give on calibration sequences.  Changes nothing.

    Args:
        model: as it is, before the edits.
        layers: from ``find_layers``.
        edits: by layer name.
        refinement: how.

    Returns:
        all edits, those refined whose error is less for it, and the errors of all layers that were trained.

    Raises:
        DataError, ArgumentError: the batches do not do.
    """
    calibration, steps = refinement.calibration, refinement.steps
    assert calibration.batches is not None
    done, errors = dict(edits), dict[str, Errors]()
    with undisturbed(model, [layers[name][0] for name in edits]):
        found = {name: layers[name][1].distiller(layers[name][0], edit) for name, edit in edits.items()}
        left = {name: distiller for name, distiller in found.items() if distiller is not None}
        with at_rest(calibration.batches):
            batches = [batch for batch, _ in take(calibration.batches, calibration.sequences)] if left else []
        with _bar(steps * len(left)) as advance:
            while left:
                records = _record(model, layers, left, batches, calibration.forward or default_forward)
                while records:
                    name = next(iter(records))
                    with exact():
                        errors[name] = _train(left[name], records.pop(name), steps, advance)
                    if errors[name][1] < errors[name][0]:
                        done[name] = _moved(edits[name], left[name].deltas())
                    del left[name]
    return done, errors


class _Records:
    """What layers get, of as many as there is room for; the last ones give way.

    Attributes:
        calls: by layer, what its distiller takes of every call.
    """

    def __init__(self, distillers: Mapping[str, Distiller]) -> None:
        self.distillers = distillers
        self.calls: dict[str, list[TensorMap]] = {name: [] for name in distillers}

    @property
    def complete(self) -> bool:
        return all(self._tokens(name) >= TOKENS for name in self.calls)

    def hook(self, name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if name in self.calls and (room := TOKENS - self._tokens(name)) > 0:
                with exact():
                    call = self.distillers[name].take(module, args, kwargs)
                    first = next(iter(call.values()))[:, :LONGEST]
                    count = math.ceil(room / max(1, first.shape[1]))
                    self.calls[name].append({key: value[:count, :LONGEST].detach().clone() for key, value in call.items()})
                self._give_way()

        return observe

    def _tokens(self, name: str) -> int:
        return sum(math.prod(next(iter(call.values())).shape[:2]) for call in self.calls[name])

    def _give_way(self) -> None:
        size = {name: sum(value.nbytes for call in calls for value in call.values()) for name, calls in self.calls.items()}
        while len(self.calls) > 1 and sum(size[name] for name in self.calls) > RECORDED_BYTES:
            self.calls.popitem()


@torch.no_grad()
def _record(
    model: nn.Module, layers: Layers, distillers: Mapping[str, Distiller], batches: Sequence[Any], forward: Callable[..., Any]
) -> dict[str, list[TensorMap]]:
    """One pass over the batches: what the first of the layers get, at least one."""
    records = _Records(distillers)
    with attached({name: records.hook(name) for name in distillers}, layers):
        for batch in batches:
            if records.complete:
                break
            forward(model, batch)
    return records.calls


def _train(distiller: Distiller, calls: list[TensorMap], steps: int, advance: Callable[[], None]) -> Errors:
    """Adam with a rate that falls to zero; the same sequences at the same steps whenever it runs.  A lossless cut stays."""
    groups, watched = _divided(_prepared(distiller, calls))
    calls.clear()
    before = _error(distiller, watched)
    if before <= LOSSLESS:
        return before, before
    random = torch.Generator("cpu").manual_seed(SEED)
    optimizer = torch.optim.Adam(distiller.groups, betas=BETAS)
    rates = [group["lr"] for group in optimizer.param_groups]
    leaves: list[Tensor] = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    for step in range(steps):
        loss, size = distiller.loss(_some(groups, random), random)
        for leaf, grad in zip(leaves, torch.autograd.grad(loss / size, leaves), strict=True):
            leaf.grad = grad
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        with torch.device("cpu"):  # the count of its steps, whatever the caller's default device
            optimizer.step()
        advance()
    return before, _error(distiller, watched)


def _prepared(distiller: Distiller, calls: list[TensorMap]) -> list[dict[str, Tensor]]:
    """Calls with equally long sequences in one, ready for the loss."""
    lengths: dict[int, list[TensorMap]] = {}
    for call in calls:
        lengths.setdefault(next(iter(call.values())).shape[1], []).append(call)
    groups = []
    for length, same in lengths.items():
        few = max(1, STEP_TOKENS // max(1, length))
        parts = [
            distiller.prepare(dict(zip(call, part, strict=True)))
            for call in same
            for part in zip(*(value.split(few) for value in call.values()), strict=True)
        ]
        groups.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    return groups


def _divided(groups: Sequence[TensorMap]) -> tuple[list[TensorMap], list[TensorMap]]:
    """What is trained on, and what is watched: the last of equally long sequences, or all where every one is alone."""
    trained, watched = list[TensorMap](), list[TensorMap]()
    for group in groups:
        count = len(next(iter(group.values())))
        kept = count - (max(1, count // WATCHED) if count > 1 else 0)
        trained.append({key: value[:kept] for key, value in group.items()})
        watched += [{key: value[kept:] for key, value in group.items()}] if kept < count else []
    return trained, watched or trained


def _some(groups: Sequence[TensorMap], random: torch.Generator) -> TensorMap:
    """Neighbouring sequences of one length, as many as make a step."""
    counts = [len(next(iter(group.values()))) for group in groups]
    drawn = int(torch.randint(sum(counts), (1,), generator=random, device="cpu"))
    index = next(i for i in range(len(counts)) if drawn < sum(counts[: i + 1]))
    few = _few(groups[index])
    begin = int(torch.randint(counts[index] - few + 1, (1,), generator=random, device="cpu"))
    return {key: value[begin : begin + few] for key, value in groups[index].items()}


def _few(group: TensorMap) -> int:
    count, length = next(iter(group.values())).shape[:2]
    return min(count, max(1, STEP_TOKENS // max(1, length)))


@torch.no_grad()
def _error(distiller: Distiller, groups: Sequence[TensorMap]) -> float:
    """Relative root mean square error over sequences."""
    lost = total = 0.0
    for group in groups:
        few = _few(group)
        for part in zip(*(value.split(few) for value in group.values()), strict=True):
            loss, size = distiller.loss(dict(zip(group, part, strict=True)), None)
            lost, total = lost + float(loss), total + float(size)
    return math.sqrt(lost / total) if total > 0 else 0.0


def _moved(edit: LayerEdit, deltas: TensorMap) -> LayerEdit:
    """The edit with something added to its tensors, and to every copy of them that it carries."""
    tensors = {key: (value.double() + deltas[key]).to(value) if key in deltas else value for key, value in edit.tensors.items()}
    return replace(edit, tensors=tensors, values=partial(_values, edit.values, deltas))


def _values(values: Callable[[TensorMap], dict[str, Tensor]], deltas: TensorMap, tensors: TensorMap) -> dict[str, Tensor]:
    moved = values(tensors)
    return {key: value + deltas[key].to(value.device) if key in deltas else value for key, value in moved.items()}


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """Shows on a terminal how far the layers are; yields what counts a step."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    with Progress(console=console, transient=True) as progress:
        yield partial(progress.advance, progress.add_task("refining", total=total))
