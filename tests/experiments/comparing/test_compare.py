"""compressm compare: its runs, what tuning may see, interruptions, and what is said at the end."""

from __future__ import annotations

import io
import json
import signal
import time

import pytest
import torch
from experiments.cli_cases import run, spawn, timeless
from experiments.report_cases import Page
from rich.console import Console

from compressm.errors import ConfigError
from compressm.experiments import comparing, declared
from compressm.experiments.comparing.design import Job
from compressm.experiments.comparing.execution import execute
from compressm.experiments.comparing.jobs import make_task
from compressm.experiments.comparing.records import read_entry

SIZES = {
    "steps": 12, "batch_size": 4, "d_state": 8, "rank": 3, "sequences": 24, "length": 16, "log_every": 4, "eval_every": 4,
    "timing_rounds": 2, "calibration_sequences": 4,
}  # fmt: skip
METHODS = ["compressed", "distilled"]
TUNING = (1.0, 3.0, 1e9)  # the last diverges


def design(methods=METHODS, seeds=2, multiples=TUNING, **overrides):
    return comparing.plan("sysid", {**SIZES, **overrides}, methods, seeds=seeds, multiples=multiples, tuning_seeds=1)


def command(out, *more, seeds=2):
    sizes = [part for key, value in SIZES.items() for part in ("--set", f"{key}={value}")]
    tuned = ["--tune", "lr=1,3,1e9", "--tune-seeds", "1"]
    return ["compare", "sysid", "--methods", ",".join(METHODS), "--seeds", seeds, *tuned, *sizes, "--out", out, *more]


def quietly(design, out, stopped=lambda: False, **options):
    return comparing.run(design, out, Console(file=io.StringIO()), stopped, **options)


def records(out):
    found = {path.relative_to(out).as_posix(): timeless(json.loads(path.read_text())) for path in out.glob("*/*.json")}
    for record in found.values():
        for point in record["run"]["curve"]:
            assert "seconds_per_step" not in point
    return found


class Nobody:
    """Looks on, and counts the runs."""

    done = 0

    def started(self, job, steps): ...

    def stepped(self, job, step): ...

    def finished(self, job):
        self.done += 1


def prepared(design, out):
    design.write(out)
    return design


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sysid"
    result = run(*command(out))
    assert result.exit_code == 0, result.output
    return out, result.output


def test_every_run_leaves_a_record(finished):
    out, output = finished
    methods = [*METHODS, "full"]  # the last teaches
    expected = {f"runs/{name}-seed{seed}.json" for name in methods for seed in (0, 1)}
    expected |= {f"tuning/{name}-seed1000000-lr{lr}.json" for name in methods for lr in ("1", "3", "1e+09")}
    found = records(out)
    assert found.keys() == expected
    for key, record in found.items():
        assert record["tuning"] == key.startswith("tuning/")
        assert {"torch", "numpy", "scipy"} <= record["versions"].keys()
        assert {"preset", "commit", "settings", "dataset", "state_bytes"} <= record.keys()
    entry = read_entry(out / "runs" / "compressed-seed1.json")
    assert (entry.seed, entry.run.final_states, entry.state_bytes) == (1, (3,), 3 * 8)
    assert entry.machine["torch"] == torch.__version__
    taught = [read_entry(out / "runs" / f"{name}-seed0.json") for name in ("distilled", "full")]
    assert taught[0].seconds_teachers == taught[1].run.final.seconds_training > 0
    assert taught[0].seconds_training > taught[0].run.final.seconds_training
    assert taught[1].seconds_teachers == 0
    assert {step["name"] for step in json.loads((out / "timing.json").read_text())["steps"]} == set(methods)
    assert "15/15" in output


def test_the_best_rate_on_other_seeds_is_that_of_the_report(finished):
    out, output = finished
    assert "diverged" in output
    for name in (*METHODS, "full"):
        tried = {lr: read_entry(out / "tuning" / f"{name}-seed1000000-lr{lr:g}.json") for lr in TUNING}
        assert tried[1e9].diverged
        assert tried[1e9].score is None
        best = min((1.0, 3.0), key=lambda lr, tried=tried: tried[lr].score)
        for seed in (0, 1):
            entry = read_entry(out / "runs" / f"{name}-seed{seed}.json")
            assert (entry.lr_multiple, entry.settings["lr"]) == (best, 0.01 * best)
    arms = {arm["name"]: arm for arm in json.loads((out / "compare.json").read_text())["arms"]}
    assert [tried["score"] is None for tried in arms["distilled"]["tuned"]] == [False, False, True]


def test_tuning_sees_neither_the_seeds_nor_the_test_data_of_the_report(tmp_path):
    plan = design(seeds=3)
    reported = {job.seed for job in plan.report_jobs()}
    tuned = {job.seed for name in plan.methods for job in plan.tuning_jobs(name)}
    assert reported == {0, 1, 2}
    assert tuned == {1_000_000}
    for preset in ("sysid", "digits"):
        sizes = SIZES if preset == "sysid" else {"steps": 20}
        plan = comparing.plan(preset, sizes, ["full"], seeds=1, multiples=(1, 2), tuning_seeds=1)
        whole = make_task(plan, Job("full", 1_000_000), 1.0).data
        part = make_task(plan, Job("full", 1_000_000, 1.0), 1.0).data
        test = {tuple(row.flatten().tolist()) for row in part.test_x}
        train = {tuple(row.flatten().tolist()) for row in part.train_x}
        assert test | train == {tuple(row.flatten().tolist()) for row in whole.train_x}
        assert len(part.test_x) + len(part.train_x) == len(whole.train_x)
        assert not test & {tuple(row.flatten().tolist()) for row in whole.test_x}


