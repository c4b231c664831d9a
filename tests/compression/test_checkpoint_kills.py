"""Training that is killed at random moments loses nothing; files of killed writers do not pile up."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fuzz import checkpoint_kills
from torch import nn

import compressm
from compressm.compression.common import files
from compressm.errors import CheckpointError
from compressm.layers import LRU

ROOT = Path(compressm.__file__).parents[1]


@pytest.mark.slow
def test_killed_runs_end_like_uninterrupted_ones():
    """A process of its own, because it forks."""
    command = [sys.executable, checkpoint_kills.__file__, "--kills", "10", "--seed", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "    10  kills\n" in done.stdout
    assert "     0  LOST: other losses" in done.stdout


def test_the_kill_test_sees_losses(tmp_path):
    """Its verdict is not empty: another loss, another file and another end are all told."""
    campaign = checkpoint_kills.Campaign(tmp_path, 0)
    assert not campaign.failed
    campaign.counts["kills"] += 1
    assert not campaign.failed
    campaign.counts["LOST: other losses"] += 1
    assert campaign.failed
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert not campaign._readable(tmp_path / "a")


@pytest.fixture
def model():
    return nn.Sequential(LRU(2, 3))


def test_leftovers_of_dead_writers_go_and_living_ones_stay(model, tmp_path):
    path = tmp_path / "a"
    dead = tmp_path / ".a.0123456789abcdef.tmp"
    dead.write_bytes(b"half")
    others = [tmp_path / ".b.0123456789abcdef.tmp", tmp_path / ".a.notes", tmp_path / "a.tmp"]
    for other in others:
        other.write_bytes(b"not ours")
    with files._temporary(path) as (descriptor, living):
        os.write(descriptor, b"half")
        compressm.save(path, model)
        assert not dead.exists()
        assert Path(living).read_bytes() == b"half"
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_many_writers_of_one_file(model, tmp_path):
    """The file is whole at every moment, and no writer takes another's half for a leftover."""
    path, errors = tmp_path / "a", []
    compressm.save(path, model)

    def write():
        try:
            for _ in range(15):
                compressm.save(path, model)
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        compressm.load(path, nn.Sequential(LRU(2, 3)))
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_permissions(model, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    (tmp_path / "latest").symlink_to(folder / "a")
    before = os.umask(0o077)
    try:
        compressm.save(tmp_path / "latest", model)
    finally:
        os.umask(before)
    assert (tmp_path / "latest").is_symlink()
    assert (folder / "a").stat().st_mode & 0o777 == 0o600
    compressm.save(tmp_path / "latest", model)
    assert (folder / "a").stat().st_mode & 0o777 == 0o666 & ~before
    with pytest.raises(CheckpointError, match="cannot be written"):
        compressm.save(folder, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "runs"]
