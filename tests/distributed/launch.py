"""Runs a module of checks in processes started by torchrun, and says what each check of each rank came to."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 280


def environment() -> dict[str, str]:
    """One thread for every process, and this checkout."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def run(script: str, folder: Path, processes: int = 2) -> dict[str, str]:
    """Start ``processes`` of ``tests/distributed/<script>``; returns name of check -> "" or what went wrong, by rank.

    Raises:
        AssertionError: the launch itself failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / script), str(folder)],
        env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    files = sorted(folder.glob("result-*.json"))
    assert len(files) == processes, f"torchrun ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    results: dict[str, str] = {}
    for rank, file in enumerate(files):
        for name, text in json.loads(file.read_text()).items():
            results[name] = results.get(name, "") + (f"rank {rank}:\n{text}" if text else "")
    return results


def main(checks: list, folder: Path) -> None:
    """In a process of torchrun: run every check with (folder,) and write down what happened."""
    import pytest
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    file = folder / f"result-{dist.get_rank()}.json"
    results = {check.__name__: "did not end" for check in checks}
    for check in checks:
        file.write_text(json.dumps(results))
        results[check.__name__] = ""
        try:
            check(folder)
        except (Exception, pytest.fail.Exception):
            results[check.__name__] = traceback.format_exc()
        file.write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


def names(script: str) -> list[str]:
    """Names of the checks in a script: its functions that are decorated with ``check``."""
    tree = ast.parse((Path(__file__).parent / script).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any(getattr(d, "id", "") == "check" for d in f.decorator_list)]
