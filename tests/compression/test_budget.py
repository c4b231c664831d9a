"""Budget: a total that is met, shared out as well as it can be; and policies of the user's own that see all layers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from compression.guard_cases import Script
from hypothesis import given, settings
from hypothesis import strategies as st

import compressm
from compressm import Budget, Largest
from compressm.compression import Policy
from compressm.compression.planning.policies import LayerSpectrum
from compressm.errors import ArgumentError, NumericalError
from compressm.layers import LRU, Mamba

positive = st.floats(1e-6, 1e6, allow_nan=False)
spectra_of = st.lists(st.lists(positive, min_size=1, max_size=9), min_size=1, max_size=5)


def layers_of(spectra, *, real=False, sizes=None, fixed=0, **known) -> dict[str, LayerSpectrum]:
    """Layers of descending spectra; a state of layer i takes sizes[i] bytes beside ``fixed`` ones."""
    layers = {}
    for i, values in enumerate(spectra):
        hsv = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
        hsv = hsv.repeat_interleave(2) if real else hsv
        size = 1 if sizes is None else sizes[i % len(sizes)]
        price = lambda rank, size=size: fixed + size * rank  # noqa: E731
        kind = "real" if real else "complex"
        layers[f"l{i}"] = LayerSpectrum(f"l{i}", len(values), hsv, kind, state_bytes=price, **known)
    return layers


def taken(layers, ranks) -> int:
    return sum(layers[name].state_bytes(rank) for name, rank in ranks.items())


def cost(layers, ranks) -> float:
    """Sum over the layers of the fraction of the spectrum that is cut."""
    total = 0.0
    for name, layer in layers.items():
        values = layer.hsv.tolist()
        kept = ranks[name] * (2 if layer.convention == "real" else 1)
        total += math.fsum(values[kept:]) / math.fsum(values)
    return total


def allowed(layer, multiple) -> list[int]:
    return sorted({*range(multiple, layer.rank, multiple), layer.rank})


def best(layers, total, multiple=1) -> float:
    """The least cost of all ranks that take at most the total."""
    choices = itertools.product(*(allowed(layer, multiple) for layer in layers.values()))
    fitting = (dict(zip(layers, choice, strict=True)) for choice in choices)
    return min(cost(layers, ranks) for ranks in fitting if taken(layers, ranks) <= total)


@given(spectra_of, st.integers(1, 50), st.integers(1, 4), st.booleans(), st.booleans())
def test_the_total_is_met(spectra, total, multiple, uniform, real):
    layers = layers_of(spectra, real=real, multiple_of=multiple, uniform=uniform)
    least = sum(allowed(layer, multiple)[0] for layer in layers.values())
    if total < least:
        with pytest.raises(ArgumentError, match=rf"Budget states: expected at least {least}, .*, got {total}"):
            Budget(states=total).ranks(layers)
        return
    ranks = Budget(states=total).ranks(layers)
    assert list(ranks) == list(layers)
    assert all(ranks[name] in allowed(layer, multiple) for name, layer in layers.items()) or uniform
    assert all(1 <= ranks[name] <= layer.rank for name, layer in layers.items())
    assert sum(ranks.values()) <= total
    if multiple == 1 and not uniform:
        assert sum(ranks.values()) == min(total, sum(layer.rank for layer in layers.values()))
    if uniform:
        highest = max(ranks.values())
        assert ranks == {name: min(layer.rank, highest) for name, layer in layers.items()}


@given(spectra_of, st.integers(1, 60), st.integers(1, 60), st.integers(1, 4), st.booleans())
def test_more_never_takes_states_away(spectra, one, other, multiple, uniform):
    layers = layers_of(spectra, sizes=(1, 5, 3), multiple_of=multiple, uniform=uniform)
    least = taken(layers, {name: allowed(layer, multiple)[0] for name, layer in layers.items()})
    small, large = (Budget(bytes=least + extra).ranks(layers) for extra in sorted((one, other)))
    assert all(small[name] <= large[name] for name in layers)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(positive, min_size=1, max_size=6), min_size=1, max_size=3), st.integers(0, 15), st.booleans())
def test_states_are_shared_out_as_well_as_can_be(spectra, extra, real):
    layers = layers_of(spectra, real=real)
    total = len(spectra) + extra
    ranks = Budget(states=total).ranks(layers)
    assert cost(layers, ranks) <= best(layers, total) + 1e-12


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(positive, min_size=1, max_size=6), min_size=1, max_size=3),
    st.lists(st.sampled_from([1, 2, 3, 8]), min_size=3, max_size=3),
    st.integers(0, 60),
    st.integers(1, 3),
)
def test_nothing_is_better_that_takes_no_more_bytes(spectra, sizes, extra, multiple):
    layers = layers_of(spectra, sizes=sizes, fixed=7, multiple_of=multiple)
    total = taken(layers, {name: allowed(layer, multiple)[0] for name, layer in layers.items()}) + extra
    ranks = Budget(bytes=total).ranks(layers)
    used = taken(layers, ranks)
    assert used <= total
    assert cost(layers, ranks) <= best(layers, used, multiple) + 1e-12
    if ranks != {name: layer.rank for name, layer in layers.items()}:
        largest = max(
            layer.state_bytes(high) - layer.state_bytes(low)
            for layer in layers.values()
            for low, high in itertools.pairwise(allowed(layer, multiple))
        )
        assert total - used < largest


def test_a_layer_is_measured_by_its_own_sum():
    """The second layer is a thousand times louder, but has the same shape: both keep the same."""
    layers = layers_of([[4, 2, 1, 0.5], [4000, 2000, 1000, 500]])
    assert Budget(states=4).ranks(layers) == {"l0": 2, "l1": 2}
    layers = layers_of([[1, 1, 1, 1], [1, 0.1, 0.1, 0.1]])
    assert Budget(states=5).ranks(layers) == {"l0": 4, "l1": 1}


def test_the_largest_values_stay_wherever_they_are():
    layers = layers_of([[1.0, 0.4, 0.3, 0.05], [1.0, 0.5, 0.1, 0.02], [0.01, 0.009]])
    assert Largest(states=6).ranks(layers) == {"l0": 3, "l1": 2, "l2": 1}
    assert Largest(states=3).ranks(layers) == {"l0": 1, "l1": 1, "l2": 1}
    assert Budget(states=6).ranks(layers) == {"l0": 2, "l1": 2, "l2": 2}
    assert Largest(states=7).ranks(layers_of([[1.0, 0.4, 0.3, 0.05], [1.0, 0.5, 0.1]], multiple_of=2)) == {"l0": 4, "l1": 3}


@pytest.mark.parametrize("values", [[1.0] * 6, [0.9**i for i in range(6)], [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]])
def test_equal_layers_get_equal_shares(values):
    layers = layers_of([values] * 3)
    for total in range(3, 18):
        ranks = list(Budget(states=total).ranks(layers).values())
        assert ranks == sorted(ranks, reverse=True)
        assert max(ranks) - min(ranks) <= 1
    assert Budget(states=9).ranks(layers_of([values] * 3, multiple_of=3)) == {"l0": 3, "l1": 3, "l2": 3}


def test_multiples():
    layers = layers_of([[0.5**i for i in range(20)], [1.0] * 20, [1.0] * 3], multiple_of=8)
    assert Budget(states=43).ranks(layers) == {"l0": 20, "l1": 20, "l2": 3}
    assert Budget(states=42).ranks(layers) == {"l0": 16, "l1": 20, "l2": 3}
    assert Budget(states=38).ranks(layers) == {"l0": 8, "l1": 20, "l2": 3}
    assert Budget(states=30).ranks(layers) == {"l0": 8, "l1": 16, "l2": 3}
    assert Budget(states=19).ranks(layers) == {"l0": 8, "l1": 8, "l2": 3}
    with pytest.raises(ArgumentError, match=r"at least 19, 8 states \(multiple_of\) for each of the 3 layers, got 18"):
        Budget(states=18).ranks(layers)


def test_what_fits_already_is_left_alone():
    layers = layers_of([[0.0] * 4, [1.0] * 4])  # a dead layer is refused only where something is cut
    assert Budget(states=8).ranks(layers) == {"l0": 4, "l1": 4}
    with pytest.raises(NumericalError, match="layer 'l0': all 4 Hankel singular values are zero"):
        Budget(states=7).ranks(layers)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Budget(), "states, bytes: expected exactly one of the two, got states=None, bytes=None"),
        (lambda: Budget(states=3, bytes=3), "states, bytes: expected exactly one"),
        (lambda: Budget(states=0), "states: expected a positive integer, got 0"),
        (lambda: Budget(bytes=1e6), "bytes: expected a positive integer, got 1000000.0"),
        (lambda: Budget(states=True), "states: expected a positive integer, got True"),
    ],
)
def test_out_of_range(build, match):
    with pytest.raises(ArgumentError, match=match):
        build()


def compressor_of(run, policy, **options):
    return compressm.Compressor(run.model, run.optimizer, policy=policy, schedule=compressm.At([1]), **options)


def test_in_training(training):
    run = training(ranks=(8, 6))
    run.step()
    report = compressor_of(run, Budget(states=9), calibration=[run.batch()[0]]).step()
    assert sum(report.ranks.values()) == sum(lru.d_state for lru in run.model.lrus) == 9
    assert report.state_bytes_after == 16 * 9
    run.step()


def test_uniform_ranks_meet_the_budget_too(training):
    for total, ranks in ((9, (4, 4)), (13, (7, 6)), (14, (8, 6))):
        plan = compressor_of(training(ranks=(8, 6)), Budget(states=total), uniform=True).plan()
        assert tuple(plan.ranks.values()) == ranks


def test_a_total_that_cannot_be_met_is_refused_before_training(training):
    with pytest.raises(ArgumentError, match=r"Budget states: expected at least 2, one state for each of the 2 layers, got 1"):
        compressor_of(training(), Budget(states=1))
    with pytest.raises(ArgumentError, match=r"Budget bytes: expected at least 128, 4 states \(multiple_of\).*got 127"):
        compressor_of(training(), Budget(bytes=127), multiple_of=4)
    with pytest.raises(ArgumentError, match="Budget bytes"):
        compressm.compress(training().model, Budget(bytes=31))


def test_bytes_of_layers_of_several_kinds():
    """A Mamba state costs 64 times as much as an LRU's: with equal spectra the cheap states stay."""
    model = torch.nn.Sequential(LRU(8, 12), Mamba(8, d_state=12))
    full = compressm.inspect(model)
    before = sum(layer.state_bytes for layer in full.layers)
    report = compressm.compress(model, Budget(bytes=before // 2))
    conv, state = model[1].allocate_inference_cache(1)
    after = model[0].initial_state(1).nbytes + conv.nbytes + state.nbytes
    assert report.state_bytes_before == before
    assert report.state_bytes_after == after <= before // 2
    assert before // 2 - after < 64  # a Mamba state, the largest step
    assert model[0].d_state == 12


def test_a_guard_may_go_beyond_the_budget(whole):
    one = whole(ranks=(8, 6))
    compressor = one.guarded(compressm.Rollback(Script(1.0, 2.0, 1.0)), Budget(states=6))
    report = one.steps(compressor, 3)[-1]
    assert 6 < sum(report.ranks.values()) < 14


@dataclass(frozen=True)
class LoudestFirst(Policy):
    """So many states, to whichever layers have the largest singular values."""

    total: int

    def ranks(self, spectra):
        order = sorted((-value, name) for name, layer in spectra.items() for value in layer.hsv.tolist())
        kept = [name for _, name in order[: self.total]]
        return {name: max(1, kept.count(name)) for name in spectra}


def test_a_policy_of_the_user_s_own(training):
    run = training(ranks=(8, 6))
    with torch.no_grad():
        run.model.lrus[1].C_re.mul_(1e-6)
        run.model.lrus[1].C_im.mul_(1e-6)
    report = compressor_of(run, LoudestFirst(5), recipe="paper").step()
    assert report.ranks == {"lrus.0": 5, "lrus.1": 1}
    assert [lru.d_state for lru in run.model.lrus] == [5, 1]
    assert "LoudestFirst(total=5)" in report.reason
    run.step()


def gain(system, *, real: bool) -> torch.Tensor:
    """H-infinity norm on a grid, of the complex system or of the real one behind y = Re(C x)."""
    omega = torch.linspace(-math.pi, math.pi, 2001, dtype=torch.float64)
    response = system.frequency_response(omega)
    if real:
        response = (response + system.frequency_response(-omega).conj()) / 2
    return torch.linalg.matrix_norm(response, 2).max()


@pytest.mark.parametrize("recipe", ["default", "paper"])
@pytest.mark.parametrize("value", [0.5, 0.1, 0.01])
def test_the_error_bound_holds(value, recipe):
    torch.manual_seed(2)
    layer, real = LRU(3, 24, r_min=0.5, r_max=0.9, max_phase=0.5, dtype=torch.float64), recipe == "default"
    adapter = compressm.adapters.LRUAdapter()
    before = adapter.read(layer)
    report = compressm.compress(layer, compressm.ErrorBound(value), recipe=recipe).layers[0]
    after = adapter.read(layer)
    error = compressm.DiagonalSystem(
        torch.cat([before.log_lam, after.log_lam]), torch.cat([before.B, after.B]), torch.cat([before.C, -after.C], 1)
    )
    assert 1 < report.rank_after < 24
    assert gain(error, real=real) <= report.error_bound * (1 + 1e-9) <= value * report.spectrum[0] * (1 + 2e-9)
    assert gain(error, real=real) <= value * gain(before, real=real)
    fewer = (2 if real else 1) * (report.rank_after - 1)
    assert 2 * sum(report.spectrum[fewer:]) > value * report.spectrum[0]


def test_an_error_bound_that_would_not_hold_is_refused_before_training(training):
    run = training()
    policy = compressm.ErrorBound(0.1)
    assert compressor_of(run, policy).plan().layers[0].error_bound is not None
    with pytest.raises(ArgumentError, match=r"ErrorBound for layer 'lrus\.0'"):
        compressor_of(run, policy, calibration=[run.batch()[0]])
    with pytest.raises(ArgumentError, match="ErrorBound for layer ''"):
        compressm.compress(Mamba(8), policy)
