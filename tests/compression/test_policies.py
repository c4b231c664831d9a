"""Rank policies."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressm.compression import Budget, Energy, ErrorBound, FixedRank, Policy, Shrink
from compressm.compression.planning.policies import HalfWay, Layer, LayerSpectrum, ask, energy_order
from compressm.errors import ArgumentError, NumericalError

values = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=40).filter(lambda v: max(v) > 1e-3)
taus = st.floats(0, 1, exclude_max=True)


def spectrum(hsv, convention="complex", keep=None, name="lru", **known) -> LayerSpectrum:
    hsv = torch.as_tensor(sorted(hsv, reverse=True), dtype=torch.float64)
    rank = len(hsv) if convention == "complex" else len(hsv) // 2
    return LayerSpectrum(name, rank, hsv, convention, keep, **known)


@given(values, taus)
def test_energy_order_is_the_smallest_that_holds_its_fraction(hsv, tau):
    hsv = sorted(hsv, reverse=True)
    order = energy_order(torch.tensor(hsv, dtype=torch.float64), tau)
    tails = [math.fsum(hsv[m:]) for m in range(len(hsv) + 1)]
    slack = 1e-12 * tails[0]
    assert 1 <= order <= len(hsv)
    assert tails[order] <= tau * tails[0] + slack
    assert order == 1 or tails[order - 1] > tau * tails[0] - slack


@given(values, taus, taus)
def test_larger_tau_never_keeps_more(hsv, one, other):
    tensor = torch.tensor(sorted(hsv, reverse=True), dtype=torch.float64)
    assert energy_order(tensor, max(one, other)) <= energy_order(tensor, min(one, other))


@given(values, taus, st.integers(1, 9), st.sampled_from(["real", "complex"]), st.floats(0.01, 1))
def test_energy_rank_is_valid_rounded_and_gated(hsv, tau, multiple, convention, gate):
    layer = spectrum(hsv * 2, convention, multiple_of=multiple)
    rank = Energy(tau=tau, gate=gate).rank(layer)
    assert 1 <= rank <= layer.rank
    order = energy_order(layer.hsv, tau)
    wanted = order if convention == "complex" else math.ceil(order / 2)
    if rank < layer.rank:
        assert rank < gate * layer.rank
        assert rank >= wanted
        assert rank % multiple == 0
        assert rank - wanted < multiple
    else:
        assert min(layer.rank, math.ceil(wanted / multiple) * multiple) >= gate * layer.rank


@given(values)
def test_tau_zero_keeps_everything(hsv):
    layer = spectrum([*hsv, 0.0])
    assert Energy(tau=0).rank(layer) == layer.rank
    assert Energy(keep=1).rank(layer) == layer.rank
    assert Energy(tau=0.5).rank(spectrum(hsv, keep=1.0)) == len(hsv)


def test_energy_counts_sigma_not_its_square():
    layer = spectrum([6.0, 3.0, 1.0])  # tails 10, 4, 1
    assert [Energy(tau=tau).rank(layer) for tau in (0.05, 0.1, 0.39, 0.4, 0.9)] == [3, 2, 2, 1, 1]


def test_golden_ranks(golden):
    for name in ("lti_N64_H8_init", "lti_N256_H8_decay", "lti_N384_H64_init"):
        g = golden(name)
        for keep, rank in zip(g["tols"].tolist(), g["threshold_ranks"].tolist(), strict=True):
            assert Energy(keep=keep, gate=1.0).rank(spectrum(g["hsv_ref"].tolist())) == rank


def test_keep_is_one_minus_tau():
    assert Energy(keep=0.98).tau == pytest.approx(0.02)
    assert Energy(tau=0.02).keep == Energy(tau=0.02).budget == 0.98
    assert Shrink(0.5).budget is FixedRank(3).budget is None


@pytest.mark.parametrize(("count", "kept"), [(95, 100), (94, 94)])
def test_gate_leaves_layers_alone_below_five_per_cent(count, kept):
    hsv = [1.0] * count + [1e-9] * (100 - count)
    assert Energy(tau=1e-3).rank(spectrum(hsv)) == kept


def test_multiple_of():
    hsv = [1.0] * 9 + [0.0] * 31
    assert Energy(tau=0.01).rank(spectrum(hsv)) == 9
    assert [Energy(tau=0.01).rank(spectrum(hsv, multiple_of=multiple)) for multiple in (4, 8, 64)] == [12, 16, 40]


def test_a_share_of_the_budget_replaces_tau():
    layer = [6.0, 3.0, 1.0]
    assert Energy(tau=0.4).rank(spectrum(layer, keep=0.89)) == 2
    assert Energy(tau=0.4).rank(spectrum(layer, keep=0.95)) == 3


@pytest.mark.parametrize("policy", [Energy(tau=0.1), Shrink(0.5), FixedRank(1), Budget(states=1), ErrorBound(0.1)])
def test_hopeless_spectra_raise(policy):
    with pytest.raises(NumericalError, match="layer 'lru': all 4 Hankel singular values are zero"):
        policy.ranks({"lru": spectrum([0.0] * 4, bounded=True)})
    for bad in (math.nan, math.inf):
        with pytest.raises(NumericalError, match=r"layer 'lru'.*NaN or infinity"):
            policy.ranks({"lru": LayerSpectrum("lru", 2, torch.tensor([bad, 1.0]), "complex", bounded=True)})


def test_fixed_rank():
    layer = spectrum([1.0] * 10, multiple_of=8)
    assert [FixedRank(k).rank(layer) for k in (1, 9, 10, 11)] == [1, 9, 10, 10]
    assert FixedRank({"lru": 4}).rank(layer) == 4
    assert FixedRank({"other": 4}).rank(layer) == 10
    assert FixedRank({"other": 4}).rank(spectrum([0.0] * 3)) == 3
    with pytest.raises(ArgumentError, match=r"FixedRank: expected names of .*: a, b, got c"):
        FixedRank({"a": 1, "c": 2}).check_layers({"a": 3, "b": 3})


@given(st.integers(1, 600), st.floats(0.01, 0.99), st.integers(1, 9))
def test_shrink(rank, fraction, multiple):
    layer = spectrum([1.0] * rank, multiple_of=multiple)
    kept = Shrink(fraction, gate=1.0).rank(layer)
    wanted = max(1, math.ceil(rank * (1 - fraction) - 1e-9))
    assert kept == min(rank, math.ceil(wanted / multiple) * multiple)


def test_shrink_by_halves_is_exact():
    assert [Shrink(0.5).rank(spectrum([1.0] * n)) for n in (1, 2, 7, 8)] == [1, 1, 4, 4]
    assert Shrink(0.9).rank(spectrum([1.0] * 10)) == 1


def test_policies_are_frozen_values():
    assert Energy(tau=0.02) == Energy(tau=0.02)
    assert eval(repr(FixedRank({"a": 3}))) == FixedRank({"a": 3})
    assert isinstance(Shrink(0.1), Policy)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Energy(), "tau, keep: expected exactly one"),
        (lambda: Energy(tau=0.1, keep=0.9), "tau, keep: expected exactly one"),
        (lambda: Energy(tau=1), r"tau: expected a number in \[0, 1\), got 1"),
        (lambda: Energy(tau=-0.1), "tau"),
        (lambda: Energy(tau=math.nan), "tau.*got nan"),
        (lambda: Energy(tau=True), "tau.*got True"),
        (lambda: Energy(tau="0.1"), "tau.*got '0.1'"),
        (lambda: Energy(keep=0), r"keep: expected a number in \(0, 1\], got 0"),
        (lambda: Energy(keep=1.1), "keep"),
        (lambda: Energy(tau=0.1, gate=0), "gate"),
        (lambda: FixedRank(0), "FixedRank rank: expected a positive integer, got 0"),
        (lambda: FixedRank({"a": 2.5}), "FixedRank a: expected a positive integer, got 2.5"),
        (lambda: FixedRank(True), "FixedRank rank"),
        (lambda: Shrink(1), "fraction"),
        (lambda: Shrink(0.0), "fraction"),
        (lambda: ErrorBound(0), "value: expected a positive number, got 0"),
        (lambda: ErrorBound(math.inf), "value"),
        (lambda: ErrorBound(0.1, relative="no"), "relative: expected True or False, got 'no'"),
    ],
)
def test_out_of_range(build, match):
    with pytest.raises(ArgumentError, match=match):
        build()


def test_gentler_policies_remove_about_half_as_much():
    assert Energy(tau=0.2, gate=0.9).gentler() == Energy(tau=0.1, gate=0.9)
    assert Shrink(0.5, gate=0.9).gentler() == Shrink(0.25, gate=0.9)
    layer = LayerSpectrum("lru", 20, torch.linspace(1, 0.1, 40, dtype=torch.float64), "real")
    ranks, policy = [], FixedRank(5)
    for _ in range(5):
        ranks.append(policy.ranks({"lru": layer})["lru"])
        policy = policy.gentler()
    assert ranks == [5, 13, 17, 19, 20]
    assert FixedRank(5).gentler().ranks({"lru": replace(layer, multiple_of=8)}) == {"lru": 16}
    assert FixedRank(20).gentler().ranks({"lru": layer}) == {"lru": 20}
    assert HalfWay(Energy(tau=0.2)).budget == 0.8
    with pytest.raises(ArgumentError, match="FixedRank"):
        FixedRank({"other": 3}).gentler().check_layers({"lru": Layer("lru", 8)})


def test_layer_policies_answer_layer_by_layer():
    spectra = {name: spectrum([1.0] * count + [0.0] * 9, name=name) for name, count in (("a", 3), ("b", 5))}
    assert Energy(tau=0.01).ranks(spectra) == {"a": 3, "b": 5}
    assert FixedRank({"b": 2}).ranks(spectra) == {"a": 12, "b": 2}


class Says(Policy):
    def __init__(self, answer):
        self.answer = answer

    def ranks(self, spectra):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        ({"a": 1}, "one for a"),
        ({"a": 1, "b": 1, "c": 1}, "one for a, b, c"),
        ({}, "one for none"),
        ([1, 1], "list"),
        (None, "NoneType"),
    ],
)
def test_answers_must_name_every_layer(answer, got):
    spectra = {name: spectrum([1.0, 0.5], name=name) for name in "ab"}
    for policy in (Says(answer), HalfWay(Says(answer))):
        with pytest.raises(ArgumentError, match=rf"policy: expected a rank for each of the layers a, b, got {got}$"):
            ask(policy, spectra)


def test_answers_are_checked_and_put_into_the_order_of_the_layers():
    spectra = {name: spectrum([1.0, 0.5], name=name) for name in "ab"}
    assert list(ask(Says({"b": 1, "a": 2}), spectra).items()) == [("a", 2), ("b", 1)]
    for rank in (0, 3, True, 1.0):
        with pytest.raises(ArgumentError, match="policy: expected a rank between 1 and 2 for layer 'b'"):
            ask(Says({"a": 1, "b": rank}), spectra)


def bound_of(values, kept) -> float:
    return 2 * math.fsum(values[kept:])


@given(values, st.floats(1e-3, 10), st.booleans(), st.integers(1, 5), st.sampled_from(["real", "complex"]))
def test_error_bound_keeps_the_smallest_rank_within_it(hsv, value, relative, multiple, convention):
    layer = spectrum(hsv * 2, convention, multiple_of=multiple, bounded=True)
    rank, width = ErrorBound(value, relative).rank(layer), 2 if convention == "real" else 1
    limit = value * float(layer.hsv[0]) if relative else value
    exact = layer.hsv.tolist()
    assert bound_of(exact, width * rank) <= limit * (1 + 1e-12)
    fewer = (math.ceil(rank / multiple) - 1) * multiple
    assert fewer < 1 or bound_of(exact, width * fewer) > limit * (1 - 1e-12)
    assert rank == layer.rank or rank % multiple == 0


def test_error_bound_relative_to_the_largest_value():
    layer = spectrum([8.0, 2.0, 0.5, 0.5], bounded=True)  # bounds 22, 6, 2, 1, 0
    assert [ErrorBound(v).rank(layer) for v in (6 / 8, 0.74, 2 / 8, 0.1)] == [1, 2, 2, 4]
    assert [ErrorBound(v, relative=False).rank(layer) for v in (6, 5.9, 1, 0.1)] == [1, 2, 3, 4]
    assert ErrorBound(0.2).gentler() == ErrorBound(0.1)
    assert ErrorBound(0.2, relative=False).gentler() == ErrorBound(0.1, relative=False)


def test_error_bound_refuses_spectra_that_bound_nothing():
    with pytest.raises(ArgumentError, match=r"ErrorBound for layer 'lru', whose spectrum would bound no error.*Drop calib"):
        ErrorBound(0.1).ranks({"lru": spectrum([1.0, 0.5])})
    with pytest.raises(ArgumentError, match="layer 'b'"):
        ErrorBound(0.1).gentler().check_layers({"a": Layer("a", 3, bounded=True), "b": Layer("b", 3)})
