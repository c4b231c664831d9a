"""The site says what is so: the code of its pages runs and prints what they show, commands exist, links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from compressm.adapters import GATED_DELTA_NETS, KIMI_DELTAS, TRANSFORMERS, supported_layers
from compressm.adapters.registry import _ADAPTERS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts}
PAGES["README.md"] = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = {
    "tutorials/transformers.md": ("transformers", "accelerate"),
    "tutorials/after_training.md": ("transformers",),
    "tutorials/own_loop.md": ("sklearn",),
}


@dataclass(frozen=True)
class Block:
    """Some code of a page.

    Attributes:
        language: as the fence says.
        text: between the fences.
        line: of its first.
        shown: the page's word for what it prints: a block of text right behind it; None: there is none.
    """

    language: str
    text: str
    line: int
    shown: str | None


def blocks(path):
    text = path.read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    for block, after in zip(found, (*found[1:], None), strict=False):
        shown = None
        if after is not None and after[1] == "text" and not text[block.end() : after.start()].strip():
            shown = after[2]
        yield Block(block[1], block[2], text.count("\n", 0, block.start(2)) + 1, shown)


def outline(text):
    """What is printed, without its numbers, widths and kernels: those differ from machine to machine."""
    text = re.sub(r"; kernel .*", "", text)
    return re.sub(r"-?\d[\d,.]*(e[-+]\d+)?", "#", " ".join(text.split()))


def code(path):
    return [block for block in blocks(path) if block.language == "python"]


SLOW = ("tutorials/transformers.md", "tutorials/own_loop.md", "tutorials/after_training.md")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page, path in PAGES.items() if code(path)]
)
def test_code_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page, ()):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in code(PAGES[page]):
        printed = io.StringIO()
        program = compile("\n" * (block.line - 1) + block.text, str(PAGES[page]), "exec")
        with contextlib.redirect_stdout(printed):
            exec(program, names)
        assert outline(block.shown or "") == outline(printed.getvalue()), f"{page}, line {block.line}:\n{printed.getvalue()}"


def test_commands_exist_and_take_their_options():
    from typer.main import get_command

    from compressm.cli import app

    command, seen = get_command(app), 0
    for page, path in PAGES.items():
        lines = [line for block in blocks(path) if block.language == "bash" for line in block.text.splitlines()]
        for line in lines:
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program == "compressm":
                seen += 1
                with command.make_context("compressm", list(arguments)) as context:
                    name, found, rest = command.resolve_command(context, arguments)
                    assert found is not None, f"{page}: {line}"
                    found.make_context(name, rest, parent=context)
    assert seen > 10


def test_every_make_target_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, path in (*PAGES.items(), ("CONTRIBUTING.md", ROOT / "CONTRIBUTING.md")):
        for block in blocks(path):
            if block.language == "bash":
                assert set(re.findall(r"^make ([\w-]+)", block.text, re.MULTILINE)) <= targets, page


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
        assert "://" in target or (ROOT / target).exists(), target


def test_every_public_module_has_a_place_in_the_reference():
    written = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"automodule:: ([\w.]+)", written))
    integrations = {path.stem for path in (ROOT / "compressm/integrations").glob("[a-z]*.py")} - {"resizing"}
    public = {"compressm", *(f"compressm.integrations.{name}" for name in integrations)}
    import compressm

    public |= {f"compressm.{name}" for name in compressm._SUBMODULES}
    assert public <= documented


@pytest.mark.parametrize(
    "package", [f"compressm{name}" for name in ("", ".adapters", ".compression", ".control", ".kernels", ".layers")]
)
def test_every_public_name_says_what_it_is(package):
    """The reference leaves out what has no docstring of its own."""
    module = importlib.import_module(package)
    for name in module.__all__:
        thing = getattr(module, name)
        assert not (callable(thing) or isinstance(thing, type)) or (thing.__doc__ or "").strip(), f"{package}.{name}"


def test_the_table_of_supported_classes_is_the_registry():
    lines = PAGES["reference/adapters.md"].read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if re.match(r"\|.*\| `\w+\.[\w.]+` \|$", line)]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert sorted(row[-1] for row in rows) == list(supported_layers())
    mixers = {"transformers.models.mamba.modeling_mamba.MambaMixer", *TRANSFORMERS, *GATED_DELTA_NETS, *KIMI_DELTAS}
    for _, becomes, ours, cpu, gpu, name in rows:
        maps = bool(_ADAPTERS[name].forms) and (name.startswith("compressm.") or name in mixers)
        forms = [*["strict"] * (name not in KIMI_DELTAS), *["projected"] * maps]
        known = {"compressm": "always", "mamba_ssm": "patch"}.get(name.partition(".")[0], "never")
        assert (becomes, ours) == (", ".join(forms), "accelerate_" if name in mixers else known), name
        assert (cpu, gpu) == ("its own", "its own") if ours == "never" else cpu.startswith("C++"), name


@pytest.mark.parametrize("page", PAGES)
def test_names_in_prose_exist(page):
    """``compressm.control.PeakGain`` and the like."""
    text = PAGES[page].read_text(encoding="utf-8").replace("`compressm.json`", "")
    for dotted in re.findall(r"`compressm((?:\.\w+)+)[`(]", text):
        parts, thing = dotted.strip(".").split("."), importlib.import_module("compressm")
        for place, part in enumerate(parts):
            if not hasattr(thing, part):
                importlib.import_module(".".join(["compressm", *parts[: place + 1]]))
            thing = getattr(thing, part)


def test_what_the_site_needs_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.partition("=")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for line in project["optional-dependencies"]["docs"]:
        name = re.split(r"[<>=\[]", line)[0]
        assert name == "compressm" or name.lower() in pinned, name
