"""The part ``kernels``: right first, then how fast, with which configuration, and beside what was predicted."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from gpu import limits, predictions, speed, sweep, tools
from gpu.checks import DTYPES, cases, ops
from gpu.jobs import Job, own, run_all
from gpu.session import Part, Session
from gpu.timing import Timer

SHARE = 0.66  # of the budget
TIMINGS = 180.0  # seconds that stay for what follows the checks
SWEEP_SHARDS = 6
CASES_A_JOB = 12


def run(session: Session) -> Part:
    """Run it all; a kernel that is wrong is not timed."""
    part = Part(session, "kernels", session.pick(SHARE, 1.0))
    with tempfile.TemporaryDirectory() as folder:
        broken = check(session, part, Path(folder))
        timer = Timer(session.device, **session.pick({}, {"fewest": 1, "most": 1}))
        ceilings = limits.measure(session, timer)
        part.set("ceilings", ceilings)
        speed.run(session, part, timer, ceilings, broken)
        part.set("predictions", predictions.table(part.body.get("speed", []), []))
        sweep.time_all(session, part, timer, broken)
        part.set("predictions", predictions.table(part.body.get("speed", []), part.body.get("sweep", [])))
        profile(session, part, Path(folder))
    part.finish()
    return part


def check(session: Session, part: Part, folder: Path) -> set[str]:
    """Run the jobs, keep their rows, and return the ops that are broken."""
    jobs = queue(session, part, folder)
    processors = session.pick(max(2, min(8, (os.cpu_count() or 2) - 2)), 1)
    outcomes = run_all(jobs, part, folder, processors, reserve=session.pick(TIMINGS, 0.0))
    for name, outcome in outcomes.items():
        if name in tools.SANITIZERS:
            tools.judge_sanitizer(name, outcome, part)
        elif name == "pytest":
            tools.judge_tests(outcome, part)
        elif name == "mamba":
            if outcome["code"] != 0:
                part.skip("mamba_ssm", f"not built (exit code {outcome['code']}): {outcome['log'][-500:]}")
        else:
            _keep(name, outcome, part)
    return _judge(part)


def queue(session: Session, part: Part, folder: Path) -> list[Job]:
    """The jobs, those that take long first."""
    if session.smoke:
        pieces = [*(f"checks:{op}:float32:0/1" for op in ops()), "large", "sweep:0/1", "small", "profile"]
        watched = tools.sanitizer_jobs(session, part, folder)
        return [own(session, ",".join(pieces), "smoke", 600, folder), *watched, tools.test_job(session)]
    jobs = []
    if session.mamba is not None:
        jobs.append(own(session, f"mamba:{session.mamba}", "mamba", 400, folder, gigabytes=1))
    for op, record in ops().items():
        for dtype in DTYPES if len(record.dtypes) > 1 else ["float32"]:
            shards = -(-len(cases(op, dtype, False)) // CASES_A_JOB)
            jobs += [
                own(session, f"checks:{op}:{dtype}:{shard}/{shards}", f"{op}-{dtype}-{shard}", 180, folder, gigabytes=8)
                for shard in range(shards)
            ]
    jobs += [own(session, f"sweep:{n}/{SWEEP_SHARDS}", f"sweep-{n}", 180, folder, gigabytes=2) for n in range(SWEEP_SHARDS)]
    jobs += tools.sanitizer_jobs(session, part, folder)
    jobs.append(tools.test_job(session))
    jobs.append(own(session, "large", "large", 120, folder, gigabytes=60))
    return jobs


def _keep(name: str, outcome: dict[str, Any], part: Part) -> None:
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in outcome["rows"]:
        tables.setdefault(row.pop("table"), []).append(row)
    for table, rows in tables.items():
        part.add(table, *rows)
    part.add("jobs", {"job": name, "code": outcome["code"], "seconds": outcome["seconds"], "rows": len(outcome["rows"])})
    if outcome["code"] is None:
        why = f"stopped after {outcome['seconds']} s with {len(outcome['rows'])} rows"
        part.skip(f"the rest of {name}", why, for_time=True)
    elif outcome["code"] != 0:
        part.fail(f"job {name}", f"exit code {outcome['code']}: {outcome['log'][-1500:]}")


def _judge(part: Part) -> set[str]:
    """Ops with a wrong case; every wrong case and every wrong configuration that the device can run is a failure."""
    broken = set()
    for row in part.body.get("checks", []):
        if row["ok"] is None:
            part.skip(f"{row['op']} {row['dtype']} {row['case']}", row["error"])
        elif not row["ok"]:
            broken.add(row["op"])
            part.fail(f"{row['op']} {row['dtype']} {row['case']}", row.get("error") or f"{row['where']}: {row['worst']:.2e}")
    for row in part.body.get("configurations", []):
        if not row["ok"] and not sweep.out_of_resources(row):
            part.fail(f"{row['kernel']} {row['config']}", row.get("error") or f"relative error {row['worst']:.2e}")
    return broken


def profile(session: Session, part: Part, folder: Path) -> None:
    """Hardware counters, with the device for itself."""
    job = tools.profile_job(session, part, folder)
    if job is not None and part.has_time("ncu", 40):
        outcome = run_all([job], part, folder, 1)["ncu"]
        tools.judge_profile(outcome, (folder / "ncu.log").read_text(errors="replace"), part)


def summary(body: dict[str, Any]) -> list[str]:
    """Lines of the last table."""
    checks = body.get("checks", [])
    right = Counter((row["op"], row["dtype"]) for row in checks if row["ok"])
    total = Counter((row["op"], row["dtype"]) for row in checks)
    worst: dict[tuple[str, str], float] = {}
    for row in checks:
        key = (row["op"], row["dtype"])
        worst[key] = max(worst.get(key, 0.0), row.get("worst", 0.0))
    lines = [f"{op:24} {dtype:9} {right[op, dtype]:3}/{count} right, worst {worst[op, dtype]:.1e}"
             for (op, dtype), count in total.items()]  # fmt: skip
    lines += [" ".join(f"{key} {value}" for key, value in row.items()) for row in body.get("tools", [])]
    for row in body.get("predictions", []):
        if row["measured"] is not None:
            verdict = "ok " if row["holds"] else "NOT"
            lines.append(f"{verdict} {row['what']}: {row['measured']:.2f}, predicted {row['predicted']}")
    for row in sorted(body.get("sweep", []), key=lambda row: -row["plan_over_best"])[:8]:
        lines.append(f"plan / best {row['plan_over_best']:.2f} {row['kernel']}, {row['shape']}: {row['plan']} -> {row['best']}")
    return lines
