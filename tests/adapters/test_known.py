"""What an adapter does not know and might depend on the rank is refused before anything changes; the rest goes on working."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import compressm
from compressm.adapters import Reduced, check_known, find_layers, register_adapter, registry
from compressm.adapters.lru import LRUAdapter
from compressm.adapters.mamba import MambaAdapter
from compressm.errors import ModelError
from compressm.layers import LRU, Mamba


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


class Fork(Mamba):
    """Vision Mamba's second direction, in a class that has the name of mamba_ssm's."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        rows, inner = self.x_proj.weight.shape
        self.A_b_log = nn.Parameter(self.A_log.detach().clone())
        self.D_b = nn.Parameter(torch.ones(inner))
        self.conv1d_b = copy.deepcopy(self.conv1d)
        self.x_proj_b = nn.Linear(inner, rows, bias=False)
        self.dt_proj_b = copy.deepcopy(self.dt_proj)


Fork.__module__, Fork.__qualname__ = "mamba_ssm.modules.mamba_simple", "Mamba"


class WithNorms(Mamba):
    """Norms over B and C, as Jamba has them."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.b_norm = nn.RMSNorm(self.A_log.shape[1])


class WithScale(Mamba):
    """A projection with a vector of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.x_proj.scale = nn.Parameter(torch.ones(len(self.x_proj.weight)))


class Masked(LRU):
    """A vector over the states."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.mask = nn.Parameter(torch.ones(self.d_state))


class Buffered(LRU):
    """A buffer over the real and imaginary parts of the states."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("seen", torch.zeros(2 * self.d_state), persistent=False)


class Flat(LRU):
    """A second set of eigenvalues, in one row with other things."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.nu_log_b = nn.Parameter(torch.zeros(3 * self.d_state))


class Harmless(LRU):
    """Parameters that cannot depend on the states."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.gate = nn.Parameter(torch.ones(1, self.d_model))
        self.log_step = nn.Parameter(torch.tensor(0.5))
        self.glu = nn.Linear(self.d_model, 2 * self.d_model)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x, *args, **options):
        return self.glu(super().forward(x * self.gate, *args, **options) * self.temperature).chunk(2, -1)[0]


SUSPECT = {
    "fork": (Fork(12, 8), r"A_b_log \(24, 8\), x_proj_b\.weight \(17, 24\)"),
    "norms": (WithNorms(12, 8), r"b_norm\.weight \(8,\)"),
    "projection": (WithScale(12, 8), r"x_proj\.scale \(17,\)"),
    "vector": (Masked(5, 16), r"mask \(16,\)"),
    "buffer": (Buffered(5, 16), r"seen \(32,\)"),
    "name": (Flat(5, 16), r"nu_log_b \(48,\)"),
}


@pytest.mark.parametrize("kind", SUSPECT)
def test_refused_before_anything_changes(kind):
    layer, match = SUSPECT[kind]
    model = nn.Sequential(copy.deepcopy(layer))
    optimizer = torch.optim.Adam(model.parameters())
    match = rf"layer '0' \(\w+\) owns {match}, .*register_adapter\(cls, adapter\).*independent"
    before, objects = copy.deepcopy(model.state_dict()), list(model.parameters())
    for act in (
        lambda: compressm.compress(model, compressm.FixedRank(4), optimizer=optimizer),
        lambda: compressm.Compressor(model, optimizer, policy=compressm.FixedRank(4), schedule=compressm.At([1])),
    ):
        with pytest.raises(ModelError, match=match):
            act()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))


def test_what_has_nothing_to_do_with_the_states_goes_on_working():
    model = nn.Sequential(Harmless(5, 16))
    x = torch.randn(2, 9, 5)
    optimizer = torch.optim.Adam(model.parameters())
    assert compressm.compress(model, compressm.FixedRank(4), optimizer=optimizer, calibration=[x]).ranks == {"0": 4}
    model(x).sum().backward()
    optimizer.step()
    assert model[0].glu.weight.grad is not None


