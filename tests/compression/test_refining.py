"""Local distillation inside a reduction: what it gains, that it repeats itself, what it carries along, and leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from compression.interruptions import Interruption
from torch import nn

import compressm
from compressm.adapters import LayerEdit, find_layers
from compressm.compression import attach_masters
from compressm.compression.compressor import refining
from compressm.compression.distributed.team import ProcessTeam
from compressm.compression.planning.report import report_from_dict
from compressm.errors import ArgumentError
from compressm.layers import LRU, Mamba2

FORMS = {"strict": {}, "projected": {"d_features": 8}}
STEPS = 30


class Model(nn.Module):
    """Tokens to logits through two residual layers that give what their states hold and nothing else."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Mamba2(8, d_state=8, headdim=4, ngroups=2, **options) for _ in range(2))
        self.head = nn.Linear(8, 16)
        with torch.no_grad():
            for layer in self.layers:
                layer.D.zero_()
                layer.dt_bias.add_(2)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def tokens(count=24, length=21, seed=1):
    return torch.randint(16, (count, length), generator=torch.Generator().manual_seed(seed)).cumsum(1) % 16


def hidden():
    return torch.randn(16, 8)[tokens(40, 17)]


def model(form="strict", **options):
    torch.manual_seed(0)
    return Model(**FORMS[form], **options)


def form_of(net):
    """That in which the layers are built."""
    return "strict" if any(isinstance(layer, Mamba2) and layer.B_map is None for layer in net.modules()) else "auto"


def compress(net, policy, **options):
    return compressm.compress(net, policy, **{"form": form_of(net), **options})


def reduced(net, refine=STEPS, **options):
    options = {"calibration": [tokens()], "refine": refine, **options}
    return compress(net, compressm.FixedRank(3), **options)


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == again and torch.equal(value, twin) for (name, value), (again, twin) in pairs)


@pytest.mark.parametrize("form", FORMS)
def test_the_error_falls_on_what_was_recorded_and_on_other_sequences(form):
    before, plain, refined = model(form), model(form), model(form)
    reduced(plain, 0)
    report = reduced(refined)
    with torch.no_grad():
        held_out = tokens(seed=9)
        errors = [(net(held_out) - before(held_out)).norm() for net in (plain, refined)]
    assert errors[1] < {"strict": 0.9, "projected": 0.98}[form] * errors[0]
    for layer in report.layers:
        assert layer.refine_error_after < layer.refine_error_before
        assert f"refined {layer.refine_error_before:.3g} -> {layer.refine_error_after:.3g}" in str(report)
    assert report_from_dict(report.to_dict()) == report


@pytest.mark.parametrize("form", FORMS)
def test_errors_are_those_of_the_layer_s_own_output(form):
    net, x = model(form), hidden()
    layer = net.layers[0]
    with torch.no_grad():
        before = layer(x)
        report = compress(layer, compressm.FixedRank(3), calibration=[x], refine=STEPS).layers[0]
        after = float((layer(x) - before)[-5:].norm() / before[-5:].norm())  # the sequences that were not trained on
    assert after == pytest.approx(report.refine_error_after, rel=1e-4)


def test_what_the_cut_has_not_touched_stays():
    net = model()
    before = copy.deepcopy(net.state_dict())
    reduced(net)
    for name, value in net.state_dict().items():
        if value.shape == before[name].shape:
            assert torch.equal(value, before[name]), name
    x = net.layers[0].d_ssm
    assert torch.equal(net.layers[0].conv1d.weight[:x], before["layers.0.conv1d.weight"][:x])
    assert torch.equal(net.layers[0].in_proj.weight[: 2 * x], before["layers.0.in_proj.weight"][: 2 * x])
    assert torch.equal(net.layers[0].in_proj.weight[-4:], before["layers.0.in_proj.weight"][-4:])


@pytest.mark.parametrize("form", FORMS)
def test_it_repeats_itself_and_leaves_no_trace(form):
    nets = [model(form) for _ in range(2)]
    loader = torch.utils.data.DataLoader(tokens(40), batch_size=5, shuffle=True)
    states = []
    for net in nets:
        torch.manual_seed(4)
        net.layers[1].requires_grad_(False)
        reduced(net, calibration=loader)
        assert net.training
        assert all(parameter.grad is None for parameter in net.parameters())
        assert not any(module._forward_hooks for module in net.modules())
        states.append(torch.get_rng_state())
    assert same(*nets)
    assert torch.equal(*states)
    plain = model(form)
    torch.manual_seed(4)
    reduced(plain, 0, calibration=loader)
    assert torch.equal(torch.get_rng_state(), states[0])


