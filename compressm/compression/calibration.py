"""Calibration: what the data excite in every layer, and what the model's output feels of it.

One forward and one backward pass per batch, of a random probe v ~ N(0, I) on the model's output, serve all layers; each
layer's adapter brings the meter that turns them into second moments.  The model, its buffers, modes and gradients, and the
random number generators are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compressm.adapters import Adapter, Meter
from compressm.compression._batches import default_forward, output_tensor, take
from compressm.compression._team import Team
from compressm.compression._undisturbed import undisturbed
from compressm.errors import DataError, bad_argument

ROWS_PER_STATE = 32  # time steps per state that enter the statistics

Layers = Mapping[str, tuple[nn.Module, Adapter]]
Forward = Callable[[nn.Module, Any], Any]


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
    """
    if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
        raise bad_argument("sequences", got=repr(sequences), expected="a positive integer")
    team = Team(model) if team is None else team
    with undisturbed(model, [module for module, _ in layers.values()]):
        with team.together("reading the calibration batches"):
            taken = take(batches, team.share(sequences), optional=team.size > 1)
        taken = team.align(taken)
        total = team.add(sum(count for _, count in taken))
        if total == 0:
            raise DataError("calibration: got no sequences on any rank, expected at least one batch")

        def meter(name: str, layer: tuple[nn.Module, Adapter]) -> Meter:
            module, adapter = layer
            return adapter.meter(module, name, total, rows_per_state, seed)

        meters = team.each(meter, layers)
        try:
            with team.together("running the calibration batches"):
                _run(model, layers, [batch for batch, _ in taken], forward or default_forward, meters, seed, team)
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
    return {name: meter.result(name) for name, meter in meters.items()}


def _run(
    model: nn.Module,
    layers: Layers,
    batches: list[Any],
    forward: Forward,
    meters: Mapping[str, Meter],
    seed: int,
    team: Team,
) -> None:
    """All batches of this process, with the meters attached."""
    # First of all hooks: those of a sharding wrapper take the layer's parameters away.
    handles = [
        module.register_forward_hook(meters[name].observe, with_kwargs=True, prepend=True)
        for name, (module, _) in layers.items()
    ]
    try:
        for index, batch in enumerate(batches):
            number = seed + index * team.size + team.rank
            for meter in meters.values():
                meter.begin(number)
            _probe(model, batch, forward, meters, number)
    finally:
        for handle in handles:
            handle.remove()


def _probe(model: nn.Module, batch: Any, forward: Forward, meters: Mapping[str, Meter], seed: int) -> None:
    """One forward pass and one backward pass of a random probe."""
    out = output_tensor(forward(model, batch))
    watched = [(meter, signal) for meter in meters.values() for signal in meter.signals]
    if out.requires_grad and watched:
        generator = torch.Generator(device=out.device).manual_seed(seed)
        probe = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(out.dtype)
        grads = torch.autograd.grad([out], [signal for _, signal in watched], [probe], allow_unused=True)
        for (meter, _), grad in zip(watched, grads, strict=True):
            if grad is not None:
                meter.adjoint(grad)
    for meter in meters.values():
        meter.signals.clear()
