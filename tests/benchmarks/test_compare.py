"""Comparing two result files: what changed beyond the spread, what a slower machine explains, and what must not pass."""

from __future__ import annotations

import json

import pytest
from benchmarks.run_cases import CEILINGS, missing, run_of, timed
from hypothesis import given, settings
from hypothesis import strategies as st
from reporting.compare import app, compare
from typer.testing import CliRunner

from compressm.errors import ArgumentError

RUNNER = CliRunner()


def machine_at(speed):
    return CEILINGS.model_copy(update={"matmul_gflop_per_s": CEILINGS.matmul_gflop_per_s * speed})


def kinds(old, new, **options):
    return {c.new.contender: c.kind for c in compare(old, new, **options).changes}


def invoke(tmp_path, old, new, *options):
    for name, run in (("old", old), ("new", new)):
        run.save(tmp_path / f"{name}.json")
    return RUNNER.invoke(app, [str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])


def test_the_same_file_twice(tmp_path):
    run = run_of(timed(), timed(contender="jax"))
    assert set(kinds(run, run).values()) == {"same"}
    result = invoke(tmp_path, run, run, "--fail-over", "1")
    assert result.exit_code == 0
    assert "as fast as before" in result.output
    assert "compressm, 1 compared: 1 within the spread." in result.output


def test_slower_faster_and_within_the_spread(tmp_path):
    before = {"compressm": 2.0, "compressm, paper": 2.0, "jax": 2.0}
    after = {"compressm": 2.6, "compressm, paper": 1.5, "jax": 2.1}
    old, new = (run_of(*(timed(contender=name, median=t) for name, t in times.items())) for times in (before, after))
    assert kinds(old, new) == {"compressm": "slower", "compressm, paper": "faster", "jax": "same"}
    change = next(c for c in compare(old, new).changes if c.kind == "slower")
    assert change.measured == pytest.approx((1.3, 1.3 * 0.95 / 1.05, 1.3 * 1.05 / 0.95))
    assert invoke(tmp_path, old, new).exit_code == 0
    failed = invoke(tmp_path, old, new, "--fail-over", "1.10")
    assert failed.exit_code == 1
    assert "selective_scan B2 L64 N16 forward, compressm: 1.30x" in failed.output
    assert "1 slower beyond the spread, 1 faster beyond the spread" in failed.output
    assert invoke(tmp_path, old, new, "--fail-over", "1.5").exit_code == 0


def test_what_the_spread_allows_fails_nothing():
    old, new = (run_of(timed(median=t, spread=0.3)) for t in (2.0, 3.0))
    assert compare(old, new).changes[0].factor == 1.5
    assert compare(old, new).over(1.1) == []


def test_a_single_round_is_said(tmp_path):
    old, new = run_of(timed(spread=0.0, rounds=1)), run_of(timed(median=3.0))
    line = next(line for line in invoke(tmp_path, old, new).output.splitlines() if line.startswith("slower"))
    assert line.split()[-4:] == ["3.00", "1.50", "once", "1.50"]


def test_a_slower_peer_fails_nothing(tmp_path):
    old, new = (run_of(timed(), timed(contender="jax", median=t)) for t in (2.0, 9.0))
    result = invoke(tmp_path, old, new, "--fail-over", "1.10")
    assert result.exit_code == 0
    assert "Control: peers take 4.50x" in result.output


def test_a_slower_machine_explains_slower_times(tmp_path):
    old, new = run_of(timed(median=2.0)), run_of(timed(median=4.0), ceilings=machine_at(0.5))
    comparison = compare(old, new)
    assert comparison.speed == 0.5
    assert comparison.changes[0].kind == "explained"
    assert comparison.changes[0].adjusted.value == pytest.approx(1.0)
    result = invoke(tmp_path, old, new, "--fail-over", "1.10")
    assert result.exit_code == 0
    assert "The machine was 50% slower" in result.output
    worse = run_of(timed(median=6.0), ceilings=machine_at(0.5))
    assert compare(old, worse).over(1.4) == ["selective_scan B2 L64 N16 forward, compressm: 1.50x"]


