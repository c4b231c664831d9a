"""Calibration: what the data excite in every layer, and what the model's output feels of it.

One forward and one backward pass per batch, of a random probe v ~ N(0, I) on every output of the model, serve all layers;
each layer's adapter brings the meter that turns them into second moments.  The model, its buffers, modes and gradients, the
loader of the batches and the random number generators are left as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from compressm.adapters import Adapter, Meter
from compressm.compression.common.models import Layers
from compressm.compression.common.undisturbed import exact, undisturbed
from compressm.compression.distributed.team import Team
from compressm.compression.planning.batches import default_forward, take, trainable
from compressm.compression.planning.loaders import at_rest
from compressm.compression.planning.probes import output_tensors, probes
from compressm.errors import CompressmError, DataError, check_integer

ROWS_PER_STATE = 32  # time steps per state that enter the statistics

Forward = Callable[[nn.Module, Any], Any]


class CalibrationWarning(UserWarning):
    """Half of a measurement is missing: no gradient of the model's output reached a layer that is measured by it."""


def rehearse(
    model: nn.Module, layers: Layers, batches: Iterable[Any], *, forward: Forward | None, sequences: int, team: Team
) -> None:
    """Measure one sequence on every process, so that a measurement that cannot work is known at once; the results are dropped.

    Args:
        model, layers, batches, forward, sequences, team: as for :func:`collect`.

    Raises:
        CompressmError: of :func:`collect`; a DataError for what the model raised.
    """
    _check_count(sequences)
    for count in (min(team.size, sequences), sequences):  # models of a fixed batch size: the measurement as it will be decides
        try:
            collect(model, layers, batches, forward=forward, sequences=count, team=team)
        except Exception as error:
            failure = error
        else:
            return
    if isinstance(failure, CompressmError):
        failure.add_note("calibration is tried when a Compressor is built; this is what came of it.")
        raise failure
    raise DataError(
        f"calibration: running the model on a batch failed ({type(failure).__name__}: {failure}), expected batches that the "
        "model takes. Pass batches in the layout of training, or forward=lambda model, batch: ... that calls the model"
    ) from failure


def collect(
    model: nn.Module,
    layers: Layers,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    sequences: int = 64,
    rows_per_state: int | None = ROWS_PER_STATE,
    seed: int = 0,
    team: Team | None = None,
) -> dict[str, Any]:
    """Measure every layer.

    Args:
        model: run in eval mode.
        layers: from ``find_layers``.
        batches: each a tensor, a tuple or list whose first entry is the input, or a dict of keyword arguments.
        forward: ``forward(model, batch) -> output`` for models that are called differently.
        sequences: at most so many sequences are used; the first dimension of a batch counts them.
        rows_per_state: time steps are subsampled evenly, every sequence with an offset of its own, so that about so many
            per state enter a layer's statistics; None uses all.
        seed: of the random probes and offsets; batch i of rank r out of R draws as batch i R + r does in one process.
        team: the processes that train the model together, each with ``batches`` of its own; ``sequences`` counts them all.

    Raises:
        DataError: no batch, or a layer that no batch reaches.
        ArgumentError: a batch of unknown kind.
        NumericalError: a layer is not finite or not stable, or its states on the data are not finite.

    Warns:
        CalibrationWarning: no gradient of an output reached a layer that wants one.
    """
    _check_count(sequences)
    team = Team(model) if team is None else team
    with undisturbed(model, [module for module, _ in layers.values()]):
        with team.together("reading the calibration batches"), at_rest(batches):
            taken = take(batches, team.share(sequences), optional=team.size > 1)
        taken = team.align(taken)
        total = team.add(sum(count for _, count in taken))
        if total == 0:
            raise DataError("calibration: got no sequences on any rank, expected at least one batch")

        def meter(name: str, layer: tuple[nn.Module, Adapter]) -> Meter:
            module, adapter = layer
            return adapter.instrument(module, name, total, rows_per_state, seed)

        meters = team.each(meter, layers)
        run = _Run(model, layers, meters, forward or default_forward)
        try:
            with team.together("running the calibration batches"):
                run.batches([batch for batch, _ in taken], lambda index: seed + index * team.size + team.rank)
        finally:
            team.at_rest()
    if team.size > 1:
        for item in meters.values():
            item.merge(team.add, team.join)
    unreached = [name for name, meter in meters.items() if not meter.reached]
    if unreached:
        raise DataError(
            f"calibration: no batch reached layer(s) {', '.join(map(repr, unreached))} through their forward, expected every "
            "state-space layer to run. Pass forward=lambda model, batch: ... that runs the whole model"
        )
    _warn_unfelt(meters, team.add(torch.tensor(run.gradients(), device="cpu")))
    return {name: meter.result(name) for name, meter in meters.items()}


