"""The machine's own tools on our kernels: compute-sanitizer, Nsight Compute and the project's tests."""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from gpu.jobs import Job, own
from gpu.session import Part, Session
from gpu.tunables import tunables

SANITIZERS = ("memcheck", "racecheck")
METRICS = (
    "gpu__time_duration.sum", "smsp__inst_executed.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active", "smsp__inst_executed_pipe_xu.sum",
    "l1tex__throughput.avg.pct_of_peak_sustained_active", "launch__registers_per_thread", "dram__bytes.sum",
)  # fmt: skip
TESTS = Path(__file__).parents[2] / "tests" / "kernels"


def sanitizer_jobs(session: Session, part: Part, folder: Path) -> list[Job]:
    """A job for every sanitizer, if the machine has them."""
    program = shutil.which("compute-sanitizer")
    if program is None or session.device != "cuda":
        part.skip("compute-sanitizer", "not on this machine" if program is None else "it needs a GPU")
        return []
    exact = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # every tensor its own allocation, whose edges are watched
    return [
        own(
            session, "small", tool, 150, folder, under=(program, "--tool", tool, "--print-limit", "20"),
            environment=exact if tool == "memcheck" else (),
        )
        for tool in SANITIZERS
    ]  # fmt: skip


def judge_sanitizer(tool: str, outcome: dict[str, Any], part: Part) -> None:
    """Errors that it found are failures; a tool that cannot run here is skipped."""
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", outcome["log"])
    launched = len(outcome["rows"])
    if found is None or "not supported" in outcome["log"]:
        part.skip(tool, f"no verdict (exit code {outcome['code']}): {outcome['log'][-300:]}")
    elif int(found[1]) or not launched:
        part.fail(tool, f"{found[0]}, {launched} problems launched: {outcome['log'][-1500:]}")
    part.add("tools", {"tool": tool, "errors": None if found is None else int(found[1]), "launched": launched,
                       "seconds": outcome["seconds"]})  # fmt: skip


def test_job(session: Session) -> Job:
    """The project's tests of the Triton kernels, on the device; a smoke run only asks for pytest's version."""
    files = sorted(str(path) for path in TESTS.glob("test_*_triton.py"))
    spread = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    wanted = session.pick(["-p", "no:cacheprovider", *spread, *files], ["--version"])
    command = (sys.executable, "-m", "pytest", *wanted)
    return Job("pytest", command, session.pick(200.0, 600.0), gigabytes=8)


def judge_tests(outcome: dict[str, Any], part: Part) -> None:
    """Failed tests are failures; tests that did not end in time are skipped."""
    words = re.findall(r"(\d+) (passed|failed|error|skipped)", outcome["log"])
    counts = {word: int(number) for number, word in words}
    part.add("tools", {"tool": "pytest", "code": outcome["code"], "seconds": outcome["seconds"], **counts})
    if outcome["code"] is None:
        part.skip("pytest", f"stopped after {outcome['seconds']} s")
    elif outcome["code"] != 0:
        part.fail("pytest", outcome["log"][-3000:])


def profile_job(session: Session, part: Part, folder: Path) -> Job | None:
    """Hardware counters of the scans, where ncu is; clocks stay as they are."""
    program = shutil.which("ncu")
    if program is None or session.device != "cuda":
        part.skip("ncu", "not on this machine" if program is None else "it needs a GPU")
        return None
    names = "|".join(sorted({tunable.kernel.__name__ for tunable in tunables() if tunable.profiled}))
    under = (program, "--clock-control", "none", "--csv", "--kernel-name", f"regex:{names}", "--metrics", ",".join(METRICS))
    return own(session, "profile", "ncu", 60, folder, under=under)


def judge_profile(outcome: dict[str, Any], log: str, part: Part) -> None:
    """A row per launch and metric, folded to one per launch."""
    rows = parse_counters(log)
    if rows:
        part.add("counters", *rows)
    else:
        part.skip("ncu", f"no counters (exit code {outcome['code']}): {outcome['log'][-300:]}")


def parse_counters(log: str) -> list[dict[str, Any]]:
    """Launches with their metrics from ncu's CSV."""
    lines = log.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        if not (row.get("Metric Name") and row.get("Metric Value")):
            continue
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "grid": row.get("Grid Size")})
        try:
            launch[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            launch[row["Metric Name"]] = row["Metric Value"]
        launch[f"{row['Metric Name']} unit"] = row.get("Metric Unit")
    return list(launches.values())
