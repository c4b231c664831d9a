"""The gate: what is wrong, raises or takes too long gets no time and is told."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from benchmarking.sizes import small

from compressm import kernels
from compressm.benchmarking.cases import OPS, case, registry
from compressm.benchmarking.problems import Contender, in_slabs
from compressm.benchmarking.results import Ceilings
from compressm.benchmarking.running import measure
from compressm.benchmarking.timing import Budget, Timed
from compressm.errors import ArgumentError, ConfigError

CEILINGS = Ceilings(copy_gb_per_s=10.0, matmul_gflop_per_s=100.0, exp_g_per_s=1.0)
QUICK = Budget(seconds=0.02, fewest=2, most=2)


def ours(problem):
    return problem.built_in["compressm"]()


@pytest.mark.parametrize(("op", "passes"), [(name, passes) for name, op in OPS.items() for passes in op.passes])
def test_ours_is_right_and_timed(op, passes):
    told = []
    chosen = small(op, passes)
    outcome = measure([(chosen, {"compressm": ours})], CEILINGS, QUICK, told.append)
    assert not outcome.failed
    assert not outcome.skipped
    (result,) = outcome.results
    assert result.group == chosen.group
    assert result.error < 1e-4
    assert result.milliseconds.rounds == len(outcome.samples[chosen.group, "compressm"])
    assert (result.limit_ms is None) == (result.level == "reduction")
    assert chosen.group in told[0]


def spoiled(name, factor):
    """Ours with one answer multiplied."""

    def make(problem):
        right = ours(problem)

        def answers():
            found = right.answers()
            return {**found, name: found[name] * factor}

        return Contender(right.timed, answers)

    return make


@pytest.mark.parametrize("name", ["out", "u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_any_wrong_output_or_gradient_prints_no_time(name):
    outcome = measure([(small("selective_scan"), {"wrong": spoiled(name, 1.01), "right": ours})], CEILINGS, QUICK, print)
    assert [r.contender for r in outcome.results] == ["right"]
    assert [m.contender for m in outcome.failed] == ["wrong"]
    assert "relative error 1.0e-02" in outcome.failed[0].reason


@pytest.mark.parametrize("change", [lambda t: t * float("nan"), lambda t: t[..., :1], lambda t: t.half() * 1e30])
def test_nan_infinite_or_missing_answers_are_wrong(change):
    problem = small("selective_scan", "forward").build()
    answers = ours(problem).answers()
    assert problem.error(answers) < 1e-5
    assert not problem.error({"out": change(answers["out"])}) < 1
    assert problem.error({}) == float("inf")


def test_what_raises_is_recorded_and_the_others_go_on():
    def absent(problem):
        raise ImportError("no such package\nand more")

    def later(problem):
        calls = []

        def run():
            calls.append(1)
            if len(calls) > 9:
                raise RuntimeError("in the rounds")

        return Contender(Timed(run), ours(problem).answers)

    makers = {"absent": absent, "later": later, "ours": ours}
    outcome = measure([(small("lti_scan"), makers)], CEILINGS, Budget(seconds=0.05, fewest=30, most=30), print)
    assert {m.contender: m.reason for m in outcome.failed} == {
        "absent": "raised ImportError: no such package", "later": "raised RuntimeError: in the rounds",
    }  # fmt: skip
    assert [r.contender for r in outcome.results] == ["ours"]


def test_what_takes_too_long_is_skipped():
    def slow(problem):
        return Contender(Timed(lambda: time.sleep(0.05)), ours(problem).answers)

    outcome = measure([(small("lti_scan"), {"slow": slow})], CEILINGS, Budget(longest=0.01), print)
    assert "one call takes" in outcome.skipped[0].reason
    assert not outcome.results


@pytest.mark.parametrize("warms", [True, False])
def test_a_contender_that_its_answers_do_not_warm_gets_one_call_more(warms):
    calls = []

    def slow(problem):
        return Contender(Timed(lambda: calls.append(time.sleep(0.11))), ours(problem).answers, warms=warms)

    measure([(small("lti_scan"), {"slow": slow})], CEILINGS, QUICK, print)
    assert len(calls) == QUICK.fewest + (1 if warms else 2)


def test_what_was_imported_is_kept_from_the_garbage_collector_for_as_long_as_it_measures():
    frozen = []

    def make(problem):
        frozen.append(gc.get_freeze_count())
        return ours(problem)

    before = gc.get_freeze_count()
    measure([(small("lti_scan"), {"compressm": make})], CEILINGS, QUICK, print)
    assert frozen[0] > before + 10_000
    assert gc.get_freeze_count() == 0


def test_without_timing_answers_are_still_judged():
    outcome = measure([(small("lti_scan"), {"wrong": spoiled("out", 2.0), "ours": ours})], CEILINGS, QUICK, print, timed=False)
    assert not outcome.results
    assert [m.contender for m in outcome.failed] == ["wrong"]


def test_the_reference_in_slabs_is_the_reference():
    problem = small("selective_scan").build()

    def reference(p):
        return kernels.selective_scan(**p, delta_softplus=True, backend="reference")

    axes = {"u": 1, "delta": 1, "A": 0, "D": 0, "z": 1, "delta_bias": 0}
    for slabs in (1, 3, 16):
        answers = in_slabs(reference, problem.inputs, problem.weight, axes, 1, slabs)
        assert set(answers) == {"out", *problem.inputs}
        for name, expected in problem.oracle.items():
            torch.testing.assert_close(answers[name], expected, rtol=1e-12, atol=1e-12)


def test_the_same_case_has_the_same_inputs():
    one, other = small("mamba").build(), small("mamba").build()
    assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_registry_names_every_case_once_and_covers_the_paper(device):
    families = registry(device)
    groups = [c.group for family in families for c in family.cases]
    assert len(groups) == len(set(groups))
    assert len({family.name for family in families}) == len(families)
    steps = [c for family in families for c in family.cases if c.level == "step"]
    states = {op: {c.shape["states"] for c in steps if c.op == op} for op in {c.op for c in steps}}
    assert states == {"smnist": {256, 47, 28, 13}, "scifar": {384, 161, 93, 57}, "mamba-lm": {128, 64, 32, 16, 12}}
    assert {c.op for f in families for c in f.cases} == {name for name in OPS if device == "cpu" or name != "loop"}
    for op in ("selective_scan", "lti_scan"):
        curves = next(f for f in families if f.name.startswith(f"{op} curves"))
        for name in ("states", "length", "batch"):
            others = [tuple(v for k, v in c.sizes if k != name) for c in curves.cases]
            assert max(others.count(other) for other in others) >= 5


def test_cases_are_checked():
    sizes = dict(OPS["lru"].sizes)
    for arguments, words in (
        (("lro", sizes, "forward"), "op: got 'lro'"),
        (("lru", sizes, "step"), "pass: got 'step', expected one of forward, forward"),
        (("lru", sizes, "forward", "int8"), "dtype: got 'int8'"),
        (("smnist", OPS["smnist"].sizes, "step", "float16"), "expected one of float32, bfloat16 for smnist"),
        (("lru", {"batch": 1}, "forward"), "sizes: got batch, expected batch, length, channels, states"),
    ):
        with pytest.raises(ConfigError, match=words):
            case(*arguments)
    with pytest.raises(ArgumentError, match="states: expected a positive integer, got 0"):
        case("lru", {**sizes, "states": 0}, "forward")
