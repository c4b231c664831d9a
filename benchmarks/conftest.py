"""pytest-benchmark reports what interleaved rounds measured.

All contenders of a family are measured together when the first of them is reached.  Every test then hands the samples of its
contender to pytest-benchmark through a clock that shows them again: its tables and our result files hold the same figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # jax would take three quarters of a GPU's memory

from suite import Suite, entries, results_path

from compressm.benchmarking.timing import Budget


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("compressm")
    group.addoption("--bench-device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--bench-seconds", type=float, default=Budget.seconds, help="of every contender's samples")
    group.addoption("--bench-out", type=Path, help="result file [results/KIND.json, of a part results/partial/KIND.json]")
    group.addoption("--bench-resume", action="store_true", help="keep what the result file holds of this machine and commit")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        found = entries(metafunc.config.getoption("--bench-device"))
        metafunc.parametrize("entry", found, ids=["_".join(f"{e.case.group}-{e.contender}".split()) for e in found])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # of packages that are not ours


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Suite:
    """The measurements of this session."""
    option = request.config.getoption
    device = option("--bench-device")
    selected = [item.callspec.params["entry"] for item in request.session.items if "entry" in item.fixturenames]
    path = option("--bench-out") or results_path(device, len(selected) == len(entries(device)))
    budget, timed = Budget(seconds=option("--bench-seconds")), not option("--benchmark-disable")
    return Suite(device, budget, path, selected, timed, option("--bench-resume"), _printer(request))


def _printer(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line past pytest's capture of output."""
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")

    def tell(text: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(text)
            reporter.flush()

    return tell


