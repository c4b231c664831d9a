"""The bytes of a library in three parts, and the windows that are cut from them."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch

from compressm.errors import DataError
from compressm.experiments.tasks.batches import WindowBatches
from compressm.experiments.tasks.datasets import texts
from compressm.experiments.tasks.datasets.texts import load_text, split_of


def contents(part):
    return bytes(part.tolist()).split(texts.SEPARATOR)


def test_parts_hold_every_file_once_in_sorted_order(source_folder):
    text = load_text(source_folder)
    files = sorted(path for path in source_folder.rglob("module*.py"))
    assert text.files == len(files) == 60
    expected = {name: [] for name in texts.SPLITS}
    for path in files:
        expected[split_of(path.relative_to(source_folder))].append(path.read_bytes())
    for name, part in text.splits.items():
        assert part.dtype == torch.uint8
        assert contents(part) == expected[name]
        assert expected[name]
    assert b"hidden" not in b"".join(bytes(part.tolist()) for part in text.splits.values())
    again = load_text(source_folder)
    assert again.describe() == text.describe()
    digest = hashlib.sha256(b"".join(bytes(part.tolist()) for part in text.splits.values())).hexdigest()
    sizes = {name: len(part) for name, part in text.splits.items()}
    assert text.describe() == {"name": f"Python files of {source_folder}", "files": 60, **sizes, "sha256": digest}


def test_a_file_keeps_its_part_whatever_lies_beside_it():
    shares = [split_of(Path(f"package/module{number}.py")) for number in range(4000)]
    assert [shares.count(name) / 4000 for name in texts.SPLITS] == pytest.approx([0.9, 0.05, 0.05], abs=0.015)
    assert shares[:3] == [split_of(Path("package") / f"module{number}.py") for number in range(3)]


def test_the_standard_library():
    text = load_text(None)
    facts = text.describe()
    assert facts["train"] > 5_000_000
    assert min(facts["validation"], facts["test"]) > 50_000
    assert facts["python"] in facts["name"]
    whole = b"".join(bytes(memoryview(part.numpy())) for part in text.splits.values())
    assert Path(sysconfig.get_paths()["stdlib"], "json", "decoder.py").read_bytes() in whole
    assert b"\nclass TestCase(object):" in whole  # unittest is no directory of tests


def test_missing_and_too_short_text(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no such folder.*Omit it to use Python's"):
        load_text(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"found no \.py file"):
        load_text(tmp_path)
    (tmp_path / "one.py").write_text("x = 1\n" * 100)
    other = "test" if split_of(Path("one.py")) == "train" else "train"
    with pytest.raises(DataError, match=rf"its {other} part has 0 bytes, expected at least length \+ 1 = 17"):
        load_text(tmp_path).require(other, 16)
    (tmp_path / "two.py").symlink_to(tmp_path / "two.py")
    assert load_text(tmp_path).files == 1
    for stripped, words in ((tmp_path / "gone", "no standard library as files"), (tmp_path / "zipped", "found no .py file")):
        monkeypatch.setattr(texts.sysconfig, "get_paths", lambda stripped=stripped: {"stdlib": str(stripped)})
        (tmp_path / "zipped").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=words) as caught:
            load_text(None)
        assert "Pass --data-dir" in str(caught.value)


def test_measuring_windows_are_fixed_and_predict_no_byte_twice():
    part = torch.arange(201, dtype=torch.uint8)
    text = texts.Text("text", {"test": part}, 1, "")
    windows = text.windows("test", 10, 1000)
    assert windows.shape == (20, 11)
    assert windows[:, 1:].flatten().tolist() == part[1:].tolist()
    few = text.windows("test", 10, 57)
    assert few.shape == (5, 11)
    assert few[:, 0].tolist() == [0, 40, 80, 120, 160]
    assert text.windows("test", 200, 1).tolist() == [part.tolist()]
    with pytest.raises(DataError, match="smaller length"):
        text.windows("test", 201, 1)


def test_training_windows_depend_on_seed_and_step_alone(source_folder):
    text = load_text(source_folder)
    batches, again = (WindowBatches(text, 16, 4, seed=3) for _ in range(2))
    first = [batches[step][0] for step in range(5)]
    assert all(batch.shape == (4, 17) and batch.dtype == torch.uint8 for batch in first)
    assert torch.equal(again[3][0], first[3])
    assert torch.equal(again[1][0], first[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(WindowBatches(text, 16, 4, seed=4)[0][0], first[0])
    train = bytes(text.splits["train"].tolist())
    assert all(bytes(window.tolist()) in train for batch in first for window in batch)
    drawn = batches.calibration(10)
    assert [part.shape for part in drawn] == [(4, 16), (4, 16), (2, 16)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again.calibration(10), strict=True))
    last = WindowBatches(texts.Text("t", {"train": torch.arange(18, dtype=torch.uint8)}, 1, ""), 16, 40, seed=0)[0][0]
    assert set(last[:, -1].tolist()) == {16, 17}
    with pytest.raises(DataError, match="train part"):
        WindowBatches(text, 10**7, 4, seed=0)
