"""Time of every kernel at the sizes that matter, beside others and beside the least that the device could take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from compressm.kernels.selective_scan import gpu as scan
from compressm.kernels.selective_scan import triton_launch
from gpu import limits, peers
from gpu.checks import ops
from gpu.session import Part, Session, brief
from gpu.sweep import graphed
from gpu.timing import Timer
from gpu.tunables import tunables

SHAPES = {"B8 D1536 L2048": (8, 1536, 2048), "B4 D2560 L4096": (4, 2560, 4096)}
STATES = (128, 64, 16, 12)
UNEVEN = 2000  # steps, beside 2048
CLOSE = 2e-2  # largest relative difference of a peer's output from ours, bfloat16
# Instructions per state and step of the compiled loops (sm_90, bfloat16), for the modelled times; and the fewest that the
# recurrence takes, forward and backward.
INSTRUCTIONS = {"forward": 11.4, "backward": 30.2, "backward, deterministic": 32.2}
FEWEST = (5, 13)
Calls = dict[str, Callable[[], object]]


def run(session: Session, part: Part, timer: Timer, ceilings: dict[str, float], broken: set[str]) -> None:
    """Rows of the table ``speed``; broken: ops whose checks failed, which are not timed."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    for op, work in (("selective_scan", _selective), ("others", _others)):
        if op in broken:
            part.skip(f"times of {op}", "its check failed")
        else:
            work(session, part, timer, ceilings, broken)


def _selective(session: Session, part: Part, timer: Timer, ceilings: dict[str, float], broken: set[str]) -> None:
    shapes = [(name, (*shape, n)) for name, shape in SHAPES.items() for n in STATES]
    batch, channels, _ = SHAPES["B8 D1536 L2048"]
    shapes += [(f"B8 D1536 L{UNEVEN}", (batch, channels, UNEVEN, n)) for n in (16, 128)]
    for name, shape in session.pick(shapes, [("smoke", (1, 1, 9, 2))]):
        label = f"{name} N{shape[3]}"
        if not part.has_time(f"selective_scan {label}", session.pick(8.0, 0.0)):
            continue
        calls = _ours(shape, session)
        _add_mamba(calls, shape, session, part, label)
        if name in ("smoke", "B8 D1536 L2048") and shape[3] in (16, 2):
            _add_compiled(calls, shape, session, part)
        for contender, times in timer.interleaved(calls, session.pick(3.0, 0.0)).items():
            counts = _counts(shape, contender)
            row = {"op": "selective_scan", "shape": label, "contender": contender, **times}
            if "median" in times:
                row |= limits.share(counts, ceilings, times["median"])
            direction = contender.removeprefix("compressm ")
            if direction in INSTRUCTIONS and "instructions" in ceilings:
                row["modelled_ms"] = INSTRUCTIONS[direction] * math.prod(shape) / ceilings["instructions"] * 1e3
            part.add("speed", row)
        calls.clear()
        _free(session)


def _ours(shape: tuple[int, ...], session: Session) -> Calls:
    device = session.device
    arguments = scan.inputs(shape, device)
    launch = triton_launch.forward
    calls = {
        "compressm forward": scan.forward(shape, None, device),
        "compressm forward, inference": lambda: launch(*arguments, True, False),
        "compressm backward": scan.backward(shape, None, device),
        "compressm backward, deterministic": scan.backward(shape, None, device, deterministic=True),
    }
    return {name: graphed(call, device) for name, call in calls.items()}


def _add_mamba(calls: Calls, shape: tuple[int, ...], session: Session, part: Part, label: str) -> None:
    extension, reason = peers.mamba_extension(session)
    if extension is None:
        if not any(entry["what"] == "mamba_ssm" for entry in part.body["skipped"]):
            part.skip("mamba_ssm", reason)
        return
    try:
        arguments = scan.inputs(shape, session.device)
        forward, backward, out = peers.mamba_calls(extension, arguments, torch.randn_like(arguments[0]))
        _compare(out, scan.forward(shape, None, session.device)()[0])
        calls["mamba_ssm forward"] = graphed(forward, session.device)
        calls["mamba_ssm backward"] = graphed(backward, session.device)
    except Exception as error:  # of the peer: it is named and left out
        part.skip(f"mamba_ssm {label}", brief(error))


def _add_compiled(calls: Calls, shape: tuple[int, ...], session: Session, part: Part) -> None:
    arguments = scan.inputs(shape, session.device)
    ours = scan.forward(shape, None, session.device)()[0]
    backend = session.pick("inductor", "eager")
    makers = {"torch.compile": peers.compiled_chunks, "torch.compile, associative_scan": peers.associative_scan}
    for name, maker in makers.items():
        if not part.has_time(name, session.pick(40.0, 0.0)):
            continue
        try:
            call = maker(backend)
            with torch.no_grad():
                _compare(call(arguments), ours)
            calls[f"{name} forward"] = graphed(torch.no_grad()(lambda call=call: call(arguments)), session.device)
        except Exception as error:  # of the peer: it is named and left out
            part.skip(name, brief(error))


def _compare(actual: torch.Tensor, ours: torch.Tensor) -> None:
    error = ((actual.double() - ours.double()).norm() / ours.double().norm()).item()
    if not error < CLOSE:
        raise ArithmeticError(f"its output differs by {error:.1e} from ours, which the float64 reference confirmed")


def _counts(shape: tuple[int, ...], contender: str) -> dict[str, float]:
    """Least bytes, exponentials and instructions of a pass, by the ceilings' names."""
    batch, channels, length, states = shape
    wide, cells = batch * channels * length, batch * channels * length * states
    back = "backward" in contender
    return {
        "copy": 2 * ((8 if back else 4) * wide + (4 if back else 2) * batch * states * length),
        "exponentials": cells + 3 * wide, "instructions": FEWEST[back] * cells,
    }  # fmt: skip


def _others(session: Session, part: Part, timer: Timer, ceilings: dict[str, float], broken: set[str]) -> None:
    """Every other kernel at its planned configuration on the shapes of its sweep, and what torch has for it."""
    for tunable in tunables():
        op = tunable.name.split()[0]
        if op == "selective_scan":
            continue
        if op in broken:
            part.skip(f"times of {tunable.name}", "its check failed")
            continue
        smoke = {"smoke": tunable.smoke} if tunable.smoke else {}
        for name, shape in session.pick(tunable.shapes, smoke).items():
            if not part.has_time(f"{tunable.name} {name}", session.pick(2.0, 0.0)):
                continue
            call = tunable.build(shape, None, session.device)
            calls: Calls = {"compressm": graphed(call, session.device) if tunable.graph else call}
            for rival, make in tunable.rivals.items():
                theirs = make(shape, session.device)
                calls[rival] = graphed(theirs, session.device) if tunable.graph else theirs
            for contender, times in timer.interleaved(calls, session.pick(1.0, 0.0)).items():
                row = {"op": tunable.name, "shape": name, "contender": contender, **times}
                if "median" in times:
                    row |= limits.share({"copy": tunable.least_bytes(shape)}, ceilings, times["median"])
                part.add("speed", row)
            _free(session)


def _free(session: Session) -> None:
    for op in ops().values():
        op.gpu_cases().forget()
    if session.device == "cuda":
        torch.cuda.empty_cache()


def medians(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """(op, shape, contender) -> milliseconds."""
    return {(row["op"], row["shape"], row["contender"]): row["median"] for row in rows if "median" in row}