def test_a_faster_machine_may_hide_slower_code(tmp_path):
    old, new = run_of(timed(median=2.0)), run_of(timed(median=2.0), ceilings=machine_at(2.0))
    assert kinds(old, new) == {"compressm": "unclear"}
    result = invoke(tmp_path, old, new)
    assert "The machine was 100% faster" in result.output
    assert "unclear" in result.output


def test_lost_gained_redefined_and_failed(tmp_path):
    group = "selective_scan B2 L64 N16 forward"
    old = run_of(timed(), timed(contender="jax"), timed(contender="gone"), timed(group="g", states=4))
    new = run_of(
        timed(contender="new"), timed(group="g", states=8), skipped=[missing("jax", "not installed")],
        failed=[missing("compressm", "wrong: error 1")],
    )  # fmt: skip
    comparison = compare(old, new)
    assert comparison.lost == (
        (group, "compressm", "failed: wrong: error 1"), (group, "jax", "skipped: not installed"),
        (group, "gone", "not in the new file"),
    )  # fmt: skip
    assert comparison.gained == ((group, "new"),)
    assert comparison.redefined == (("g", "compressm"),)
    assert comparison.changes == ()
    assert invoke(tmp_path, old, new).exit_code == 0
    result = invoke(tmp_path, old, new, "--fail-over", "10")
    assert result.exit_code == 1
    for words in (f"{group}, jax (skipped: not installed)", f"{group}, new", "g, compressm"):
        assert words in result.output, words


def test_a_case_left_out_of_a_partial_run_is_no_failure():
    assert compare(run_of(timed(), timed("lti_scan")), run_of(timed())).over(1.0) == []


def test_other_machines_are_refused_unless_forced(tmp_path):
    old, new = run_of(timed()), run_of(timed(median=9.0), cpu="Other CPU", threads=64)
    with pytest.raises(ArgumentError, match=r"cpu Test CPU and Other CPU; threads 2 and 64.*--force"):
        compare(old, new)
    assert kinds(old, new, force=True) == {"compressm": "slower"}
    assert invoke(tmp_path, old, new).exit_code == 2
    assert "Other CPU" in invoke(tmp_path, old, new, "--force").output


def test_other_formats_and_thresholds_are_refused(tmp_path):
    run = run_of(timed())
    invoke(tmp_path, run, run)
    body = json.loads((tmp_path / "new.json").read_text()) | {"format": 7}
    (tmp_path / "new.json").write_text(json.dumps(body))
    refused = RUNNER.invoke(app, [str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert refused.exit_code == 2
    assert "new.json: format" in refused.output
    assert "--fail-over" in invoke(tmp_path, run, run, "--fail-over", "0.9").output


def test_versions_that_changed_are_named(tmp_path):
    result = invoke(tmp_path, run_of(timed()), run_of(timed(), torch="2.14.0", versions={"jax": "0.11", "[red]x": "1"}))
    rows = [line.split() for line in result.output.splitlines()]
    for row in (["torch", "2.13.0", "2.14.0"], ["jax", "0.10.2", "0.11"], ["[red]x", "none", "1"]):
        assert row in rows, row


TIMES = st.dictionaries(st.sampled_from(["compressm", "jax", "loop", "compressm, paper"]), st.floats(1e-3, 1e4))


@settings(max_examples=60, deadline=None)
@given(TIMES, TIMES, st.floats(0.0, 0.9), st.floats(0.25, 4.0))
def test_there_and_back(before, after, spread, speed):
    old, new = (
        run_of(*(timed(contender=name, median=t, spread=spread) for name, t in times.items()), ceilings=machine_at(fast))
        for times, fast in ((before, 1.0), (after, speed))
    )
    opposite = {"slower": "faster", "faster": "slower"}
    there, back = kinds(old, new), kinds(new, old)
    assert set(there) == set(before) & set(after)
    for name, kind in there.items():
        assert back[name] == opposite.get(kind, kind)
    assert len(compare(old, new).lost) == len(compare(new, old).gained)
