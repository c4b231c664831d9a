"""What a Compressor tells of how its spectra and rankings settled."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import compressm
from compressm.compression.planning.stability import rank_correlation
from compressm.control import GHOST, cross_root
from compressm.errors import ArgumentError
from compressm.layers import LRU, GatedDeltaNet, Mamba, Mamba2

LAYERS = {
    "lru": lambda: LRU(6, 7),
    "mamba": lambda: Mamba(6, 8),
    "mamba2": lambda: Mamba2(6, d_state=8, headdim=3, ngroups=2),
    "gated_delta_net": lambda: GatedDeltaNet(6, 1.0, head_dim=8, num_heads=2),
}


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer = LAYERS[kind]()

    def forward(self, x):
        return x + self.layer(x)


def batch(seed):
    return torch.randn(3, 13, 6, generator=torch.Generator().manual_seed(seed))


def watched(kind, steps=12, check=0.25, **options):
    model = Model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {
        "schedule": compressm.Watch(steps, check),
        "calibration": [batch(99)],
        "policy": compressm.FixedRank(3),
        **options,
    }
    return model, optimizer, compressm.Compressor(model, optimizer, **options)


def train(model, optimizer, compressor, steps):
    """The model before every step of the compressor, by its count afterwards."""
    models = {}
    for _ in range(steps):
        model(batch(compressor.step_count)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        models[compressor.step_count + 1] = copy.deepcopy(model)
        compressor.step()
    return models


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_is_cut_and_everything_is_seen(kind):
    model, optimizer, compressor = watched(kind)
    models = train(model, optimizer, compressor, 12)
    assert compressor.history == []
    ((name, layer),) = compressor.stability().layers.items()
    assert layer.steps == (3, 6, 9, 12)
    for step, spectrum in zip(layer.steps, layer.spectra, strict=True):
        again = compressm.Compressor(
            models[step], None, policy=compressm.FixedRank(3), schedule=compressm.At([1]), calibration=[batch(99)]
        )
        (expected,) = again.plan().layers
        assert name == expected.name
        torch.testing.assert_close(torch.tensor(spectrum), torch.tensor(expected.spectrum))
    for index in range(1, 4):
        moved = (torch.tensor(layer.spectra[index]) - torch.tensor(layer.spectra[index - 1])).abs().max() / 3
        assert layer.drift[index] == pytest.approx(float(moved), rel=1e-4)
        assert 0 < layer.drift[index] <= layer.bound[index] * (1 + 1e-6)
        assert layer.bound[index] < 1e3 * layer.drift[index]
    assert layer.drift[0] is layer.bound[0] is None
    assert layer.correlation[-1] == pytest.approx(1.0)
    assert layer.overlap[-1] == 1.0
    assert all(-1 <= value <= 1 for value in layer.correlation)
    assert all(0 <= value <= 1 for value in layer.overlap)
    compressor.close()


def test_the_bound_is_that_of_the_roots_of_the_gramians():
    """On moments that are known: Weyl's inequality holds, and is met where one root only grows."""
    draw = torch.Generator().manual_seed(1)
    P, Q = (torch.cov(torch.randn(6, 40, generator=draw, dtype=torch.float64)) for _ in range(2))
    torch.testing.assert_close(
        torch.linalg.svdvals(cross_root(P, Q)), torch.linalg.eigvals(P @ Q).real.sort(descending=True).values.sqrt()
    )
    torch.testing.assert_close(
        cross_root(P, torch.eye(6, dtype=torch.float64)) @ cross_root(P, torch.eye(6, dtype=torch.float64)), P
    )
    grown = torch.linalg.matrix_norm(cross_root(1.21 * P, Q) - cross_root(P, Q), 2)
    torch.testing.assert_close(grown, 0.1 * torch.linalg.svdvals(cross_root(P, Q))[0])


def test_overlap_and_correlation_are_with_the_last_step():
    model, optimizer, compressor = watched("mamba", criterion=GHOST())
    train(model, optimizer, compressor, 12)
    (layer,) = compressor.stability().layers.values()
    seen = [compressor._sightings.seen[step]["layer"] for step in layer.steps]
    assert layer.bound == (None,) * 4  # scores are no singular values
    for index, sight in enumerate(seen):
        assert sorted(sight.kept) == sorted(torch.tensor(sight.scores).topk(3).indices.tolist())
        assert layer.overlap[index] == len(set(sight.kept) & set(seen[-1].kept)) / 3
        assert layer.correlation[index] == pytest.approx(spearmanr(sight.scores, seen[-1].scores).statistic)


def test_a_settled_schedule_tells_its_checks():
    schedule = compressm.WhenStable(40, check=0.1, force=0.5)
    model, optimizer, compressor = watched("lru", schedule=schedule)
    train(model, optimizer, compressor, 30)
    (report,) = compressor.history
    (layer,) = compressor.stability().layers.values()
    assert layer.steps == tuple(step for step in schedule.steps if step <= report.step)
    assert layer.overlap[-1] == 1.0
    assert "step 8: drift " in str(compressor.stability())


def test_smaller_layers_are_not_compared_with_larger_ones():
    model, optimizer, compressor = watched("lru", schedule=compressm.At([2, 4]), policy=compressm.Shrink(0.5))
    train(model, optimizer, compressor, 5)
    (layer,) = compressor.stability().layers.values()
    assert [len(spectrum) for spectrum in layer.spectra] == [14, 8]
    assert (layer.drift, layer.overlap, layer.correlation) == ((None, None), (None, 1.0), (None, pytest.approx(1.0)))


def test_resumed_and_rolled_back():
    model, optimizer, compressor = watched("mamba")
    train(model, optimizer, compressor, 7)
    state = json.loads(json.dumps(compressor.state_dict()))
    _, _, other = watched("mamba")
    other.load_state_dict(state)
    assert other.stability() == compressor.stability()
    train(model, optimizer, compressor, 5)
    again = compressor.stability().layers["layer"]
    assert again.steps == (3, 6, 9, 12)
    for wrong in ([{"step": 3}], [{"step": "x", "layers": {}}], 3, [{"step": 3, "layers": {"layer": {"spectrum": "no"}}}]):
        with pytest.raises(ArgumentError, match="state_dict seen"):
            other.load_state_dict({**state, "seen": wrong})
    worse = iter([0.0, 1.0])
    guard = compressm.Rollback(lambda model: next(worse, 1.0), tolerance=0.1, jump=None, recovery=2, failures=1)
    model, optimizer, compressor = watched("lru", schedule=compressm.At([2, 6]), guard=guard)
    train(model, optimizer, compressor, 4)
    assert compressor.step_count < 4
    assert compressor.stability().layers["layer"].steps in ((), (2,))


def test_rank_correlation_is_spearmans():
    one, other = [3.0, 1.0, 1.0, 7.0, 0.0], [2.0, 2.0, 5.0, 9.0, 1.0]
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert (
        rank_correlation(one, other[:4]) is rank_correlation([1.0], [2.0]) is rank_correlation([1.0, 1.0], [1.0, 2.0]) is None
    )
