"""What the caller has switched on - inference mode, a default device or dtype, autocast, coarse products - and measuring."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import compressm
from compressm.adapters import find_layers
from compressm.compression.common.undisturbed import exact, ordinary
from compressm.compression.planning.calibration import collect
from compressm.layers import LRU, Mamba

LAYERS = {"LRU": lambda: LRU(8, 16), "Mamba": lambda: Mamba(8, d_state=16)}


class Model(nn.Module):
    """Linear -> a layer -> Linear, with a buffer that its forward pass multiplies by."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = nn.Linear(8, 8), LAYERS[kind](), nn.Linear(8, 1)
        self.register_buffer("scale", torch.ones(8))
        self.table = torch.ones(8)

    def forward(self, x):
        return self.head(self.layer(self.embed(x) * self.scale) * self.table)


def batch(seed: int = 1) -> torch.Tensor:
    return torch.randn(4, 33, 8, generator=torch.Generator().manual_seed(seed))


def train_step(model, optimizer, x) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def compressor_of(model, optimizer, x, **options):
    options = {"schedule": compressm.At([1]), **options}
    return compressm.Compressor(model, optimizer, policy=compressm.FixedRank(4), calibration=[x], **options)


def tensors(model, optimizer):
    return {**model.state_dict(), **{f"{n} {k}": v for n, s in enumerate(optimizer.state.values()) for k, v in s.items()}}


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_reduction_inside_inference_mode_is_that_outside(kind, calibrated):
    results = []
    for mode in (False, True):
        model, x = Model(kind), batch()
        optimizer, average = torch.optim.Adam(model.parameters()), copy.deepcopy(model)
        compressor = compressor_of(model, optimizer, x, ema=average)
        if not calibrated:
            compressor = compressm.Compressor(
                model, optimizer, policy=compressm.FixedRank(4), schedule=compressm.At([1]), ema=average
            )
        train_step(model, optimizer, x)
        with torch.inference_mode(mode):
            compressor.step()
        made = [*model.parameters(), *average.parameters(), *tensors(model, optimizer).values()]
        assert not any(tensor.is_inference() for tensor in made)
        for _ in range(2):
            train_step(model, optimizer, x)
        results.append(tensors(model, optimizer))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_a_rollback_inside_inference_mode_puts_everything_back(kind):
    model, x = Model(kind), batch()
    with torch.inference_mode():
        model.register_buffer("cache", torch.zeros(3))
    optimizer = torch.optim.Adam(model.parameters())
    values = iter([1.0, 1.0, 9.0])
    guard = compressm.Rollback(lambda model: next(values), recovery=1)
    compressor = compressor_of(model, optimizer, x, guard=guard)
    train_step(model, optimizer, x)
    before, cache = {key: value.clone() for key, value in tensors(model, optimizer).items()}, model.cache
    with torch.inference_mode():
        compressor.step()
        model.cache.add_(1)
    train_step(model, optimizer, x)
    with torch.inference_mode():
        assert compressor.step().outcome == "rolled back"
    after = tensors(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.cache is cache
    assert not any(value.is_inference() for key, value in after.items() if key != "cache")
    train_step(model, optimizer, x)


def test_loading_and_one_shot_reductions_inside_inference_mode(tmp_path):
    model, x = Model("LRU"), batch()
    optimizer = torch.optim.Adam(model.parameters())
    train_step(model, optimizer, x)
    with torch.inference_mode():
        compressm.inspect(model, [x])
        compressm.compress(model, compressm.FixedRank(4), optimizer=optimizer, calibration=[x])
        compressm.save(tmp_path / "model", model, optimizer=optimizer)
    fresh = Model("LRU")
    again = torch.optim.Adam(fresh.parameters())
    with torch.inference_mode():
        compressm.load(tmp_path / "model", fresh, optimizer=again)
    for net, trained in ((model, optimizer), (fresh, again)):
        train_step(net, trained, x)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_tensors_made_in_inference_mode_are_measured_like_others(kind):
    """Batches, buffers, plain attributes, and whole models."""
    oracle = compressm.compress(Model(kind), compressm.FixedRank(4), calibration=[batch()]).layers[0]
    assert oracle.gramians == "data"
    with torch.inference_mode():
        x, built = batch(), Model(kind)
        buffered = Model(kind)
        buffered.scale, buffered.table = torch.ones(8), torch.ones(8)
    for name, parameter in Model(kind).named_parameters():
        buffered.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = parameter
    held = buffered.scale, buffered.table
    for model in (Model(kind), buffered, built):
        for calibration in ([x], [(x, "label")], [{"x": x}]):
            net = copy.deepcopy(model) if model is not buffered else buffered
            seen = compressm.inspect(net, calibration).layers[0].spectra[0]
            assert seen.gramians == oracle.gramians
            assert seen.hsv == oracle.spectrum
    assert (buffered.scale, buffered.table) == held
    report = compressm.compress(built, compressm.FixedRank(4), calibration=[x])
    assert report.layers[0].spectrum == oracle.spectrum


def test_a_layer_that_the_model_runs_in_inference_mode():
    class Frozen(Model):
        def forward(self, x):
            with torch.inference_mode():
                h = self.layer(self.embed(x))
            return self.head(h.clone())

    with pytest.warns(compressm.compression.CalibrationWarning, match="no gradient of the model's output reached"):
        report = compressm.compress(Frozen("LRU"), compressm.FixedRank(4), calibration=[batch()])
    assert report.layers[0].gramians == "data P, data-free Q"


@pytest.fixture
def default():
    """default(device=, dtype=) until the test ends."""
    dtype = torch.get_default_dtype()

    def choose(device=None, dtype=dtype):
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)

    yield choose
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


