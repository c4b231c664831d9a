"""The tables of quality: those that are committed are what the script makes, and they say what the files say."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from reporting import quality
from typer.testing import CliRunner

from compressm.errors import DataError

ROOT = Path(__file__).parents[2]


def estimated(mean, error=None):
    return {"mean": mean, "error": error, "count": 1 if error is None else 3}


def arm(name, score, **more):
    return {
        "name": name, "title": f"the |{name}|", "lr_multiple": 2.0, "tuned": [], "seeds": [0, 1, 2], "scores": [],
        "score": score, "states": [8, 12, 8], "parameters": 1234.0, "state_bytes": 96.0, "seconds_training": 7.25,
        "seconds_per_step": 0.0123, "to_quality": {"reached": 0, "steps": None, "seconds": None}, **more,
    }  # fmt: skip


def pair(theirs, mean, low, high, verdict):
    difference = {"mean": mean, "error": 0.01, "low": low, "high": high, "p": 0.02, "count": 3}
    return {"ours": "compressed", "theirs": theirs, "difference": difference, "p": 0.04, "verdict": verdict}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / quality.FOLDER / "one"
    folder.mkdir(parents=True)
    design = {"preset": "recall", "overrides": {"model": "mamba", "lr": 0.5}, "multiples": [0.5, 1.0], "tuning_seeds": 2}
    arms = [
        arm("compressed", estimated(0.9, 0.012)), arm("full", estimated(0.99, 0.001)), arm("watched", estimated(0.98)),
        arm("compressed_strict", estimated(0.95, 0.1)), arm("small", estimated(0.4)), arm("drrqr", estimated(0.6, 0.02)),
        arm("ghost", None, seconds_per_step=None),
    ]  # fmt: skip
    pairs = [pair("small", 0.5, None, None, "not resolved"), pair("drrqr", 0.3, 0.1, 0.5, "better")]
    (folder / "design.json").write_text(json.dumps(design))
    (folder / "compare.json").write_text(json.dumps({"preset": "recall", "metric": "accuracy", "arms": arms, "pairs": pairs}))
    for path, name in quality.PAGES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        marks = f"<!-- quality {name}: made by make quality -->\nold\n<!-- end of quality {name} -->"
        (tmp_path / path).write_text(f"before\n\n{marks}\n\nafter\n")
    return tmp_path


def rows(text):
    return [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| ")]


def test_the_committed_tables_are_those_of_the_committed_results():
    for path, text in quality.pages(ROOT).items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path}: run make quality"


def test_pages_keep_what_is_around_the_tables_and_change_once(root):
    made = CliRunner().invoke(quality.app, [str(root)])
    assert made.exit_code == 0
    for path in quality.PAGES:
        text = (root / path).read_text()
        assert text.startswith("before\n\n<!-- quality ")
        assert text.endswith("-->\n\nafter\n")
        assert "\nold\n" not in text
    again = quality.pages(root)
    assert all((root / path).read_text() == text for path, text in again.items())


def test_the_overview_has_the_best_of_the_other_small_ones(root):
    _, _, row = rows(quality.pages(root)[Path("README.md")])
    assert row[0].startswith("| Associative recall, `model=mamba`, `lr=0.5`")
    assert row[1:4] == ["test %", "tuned", "3"]
    assert row[4:6] == ["90.00 ± 1.20", "99.00 ± 0.10"]
    assert row[6] == r"60.00 ± 2.00 (the \|drrqr\|)"
    assert row[7] == "+30.00 (+10.00 to +50.00), better |"


@pytest.mark.parametrize(("seeds", "methods"), [([0], 7), ([0, 1, 2], 4)], ids=["one seed", "no rival"])
def test_the_overview_leaves_out_what_tells_nothing_of_rivals(root, seeds, methods):
    path = root / quality.FOLDER / "one" / "compare.json"
    found = json.loads(path.read_text())
    found["arms"] = [one | {"seeds": seeds} for one in found["arms"]][:methods]
    path.write_text(json.dumps(found))
    assert not rows(quality.pages(root)[Path("README.md")])[2:]
    assert len(rows(quality.pages(root)[quality.FOLDER / "README.md"])[2:]) == methods


def test_the_details_have_every_method_and_the_command(root):
    text = quality.pages(root)[quality.FOLDER / "README.md"]
    command = next(part for part in text.split("`") if part.startswith("compressm compare"))
    assert shlex.split(command) == [
        "compressm", "compare", "recall", "--methods", "compressed,full,watched,compressed_strict,small,drrqr,ghost",
        "--seeds", "3", "--tune", "lr=0.5,1", "--tune-seeds", "2", "--set", "model=mamba", "--set", "lr=0.5",
    ]  # fmt: skip
    table = rows(text)[2:]
    assert len(table) == 7
    assert table[4][1:] == ["x2", "3", "40.00", "+50.00, not resolved", "8-12", "96", "1,234", "12.3", "7.25 |"]
    assert table[6][3:5] == ["–", "–"]
    assert table[6][8] == "–"


def test_what_cannot_be_read_is_said(root):
    page = root / "README.md"
    page.write_text("no marks")
    with pytest.raises(DataError, match=r"README\.md: expected the lines .* once, got 0 such pairs"):
        quality.pages(root)
    assert CliRunner().invoke(quality.app, [str(root)]).exit_code == 2
    found = root / quality.FOLDER / "one" / "compare.json"
    for content, words in (("{", "what compressm compare wrote"), ("{}", "no arms, metric, pairs"), ("[]", "compare.json")):
        found.write_text(content)
        with pytest.raises(DataError, match=words):
            quality.gathered(root)
