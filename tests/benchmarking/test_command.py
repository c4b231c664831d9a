"""compressm bench as a user meets it."""

from __future__ import annotations

import signal

import pytest
from experiments.cli_cases import run

from compressm import cli
from compressm.benchmarking import limits, op_problems
from compressm.benchmarking.cases import OPS
from compressm.benchmarking.problems import Contender
from compressm.benchmarking.request import SIZES, sizes_of_ops
from compressm.benchmarking.results import Run
from compressm.errors import ConfigError

TINY = ["--batch", "1", "--d-model", "8", "--length", "20", "--rounds", "3"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(limits, "REPEATS", 1)
    monkeypatch.setattr(limits, "MATMUL_SIZE", {"cpu": 256})
    monkeypatch.setenv("COLUMNS", "80")


def test_sizes_are_compared_with_each_other_and_with_plain_torch(tmp_path):
    path = tmp_path / "figures.json"
    result = run("bench", "selective_scan", *TINY, "--states", "16,4", "--json", path)
    assert result.exit_code == 0, result.output
    measured = Run.load(path)
    assert [(r.shape["states"], r.contender) for r in measured.results] == [
        (16, "compressm"), (16, "reference loop"), (4, "compressm"), (4, "reference loop"),
    ]  # fmt: skip
    assert {r.passes for r in measured.results} == {"forward+backward"}
    assert all(r.milliseconds.rounds == 3 and r.error < 1e-5 for r in measured.results)
    ratio = measured.results[0].milliseconds.median / measured.results[2].milliseconds.median
    assert f"{ratio:.2f}x" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "exponentials/s" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["causal_conv1d", *TINY, "--width", "3"],
        ["lru", *TINY, "--states", "4", "--pass", "forward", "--dtype", "bfloat16"],
        ["smnist", "--batch", "2", "--states", "8,4", "--rounds", "2"],
        ["balanced_truncation", "--states", "12", "--rank", "4", "--rounds", "2"],
    ],
)
def test_every_kind_of_op(arguments):
    result = run("bench", *arguments)
    assert result.exit_code == 0, result.output
    assert "compressm" in result.output


def test_the_help_names_every_op_and_its_sizes_are_known_without_torch():
    sizes = {**sizes_of_ops(cli.KERNELS), **SIZES}
    assert {name: op.sizes for name, op in OPS.items()} == sizes
    assert sorted(cli.BENCH_OPS) == sorted(sizes)
    assert "selective_state_update" in run("bench", "--help").output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["selectiv_scan"], "did you mean 'selective_scan'"),
        (["lru", "--width", "4"], "--width: has no meaning for lru, expected --batch, --length, --d-model, --states"),
        (["lru", "--batch", "0"], "--batch: got 0, expected a positive integer"),
        (["lru", "--states", "128;12"], "--states: got '128;12', expected positive integers separated by commas"),
        (["lru", "--states", "0"], "--states: got '0'"),
        (["causal_conv1d", "--states", "4"], "which keeps no states"),
        (["balanced_truncation", "--states", "8"], "expected at least the rank"),
        (["lru", "--pass", "backward"], "pass: got 'backward', expected one of forward"),
        (["lru", "--dtype", "float8"], "dtype: got 'float8'"),
        (["lru", "--device", "cudo"], "device: got 'cudo'"),
        (["lru", "--rounds", "0"], "--rounds: got 0"),
    ],
)
def test_wrong_input_is_answered_with_what_is_allowed(arguments, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        run("bench", *arguments)


def test_a_wrong_answer_has_no_time_and_an_exit_code(monkeypatch, tmp_path):
    right = op_problems.Problem.contender

    def spoiled(self, function):
        contender = right(self, function)
        return Contender(contender.timed, lambda: {n: t * 1.1 for n, t in contender.answers().items()})

    monkeypatch.setattr(op_problems.Problem, "contender", spoiled)
    path = tmp_path / "figures.json"
    result = run("bench", "lru", *TINY, "--states", "4", "--json", path)
    assert result.exit_code == 1
    assert "wrong: relative error 1.0e-01" in " ".join(result.output.split())
    assert not Run.load(path).results
    assert len(Run.load(path).failed) == 2


@pytest.fixture
def interruptible():
    """Ctrl-C reaches Python even where the shell started it in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_it_ends_quietly(monkeypatch, tmp_path):
    right = op_problems.Problem.contender

    def interrupted(self, function):
        signal.raise_signal(signal.SIGINT)
        return right(self, function)

    monkeypatch.setattr(op_problems.Problem, "contender", interrupted)
    result = run("bench", "lru", *TINY, "--json", tmp_path / "figures.json")
    assert result.exit_code == 130
    assert "stopped, nothing was written" in result.output
    assert not list(tmp_path.iterdir())
