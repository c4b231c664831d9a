"""``load_from_checkpoint`` of reduced runs."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import compressm
from compressm.errors import ModelError
from compressm.integrations._common import per_layer
from compressm.layers import LRU, Mamba

lightning = pytest.importorskip("lightning")
pytorch_lightning = pytest.importorskip("pytorch_lightning")
transformers = pytest.importorskip("transformers")

from compressm.integrations.lightning import CompressionCallback  # noqa: E402

for name in ("lightning.pytorch", "pytorch_lightning", "transformers"):
    logging.getLogger(name).setLevel(logging.ERROR)

pytestmark = [  # of Lightning itself
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found keys that are"),
]


def mixer(states):
    config = {"vocab_size": 11, "hidden_size": 8, "state_size": states, "num_hidden_layers": 2, "initializer_range": 0.5}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**config))


NETS = {
    "LRU": lambda states: nn.Sequential(LRU(4, states), nn.Linear(4, 1)),
    "Mamba": lambda states: nn.Sequential(Mamba(4, d_state=states), nn.Linear(4, 1)),
    "transformers": mixer,
}


def make_module(base):
    class Module(base):
        def __init__(self, kind, states=8):
            super().__init__()
            self.save_hyperparameters()
            self.net = NETS[kind](states)

        def output(self, x):
            return self.net(input_ids=x).logits if self.hparams["kind"] == "transformers" else self.net(x)

        def training_step(self, batch, _):
            return self.output(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Module


Module = make_module(lightning.pytorch.LightningModule)


def inputs(kind):
    random = torch.Generator().manual_seed(7)
    return torch.randint(11, (8, 9), generator=random) if kind == "transformers" else torch.randn(8, 9, 4, generator=random)


def trained(folder, module, package=lightning.pytorch, **options):
    x = inputs(module.hparams["kind"])
    run = CompressionCallback(policy=compressm.FixedRank(3), schedule=compressm.At([2]), **options)
    trainer = package.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, callbacks=[run], logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=str(folder),
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2))
    assert set(run.compressor.ranks.values()) == {3}
    return trainer


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_the_module_gets_the_ranks_of_the_checkpoint(tmp_path, kind, weights_only):
    module = Module(kind)
    trained(tmp_path, module).save_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
    loaded, x = Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False), inputs(kind)
    assert torch.equal(loaded.output(x), module.output(x))
    if kind == "transformers":
        assert loaded.net.config.state_size == module.net.config.state_size == 3
        loaded.net.save_pretrained(tmp_path / "alone")
        alone = transformers.MambaForCausalLM.from_pretrained(tmp_path / "alone")
        assert torch.equal(alone(input_ids=x).logits, module.output(x))
    with pytest.raises(RuntimeError, match="size mismatch"):  # of modules that exist already, only on demand
        Module(kind).load_state_dict(module.state_dict())


def test_other_package_and_other_arguments(tmp_path):
    theirs = make_module(pytorch_lightning.LightningModule)
    module, path = theirs("LRU"), tmp_path / "last.ckpt"
    trained(tmp_path, module, pytorch_lightning).save_checkpoint(path)
    larger = theirs.load_from_checkpoint(path, weights_only=False, states=20)
    assert torch.equal(larger.output(inputs("LRU")), module.output(inputs("LRU")))
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["state_dict"]["net.0.B_re"], checkpoint["state_dict"]["net.1.weight"]
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match="size mismatch"):  # half a layer is not taken
        theirs.load_from_checkpoint(path, weights_only=False, strict=False)
    checkpoint["state_dict"]["net.0.B_re"] = module.net[0].B_re.detach()
    torch.save(checkpoint, path)
    partly = theirs.load_from_checkpoint(path, weights_only=False, strict=False)
    assert torch.equal(partly.net[0](inputs("LRU")), module.net[0](inputs("LRU")))


def test_modules_without_such_layers_load_as_ever(tmp_path):
    class Foreign(lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.A_log = nn.Parameter(torch.randn(3))  # looks like a layer that has no adapter

    module, path = Foreign(), tmp_path / "foreign.ckpt"
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": lightning.__version__}, path)
    assert torch.equal(Foreign.load_from_checkpoint(path).A_log, module.A_log)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        module.load_from_checkpoint(path)


def test_a_hook_of_the_user_does_it_where_this_package_is_not_imported(tmp_path):
    module = Module("LRU")
    trained(tmp_path, module).save_checkpoint(tmp_path / "last.ckpt")
    code = f"""
import lightning.pytorch, torch, compressm
class Module(lightning.pytorch.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(compressm.layers.LRU(4, 8), torch.nn.Linear(4, 1))
    def on_load_checkpoint(self, checkpoint):
        compressm.resize_to(self, checkpoint["state_dict"])
assert Module.load_from_checkpoint({str(tmp_path / "last.ckpt")!r}, weights_only=False).net[0].d_state == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_stands_in_for_a_projection_is_refused_when_training_begins(tmp_path):
    module = Module("Mamba")
    nn.utils.parametrize.register_parametrization(module.net[0].x_proj, "weight", nn.Identity())
    with pytest.raises(ModelError, match=r"x_proj\.weight is not a plain parameter"):
        trained(tmp_path, module)
    assert module.net[0].d_state == 8


def test_ranks_may_differ_on_demand(tmp_path):
    module = Module("transformers")
    names = [f"net.backbone.layers.{i}.mixer" for i in range(2)]
    run = {"policy": compressm.FixedRank(dict(zip(names, (2, 3), strict=True))), "schedule": compressm.At([2])}
    for uniform, ranks, each in ((True, {3}, {}), (False, {2, 3}, {0: {"state_size": 2}})):
        module, callback = Module("transformers"), CompressionCallback(**run, uniform=uniform)
        trainer = lightning.pytorch.Trainer(
            max_steps=3, accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=str(tmp_path),
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(inputs("transformers"))
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
        assert set(callback.compressor.ranks.values()) == ranks
        assert per_layer(module.net.config) == each
        assert not uniform or module.net.config.state_size == 3
