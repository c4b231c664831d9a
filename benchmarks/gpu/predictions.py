"""What the design predicted of the kernels, beside what was measured."""

from __future__ import annotations

from typing import Any

from gpu.speed import medians

OP = "selective_scan"
MAIN, LONG = "B8 D1536 L2048", "B4 D2560 L4096"
# Modelled milliseconds of the loops at full issue rate, by shape and states: (forward, backward).
MODELLED = {(MAIN, 128): (1.13, 2.95), (MAIN, 16): (0.162, 0.41), (MAIN, 12): (0.128, 0.32),
            (LONG, 128): (1.88, 4.92), (LONG, 16): (0.27, 0.68)}  # fmt: skip
FORWARD, BACKWARD = "compressm forward", "compressm backward"


def table(speed: list[dict[str, Any]], sweep: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows: what, predicted, measured (None: not measured) and whether it holds."""
    times = medians(speed)

    def ratio(above: tuple[str, str], below: tuple[str, str]) -> float | None:
        first, second = times.get((OP, *above)), times.get((OP, *below))
        return first / second if first and second else None

    rows = []
    for shape, least, ours, theirs in ((MAIN, 1.5, FORWARD, "mamba_ssm forward"), (MAIN, 1.8, BACKWARD, "mamba_ssm backward")):
        for n in (128, 64, 16, 12):
            label = f"{shape} N{n}"
            measured = ratio((label, theirs), (label, ours))
            rows.append(_row(f"{theirs} / ours, {label}", f">= {least}", measured, lambda x, least=least: x >= least))
    for n in (128, 16):
        label = f"{MAIN} N{n}"
        measured = ratio((label, f"{BACKWARD}, deterministic"), (label, BACKWARD))
        rows.append(_row(f"backward deterministic / atomic, {label}", "<= 1.10", measured, lambda x: x <= 1.10))
        for direction in (FORWARD, BACKWARD):
            measured = ratio((f"B8 D1536 L2000 N{n}", direction), (label, direction))
            rows.append(_row(f"{direction} L2000 / L2048, N{n}", "<= 1.05", measured, lambda x: x <= 1.05))
    rows += [_per_state(times, direction) for direction in (FORWARD, BACKWARD)]
    rows += _utilisation(times)
    rows += _registers(sweep)
    return rows


def _row(what: str, predicted: str, measured: float | None, holds: Any) -> dict[str, Any]:
    verdict = None if measured is None else bool(holds(measured))
    return {"what": what, "predicted": predicted, "measured": measured, "holds": verdict}


def _per_state(times: dict[tuple[str, str, str], float], direction: str) -> dict[str, Any]:
    """How time falls from N = 128 to N = 16: eight times fewer states."""
    large, small = (times.get((OP, f"{MAIN} N{n}", direction)) for n in (128, 16))
    modelled = MODELLED[MAIN, 128][direction == BACKWARD] / MODELLED[MAIN, 16][direction == BACKWARD]
    measured = large / small if large and small else None
    return _row(f"{direction} N128 / N16, {MAIN}", f"{modelled:.1f}", measured, lambda x: abs(x / modelled - 1) < 0.2)


def _utilisation(times: dict[tuple[str, str, str], float]) -> list[dict[str, Any]]:
    """Share of the full issue rate."""
    rows = []
    for (shape, n), modelled in MODELLED.items():
        for direction, model, low, high in ((FORWARD, modelled[0], 0.8, 0.9), (BACKWARD, modelled[1], 0.65, 0.75)):
            measured = times.get((OP, f"{shape} N{n}", direction))
            share = model / measured if measured else None
            what = f"{direction} share of issue rate, {shape} N{n}"
            rows.append(_row(what, f"{low:.2f}-{high:.2f}", share, lambda x, low=low: x >= low))
    return rows


def _registers(sweep: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether fewer registers a lane pay in the backward."""
    rows = []
    for entry in sweep:
        if entry["kernel"] != f"{OP} backward":
            continue
        found = entry["milliseconds"]
        free = [t for label, t in found.items() if "maxnreg" not in label and "(plan)" not in label]
        capped = [t for label, t in found.items() if "maxnreg" in label]
        measured = min(free) / min(capped) if free and capped else None
        what = f"backward: best uncapped / best at 168 registers, {entry['shape']}"
        rows.append(_row(what, "> 1", measured, lambda x: x > 1))
    return rows
