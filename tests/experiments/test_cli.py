"""The command line as a user meets it: whole commands, interruptions, wrong input."""

from __future__ import annotations

import errno
import json
import os
import signal
import time

import pytest
from experiments.cli_cases import run, spawn, timeless

import compressm
from compressm.errors import CheckpointError, CompressmError, ConfigError
from compressm.experiments.declared import parse_assignments
from compressm.experiments.settings import resolve

QUICK = ["--steps", "20", "--batch-size", "16"]
SIZES = ["d_state=8", "d_model=4", "eval_every=10", "log_every=5", "timing_rounds=2"]
SETTINGS = [part for size in SIZES for part in ("--set", size)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    result = run("train", "digits", "--out", out, *QUICK, *SETTINGS)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_train_writes_report_pictures_and_checkpoints(finished):
    out, output = finished
    names = {"command.json", "report.json", "report.html"}
    names |= {f"{name}.safetensors" for name in ("compressed", "full", "small", "small_narrow")}
    assert {path.name for path in out.iterdir()} == names
    report = json.loads((out / "report.json").read_text())
    assert [r["name"] for r in report["runs"]] == ["compressed", "full", "small", "small_narrow"]
    by_name = {r["name"]: r for r in report["runs"]}
    states = {name: list(r["final"]["states"].values()) for name, r in by_name.items()}
    assert states["full"] == [8, 8]
    assert states["compressed"] == states["small"] == states["small_narrow"]
    assert sum(states["compressed"]) < 16
    assert {s["name"] for s in report["timing"]["steps"]} == set(by_name)
    for r in report["runs"]:
        assert 0 < r["final"]["seconds_training"] <= r["final"]["seconds_total"]
        assert r["curve"][-1]["step"] == r["evaluations"][-1]["step"] == 20
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "reduced at step 4" in output
    assert "Full size" in output


def test_report_and_inspect_read_what_train_wrote(finished):
    out, _output = finished
    (out / "report.html").unlink()
    again = run("report", out).output
    assert (out / "report.html").exists()
    assert "Full size" in again
    picture = out.parent / "spectra.png"
    found = json.loads(run("inspect", out / "full.safetensors", "--json", "--plot", picture).output)
    assert [layer["states"] for layer in found["layers"]] == [8, 8]
    assert {s["gramians"] for s in found["layers"][0]["spectra"]} == {"data", "data-free"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "blocks.0.lru" in run("inspect", out / "compressed.safetensors").output
    with pytest.raises(ConfigError, match="--plot"):
        run("inspect", out / "full.safetensors", "--plot", out / "spectra.nonsense")


def test_resuming_a_finished_command_prints_it_again(finished):
    out, _ = finished
    before = timeless(json.loads((out / "report.json").read_text()))
    assert run("train", "digits", "--out", out, "--resume").exit_code == 0
    assert timeless(json.loads((out / "report.json").read_text())) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, number, monkeypatch):
    out, _ = finished
    where = tmp_path / "run"
    process = spawn("train", "digits", "--out", where, *QUICK, *SETTINGS)
    deadline = time.monotonic() + 60
    while not (where / "full.safetensors").exists() and not (where / "compressed.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    if process.returncode != 0:
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), stderr
        assert not (where / "report.json").exists()
        if number != signal.SIGKILL:
            assert "everything is saved" in stdout
            assert f"--resume --out {where}" in " ".join(stdout.split())
        with pytest.raises(ConfigError, match="unfinished digits command"):
            run("train", "digits", "--out", where, *QUICK)
    result = run("train", "digits", "--out", where, "--resume")
    assert result.exit_code == 0
    one, other = (timeless(json.loads((folder / "report.json").read_text())) for folder in (out, where))
    assert one == other


def test_resume_refuses_other_settings(finished):
    out, _ = finished
    with pytest.raises(ConfigError, match=r"steps was 20 when .* was started, got 30"):
        run("train", "digits", "--out", out, "--resume", "--steps", "30")
    with pytest.raises(ConfigError, match="holds a 'digits' command, got preset 'smnist'"):
        run("train", "smnist", "--out", out, "--resume")


def test_resume_with_nothing_there_starts(tmp_path):
    asked = [*QUICK, *SETTINGS, "--set", 'runs=["full"]', "--set", "narrow_max_phase=0.2"]  # of a method that does not run
    result = run("train", "digits", "--out", tmp_path / "new", "--resume", *asked)
    assert result.exit_code == 0
    assert "nothing to resume" in result.output
    again = run("train", "digits", "--out", tmp_path / "new", "--resume", *asked)
    assert again.exit_code == 0
    assert "nothing to resume" not in again.output


def test_wrong_input_is_one_sentence_and_leaves_nothing(tmp_path):
    for arguments, words in (
        (["train", "digit"], "did you mean 'digits'"),
        (["train", "digits", "--set", "tua=1"], "did you mean 'tau'"),
        (["train", "digits", "--steps", "40", "--set", "steps=3"], "given twice"),
        (["train", "digits", "--device", "nonsense"], "device: got 'nonsense'"),
        (["train", "digits", "--batch-size", "5000"], "expected at most 1347"),
        (["train", "smnist", "--data-dir", str(tmp_path)], "no such file"),
    ):
        out = tmp_path / "out"
        with pytest.raises(CompressmError, match=words):
            run(*arguments, "--out", out)
        assert not list(out.glob("*.safetensors"))
    for arguments in (["report", tmp_path], ["inspect", tmp_path / "none.safetensors"]):
        with pytest.raises(CompressmError, match=r"report.json|no such file"):
            run(*arguments)
    process = spawn("train", "digit")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stdout == ""
    assert stderr.startswith("compressm: preset: got 'digit'")
    assert len(stderr.splitlines()) == 1
    assert run("--version").output == f"compressm {compressm.__version__}\n"


@pytest.mark.parametrize(
    ("name", "kept", "again"), [("command.json", [], []), ("compressed.safetensors", ["command.json"], ["--resume"])]
)
def test_a_full_disk_stops_the_run_and_keeps_what_is_whole(tmp_path, monkeypatch, name, kept, again):
    replace = os.replace

    def full(source, target):
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be written \(No space left"):
            run("train", "digits", "--out", out, *QUICK, *SETTINGS)
    assert [path.name for path in out.iterdir()] == kept
    assert run("train", "digits", "--out", out, *(again or (*QUICK, *SETTINGS))).exit_code == 0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"--out .*expected a folder that can be written"):
        run("train", "digits", "--out", tmp_path / "file" / "runs", *QUICK)


@pytest.mark.parametrize("text", ["compressed,full", "compressed, full", '["compressed","full"]'])
def test_runs_are_names_between_commas_or_json(text):
    assert resolve("digits", parse_assignments([f"runs={text}"])).runs == ("compressed", "full")


def test_an_unknown_run_between_commas_is_named():
    with pytest.raises(ConfigError, match="runs: got 'smal'"):
        resolve("digits", parse_assignments(["runs=full,smal"]))