def whole_run(kind, calibrated, tmp_path, settings):
    """A run with everything, the library called under ``settings()``; its tensors, spectra and report."""
    model, x = Model(kind), batch()
    optimizer, average = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), copy.deepcopy(model)
    train_step(model, optimizer, x)
    values = iter([1.0, 1.0, 9.0, 1.0, 1.0])
    settings()
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.Energy(tau=0.05), schedule=compressm.At([1, 4]), ema=average,
        calibration=[x] if calibrated else None, guard=compressm.Rollback(lambda model: next(values), recovery=1),
    )  # fmt: skip
    plan = compressor.plan()
    inspected = compressm.inspect(model, [x] if calibrated else None)
    outcomes = [compressor.step() for _ in range(4)]
    extra = {"floats": [0.5] * 100, "tensor": x}
    compressm.save(tmp_path / "run", model, optimizer=optimizer, compressor=compressor, extra=extra, rng=True)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    fresh = Model(kind)
    again = torch.optim.SGD(fresh.parameters(), 0.1, momentum=0.9)
    guard = compressm.Rollback(lambda model: 1.0, recovery=1)
    resumed = compressm.Compressor(
        fresh, again, policy=compressm.Energy(tau=0.05), schedule=compressm.At([1, 4]), ema=copy.deepcopy(fresh), guard=guard
    )
    settings()
    compressm.load(tmp_path / "run", fresh, optimizer=again, compressor=resumed, rng=True)
    found = {**tensors(model, optimizer), **{f"loaded {k}": v for k, v in tensors(fresh, again).items()}}
    said = [item.to_dict() | {"seconds": 0} for item in outcomes if item is not None]
    return found | {f"ema {k}": v for k, v in average.state_dict().items()}, (plan.to_dict(), inspected.to_dict(), said)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("settings", [{"device": "meta"}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}])
def test_default_device_and_dtype_do_not_reach_the_library(kind, calibrated, settings, default, tmp_path):
    expected, said = whole_run(kind, calibrated, tmp_path, lambda: None)
    found, said_so = whole_run(kind, calibrated, tmp_path, lambda: default(**settings))
    assert said_so == said
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].device) == (value.dtype, value.device), name
        assert torch.equal(found[name], value), name


class Deep(nn.Module):
    """Two layers behind one another: the second gets what autocast makes of the first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = {"LRU": lambda: LRU(16, 32), "Mamba": lambda: Mamba(16, d_state=32)}[kind]
        self.embed, self.layers, self.head = nn.Linear(16, 16), nn.ModuleList([make(), make()]), nn.Linear(16, 8)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_rounds_the_model_and_not_the_measurement(kind, dtype, monkeypatch):
    """Second moments of one and the same input, within the model's autocast and outside of it."""
    torch.manual_seed(1)
    x = torch.randn(16, 128, 16).cumsum(1) * 0.1
    model = Deep(kind)
    hidden = []
    model.layers[1].register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach().float()))

    def forward(model, batch):
        with torch.autocast("cpu", dtype):
            return model(batch)

    seen = collect(model, find_layers(model), [x], forward=forward)["layers.1"]
    alone = nn.Sequential(copy.deepcopy(model.layers[1]))
    alone[0]._forward_pre_hooks.clear()
    oracle = collect(alone, find_layers(alone), [hidden[0]])["0"]
    assert hidden[0].shape == x.shape
    assert torch.equal(seen.P, oracle.P)


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("kind", LAYERS)
def test_coarse_products_do_not_reach_the_measurement(kind, precision):
    """Of a layer alone nothing is measured that the model computes; on CPUs without bfloat16 units the setting does nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]())
    before = torch.get_float32_matmul_precision()
    exactly = compressm.inspect(model, [batch()]).layers[0].spectra[0].hsv
    torch.set_float32_matmul_precision(precision)
    try:
        assert compressm.inspect(model, [batch()]).layers[0].spectra[0].hsv == exactly
        a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        with exact():
            assert ((a @ a) - (a.double() @ a.double())).abs().max() < 1e-4
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_modes_are_as_before():
    with torch.no_grad(), ordinary():
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with exact():
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
