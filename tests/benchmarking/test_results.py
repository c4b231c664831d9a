"""Result files: what is written reads back equal, and what is damaged is refused."""

from __future__ import annotations

import json

import pytest

from compressm.benchmarking.results import Ceilings, Counts, Milliseconds, Missing, Result, Run
from compressm.errors import DataError

MACHINE = {"cpu": "x", "device": "cpu", "torch": "2", "commit": "abc", "date": "2026-11-25T00:00:00+00:00", "versions": {}}


def result(group="g", contender="compressm", median=2.0, limit=1.0):
    return Result(
        group=group, op="lti_scan", level="op", shape={"batch": 1, "states": 4}, dtype="float32", passes="forward",
        contender=contender, milliseconds=Milliseconds(median=median, low=1.5, high=median + 1, minimum=1.5, rounds=5),
        peak_bytes=None, error=1e-7, counts=Counts(bytes=1, flops=2, exponentials=0), limit_ms=limit, limit_by="bytes",
    )  # fmt: skip


def run_of(*results, **more):
    ceilings = Ceilings(copy_gb_per_s=20.0, matmul_gflop_per_s=300.0, exp_g_per_s=10.0)
    return Run(machine=MACHINE, ceilings=ceilings, results=results, **more)


def test_written_and_read_back(tmp_path):
    path = tmp_path / "new" / "cpu.json"
    run = run_of(result(), result(contender="jax"), skipped=[Missing(group="g", contender="mamba_ssm", reason="absent")])
    run.save(path)
    assert Run.load(path) == run
    body = json.loads(path.read_text())
    assert body["format"] == 1
    assert body["results"][0]["pass"] == "forward"
    assert body["results"][0]["milliseconds"]["median"] == 2.0
    assert run.results[0].share_of_limit == 0.5
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]


def test_a_newer_run_replaces_whole_groups():
    failed = [Missing(group="a", contender="jax", reason="wrong")]
    old = run_of(result("a"), result("b"), result("b", "jax"), failed=failed)
    new = run_of(result("b", median=9.0), result("c"))
    merged = old.merged(new)
    assert [(r.group, r.contender, r.milliseconds.median) for r in merged.results] == [
        ("a", "compressm", 2.0), ("b", "compressm", 9.0), ("c", "compressm", 2.0),
    ]  # fmt: skip
    assert merged.failed == old.failed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body.update(format=2), "format"),
        (lambda body: body["results"][0].update(level="word"), r"results\.0\.level"),
        (lambda body: body["results"].append(body["results"][0]), "occurs twice"),
        (lambda body: body["machine"].pop("commit"), "commit is missing"),
        (lambda body: body["results"][0]["milliseconds"].update(low=5.0), "minimum <= low"),
        (lambda body: body["results"][0].update(eror=1), "eror"),
        (lambda body: body.pop("ceilings"), "ceilings"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, words):
    path = tmp_path / "cpu.json"
    run_of(result()).save(path)
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match=words):
        Run.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        Run.load(tmp_path / "none.json")
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(DataError, match=r"no\.json"):
        Run.load(tmp_path / "no.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        run_of(result()).save(tmp_path / "file" / "cpu.json")
