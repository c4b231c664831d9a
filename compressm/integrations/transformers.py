"""transformers: compress a model inside ``Trainer.train()``, and run its Mamba mixers on compressm's kernels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import compressm
from compressm.compression import Compressor, Policy, StaleCopyWarning
from compressm.compression.common.codec import encode
from compressm.compression.surgery.optimizer_state import unwrapped
from compressm.errors import ModelError, bad_argument, needs_extra
from compressm.integrations._common import ScheduleArgument, as_schedule, checked_layers, sized_configs
from compressm.integrations.resizing import resize_on_load

with needs_extra("compressm.integrations.transformers"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    from compressm.integrations._mamba_mixer import AcceleratedMambaMixer, accelerate_
    from compressm.integrations._peft import save_base, saves_adapters_alone
    from compressm.integrations._pretrained import from_pretrained

__all__ = ["AcceleratedMambaMixer", "CompressionCallback", "accelerate_", "from_pretrained", "save_base", "update_config"]


class CompressionCallback(TrainerCallback, ExportableState):
    """Compresses the model while ``Trainer.train()`` runs; pass it as ``Trainer(callbacks=[...])``.

    It counts optimizer steps, not micro-batches.  Its state lies in the Trainer's checkpoints, and
    ``train(resume_from_checkpoint=...)`` on a model of the original size continues with the reduced one.  Models whose config
    has one ``state_size`` keep the same number of states in all layers and have it updated, so that ``save_pretrained`` and
    ``from_pretrained`` work as ever, also behind wrappers: a PEFT model, ``torch.compile``'s, a module of your own around
    them.  With ``uniform=False`` each layer gets its own, which the config's ``per_layer_config`` says and
    :func:`from_pretrained` reads.  Of a PEFT model the Trainer saves the adapters alone, which fit the reduced base and not the
    original: its checkpoints get this base beside them, in a folder ``base``, from which a run is resumed (see
    :func:`save_base`).  Checkpoints due while a guard validates a reduction are written when it has decided.

    Args:
        policy: how many states stay.
        schedule: a schedule, or a function from the number of optimizer steps of the whole training to one, such as
            ``compressm.Warmup`` or ``lambda total: compressm.Once(total, at=0.1)``.
        options: of the :class:`~compressm.Compressor`, such as ``calibration=batches`` or ``recipe="paper"``.

    Attributes:
        compressor: the :class:`~compressm.Compressor`, once training has begun.

    Raises:
        ModelError: (when training begins, or already from ``Trainer(...)``) nothing to compress in the model, an adapter on
            a projection that reductions replace, adapters saved on a base of other ranks, or training is distributed.
        ArgumentError: ``uniform=False`` for a model whose config has one number of states for all layers, ``form="projected"``
            with checkpoints of the Trainer, or ``load_best_model_at_end`` for a model whose checkpoints hold adapters alone.

    Warns:
        StaleCopyWarning: the base under adapters was reduced.
    """

    def __init__(self, *, policy: Policy, schedule: ScheduleArgument = compressm.Once, **options: Any) -> None:
        self.policy, self.schedule, self.options = policy, schedule, options
        self.compressor: Compressor | None = None
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._resizing: RemovableHandle | None = None
        self._postponed = self._adapters_alone = False

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
        callbacks: Any = state.stateful_callbacks
        entry = callbacks.setdefault(type(self).__name__, {"attributes": {"compressor": None}})
        saved = entry["attributes"]["compressor"]
        options = {"uniform": bool(sized_configs(model))} | self.options
        self.compressor = Compressor(model, self._optimizer, policy=self.policy, schedule=schedule, **options)
        if lr_scheduler is not None:
            self.compressor.register(scheduler=lr_scheduler)
        if state.global_step > 0:
            # A run that goes on without a saved state was not compressed so far: only its steps count.
            saved = saved or self.compressor.state_dict() | {"step": state.global_step}
            if self._adapters_alone and saved["ranks"] != self.compressor.ranks:
                raise ModelError(
                    f"resume_from_checkpoint: its adapters belong to a base with states {saved['ranks']}, expected "
                    f"{self.compressor.ranks} as in this model. Load the base with from_pretrained from the checkpoint's "
                    "folder 'base' and put adapters of the same configuration on it"
                )
            self.compressor.load_state_dict(saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        before = self._running.ranks
        self._running.step()
        if self._running.ranks != before:
            self._resized()
            if self._adapters_alone:
                warnings.warn(
                    "compressm has reduced the base of this model; save_pretrained and Trainer.save_model write its adapters "
                    "alone, which fit the reduced base and not the original. Store this base as well, with "
                    "compressm.integrations.transformers.save_base(model, folder), or both in one with "
                    "model.merge_and_unload().save_pretrained(folder); checkpoints have the base in their folder 'base'",
                    StaleCopyWarning,
                    stacklevel=2,
                )
        self._postpone_saving(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._adapters_alone and any(report.changed for report in self._running.history):
            save_base(self._trained, Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", "base"))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._postpone_saving(control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._running.close()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into its checkpoints."""
        return {"args": {}, "attributes": {"compressor": None if self.compressor is None else self.compressor.state_dict()}}

    def _postpone_saving(self, control: TrainerControl) -> None:
        """Checkpoints due while a guard holds tensors to undo a reduction wait: the Trainer writes states as JSON."""
        if control.should_save or self._postponed:
            tensors: dict[str, torch.Tensor] = {}
            encode(self._running.state_dict(), "compressor", tensors)
            control.should_save = not tensors
            self._postponed = not control.should_save

    def _attach(self, args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
        """Check the model, and let it take the weights of reduced checkpoints from now on."""
        if args.world_size > 1:
            raise ModelError(
                f"Trainer: runs on {args.world_size} processes, expected one: the wrapper around the model would hold on to "
                "the parameters that a reduction replaces. Compress in a run of one process"
            )
        checked_layers(model)
        for sized in () if self.options.get("uniform", True) else sized_configs(model):
            if (reason := sized.why_not_each) is not None:
                remedy = "Drop it, or train with compressm.Compressor in a loop of your own and store with compressm.save"
                expected = f"True: {type(sized.config).__name__} has one {sized.field} for all layers, as {reason}"
                raise bad_argument("uniform", got="False", expected=expected, remedy=remedy)
        if self.options.get("form") == "projected" and args.save_strategy != "no":
            remedy = "save_pretrained cannot store maps; store the trained model with compressm.save, or use form='strict'"
            got = f"{args.save_strategy!s} with form='projected'"
            raise bad_argument("save_strategy", got=got, expected="'no'", remedy=remedy)
        self._adapters_alone = saves_adapters_alone(model)
        if self._adapters_alone and args.load_best_model_at_end:
            remedy = "The adapters of the best checkpoint would be put on a base that may have been reduced since"
            raise bad_argument("load_best_model_at_end", got="True", expected="False for a PEFT model", remedy=remedy)
        self._optimizer = unwrapped(optimizer)
        if self._model is not model:
            if self._resizing is not None:
                self._resizing.remove()
            self._model, self._resizing = model, resize_on_load(model, self._optimizers, after=self._resized)

    def _optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        return () if self._optimizer is None else (self._optimizer,)

    def _resized(self) -> None:
        if sized_configs(self._trained):
            update_config(self._trained)

    @property
    def _running(self) -> Compressor:
        """The Compressor of the training that has begun."""
        assert self.compressor is not None
        return self.compressor

    @property
    def _trained(self) -> nn.Module:
        """The model that the callback was attached to."""
        assert self._model is not None
        return self._model


def update_config(model: nn.Module) -> nn.Module:
    """Set ``config.state_size`` to the model's present number of states, so that ``save_pretrained`` writes what loads again.

    Other models call it ``mamba_d_state`` or ``ssm_state_size``.  Where layers keep different numbers of states, the config's
    ``per_layer_config`` says each, and :func:`from_pretrained` loads the checkpoint.  The callback does this itself; call it
    after ``compressm.compress`` or a loop of your own.

    Args:
        model: a transformers model, or whatever holds one: a PEFT model, ``torch.compile``'s wrapper, a module of your own.

    Returns:
        the model.

    Raises:
        ModelError: no model with such a config, or its layers keep different numbers of states and the config has one for all.
    """
    configs = sized_configs(model)
    if not configs:
        raise ModelError(
            f"model: {type(model).__name__} holds no transformers model with state-space layers and their number of states "
            "in its config, expected one. Store others with compressm.save"
        )
    for sized in configs:
        if len(set(sized.ranks.values())) > 1 and (reason := sized.why_not_each) is not None:
            raise ModelError(
                f"config.{sized.field}: the layers keep different numbers of states, {sized.ranks}, expected one, which is all "
                f"that this model can say, as {reason}. Reduce with uniform=True, or store with compressm.save"
            )
    for sized in configs:
        sized.tell()
    return model
