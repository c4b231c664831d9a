"""A training loop."""

from __future__ import annotations


def train(model, optimizer, compressor, steps, batch):
    """Losses at these steps: mean squares of the outputs for ``batch(step)``; compressor may be None."""
    losses = []
    for step in steps:
        loss = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if compressor is not None:
            compressor.step()
    return losses
