"""Averaged models that Lightning's callbacks keep, beside a compression, and checkpoints with them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import compressm
from compressm.errors import ArgumentError
from compressm.layers import LRU, Mamba

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import (  # noqa: E402
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from compressm.integrations.lightning import CompressionCallback  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = [  # of Lightning itself
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]
STEPS, DECAY = 8, 0.7
KINDS = ("EMA", "mean", "SWA", "own")


class Net(lightning.pytorch.LightningModule):
    """inputs (batch, 9, 4) -> (batch, 9, 1)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(LRU(4, 8, max_phase=1.5), nn.Tanh(), Mamba(4, d_state=6), nn.Linear(4, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.log("loss", self.training_step(batch, _))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Own(Callback):
    """An average that somebody's callback makes when training has begun already."""

    def __init__(self):
        self.mean = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.mean is None and trainer.global_step == 2:
            self.mean = AveragedModel(pl_module, avg_fn=get_ema_avg_fn(DECAY))
        if self.mean is not None:
            self.mean.update_parameters(pl_module)


def batches():
    return torch.randn(2 * STEPS, 9, 4, generator=torch.Generator().manual_seed(7))


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batches()), batch_size=4)


def compression(**options):
    defaults = {"policy": compressm.FixedRank(3), "schedule": compressm.At([5]), "calibration": [batches()[:4]]}
    return CompressionCallback(**defaults | options)


def averaging(kind):
    make = {"EMA": EMAWeightAveraging, "mean": WeightAveraging, "SWA": StochasticWeightAveraging, "own": Own}
    options = {"EMA": {"decay": DECAY}, "SWA": {"swa_lrs": 1e-2, "swa_epoch_start": 1}}
    return make[kind](**options.get(kind, {}))


def fit(folder, callbacks, epochs=2, module=None, **options):
    module = Net() if module is None else module
    trainer = lightning.pytorch.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        default_root_dir=str(folder), num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), **options)
    return module, trainer


def kept(average):
    model = average.mean if isinstance(average, Own) else average._average_model
    return model.module if isinstance(model, AveragedModel) else model


@pytest.mark.parametrize("first", ["compression", "average"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_average_follows(tmp_path, kind, first):
    average, run = averaging(kind), compression()
    module, trainer = fit(tmp_path, [run, average] if first == "compression" else [average, run])
    assert trainer.global_step == run.compressor.step_count == STEPS
    assert run.compressor.history[0].step == 5
    for net in (module.net, kept(average).net):
        assert (net[0].d_state, net[2].d_state) == (3, 3)
        assert torch.isfinite(net(batches())).all()


@pytest.mark.parametrize("first", ["compression", "average"])
def test_it_has_the_values_of_an_average_passed_by_hand(tmp_path, first):
    average, run = averaging("EMA"), compression()
    module, _ = fit(tmp_path, [run, average] if first == "compression" else [average, run])

    plain = Net()
    optimizer = plain.configure_optimizers()
    mean = AveragedModel(plain, avg_fn=get_ema_avg_fn(DECAY), use_buffers=True)
    options = {"policy": run.policy, "schedule": run.schedule, "calibration": [batches()[:4]], "ema": mean}
    compressor = compressm.Compressor(plain, optimizer, **options)
    for index in range(STEPS):
        optimizer.zero_grad()
        plain.training_step([batches().split(4)[index % 4]], index).backward()
        optimizer.step()
        if first == "average":
            mean.update_parameters(plain)
        before = copy.deepcopy(mean.module)
        if compressor.step() is not None:
            expected, got, live = (net(batches()) for net in (before, mean.module, plain))
            assert (got - expected).norm() < 0.5 * (live - expected).norm()  # its own past, not the model's present
        if first == "compression":
            mean.update_parameters(plain)
    for (name, p), q in zip(mean.module.named_parameters(), module.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("first", ["compression", "average"])
@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_resumes_with_the_average(tmp_path, kind, first):
    def callbacks(folder):
        pair = [compression(), averaging(kind)]
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
        return [*(pair if first == "compression" else pair[::-1]), saver]

    whole, _ = fit(tmp_path, callbacks("whole"), epochs=3)
    resumed, trainer = fit(tmp_path, callbacks("again"), epochs=3, ckpt_path=tmp_path / "whole" / "step=8.ckpt")
    assert trainer.global_step == 12
    assert resumed.net[0].d_state == 3
    for (name, p), q in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name


def test_load_from_checkpoint_gives_the_average(tmp_path):
    module, trainer = fit(tmp_path, [compression(), averaging("EMA")])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert torch.equal(loaded(batches()), module(batches()))


@pytest.mark.parametrize("tolerance", [0.0, 10.0])
def test_a_guard_sets_the_average_back(tmp_path, tolerance):
    worse = iter(range(1, 100))
    guard = compressm.Rollback(lambda model: next(worse), tolerance=tolerance, recovery=2, jump=None, failures=1)
    average = averaging("EMA")
    module, _ = fit(tmp_path, [compression(guard=guard), average])
    sizes = {(net[0].d_state, net[2].d_state) for net in (module.net, kept(average).net)}
    assert sizes == {(8, 6) if tolerance == 0 else (3, 3)}


def test_only_one_average_follows(tmp_path):
    with pytest.raises(ArgumentError, match="ema: expected one averaged model, which follows, got 2 kept by callbacks"):
        fit(tmp_path, [compression(), averaging("EMA"), averaging("SWA")])
    module = Net()
    with pytest.raises(ArgumentError, match="1 kept by callbacks and one passed"):
        fit(tmp_path, [compression(ema=AveragedModel(module)), averaging("EMA")], module=module)
    module = Net()  # the refused training holds an optimizer of the one before
    mean = AveragedModel(module)
    fit(tmp_path, [compression(ema=mean)], module=module)
    assert mean.module.net[0].d_state == 3
