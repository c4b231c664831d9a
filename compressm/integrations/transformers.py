"""transformers: compress a model inside ``Trainer.train()``, and run its Mamba mixers on compressm's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

import compressm
from compressm.compression import Compressor, Policy
from compressm.compression.codec import encode
from compressm.compression.optimizer_state import unwrapped
from compressm.compression.planning import compressible_layers
from compressm.errors import ModelError, bad_argument
from compressm.integrations._common import ScheduleArgument, as_schedule
from compressm.integrations._mamba_mixer import AcceleratedMambaMixer, accelerate_
from compressm.integrations.resizing import resize_on_load

__all__ = ["AcceleratedMambaMixer", "CompressionCallback", "accelerate_", "update_config"]


class CompressionCallback(TrainerCallback, ExportableState):
    """Compresses the model while ``Trainer.train()`` runs; pass it as ``Trainer(callbacks=[...])``.

    It counts optimizer steps, not micro-batches.  Its state lies in the Trainer's checkpoints, and
    ``train(resume_from_checkpoint=...)`` on a model of the original size continues with the reduced one.  Models whose config
    has one ``state_size`` keep the same number of states in all layers and have it updated, so that ``save_pretrained`` and
    ``from_pretrained`` work as ever.  Checkpoints due while a guard validates a reduction are written when it has decided.

    Args:
        policy: how many states stay.
        schedule: a schedule, or a function from the number of optimizer steps of the whole training to one, such as
            ``compressm.Warmup`` or ``lambda total: compressm.Once(total, at=0.1)``.
        options: of the :class:`~compressm.Compressor`, such as ``calibration=batches`` or ``recipe="paper"``.

    Attributes:
        compressor: the :class:`~compressm.Compressor`, once training has begun.

    Raises:
        ModelError: (when training begins, or already from ``Trainer(...)``) nothing to compress in the model, or training is
            distributed.
        ArgumentError: ``uniform=False`` for a model whose config has one ``state_size``.
    """

    def __init__(self, *, policy: Policy, schedule: ScheduleArgument = compressm.Once, **options: Any) -> None:
        self.policy, self.schedule, self.options = policy, schedule, options
        self.compressor: Compressor | None = None
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._resizing: RemovableHandle | None = None
        self._postponed = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None,
        **_: Any,
    ) -> None:  # fmt: skip
        if args.restore_callback_states_from_checkpoint:
            remedy = "This callback restores itself from the checkpoint"
            raise bad_argument("restore_callback_states_from_checkpoint", got="True", expected="False", remedy=remedy)
        self._attach(args, model, optimizer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None,
        lr_scheduler: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        self._attach(args, model, optimizer)
        schedule = as_schedule(self.schedule, state.max_steps)
        # The Trainer writes only into entries that are there.
        entry = state.stateful_callbacks.setdefault(type(self).__name__, {"attributes": {"compressor": None}})
        saved = entry["attributes"]["compressor"]
        options = {"uniform": _has_one_state_size(model)} | self.options
        self.compressor = Compressor(model, self._optimizer, policy=self.policy, schedule=schedule, **options)
        if lr_scheduler is not None:
            self.compressor.register(scheduler=lr_scheduler)
        if state.global_step > 0:
            # A run that goes on without a saved state was not compressed so far: only its steps count.
            self.compressor.load_state_dict(saved or self.compressor.state_dict() | {"step": state.global_step})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.compressor.step()
        if _has_one_state_size(self._model):
            module, adapter = next(iter(self.compressor.layers.values()))
            if adapter.rank(module) != self._model.config.state_size:
                update_config(self._model)
        self._postpone_saving(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._postpone_saving(control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.compressor.close()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into its checkpoints."""
        return {"args": {}, "attributes": {"compressor": None if self.compressor is None else self.compressor.state_dict()}}

    def _postpone_saving(self, control: TrainerControl) -> None:
        """Checkpoints due while a guard holds tensors to undo a reduction wait: the Trainer writes states as JSON."""
        if control.should_save or self._postponed:
            tensors: dict[str, torch.Tensor] = {}
            encode(self.compressor.state_dict(), "compressor", tensors)
            control.should_save = not tensors
            self._postponed = not control.should_save

    def _attach(self, args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
        """Check the model, and let it take the weights of reduced checkpoints from now on."""
        if args.world_size > 1:
            raise ModelError(
                f"Trainer: runs on {args.world_size} processes, expected one: the wrapper around the model would hold on to "
                "the parameters that a reduction replaces. Compress in a run of one process"
            )
        compressible_layers(model)
        if _has_one_state_size(model) and not self.options.get("uniform", True):
            remedy = "Drop it, or train with compressm.Compressor in a loop of your own and store with compressm.save"
            expected = f"True: {type(model.config).__name__} has one state_size for all layers"
            raise bad_argument("uniform", got="False", expected=expected, remedy=remedy)
        self._optimizer = unwrapped(optimizer)
        if self._model is not model:
            if self._resizing is not None:
                self._resizing.remove()
            self._model, self._resizing = model, resize_on_load(model, self._optimizers, after=self._resized)

    def _optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        return () if self._optimizer is None else (self._optimizer,)

    def _resized(self) -> None:
        if _has_one_state_size(self._model):
            update_config(self._model)


def update_config(model: PreTrainedModel) -> PreTrainedModel:
    """Set ``config.state_size`` to the model's present number of states, so that ``save_pretrained`` writes what loads again.

    The callback does this itself; call it after ``compressm.compress`` or a loop of your own.

    Returns:
        the model.

    Raises:
        ModelError: the layers keep different numbers of states; the config has one for all.
    """
    ranks = {name: adapter.rank(module) for name, (module, adapter) in compressible_layers(model).items()}
    if len(set(ranks.values())) > 1:
        raise ModelError(
            f"config.state_size: the layers keep different numbers of states, {ranks}, expected one, which is all that "
            f"{type(model.config).__name__} can say. Reduce with uniform=True, or store with compressm.save"
        )
    model.config.state_size = next(iter(ranks.values()))
    return model


def _has_one_state_size(model: Any) -> bool:
    return isinstance(model, PreTrainedModel) and hasattr(model.config, "state_size")
