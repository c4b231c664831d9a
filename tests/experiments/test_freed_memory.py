"""What a training command and the samples of a benchmark free stays with the process until they end."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from compressm.benchmarking.timing import Budget, Timed, interleaved, peak_bytes
from compressm.experiments import runs
from compressm.experiments.display import TrainingDisplay
from compressm.experiments.freed_memory import freed_memory_kept

SIZE = 96 << 20  # bytes: more than glibc ever keeps unasked, and at least 48 faults even with pages of 2 MiB
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE_PAGES = _SETTING.read_text().partition("[")[2].partition("]")[0] if _SETTING.exists() else ""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc that gives back")


def faults() -> int:
    """Page faults of this thread for a block as large as one that it has just freed."""
    first = b"x" * SIZE
    del first
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    second = b"x" * SIZE
    del second
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def resident() -> int:
    """Bytes that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_memory(name: str) -> int:
    """Bytes by a line of the process's accounts."""
    accounts = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    return int(accounts.partition(f"{name}:")[2].split()[0]) << 10


def test_kept_within_and_given_back_at_the_end():
    assert faults() >= 48
    before = resident()
    with freed_memory_kept() as kept:
        assert kept
        assert faults() < 8
        assert resident() - before > 0.9 * SIZE
    assert resident() - before < 0.1 * SIZE
    assert faults() >= 48


@pytest.mark.skipif(LARGE_PAGES not in ("always", "madvise"), reason="a system without large pages")
def test_on_large_pages_and_of_the_former_size_at_the_end():
    before = in_memory("VmSize")
    with freed_memory_kept():
        block = b"x" * SIZE
        assert in_memory("AnonHugePages") > 0
        del block
    assert in_memory("VmSize") - before < SIZE


def test_where_the_address_space_is_limited():
    code = (
        "import resource; from compressm.experiments.freed_memory import freed_memory_kept as kept\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (64 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\nwith kept() as was: print(was)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_given_back_when_an_error_ends_it():
    with pytest.raises(KeyboardInterrupt), freed_memory_kept():
        raise KeyboardInterrupt
    assert faults() >= 48


@pytest.mark.parametrize(("name", "value"), [("GLIBC_TUNABLES", "glibc.malloc.top_pad=131072"), ("MALLOC_MMAP_MAX_", "4")])
def test_a_user_who_tunes_malloc_is_left_alone(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with freed_memory_kept() as kept:
        assert not kept
        assert faults() >= 48


def test_tunables_of_other_parts_of_glibc_do_not_count(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=1")
    with freed_memory_kept() as kept:
        assert kept


def test_a_training_command_keeps(tmp_path):
    seen = []

    def stopped():
        seen.append(faults())
        return len(seen) == 3

    overrides = {"steps": 20, "batch_size": 16, "d_state": 8, "d_model": 4}
    command = runs.prepare("digits", overrides, tmp_path, None, resume=False, overwrite=False)
    with TrainingDisplay(Console(quiet=True), 4, "accuracy") as display, pytest.raises(runs.Interrupted):
        runs.execute(command, tmp_path, display, stopped)
    assert max(seen) < 8
    assert faults() >= 48


def test_samples_are_taken_with_memory_kept_and_peaks_without():
    seen = []
    timed = Timed(lambda: seen.append(faults()))
    interleaved({"x": timed}, {"x": 0.5}, Budget.of(3), "cpu")
    assert max(seen) < 8
    seen.clear()
    peak, _seconds = peak_bytes(timed, "cpu")
    assert min(seen) >= 48
    assert 0.9 * SIZE < peak < 1.5 * SIZE
