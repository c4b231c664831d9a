"""Published criteria for selective and matrix-valued states, by way of the Compressor and of compress()."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compressm
from compressm.compression.planning.calibration import collect
from compressm.control import DRRQR, GHOST, OutputEnergy, PeakGain, RandomModes, Taylor
from compressm.errors import ArgumentError, ModelError
from compressm.layers import LRU, GatedDeltaNet, Mamba, Mamba2

CRITERIA = (GHOST(), OutputEnergy(), DRRQR(), Taylor(), RandomModes(3))
LAYERS = {
    "mamba": lambda: Mamba(6, 8),
    "mamba2": lambda: Mamba2(6, d_state=8, headdim=3, ngroups=2),
    "gated_delta_net": lambda: GatedDeltaNet(6, 1.0, head_dim=8, num_heads=2),
}


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer = LAYERS[kind]()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(x + self.layer(x)))


def batches(count=2):
    return [torch.randn(3, 13, 6, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.name)
def test_the_chosen_rows_stay_as_they_are(kind, criterion):
    model = Model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([3]), calibration=batches(), criterion=criterion
    )
    ((_, adapter),) = compressor.layers.values()
    name = next(iter(adapter.rows(model.layer)))
    for _ in range(3):
        model(batches()[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        parameter = model.layer.get_parameter(name)
        before, moments = parameter.detach().clone(), optimizer.state[parameter]["exp_avg"].clone()
        report = compressor.step()
    (cut,) = report.layers
    assert (cut.rank_after, cut.convention, cut.gramians) == (3, "scores", "data")
    assert cut.method.endswith(criterion.name)
    assert list(cut.spectrum) == sorted(cut.spectrum, reverse=True)
    assert len(cut.spectrum) == 8
    after = model.layer.get_parameter(name)
    olds = {tuple(row.tolist()): index for index, row in enumerate(before)}
    index = [olds[tuple(row.tolist())] for row in after.detach()]
    assert len(index) < len(olds)
    assert torch.equal(optimizer.state[after]["exp_avg"], moments[index])
    model(batches()[0]).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["mamba2", "gated_delta_net"])
def test_without_training_and_data(kind):
    rows = {}
    for criterion in (GHOST(), DRRQR(), RandomModes(1)):
        model = Model(kind)
        report = compressm.compress(model, compressm.FixedRank(3), criterion=criterion)
        (cut,) = report.layers
        assert (cut.rank_after, cut.gramians) == (3, "data-free")
        rows[criterion.name] = model(batches()[0]).detach()
    assert not torch.equal(rows["GHOST"], rows["RandomModes"])


@pytest.mark.parametrize("kind", LAYERS)
def test_taylor_looks_at_the_gradients_of_the_weights(kind):
    """With a loss in the place of the output every score is the same random number times that of the loss."""
    model = Model(kind)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    ((name, (layer, adapter)),) = compressm.adapters.find_layers(model).items()
    judged = adapter.judged_by(Taylor(), layer, name)
    measured = collect(model, {name: (layer, judged)}, batches(1), forward=loss)[name]
    gradients = torch.autograd.grad(loss(model.eval(), batches(1)[0]), [layer.get_parameter(k) for k in judged.rows(layer)])
    expected = 0.0
    for (key, parts), gradient in zip(judged.rows(layer).items(), gradients, strict=True):
        energy = (layer.get_parameter(key).detach() * gradient).double().square().flatten(1 if gradient.dim() > 1 else 0)
        energy = energy.sum(1) if energy.dim() > 1 else energy
        expected = expected + sum(energy[part] for part in parts)
    found = measured.rows().gradients
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-4, atol=1e-7)


def test_what_does_not_go_together_is_refused():
    model = Model("mamba2")

    def build(model, criterion, **options):
        options |= {"policy": compressm.FixedRank(3), "schedule": compressm.At([1])}
        return compressm.Compressor(model, None, criterion=criterion, **options)

    with pytest.raises(ArgumentError, match=r"calibration: expected batches, .* gradients, got None with Taylor"):
        build(model, Taylor())
    with pytest.raises(ArgumentError, match=r"criterion: expected form 'strict' or 'auto'.*GHOST with form='projected'"):
        build(model, GHOST(), form="projected")
    with pytest.raises(ArgumentError, match=r"RowCriterion for such layers, got PeakGain for layer 'layer' \(Mamba2\)"):
        build(model, PeakGain())
    with pytest.raises(ArgumentError, match=r"Criterion for such layers, got GHOST for layer '' \(LRU\)"):
        compressm.compress(LRU(3, 9), compressm.FixedRank(3), criterion=GHOST())
    model.layer = Mamba2(6, d_state=8, headdim=3, d_features=10)
    with pytest.raises(ArgumentError, match=r"criterion: .*DRRQR for layer 'layer' \(Mamba2\), which has maps"):
        build(model, DRRQR())
    model = Model("mamba")
    model.layer.x_proj.weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"x_proj\.weight is frozen"):
        build(model, Taylor(), calibration=batches())
