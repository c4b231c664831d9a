"""Lightning's own Trainer, on CPU."""

from __future__ import annotations

import csv
import logging

import pytest
import torch
from torch import nn

import compressm
from compressm.errors import ArgumentError, ModelError
from compressm.layers import LRU

lightning = pytest.importorskip("lightning")
pytorch_lightning = pytest.importorskip("pytorch_lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from compressm.integrations.lightning import CompressionCallback  # noqa: E402

for name in ("lightning.pytorch", "pytorch_lightning"):
    logging.getLogger(name).setLevel(logging.ERROR)

pytestmark = [  # of Lightning itself
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]


def make_module(base):
    class Module(base):
        """inputs (batch, 9, 2) -> logits (batch, 3)."""

        def __init__(self, ranks=(8, 6), optimizers=1):
            super().__init__()
            torch.manual_seed(4)
            self.encoder = nn.Linear(2, 4)
            self.lrus = nn.ModuleList(LRU(4, rank, max_phase=1.5) for rank in ranks)
            self.head = nn.Linear(4, 3)
            self.automatic_optimization = optimizers == 1
            self.forwards = self.clipped = 0

        def forward(self, x):
            x = self.encoder(x)
            for lru in self.lrus:
                x = x + torch.tanh(lru(x))
            return self.head(x.mean(1))

        def loss(self, batch):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def training_step(self, batch, index):
            self.forwards += 1
            loss = self.loss(batch)
            if self.automatic_optimization:
                return loss
            layers, head = self.optimizers()
            head.zero_grad()
            layers.zero_grad()
            self.manual_backward(loss)
            head.step()
            if index % 2:
                layers.step()
            return None

        def test_step(self, batch, index):
            self.log("test_loss", self.loss(batch))

        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            self.clipped += 1
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

        def configure_optimizers(self):
            if self.automatic_optimization:
                optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
            layers = torch.optim.SGD([*self.encoder.parameters(), *self.lrus.parameters()], lr=1e-2, momentum=0.9)
            return [layers, torch.optim.Adam(self.head.parameters())]

    return Module


Module = make_module(lightning.pytorch.LightningModule)


def loader(count=24):
    random = torch.Generator().manual_seed(7)
    x = torch.randn(count, 9, 2, generator=random)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, :, 0].mean(1) > 0).long()), batch_size=2)


def trainer(folder, *callbacks, package=lightning.pytorch, **options):
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": str(folder), "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    return package.Trainer(**settings | options, callbacks=list(callbacks))


def callback(**options):
    defaults = {"policy": compressm.Energy(tau=0.2), "schedule": compressm.At([3, 5]), "calibration": [b[0] for b in loader(8)]}
    return CompressionCallback(**defaults | options)


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def test_counts_optimizer_steps(tmp_path, package):
    module, run = make_module(package.LightningModule)(), callback()
    fit = trainer(tmp_path, run, package=package, accumulate_grad_batches=2, gradient_clip_val=0.5, precision="bf16-mixed")
    fit.fit(module, loader())
    assert module.forwards == 12
    assert module.clipped == run.compressor.step_count == fit.global_step == 6
    assert [report.step for report in run.compressor.history] == [3, 5]
    assert run.compressor.ranks == {f"lrus.{i}": lru.d_state for i, lru in enumerate(module.lrus)}
    assert all(after < before for after, before in zip(run.compressor.ranks.values(), (8, 6), strict=True))
    optimizer = run.compressor.optimizers[0]
    assert optimizer is fit.optimizers[0]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in module.parameters()}
    assert not optimizer._optimizer_step_post_hooks


def test_manual_optimization_counts_the_optimizer_of_the_layers(tmp_path):
    module, run = Module(optimizers=2), callback()
    fit = trainer(tmp_path, run)
    fit.fit(module, loader())
    assert fit.global_step == 18
    assert run.compressor.step_count == 6
    assert [report.step for report in run.compressor.history] == [3, 5]


def test_schedule_from_the_estimated_steps(tmp_path):
    run = callback(schedule=compressm.Once)
    trainer(tmp_path, run, max_epochs=2, accumulate_grad_batches=3).fit(Module(), loader(30))
    assert run.compressor.schedule == compressm.Once(10)
    assert [report.step for report in run.compressor.history] == [2]
    with pytest.raises(ArgumentError, match="a training without end"):
        trainer(tmp_path, callback(schedule=compressm.Warmup), max_epochs=-1, max_time="00:00:00:01").fit(Module(), loader())


def test_logs_the_states(tmp_path):
    run, logger = callback(), CSVLogger(tmp_path)
    trainer(tmp_path, run, logger=logger, log_every_n_steps=4).fit(Module(), loader())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [(int(row["step"]), int(float(row["states/lrus.0"]))) for row in csv.DictReader(file)]
    first, second = (report.ranks["lrus.0"] for report in run.compressor.history)
    assert rows == [(0, 8), (3, first), (5, second)]


@pytest.mark.parametrize("step", [4, 8])
def test_resumes_a_reduced_checkpoint(tmp_path, step):
    def fit(module, run, folder, **options):
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", save_on_train_epoch_end=True, save_top_k=-1)
        trainer(tmp_path, run, saver, enable_checkpointing=True, max_epochs=3).fit(module, loader(8), **options)

    whole, again, resumed = Module(), callback(), Module()
    fit(whole, callback(), "whole")
    fit(resumed, again, "resumed", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
    assert again.compressor.step_count == 12
    assert [report.step for report in again.compressor.history] == [3, 5]
    assert [lru.d_state for lru in resumed.lrus] == [lru.d_state for lru in whole.lrus] != [8, 6]
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_callback_may_join_later(tmp_path):
    module, run = Module(), callback(schedule=compressm.At([3, 14]))
    trainer(tmp_path, saver := ModelCheckpoint(tmp_path), enable_checkpointing=True).fit(module, loader())
    trainer(tmp_path, run, max_epochs=2).fit(Module(), loader(), ckpt_path=saver.best_model_path)
    assert run.compressor.step_count == 24
    assert [report.step for report in run.compressor.history] == [14]


def test_a_full_size_module_is_tested_with_a_reduced_checkpoint(tmp_path):
    module, path = Module(), tmp_path / "reduced.ckpt"
    fit = trainer(tmp_path, callback())
    fit.fit(module, loader())
    fit.save_checkpoint(path)
    fresh = Module()
    trainer(tmp_path, callback()).test(fresh, loader(), ckpt_path=path, verbose=False)
    x = loader().dataset.tensors[0]
    with torch.no_grad():
        assert torch.equal(fresh(x), module(x))
    assert not fresh._load_state_dict_pre_hooks
    with pytest.raises(RuntimeError, match="size mismatch"):
        Module().load_state_dict(module.state_dict())


def test_fit_goes_on(tmp_path):
    module, run = Module(), callback()
    fit = trainer(tmp_path, run)
    fit.fit(module, loader())
    fit.fit_loop.max_epochs = 2
    fit.fit(module, loader())
    assert run.compressor.step_count == 24
    assert [report.step for report in run.compressor.history] == [3, 5]


def test_refusals(tmp_path, monkeypatch):
    class Plain(Module):
        def __init__(self):
            super().__init__(ranks=())

    with pytest.raises(ModelError, match="no state-space layer"):
        trainer(tmp_path, callback()).fit(Plain(), loader())

    monkeypatch.setattr(lightning.pytorch.Trainer, "world_size", 2)
    with pytest.raises(ModelError, match="runs on 2 processes"):
        trainer(tmp_path, callback()).fit(Module(), loader())
