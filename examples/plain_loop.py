"""A classifier of handwritten digits, read pixel by pixel, that loses states while it trains; everything in a plain loop.

python examples/plain_loop.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import compressm
from compressm.layers import LRU


class Classifier(nn.Module):
    """Pixels (batch, 64, 1) to scores of the ten digits (batch, 10)."""

    def __init__(self, d_model: int, d_state: int, blocks: int) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(1, d_model), nn.Linear(d_model, 10)
        self.lrus = nn.ModuleList(LRU(d_model, d_state, max_phase=0.6) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(blocks))

    def forward(self, x):
        x = self.encoder(x)
        for lru, norm in zip(self.lrus, self.norms, strict=True):
            x = x + nn.functional.gelu(lru(norm(x)))
        return self.head(x.mean(1))


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--d-state", type=int, default=32)
arguments = parser.parse_args()

torch.manual_seed(0)
x, y = map(torch.tensor, load_digits(return_X_y=True))
x = x.float().unsqueeze(-1) / 16
train, test = torch.randperm(len(x)).split([1500, len(x) - 1500])

model = Classifier(d_model=16, d_state=arguments.d_state, blocks=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
compressor = compressm.Compressor(
    model, optimizer,
    policy=compressm.Energy(tau=0.05), schedule=compressm.Once(arguments.steps, at=0.25),
    calibration=[x[train[:64]]],
)  # fmt: skip
with compressor:  # complains at the end if a scheduled reduction never came
    for _ in range(arguments.steps):
        batch = train[torch.randint(len(train), (50,))]
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if report := compressor.step():
            print(report)

with torch.no_grad():
    accuracy = (model.eval()(x[test]).argmax(-1) == y[test]).float().mean()
print(f"states: {compressor.ranks}, test accuracy: {accuracy:.1%}")
