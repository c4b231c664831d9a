"""compressm train stdlib-lm as a user meets it, on a folder of small files."""

from __future__ import annotations

import json
import time

import pytest
from experiments.cli_cases import run, spawn, timeless

from compressm.errors import CompressmError

SIZES = {
    "blocks": 1, "d_model": 8, "d_state": 8, "rank": 3, "length": 16, "eval_bytes": 256, "eval_every": 10, "log_every": 5,
    "timing_rounds": 2, "calibration_sequences": 8, "reduce_until": 0.2,
}  # fmt: skip
TINY = ["--steps", "20", "--batch-size", "4", *(part for key, value in SIZES.items() for part in ("--set", f"{key}={value}"))]


@pytest.fixture(scope="module")
def finished(source_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lm"
    result = run("train", "stdlib-lm", "--data-dir", source_folder, "--out", out, *TINY)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_train_compares_three_runs_by_bits_per_byte(finished, source_folder):
    out, output = finished
    report = json.loads((out / "report.json").read_text())
    assert report["metric"] == "bits_per_byte"
    by_name = {entry["name"]: entry for entry in report["runs"]}
    states = {name: entry["final"]["states"] for name, entry in by_name.items()}
    assert states == {"compressed": {"blocks.0.mamba": 3}, "full": {"blocks.0.mamba": 8}, "small": {"blocks.0.mamba": 3}}
    (cut,) = by_name["compressed"]["reductions"]
    assert (cut["step"], cut["ranks"]) == (4, {"blocks.0.mamba": 3})
    assert {"bits_per_byte_before", "bits_per_byte_after"} <= cut.keys()
    assert cut["layers"][0]["gramians"] == "data"
    for entry in report["runs"]:
        assert entry["final"]["bits_per_byte"] < 8
        assert "accuracy" not in entry["final"]
    assert report["dataset"]["name"] == f"Python files of {source_folder}"
    assert len(report["dataset"]["sha256"]) == 64
    assert report["config"]["rank"] == 3
    assert "tau" not in report["config"]
    assert "selective_scan" in output
    assert "validation bits/byte" in output
    assert "less is better" in output
    assert "accuracy" not in output
    assert "Validation bits per byte by step" in (out / "report.html").read_text()


def test_report_inspect_and_resume(finished, source_folder):
    out, _ = finished
    assert "bits per byte on the test set" in " ".join(run("report", out).output.split())
    found = json.loads(run("inspect", out / "full.safetensors", "--data-dir", source_folder, "--json").output)
    assert [(layer["name"], layer["states"]) for layer in found["layers"]] == [("blocks.0.mamba", 8)]
    assert "data" in {spectrum["gramians"] for spectrum in found["layers"][0]["spectra"]}
    before = timeless(json.loads((out / "report.json").read_text()))
    assert run("train", "stdlib-lm", "--out", out, "--resume").exit_code == 0
    assert timeless(json.loads((out / "report.json").read_text())) == before


def test_small_runs_need_no_compressed_one(source_folder, tmp_path):
    only = ["--set", 'runs=["full", "small"]']
    assert run("train", "stdlib-lm", "--data-dir", source_folder, "--out", tmp_path, *TINY, *only).exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [list(entry["final"]["states"].values()) for entry in report["runs"]] == [[8], [3]]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(finished, source_folder, tmp_path):
    out, _ = finished
    where = tmp_path / "run"
    process = spawn("train", "stdlib-lm", "--data-dir", source_folder, "--out", where, *TINY)
    deadline = time.monotonic() + 60
    while not (where / "compressed.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=60)
    assert run("train", "stdlib-lm", "--out", where, "--resume").exit_code == 0
    one, other = (timeless(json.loads((folder / "report.json").read_text())) for folder in (out, where))
    assert one == other


def test_wrong_input_is_one_sentence_and_leaves_nothing(source_folder, tmp_path):
    for arguments, words in (
        (["--set", "narrow_max_phase=0.3"], "narrow_max_phase has no meaning for the dataset 'stdlib'"),
        (["--set", "lengths=3"], "did you mean 'length'"),
        (["--set", "rank=500"], "must be below d_state"),
        (["--data-dir", tmp_path / "none"], "no such folder"),
        (["--data-dir", tmp_path], r"found no \.py file"),
        (["--data-dir", source_folder, "--set", "length=100000"], "train part has"),
    ):
        with pytest.raises(CompressmError, match=words):
            run("train", "stdlib-lm", "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()
