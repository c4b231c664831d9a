"""PyTorch Lightning: compress a LightningModule inside ``Trainer.fit``.

Importing it lets ``LightningModule.load_from_checkpoint`` take reduced runs: the module that it builds gets the checkpoint's
numbers of states.  Nothing else of Lightning changes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

import compressm
from compressm.adapters import find_layers
from compressm.compression import Compressor, Policy
from compressm.compression.common.models import plain_model
from compressm.compression.surgery.audit import Ema
from compressm.errors import ModelError, bad_argument, needs_extra
from compressm.integrations._common import ScheduleArgument, as_schedule, checked_layers, sized_configs, tell_configs
from compressm.integrations._lightning_loading import teach_load_from_checkpoint
from compressm.integrations.resizing import follow, resize_on_load

with needs_extra("compressm.integrations.lightning"):
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback  # type: ignore[assignment]  # the same under another name

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CompressionCallback"]

for _name in ("lightning.pytorch", "pytorch_lightning"):
    if _name in sys.modules:
        teach_load_from_checkpoint(sys.modules[_name].LightningModule)


class CompressionCallback(Callback):
    """Compresses the module while ``Trainer.fit`` runs; for ``lightning`` and ``pytorch_lightning``.

    It counts the steps of the optimizer that trains the state-space layers, whatever the number of batches between them, with
    automatic and manual optimization, and reduces at the end of a batch.  The numbers of states go to the trainer's loggers.
    Its state lies in Lightning's checkpoints: ``fit(module, ckpt_path=...)`` (also ``test`` and ``validate``) on a module of
    the original size continues with the reduced one, and ``load_from_checkpoint`` gives the reduced one.

    The averaged model of ``WeightAveraging``, ``EMAWeightAveraging`` or ``StochasticWeightAveraging``, or another
    ``AveragedModel`` of the module that a callback keeps, follows every reduction, in whatever order the callbacks are.  A
    transformers model inside the module keeps the same number of states in all layers, and its ``config.state_size``
    follows, unless ``uniform=False``.

    Args:
        policy: how many states stay.
        schedule: a schedule, or a function from the number of optimizer steps of the whole training
            (``trainer.estimated_stepping_batches``) to one, such as ``compressm.Warmup`` or
            ``lambda total: compressm.Once(total, at=0.1)``.
        options: of the :class:`~compressm.Compressor`, such as ``calibration=batches`` or ``recipe="paper"``; its model is the
            LightningModule.

    Attributes:
        compressor: the :class:`~compressm.Compressor`, once training has begun.

    Raises:
        ModelError: (when training begins) nothing to compress in the module, or training is distributed.
        ArgumentError: (when training begins) several averaged models.
    """

    def __init__(self, *, policy: Policy, schedule: ScheduleArgument = compressm.Once, **options: Any) -> None:
        self.policy, self.schedule, self.options = policy, schedule, options
        self.compressor: Compressor | None = None
        self._saved: dict[str, Any] = {}
        self._taken = 0  # optimizer steps since the last batch end
        self._kept: list[nn.Module] = []  # averages of other callbacks
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        base = next(cls for cls in type(pl_module).__mro__ if cls.__name__ == "LightningModule")
        teach_load_from_checkpoint(base)

        def follow_all() -> None:
            tell_configs(pl_module)
            for average in _kept(trainer):
                follow(pl_module, average)

        self._handles.append(resize_on_load(pl_module, lambda: trainer.optimizers, after=follow_all))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ModelError(
                f"Trainer: runs on {trainer.world_size} processes, expected one: the wrapper around the module would hold on "
                "to the parameters that a reduction replaces. Compress in a run of one process (devices=1)"
            )
        plain_model(trainer.strategy.model)
        schedule = as_schedule(self.schedule, trainer.estimated_stepping_batches)
        saved = self.state_dict() if trainer.global_step > 0 else {}
        checked_layers(pl_module)
        self._kept = _kept(trainer)
        options = {"uniform": bool(sized_configs(pl_module))} | self.options | {"ema": self._average(self._kept)}
        self.compressor = Compressor(pl_module, trainer.optimizers, policy=self.policy, schedule=schedule, **options)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.compressor.register(**{f"scheduler {index}": item for index, item in enumerate(schedulers)})
        if trainer.global_step > 0:
            # A run that goes on without a saved state was not compressed so far: only its steps count.
            steps = trainer.global_step // len(trainer.optimizers)
            self.compressor.load_state_dict(saved or self.compressor.state_dict() | {"step": steps})
        self._taken = 0
        self._handles.append(_training(self.compressor).register_step_post_hook(self._count))
        self._log(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        taken, self._taken = self._taken, 0
        if (kept := _kept(trainer)) != self._kept:  # another callback has made its average
            self._kept, self._running.ema = kept, self._average(kept)
        reports = [self._running.step() for _ in range(taken)]
        if any(reports):
            tell_configs(pl_module)
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        return self._saved if self.compressor is None else self.compressor.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._saved, self.compressor = dict(state_dict), None

    def _average(self, kept: list[nn.Module]) -> Ema | None:
        """What follows the model: passed as ``ema``, or one of those kept by other callbacks that has state-space layers.

        Raises:
            ArgumentError: several.
        """
        passed, averages = self.options.get("ema"), [average for average in kept if find_layers(average, strict=False)]
        if len(averages) + (passed is not None) > 1:
            got = f"{len(averages)} kept by callbacks{'' if passed is None else ' and one passed'}"
            raise bad_argument("ema", got=got, expected="one averaged model, which follows", remedy="Do without the others")
        return averages[0] if averages else passed

    @property
    def _running(self) -> Compressor:
        """The Compressor of the training that has begun."""
        assert self.compressor is not None
        return self.compressor

    def _count(self, *_: Any) -> None:
        self._taken += 1

    def _log(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"states/{n}": float(r) for n, r in self._running.ranks.items()}, step=trainer.global_step)


def _kept(trainer: Any) -> list[nn.Module]:
    """The averaged models that callbacks keep, those that have been made."""
    found: list[nn.Module] = []
    for item in trainer.callbacks:
        found += [value for value in vars(item).values() if isinstance(value, AveragedModel)]
        if any(cls.__name__ == "StochasticWeightAveraging" for cls in type(item).__mro__) and item._average_model is not None:
            found.append(item._average_model)
    return found


def _training(compressor: Compressor) -> torch.optim.Optimizer:
    """The optimizer that holds most of the parameters that reductions replace."""
    parameters = [module.get_parameter(n) for module, adapter in compressor.layers.values() for n in adapter.parameters(module)]
    own = {id(parameter) for parameter in parameters}

    def held(optimizer: torch.optim.Optimizer) -> int:
        return sum(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    return max(compressor.optimizers, key=held)
