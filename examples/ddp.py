"""Compress a model while DistributedDataParallel trains it:  torchrun --nproc_per_node 2 examples/ddp.py

The task: tell the frequency of a noisy sine from its samples.  Every process draws its own part of the data.
"""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compressm
from compressm.layers import LRU

STEPS, CLASSES, CHANNELS = 60, 4, 16


class Classifier(nn.Module):
    def __init__(self, states):
        super().__init__()
        self.encoder = nn.Linear(1, CHANNELS)
        self.layers = nn.ModuleList(LRU(CHANNELS, states) for _ in range(2))
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x):
        x = self.encoder(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x.mean(1))


def batch(draw, size=16, length=64):
    label = torch.randint(CLASSES, (size,), generator=draw)
    time = torch.arange(length) + 6 * torch.rand(size, 1, generator=draw)
    signal = torch.sin(2 * math.pi * time / (4.0 * 2**label[:, None]))
    return (signal + 0.3 * torch.randn(size, length, generator=draw))[..., None], label


dist.init_process_group("gloo")  # "nccl" on GPUs
draw = torch.Generator().manual_seed(dist.get_rank())
torch.manual_seed(0)
model = DistributedDataParallel(Classifier(states=64))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
compressor = compressm.Compressor(
    model, optimizer, policy=compressm.Energy(0.05), schedule=compressm.Once(STEPS, at=0.3), calibration=[batch(draw)]
)
for step in range(1, STEPS + 1):
    x, label = batch(draw)
    loss = nn.functional.cross_entropy(model(x), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    report = compressor.step()
    model = compressor.rewrap()  # a new wrapper after a reduction
    if dist.get_rank() == 0 and (report or step % 20 == 0):
        print(report or f"step {step}: loss {loss:.3f}")
if dist.get_rank() == 0:
    print("states per layer:", compressor.ranks)
del model, optimizer, compressor, loss  # the last holders of the group, whose threads end with it
dist.destroy_process_group()
