"""The core runs without the packages of the extras, and what needs them says which extra to install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import compressm
from compressm.errors import EXTRAS, DependencyError, needs_extra

ROOT = Path(compressm.__file__).parents[1]
EVERYTHING = tuple(name for packages in EXTRAS.values() for name in packages)
REMEDY = "Install it with pip install 'compressm[{}]'"
COMMAND = """
import contextlib, io, json
from compressm.__main__ import main
answers = {}
for line in LINES:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["compressm", *line.split()]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main()
    answers[line] = out.getvalue(), err.getvalue()
print(json.dumps(answers))
"""


def without(packages, code, cwd):
    """What a process prints that cannot import some packages."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({tuple(packages)!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{hide}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(packages, lines, cwd):
    """(stdout, stderr) of commands by their arguments, in a process that cannot import some packages."""
    return json.loads(without(packages, f"LINES = {lines!r}\n{COMMAND}", cwd).splitlines()[-1])


def missing(package, extra="train", what="the command"):
    return f"{what}: {package} is not installed. {REMEDY.format(extra)}"


def test_the_table_of_packages_is_what_the_extras_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        listed = {re.split("[<>=!~;]", line)[0] for line in project["optional-dependencies"][extra]}
        assert set(packages.values()) == listed
    core = {re.split("[<>=!~;]", line)[0] for line in project["dependencies"]}
    assert core == {"torch", "triton", "numpy", "ninja", "filelock", "safetensors", "rich"}


def test_the_core_works_without_the_extras(tmp_path):
    code = """
import torch, compressm
from compressm.errors import DependencyError
model = compressm.layers.LRU(4, 8)
optimizer = torch.optim.AdamW(model.parameters())
compressor = compressm.Compressor(model, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([1]))
model(torch.randn(2, 9, 4)).square().mean().backward()
optimizer.step()
print(compressor.step())
compressm.save("model.safetensors", model, optimizer=optimizer, compressor=compressor)
again = compressm.layers.LRU(4, 8)
compressm.load("model.safetensors", again)
assert again.d_state == model.d_state == 3
found = compressm.inspect(again)
print(found)
try:
    found.plot("spectra.png")
except DependencyError as error:
    print("plot:", error)
"""
    printed = without(EVERYTHING, code, tmp_path)
    assert "8 -> 3" in printed
    assert "3 states" in printed
    assert printed.splitlines()[-1] == f"plot: {missing('matplotlib', what='Inspection.plot')}"
    assert not (tmp_path / "spectra.png").exists()


def test_every_command_says_what_is_missing(tmp_path):
    lines = ["", "--help", "train digits", "compare digits", "report .", "inspect x.safetensors", "bench lru"]
    for line, printed in answers(EVERYTHING, lines, tmp_path).items():
        assert printed == ["", f"compressm: {missing('typer')}\n"], line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("pydantic", "bench lru"),
        ("matplotlib", "train digits"),
        ("jinja2", "report ."),
        ("sklearn", "train digits --steps 20"),
        ("pooch", "train smnist --steps 20"),
        ("scipy", "compare sysid"),
    ],
)
def test_a_part_of_the_extra_is_named(package, line, tmp_path):
    _, printed = answers([package], [line], tmp_path)[line]
    assert printed == f"compressm: {missing(EXTRAS['train'][package])}\n"


@pytest.mark.parametrize("package", ["transformers", "accelerate", "lightning"])
def test_integrations_say_what_is_missing(package, tmp_path):
    code = f"""
from compressm.errors import DependencyError
try:
    import compressm.integrations.{package}
except DependencyError as error:
    print(error)
"""
    printed = without(EVERYTHING, code, tmp_path).strip()
    assert printed == missing(package, "integrations", f"compressm.integrations.{package}")


def test_other_missing_modules_are_no_ones_extra():
    with pytest.raises(ModuleNotFoundError, match="nothing") as caught, needs_extra("this"):
        import compressm.nothing  # noqa: F401
    assert not isinstance(caught.value, DependencyError)


def test_the_command_starts_without_what_takes_long_to_import(tmp_path):
    slow = {"torch", "numpy", "matplotlib", "sklearn", "jinja2", "safetensors", "transformers"}
    code = f"LINES = ['--help', '--version', 'train --help']\n{COMMAND}\nprint(sorted({slow!r} & set(sys.modules)))"
    assert without((), code, tmp_path).splitlines()[-1] == "[]"
