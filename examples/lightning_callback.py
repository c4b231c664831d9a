"""A LightningModule that loses states while Trainer.fit runs: one callback, nothing else changes.

python examples/lightning_callback.py
"""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import compressm
from compressm.integrations.lightning import CompressionCallback
from compressm.layers import LRU


class Digits(lightning.LightningModule):
    """Handwritten digits, read pixel by pixel: (batch, 64, 1) to scores (batch, 10)."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(1, d_model), nn.Linear(d_model, 10)
        self.lru, self.norm = LRU(d_model, d_state, max_phase=0.6), nn.LayerNorm(d_model)

    def forward(self, x):
        x = self.encoder(x)
        return self.head((x + nn.functional.gelu(self.lru(self.norm(x)))).mean(1))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--d-state", type=int, default=32)
arguments = parser.parse_args()

lightning.seed_everything(0, verbose=False)
pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
train, test = random_split(TensorDataset(pixels.float().unsqueeze(-1) / 16, labels), [0.8, 0.2])

compression = CompressionCallback(
    policy=compressm.Energy(tau=0.05),
    schedule=lambda total_steps: compressm.Once(total_steps, at=0.25),
    calibration=DataLoader(train, batch_size=64),  # of which the first 64 sequences are used
)
trainer = lightning.Trainer(
    max_epochs=arguments.epochs, accelerator="cpu", callbacks=[compression], logger=False, enable_checkpointing=False
)
trainer.fit(Digits(d_model=16, d_state=arguments.d_state), DataLoader(train, batch_size=50, shuffle=True))
print(*compression.compressor.history, sep="\n")
trainer.test(trainer.model, DataLoader(test, batch_size=len(test)))