def test_a_comparison_stopped_anywhere_goes_on_to_the_same_records(finished, tmp_path):
    whole, plan, counts = records(finished[0]), design(seeds=1, multiples=TUNING[:2]), []
    for after in (3, 60, 1000):
        calls = []

        def stopped(calls=calls, after=after):
            calls.append(1)
            return len(calls) >= after

        done = execute(plan, tmp_path, Nobody(), stopped) if counts else quietly(plan, tmp_path, stopped)
        counts.append(len(records(tmp_path)))
        assert bool(done) == (after == 1000)
    assert counts == [0, counts[1], 9]
    assert 0 < counts[1] < 9
    assert all(whole[key] == record for key, record in records(tmp_path).items())


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--jobs", 2)])
def test_killed_and_started_again_equals_uninterrupted(finished, tmp_path, more):
    out, _ = finished
    where = tmp_path / "runs"
    process = spawn(*command(where, *more))
    try:
        deadline = time.monotonic() + 300
        while not list(where.glob("tuning/*.json")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)  # the end of its output: no worker lives on
    assert 0 < len(records(where)) < len(records(out))
    again = run(*command(where, *more))
    assert again.exit_code == 0
    assert "Paired differences" in again.output
    assert records(where) == records(out)


def test_seeds_and_methods_may_be_added_and_nothing_else_changed(finished, tmp_path):
    for other in (design(multiples=(1.0, 2.0)), design(steps=13)):
        with pytest.raises(ConfigError, match=r"holds a comparison with another (multiples|overrides)"):
            quietly(other, finished[0])
    prepared(design(steps=13), tmp_path)  # stopped before a run began: nothing is taken over
    assert execute(prepared(design(["full"], seeds=1, multiples=()), tmp_path), tmp_path, Nobody(), lambda: False)
    first = (tmp_path / "runs" / "full-seed0.json").stat().st_mtime_ns
    more = quietly(design(["full", "small"], seeds=2, multiples=()), tmp_path)
    assert [len(arm.entries) for arm in more.arms] == [2, 2]
    assert (tmp_path / "runs" / "full-seed0.json").stat().st_mtime_ns == first


def test_the_end_of_the_budget_leaves_a_report_of_what_is_done(tmp_path):
    plan = design(["full", "small"], seeds=3, multiples=())
    assert quietly(plan, tmp_path, budget=0.0) is None
    display = Nobody()
    assert not execute(plan, tmp_path, display, lambda: display.done == 3)
    found = quietly(plan, tmp_path, budget=0.0)
    assert (found.missing, [len(arm.entries) for arm in found.arms], found.pairs[0].difference.count) == (3, [2, 1], 1)
    assert "3 of 6 runs are missing" in (tmp_path / "compare.html").read_text()


def test_a_teacher_that_diverges_fails_its_student(tmp_path):
    found = quietly(design(["full", "distilled"], seeds=1, multiples=(), lr=1e9), tmp_path)
    assert [entry.diverged.split()[:2] for entry in found.entries] == [["run", "'full':"], ["takes", "over"]]
    assert found.quality is None
    assert not found.pairs
    assert "(1 diverged)" in (tmp_path / "compare.html").read_text()


def test_the_terminal_and_the_page_say_the_same(finished):
    out, output = finished
    page = Page((out / "compare.html").read_text())
    text, printed = page.text, " ".join(output.split())
    assert page.tags.count("svg") == 5
    for words in ("Compressed in training and full size: not resolved", "other seeds, on examples held out of training"):
        assert words in text
        assert words in printed
    assert "Learning rates that were tried" in text
    assert "corrected for 2 comparisons (Holm)" in printed
    assert max(map(len, output.splitlines()[:-2])) <= 100  # but for the paths at the end
    assert "…" not in output
    body = json.loads((out / "compare.json").read_text())
    assert [pair["theirs"] for pair in body["pairs"]] == ["distilled", "full"]
    assert "script" not in page.tags


def test_wrong_input_is_answered_with_what_is_right(tmp_path):
    for arguments, words in (
        (["--methods", "smal"], "did you mean 'small'"),
        (["--tune", "steps=1,2"], r"--tune: got 'steps=1,2', expected multiples of the learning rate"),
        (["--tune", "lr=2"], "at least two positive multiples"),
        (["--seeds", "0"], "expected at least 1"),
        (["--budget", "soon"], "--budget: got 'soon', expected a time such as"),
        (["--set", 'runs=["full"]'], "expected --methods"),
        (["--set", "seed=999999", "--seeds", "2"], "expected less than 1,000,000"),
    ):
        with pytest.raises(ConfigError, match=words):
            run("compare", "sysid", "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()
    assert [declared.parse_budget(text) for text in ("90s", "30m", "1.5h", "1h30m")] == [90, 1800, 5400, 5400]
