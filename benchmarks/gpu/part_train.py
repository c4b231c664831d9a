"""The part ``train``: whole training steps as the states shrink, in every way to launch them, and where their time goes."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpu import steps, trace
from gpu.checks import TOLERANCES
from gpu.session import Part, Session, brief
from gpu.steps import Step, Workload
from gpu.timing import Timer

COMPILE_SECONDS = {"sMNIST LRU": 25.0, "sCIFAR LRU": 35.0, "Mamba LM": 35.0}


def run(session: Session) -> Part:
    """Every workload eagerly and as a graph at every number of states; then compiled at the largest and the smallest."""
    part = Part(session, "train", 1.0)
    timer = Timer(session.device, **session.pick({"most": 15}, {"fewest": 1, "most": 1}))
    works = session.pick(steps.WORKLOADS, steps.SMOKE)
    for work in works:
        if part.has_time(work.name, session.pick(15.0, 0.0)):
            _measure(work, _plain(session), work.states, session, part, timer)
            _trace(work, session, part)
    for work in works:
        modes = [mode for mode in ("compile", "compile+graph") if session.device == "cuda" or "graph" not in mode]
        ends = session.pick((work.states[0], work.states[-1]), work.states[:1])
        for states in ends:
            if part.has_time(f"{work.name} N{states} compiled", session.pick(COMPILE_SECONDS.get(work.name, 30.0), 0.0)):
                _measure(work, modes, (states,), session, part, timer)
    part.finish()
    return part


def _plain(session: Session) -> list[str]:
    return ["eager", "graph"] if session.device == "cuda" else ["eager"]


def _measure(
    work: Workload, modes: list[str], states: tuple[int, ...], session: Session, part: Part, timer: Timer
) -> None:
    """Rows of one workload; modes are timed together, sizes one after the other, as they would not fit in memory."""
    backend = session.pick("inductor", "eager")
    for n in states:
        if not _right(work, n, session, part):
            continue
        made: dict[str, Step] = {}
        for mode in modes:
            try:
                made[mode] = steps.make(work, n, mode, session.device, backend)
            except Exception as error:  # of one way to launch: it is a failure of its own
                part.fail(f"{work.name} N{n} {mode}", brief(error))
        times = timer.interleaved({mode: step for mode, step in made.items()}, session.pick(2.0, 0.0))
        for mode, found in times.items():
            row = {"model": work.name, "states": n, "mode": mode, "batch": work.shape, **found}
            if "error" in found:
                part.fail(f"{work.name} N{n} {mode}", found["error"])
            else:
                row |= _judge(work, n, mode, made[mode], part)
            part.add("train", row)
        made.clear()
        if session.device == "cuda":
            torch.cuda.empty_cache()


def _right(work: Workload, states: int, session: Session, part: Part) -> bool:
    """Whether the model agrees with its float64 self; else it is not timed."""
    name = f"{work.name} N{states}"
    found = part.body.setdefault("errors", {})
    try:
        if name not in found:
            found[name] = Step(work, states, session.device).error()
    except Exception as error:  # of one model: it is a failure of its own
        part.fail(name, brief(error))
        return False
    if found[name] <= TOLERANCES[torch.float32]:
        return True
    part.fail(name, f"relative error {found[name]:.1e} against float64")
    return False


def _judge(work: Workload, states: int, mode: str, step: Step, part: Part) -> dict[str, Any]:
    """The loss after the timed steps: finite, and on one batch below what an untrained model has."""
    loss = step().item()
    classes = 10 if step.batch.dim() == 3 else 256
    if not math.isfinite(loss) or loss > 3 * math.log(classes):
        part.fail(f"{work.name} N{states} {mode}", f"the loss is {loss}")
    return {"loss": loss}


def _trace(work: Workload, session: Session, part: Part) -> None:
    for states in (work.states[0], work.states[-1]):
        try:
            step = steps.make(work, states, "eager", session.device, "eager")
            part.add("profile", {"model": work.name, "states": states, **trace.of(step, session.device)})
        except Exception as error:  # of the profiler: the times stay
            part.skip(f"profile of {work.name} N{states}", brief(error))


def summary(body: dict[str, Any]) -> list[str]:
    """Lines of the last table."""
    rows = [row for row in body.get("train", []) if "median" in row]
    times = {(row["model"], row["states"], row["mode"]): row["median"] for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for mode in dict.fromkeys(row["mode"] for row in rows if row["model"] == model):
            own = {n: t for (m, n, way), t in times.items() if (m, way) == (model, mode)}
            first = max(own)
            found = ", ".join(f"N{n} {t:.2f} ms ({own[first] / t:.2f}x)" for n, t in own.items())
            lines.append(f"{model}, {mode}: {found}")
    lines += [f"{row['model']} N{row['states']}: {row['next']}" for row in body.get("profile", [])]
    return lines
