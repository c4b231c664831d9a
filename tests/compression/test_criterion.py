"""Other criteria than Hankel singular values, by way of the Compressor."""

from __future__ import annotations

import pytest
import torch

import compressm
from compressm.control import Magnitude, PeakGain, RandomModes
from compressm.errors import ArgumentError
from compressm.layers import LRU, Mamba


def trained(d_state=9):
    model = LRU(3, d_state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(4, 17, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def cut(model, optimizer, criterion, rank=4):
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(rank), schedule=compressm.At([1]), criterion=criterion
    )
    return compressor.step()


@pytest.mark.parametrize("criterion", [Magnitude(), PeakGain(), RandomModes(3)])
def test_the_best_modes_stay_as_they_are(criterion):
    model, optimizer = trained()
    x = torch.randn(2, 33, 3)
    system = compressm.adapters.LRUAdapter().read(model)
    kept = criterion.scores(system).argsort(descending=True)[:4].sort().values
    part = compressm.DiagonalSystem(system.log_lam[kept], system.B[kept], system.C[:, kept])
    response = part.impulse_response(33).real.float()  # (L, H, H)
    expected = torch.stack([sum(x[:, t - s] @ response[s].T for s in range(t + 1)) for t in range(33)], 1) + model.D * x
    moments = optimizer.state[model.C_re]["exp_avg"][:, kept].clone()
    report = cut(model, optimizer, criterion)
    (layer,) = report.layers
    assert (layer.rank_after, layer.method, layer.convention) == (4, type(criterion).__name__, "modal")
    assert layer.error_bound is None
    assert list(layer.spectrum) == sorted(criterion.scores(system).tolist(), reverse=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    after = optimizer.state[model.C_re]["exp_avg"]
    ratio = after / moments  # every mode has a scale of its own, which B shares
    assert after.shape == (3, 4)
    torch.testing.assert_close(ratio, ratio[:1].expand(3, 4), rtol=1e-3, atol=1e-4)


def test_policies_see_the_scores_as_the_spectrum():
    model, optimizer = trained()
    scores = PeakGain().scores(compressm.adapters.LRUAdapter().read(model)).sort(descending=True).values
    wanted = int((scores.cumsum(0) < 0.7 * scores.sum()).sum()) + 1
    policy, schedule = compressm.Energy(keep=0.7), compressm.At([1])
    cutter = compressm.Compressor(model, optimizer, policy=policy, schedule=schedule, criterion=PeakGain())
    assert cutter.step().ranks == {"": wanted}
    assert compressm.adapters.find_layers(model)[""][1].criterion is None  # that of other compressors


def test_wrong_criteria_are_refused():
    model, optimizer = trained()
    for wrong in (PeakGain, "magnitude"):
        with pytest.raises(ArgumentError, match=r"criterion: expected a compressm\.control\.Criterion or RowCriterion"):
            cut(model, optimizer, wrong)
    mamba = Mamba(4, 8)
    with pytest.raises(ArgumentError, match=r"expected None or a .*\.RowCriterion .*, got PeakGain for layer '' \(Mamba\)"):
        cut(mamba, torch.optim.AdamW(mamba.parameters()), PeakGain())
    with pytest.raises(ArgumentError, match="would bound no error"):
        compressm.Compressor(
            model, optimizer, policy=compressm.ErrorBound(0.1), schedule=compressm.At([1]), criterion=PeakGain()
        )
