"""Shared by the tests of experiments."""

from __future__ import annotations

import pytest
from experiments.report_cases import image_report


@pytest.fixture
def data():
    """A report of all four runs on images."""
    return image_report()


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory):
    """A small folder of .py files, with parts that a dataset leaves out."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(60):
        path = root / f"package{number % 4}" / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"def f{number}(x):\n    return x * {number}\n" * 20)
    for left_out in ("site-packages/other", "package1/tests", "test", "__pycache__"):
        (root / left_out).mkdir(parents=True)
        (root / left_out / "hidden.py").write_text("hidden = True\n")
    (root / "package0" / "notes.txt").write_text("not source")
    return root