@contextmanager
def attached(hooks: Mapping[str, Callable[..., Any]], layers: Layers) -> Iterator[None]:
    """Forward hooks ``hook(module, args, kwargs, output)`` on layers, by name."""
    # First of all hooks: those of a sharding wrapper take the layer's parameters away.
    handles = [layers[name][0].register_forward_hook(hook, with_kwargs=True, prepend=True) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _parts_attached(meters: Mapping[str, Meter], layers: Layers) -> Iterator[None]:
    """Forward hooks on the sub-modules whose outputs meters want."""

    def taking(meter: Meter) -> Callable[..., None]:
        return lambda _module, _args, output: meter.part_output(output)

    with ExitStack() as stack:
        for name, meter in meters.items():
            if meter.part is not None:
                handle = layers[name][0].get_submodule(meter.part).register_forward_hook(taking(meter))
                stack.callback(handle.remove)
        yield


def _check_count(sequences: Any) -> None:
    check_integer("sequences", sequences)


def _warn_unfelt(meters: Mapping[str, Meter], gradients: Tensor) -> None:
    """Warn about layers that wanted gradients and got none."""
    unfelt = [name for name, (wanted, got) in zip(meters, gradients.tolist(), strict=True) if wanted and not got]
    if unfelt:
        warnings.warn(
            f"calibration: no gradient of the model's output reached layer(s) {', '.join(map(repr, unfelt))}, so that how much "
            "the output feels of their states is not measured and a data-free stand-in is taken. Look for detach(), no_grad() "
            "or another library's checkpointing after them, or pass forward=lambda model, batch: ... that returns an output "
            "which depends on them",
            CalibrationWarning,
            stacklevel=5,
        )


class _Run:
    """The batches of one process, with the meters attached."""

    def __init__(self, model: nn.Module, layers: Layers, meters: Mapping[str, Meter], forward: Forward) -> None:
        self.model, self.layers, self.meters, self.forward = model, layers, meters, forward
        self.wanted, self.got = dict.fromkeys(meters, 0), dict.fromkeys(meters, 0)

    def gradients(self) -> list[tuple[int, int]]:
        """Per layer, how many gradients its meter wanted and got."""
        return [(self.wanted[name], self.got[name]) for name in self.meters]

    def batches(self, batches: list[Any], seed: Callable[[int], int]) -> None:
        """Run all of them; ``seed(index)`` belongs to a batch."""
        hooks = {name: _hook(meter) for name, meter in self.meters.items()}
        with attached(hooks, self.layers), _parts_attached(self.meters, self.layers), _differentiable_checkpoints():
            for index, batch in enumerate(batches):
                for meter in self.meters.values():
                    meter.begin(seed(index))
                self._probe(batch, seed(index))

    def _probe(self, batch: Any, seed: int) -> None:
        """One forward pass and one backward pass of random probes."""
        outputs = [out for out in output_tensors(self.forward(self.model, trainable(batch))) if out.requires_grad]
        watched = [(name, signal) for name, meter in self.meters.items() for signal in meter.signals]
        for name, _ in watched:
            self.wanted[name] += 1
        if outputs and watched:
            signals = [signal for _, signal in watched]
            try:
                for meter in self.meters.values():
                    meter.replaying = True
                grads = torch.autograd.grad(outputs, signals, probes(outputs, seed), allow_unused=True)
            finally:
                for meter in self.meters.values():
                    meter.replaying = False
            with exact():
                for (name, _), grad in zip(watched, grads, strict=True):
                    if grad is not None:
                        self.meters[name].adjoint(grad)
                        self.got[name] += 1
        for meter in self.meters.values():
            meter.signals.clear()


def _hook(meter: Meter) -> Callable[..., Any]:
    """The meter as a forward hook, whatever autocast and modes the model runs the layer with."""

    def observe(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        with exact():
            return meter.observe(module, args, kwargs, output)

    return observe


class _Differentiable:
    """Stands in for torch's reentrant checkpoint, whose backward pass refuses to go to signals instead of parameters."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, determinism_check="none"
        )


@contextmanager
def _differentiable_checkpoints() -> Iterator[None]:
    """Parts of the model under ``checkpoint(..., use_reentrant=True)`` are recomputed in the non-reentrant way meanwhile."""
    reentrant = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _Differentiable  # type: ignore[misc, assignment]  # in torch's place meanwhile
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]
