"""Two processes on CPU (torchrun, gloo): DistributedDataParallel and fully_shard; the checks are in ``*_checks.py``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from compressm.compression.saving.sharded import load_sharded
from compressm.errors import CheckpointError
from distributed import cases, launch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launch.run("ddp_checks.py", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def fsdp(fsdp_folder):
    return launch.run("fsdp_checks.py", fsdp_folder)


@pytest.mark.parametrize("name", [*launch.names("ddp_checks.py"), *launch.names("ddp_agreement_checks.py")])
def test_ddp(ddp, name):
    assert not ddp[name], ddp[name]


@pytest.mark.parametrize("name", launch.names("fsdp_checks.py"))
def test_fully_shard(fsdp, name):
    assert not fsdp[name], fsdp[name]


def test_one_process_reads_what_two_have_written(fsdp, fsdp_folder):
    model = cases.make("lru")
    optimizer = cases.adam(model)
    load_sharded(fsdp_folder / "shards", model, optimizer=optimizer)
    expected = torch.load(fsdp_folder / "contents.pt")
    found = cases.contents(model, optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_damaged_shards_are_reported(fsdp, fsdp_folder, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for file in (fsdp_folder / "shards").iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(data if file.suffix == ".json" else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="a part may have been read"):
        load_sharded(folder, cases.make("lru"))
    (folder / "compressm.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="was not written by save_sharded"):
        load_sharded(folder, cases.make("lru"))


def test_example():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "examples/ddp.py"]
    done = subprocess.run(
        command, cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "64 -> " in done.stdout
    assert done.stdout.count("states per layer") == 1
