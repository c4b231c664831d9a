"""Layers against formulas, compiled, and token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class InferenceParams:
    """As of mamba_ssm."""

    seqlen_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)


def decoded(layer, x):
    """A sequence token by token from an empty cache."""
    states = layer.allocate_inference_cache(len(x))
    return torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)


def check_decoding(layer, x, assert_close):
    """Prompts, shorter and longer than the convolution, and tokens behind them give what the whole sequence gives."""
    expected = layer(x).detach()
    for prompt in (1, 3, 7):
        params = InferenceParams()
        parts = [layer(x[:, :prompt], inference_params=params)]
        with torch.no_grad():
            for t in range(prompt, x.shape[1]):
                params.seqlen_offset = t
                parts.append(layer(x[:, t : t + 1], inference_params=params))
        assert_close(torch.cat(parts, 1).detach(), expected)


def check_formula(layer, formula, x, assert_close):
    """The layer's output and gradients are those of a formula of (layer, x)."""
    assert_close(layer(x).detach(), formula(layer, x).detach())
    gradients = [
        torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (layer(x), formula(layer, x))
    ]
    for (name, _), got, expected in zip(layer.named_parameters(), *gradients, strict=True):
        assert_close(got, expected, name)


def check_compiled(layer, x, assert_close):
    """Compiled without graph breaks, a layer gives the same, and the same gradients."""
    compiled = torch.compile(layer, fullgraph=True)(x)
    assert_close(compiled.detach(), layer(x).detach().double(), dtype=torch.float32)
    got, expected = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (compiled, layer(x)))
    for (name, _), a, b in zip(layer.named_parameters(), got, expected, strict=True):
        assert_close(a, b.double(), name, dtype=torch.float32)
