"""accelerate's own Accelerator, on CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compressm
from compressm.errors import ModelError
from compressm.layers import LRU, Mamba

accelerate = pytest.importorskip("accelerate")

from compressm.integrations.accelerate import prepare  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.lru, self.mamba, self.head = LRU(4, 8, max_phase=1.5), Mamba(4, d_state=6), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.mamba(torch.tanh(self.lru(x))).mean(1))


def data():
    x = torch.randn(32, 9, 4, generator=torch.Generator().manual_seed(6))
    return torch.utils.data.TensorDataset(x, (x[:, :, 0].mean(1) > 0).long())


class Run:
    """Training as accelerate's users write it: two micro-batches per optimizer step, mixed precision, clipping."""

    def __init__(self, **options):
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(data(), batch_size=2)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        schedule, batches = compressm.At([2, 5]), [data().tensors[0][:8]]
        self.compressor = prepare(
            self.accelerator, self.model, self.optimizer, policy=compressm.Energy(tau=0.3), schedule=schedule,
            calibration=batches,
        )  # fmt: skip
        self.losses = []

    def train(self, start=0, stop=16):
        for index, (x, y) in enumerate(self.loader):
            if not start <= index < stop:
                continue
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.cross_entropy(self.model(x), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.compressor.step()
            self.losses.append(loss.item())


def test_steps_and_wrappers():
    run = Run()
    run.train()
    assert isinstance(run.optimizer, accelerate.optimizer.AcceleratedOptimizer)
    assert run.compressor.optimizers == (run.optimizer.optimizer,)
    assert run.compressor.step_count == 8
    assert [report.step for report in run.compressor.history] == [2, 5]
    ranks = run.compressor.ranks
    assert ranks["lru"] < 8
    assert ranks["mamba"] < 6
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}


@pytest.mark.parametrize("batches", [6, 12])
def test_load_state_of_a_reduced_model(tmp_path, batches):
    whole = Run()
    whole.train(stop=batches)
    whole.accelerator.save_state(tmp_path)
    whole.train(start=batches)
    again = Run()
    assert again.compressor.ranks == {"lru": 8, "mamba": 6}
    again.accelerator.load_state(tmp_path)
    assert again.compressor.step_count == batches // 2
    again.train(start=batches)
    assert again.compressor.state_dict()["history"][-1]["step"] == 5
    assert again.losses == whole.losses[batches:]
    assert again.compressor.ranks == whole.compressor.ranks
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_wrapped_model_is_refused():
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.DataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ModelError, match="wrapped in DataParallel"):
        prepare(accelerator, model, optimizer, policy=compressm.Shrink(0.5), schedule=compressm.At([1]))


def test_the_config_of_a_transformers_model_follows(tmp_path):
    transformers = pytest.importorskip("transformers")
    from compressm.integrations.transformers import update_config

    def run():
        torch.manual_seed(3)
        config = {"vocab_size": 11, "hidden_size": 8, "state_size": 6, "num_hidden_layers": 2, "initializer_range": 0.5}
        model = nn.ModuleList([transformers.MambaForCausalLM(transformers.MambaConfig(**config))])
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        options = {"policy": compressm.Energy(tau=0.3), "schedule": compressm.At([1])}
        return accelerator, model, prepare(accelerator, model, optimizer, **options)

    accelerator, model, compressor = run()
    x = torch.randint(11, (2, 9))
    model[0](input_ids=x, labels=x).loss.backward()
    compressor.optimizers[0].step()
    assert compressor.step().changed
    (rank,) = set(compressor.ranks.values())
    assert update_config(model)[0].config.state_size == rank < 6
    accelerator.save_state(tmp_path)
    other, again, _ = run()
    other.load_state(tmp_path)
    assert again[0].config.state_size == rank
    assert torch.equal(again[0](x).logits, model[0](x).logits)