def test_ways_out(tmp_path):
    """An adapter that knows better, or none; files can be written and read without being asked."""
    model = nn.Sequential(Masked(5, 16))
    compressm.load(compressm.save(tmp_path / "a", model), model)
    compressm.inspect(model)

    class Knowing(LRUAdapter):
        def independent(self, module):
            return (*super().independent(module), "mask")

    register_adapter(Masked, Knowing())
    check_known(find_layers(model))
    register_adapter(Masked, None)
    with pytest.raises(ModelError, match="no state-space layer"):
        compressm.compress(model, compressm.FixedRank(4))


def test_an_adapter_that_does_not_say_is_trusted_with_its_own_class_only():
    class Silent(LRUAdapter):
        def independent(self, module):
            return None

    class Child(Masked):
        """A subclass of a class that the user registered."""

    register_adapter(Masked, Silent())
    check_known(find_layers(Masked(5, 16)))
    odd = parametrize.register_parametrization(Masked(5, 16), "D", nn.Identity())
    check_known(find_layers(odd))
    with pytest.raises(ModelError, match=r"owns mask \(16,\)"):
        check_known(find_layers(Child(5, 16)))


class Lora(nn.Module):
    """A low-rank adapter around a projection, whose rank is the number of states."""

    def __init__(self, base, rank):
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_adapters_around_projections_are_judged_as_before():
    layer = Mamba(12, 8)
    layer.in_proj, layer.out_proj = Lora(layer.in_proj, 8), Lora(layer.out_proj, 8)
    check_known(find_layers(layer))
    layer.x_proj = Lora(layer.x_proj, 8)
    with pytest.raises(ModelError, match=r"x_proj\.weight is not a plain parameter"):
        compressm.compress(layer, compressm.FixedRank(4))
    layer = Mamba(12, 8)
    parametrize.register_parametrization(layer, "A_log", nn.Identity())
    with pytest.raises(ModelError, match="A_log is not a plain parameter"):
        compressm.compress(layer, compressm.FixedRank(4))
    layer = Mamba(12, 8)
    layer.x_proj.bias = nn.Parameter(torch.zeros(17))
    with pytest.raises(ModelError, match="x_proj has a bias"):
        compressm.compress(layer, compressm.FixedRank(4))


@pytest.mark.parametrize(("d_model", "states"), [(16, 16), (4, 8), (8, 4), (16, 1), (1, 2)])
def test_our_own_layers_are_known_whatever_their_sizes(d_model, states):
    check_known(find_layers(nn.Sequential(LRU(d_model, states), Mamba(d_model, states))))


@pytest.mark.parametrize("layer", [LRU(5, 8), Mamba(5, 8)])
@pytest.mark.parametrize("convention", ["real", "complex"])
def test_reductions_say_what_planning_reads(layer, convention):
    adapter = find_layers(layer)[""][1]
    reduction = adapter.analyse(layer, "", convention, None).reduce(3)
    assert isinstance(reduction, Reduced)
    assert (reduction.order, len(reduction.kept(8))) == (3, 3)
    assert 3 <= reduction.real_order <= 6
    assert isinstance(reduction.method, str)


def test_a_reduction_of_the_user_needs_what_the_contract_says_and_no_more():
    """An adapter whose reductions hold the members of Reduced, and what its own edit takes."""

    class Bare:
        def __init__(self, inner):
            self.inner, self.order, self.real_order = inner, inner.order, inner.real_order
            self.method, self.output_error = "by hand", 0.25

        def kept(self, order):
            return self.inner.kept(order)

    class Wrapping(MambaAdapter):
        def analyse(self, module, name, convention, measured):
            analysis = super().analyse(module, name, convention, measured)
            reduce = analysis.reduce
            object.__setattr__(analysis, "reduce", lambda rank: Bare(reduce(rank)))
            return analysis

        def edit(self, module, reduction):
            return super().edit(module, reduction.inner)

    assert isinstance(Bare(type("Any", (), {"order": 1, "real_order": 1})), Reduced)
    register_adapter(Mamba, Wrapping())
    model = nn.Sequential(Mamba(6, 8))
    (layer,) = compressm.compress(model, compressm.FixedRank(3)).layers
    assert (layer.rank_after, layer.method, layer.output_error) == (3, "by hand", 0.25)
    assert model[0].A_log.shape == (12, 3)