def test_layers_in_several_passes_are_those_of_one(monkeypatch):
    nets, runs = [model() for _ in range(2)], []
    for net, room in zip(nets, (refining.RECORDED_BYTES, 1), strict=True):
        monkeypatch.setattr(refining, "RECORDED_BYTES", room)
        runs.append(0)

        def counted(net, batch):
            runs[-1] += not torch.is_grad_enabled()
            return net(batch)

        reduced(net, calibration=[tokens(4), tokens(8, 13)], forward=counted)
    assert runs == [2, 4]
    assert same(*nets)


def test_no_more_is_recorded_than_is_wanted(monkeypatch):
    monkeypatch.setattr(refining, "TOKENS", 50)
    monkeypatch.setattr(refining, "LONGEST", 9)
    runs = []

    def counted(net, batch):
        runs.append(len(batch))
        return net(batch)

    reduced(model(), 1, calibration=[tokens(4), tokens(8), tokens(8)], forward=counted)
    assert runs == [4, 8, 8, 4, 8]  # all of them to measure, 4 + 2 sequences of 9 tokens to record
    records = refining._Records({"": Taking()})
    records.hook("")(model().layers[0], (torch.randn(8, 21, 8),), {}, None)
    assert [call["hidden"].shape for call in records.calls[""]] == [(6, 9, 8)]
    assert records.complete


class Taking:
    """Takes what a layer gets."""

    def take(self, module, args, kwargs):
        return {"hidden": args[0]}


@pytest.mark.parametrize("form", FORMS)
def test_an_average_moves_along(form):
    net = model(form)
    average = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(0.01)
    plain, shifted = model(form), copy.deepcopy(average)
    reduced(plain, 0, ema=shifted)
    reduced(net, ema=average)
    for (name, new), cut in zip(net.named_parameters(), plain.parameters(), strict=True):
        moved = average.get_parameter(name) - shifted.get_parameter(name)
        torch.testing.assert_close(moved, new - cut, rtol=1e-4, atol=1e-6)
    assert not torch.equal(*(net.layers[0].get_parameter(n) for net in (net, plain) for n in _trained(form)[:1]))


def _trained(form):
    return {"strict": ("in_proj.weight", "conv1d.weight", "conv1d.bias"), "projected": ("B_map", "C_map")}[form]


