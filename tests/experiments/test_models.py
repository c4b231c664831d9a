"""The classifier's own parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compressm.experiments.models import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_dropout_zeroes_a_share_p_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(7, 1001, 13, requires_grad=True)
    y = Dropout(p)(x)
    n = x.numel()
    zeros = int((y == 0).sum())
    assert abs(zeros - p * n) < 5 * math.sqrt(n * p * (1 - p))
    assert torch.equal(y[y != 0], torch.full((n - zeros,), 1.0).div(1 - p))
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_dropout_masks_of_neighbours_are_independent():
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(400_001)) != 0).double() - 0.5
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((kept[lag:] * kept[:-lag]).mean())) < 5 * 0.25 / math.sqrt(400_000)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_at_the_ends(p):
    x = torch.randn(3, 5)
    assert torch.equal(Dropout(p)(x), x * (1 - p))


def test_dropout_is_off_in_eval_mode_and_follows_the_seed():
    layer, x = Dropout(0.3), torch.randn(5, 9, dtype=torch.float64)
    assert torch.equal(layer.eval()(x), x)
    layer.train()
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    assert isinstance(layer, nn.Dropout)  # what walks over models for dropout finds it