@pytest.mark.parametrize("form", FORMS)
def test_master_copies_keep_their_digits(form):
    net = model(form).to(torch.bfloat16)
    masters = {name: parameter.detach().float() + 1e-5 for name, parameter in net.named_parameters()}
    optimizer = torch.optim.Adam(masters.values())
    attach_masters(optimizer, net, masters)
    for master in masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    report = reduced(net, optimizer=optimizer)
    assert all(layer.refine_error_after < layer.refine_error_before for layer in report.layers)
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if name.startswith("layers") and name.split(".", 2)[2] in _trained(form):
            assert torch.equal(parameter, masters[name].to(torch.bfloat16))
            assert optimizer.state[masters[name]]["exp_avg"].shape == parameter.shape
    cut = model(form).to(torch.bfloat16)
    reduced(cut, 0)
    assert not torch.equal(*(n.layers[0].get_parameter(_trained(form)[0]) for n in (net, cut)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    report = reduced(model().to(dtype))
    assert all(layer.refine_error_after < layer.refine_error_before for layer in report.layers)


def test_the_guard_takes_it_back():
    guard = compressm.Rollback(lambda net: float(net.layers[0].d_state < 8), tolerance=0.1, jump=None, recovery=1, failures=1)
    net = model()
    before = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters())
    compressor = compressm.Compressor(
        net, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([1]), calibration=[tokens()], guard=guard,
        refine=STEPS,
    )  # fmt: skip
    report = compressor.step()
    assert report.layers[1].refine_error_after < report.layers[1].refine_error_before
    assert compressor.history[-1].layers[1].refine_error_after is not None
    assert compressor.step().outcome == "rolled back"
    assert same(net, before)


def test_a_cut_that_training_does_not_improve_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("compressm.adapters._mamba2_distiller.RATE", 100.0)
    net, plain = model(), model()
    report = reduced(net, 2)
    reduced(plain, 0)
    assert same(net, plain)
    assert all(layer.refine_error_after >= layer.refine_error_before for layer in report.layers)
    assert "not refined, as its error would go" in str(report)


def test_ctrl_c_leaves_everything_as_it_is(snapshot):
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    net(tokens()).square().mean().backward()
    optimizer.step()
    before = snapshot(net, optimizer)
    interruption = Interruption(refining, opcodes=False)
    for at in (1, 30, 60, 90, 200, 400):
        assert interruption.during(lambda: reduced(net, 5, optimizer=optimizer), at)
        before.check()
        assert net.training
        assert not any(module._forward_hooks for module in net.modules())


class Doubled(nn.Module):
    """A projection that is more than its parameters."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def test_sub_modules_are_called_as_they_are():
    net, x = model().layers[0], hidden()
    net.out_proj = Doubled(net.out_proj)
    net.norm.register_forward_hook(lambda module, args, out: out * torch.linspace(0, 1, out.shape[-1]))
    with torch.no_grad():
        before = net(x)
        report = compress(net, compressm.FixedRank(3), calibration=[x], refine=STEPS).layers[0]
        after = float((net(x) - before)[-5:].norm() / before[-5:].norm())
    assert report.refine_error_after < report.refine_error_before
    assert after == pytest.approx(report.refine_error_after, rel=1e-4)
    hooked = model().layers[0]
    hooked.in_proj.register_forward_hook(lambda module, args, out: out * 2)
    assert compress(hooked, compressm.FixedRank(3), calibration=[x]).layers[0].refine_error_before is None


KINDS = [{"d_ssm": 8}, {"rmsnorm": False}, {"bias": True, "conv_bias": False}, {"D_has_hdim": True}]


@pytest.mark.parametrize("options", KINDS)
def test_all_kinds_of_layers(options):
    layer, x = model(**options).layers[0], hidden()
    with torch.no_grad():
        before = layer(x)
        report = compress(layer, compressm.FixedRank(3), calibration=[x], refine=STEPS).layers[0]
        lost = (layer(x) - before)[-5:].norm()
    assert report.refine_error_after < report.refine_error_before
    if "d_ssm" not in options and "bias" not in options:
        assert float(lost / before[-5:].norm()) == pytest.approx(report.refine_error_after, rel=1e-4)


def test_defaults():
    net = model()
    report = compress(net, compressm.FixedRank(3), calibration=[tokens(4)])
    assert report.layers[0].refine_error_after is not None
    assert compress(model(), compressm.FixedRank(3)).layers[0].refine_error_after is None
    net = model()
    compressor = compressm.Compressor(
        net, None, policy=compressm.FixedRank(3), schedule=compressm.At([1]), calibration=[tokens(4)]
    )
    assert compressor.step().layers[0].refine_error_after is None
    report = compress(model(), compressm.FixedRank(3), calibration=iter([tokens(4)]), refine=2)
    assert report.layers[0].refine_error_after is not None


@pytest.mark.parametrize(
    ("net", "options", "words"),
    [
        (model, {"refine": -1}, "refine: expected a number of steps.*got -1"),
        (model, {"refine": True}, "got True"),
        (model, {"refine": 2.0}, "got 2.0"),
        (model, {"calibration": None}, "refine: .*without calibration data"),
        (lambda: nn.Sequential(LRU(8, 6)), {"calibration": [torch.randn(2, 9, 8)]}, r"layers that are not distilled \(LRU\)"),
    ],
)
def test_wrong_arguments(net, options, words):
    built = net()
    before = copy.deepcopy(built)
    with pytest.raises(ArgumentError, match=words):
        reduced(built, **options)
    assert same(built, before)


def test_a_team_of_processes_is_refused():
    team, layers = object.__new__(ProcessTeam), find_layers(model())
    with pytest.raises(ArgumentError, match="5 for a model wrapped for several processes"):
        refining.chosen_steps(5, 0, layers, [tokens()], team)
    assert refining.chosen_steps(None, 0, layers, [tokens()], team) == refining.chosen_steps(0, 7, layers, None, team) == 0


def test_other_layers_beside_are_cut_alone():
    net = nn.Sequential(LRU(8, 6), model().layers[0])
    report = compress(net, compressm.FixedRank(3), calibration=[torch.randn(4, 13, 8)], refine=STEPS)
    assert [layer.refine_error_after is None for layer in report.layers] == [True, False]


def test_the_adapter_offers_it():
    layer = model().layers[0]
    (_, adapter), edit = find_layers(layer)[""], LayerEdit(8, 3, {}, *[lambda tensors: {}] * 3)
    assert adapter.distils
    assert adapter.distiller(layer, edit) is None
