"""How figures and names are written: three significant digits, units that fit, and no name that breaks a Markdown table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compressm.benchmarking.results import Milliseconds, Missing, Result
from compressm.kernels import OPS

from .analysis import Group, Spread

NONE = "–"
SPACE = "\u00a0"  # one at which no line breaks
OP_NAMES = {
    **{name: record.title for name, record in OPS.items()},
    "lru": "LRU layer",
    "mamba": "Mamba layer",
    "s5": "S5 layer",
    "s4d": "S4D layer",
    "loop": "Step of a linear layer in a control loop",
    "smnist": "sMNIST (LRU)",
    "scifar": "sCIFAR (LRU)",
    "mamba-lm": "Mamba language model",
    "balanced_truncation": "Balanced truncation of one system",
    "attempt": "Reduction of a stack of LRU layers, optimizer included",
    "attempt-s5": "Reduction of a stack of S5 layers, optimizer included",
    "rollback": "Model and optimizer of such a stack put aside and back, as the guard does",
    "waiting": "`Compressor.step()` under a guard with nothing due, 1,000 times",
}
LETTERS = {"batch": "B", "channels": "D", "length": "L", "states": "N", "groups": "G", "width": "W", "rank": "R"}
RESOURCES = {"bytes": "memory", "flops": "arithmetic", "exponentials": "exponentials"}


def escape(text: object) -> str:
    """One line of plain text that Markdown shows as it is."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", line)


def code(text: object) -> str:
    """A name in code letters, safe inside a table."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return f"`{line.replace('`', chr(39)).replace('|', '/')}`" if line else NONE


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table: so many columns to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *rows)] + [""]


def number(value: float) -> str:
    """Three significant digits, thousands with commas."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(float(f"{value:.2e}"))))
    if digits > 6:
        return f"{value:.1e}"
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def milliseconds(time: Milliseconds) -> str:
    return number(time.median)


def span(low: float, high: float) -> str:
    """A range that stays on one line."""
    return f"{number(low)}–{number(high)}"


def whole(text: str) -> str:
    """A text that stays on one line."""
    return text.replace(" ", SPACE)


def times(spread: Spread, once: bool = False) -> str:
    """A speed-up with its spread; ``once`` where one of its times is of a single round."""
    return whole(f"{number(spread.value)}x ({'once' if once else span(spread.low, spread.high)})")


def once(*results: Result) -> bool:
    """Whether one of them was timed in a single round, which has no spread."""
    return any(result.milliseconds.rounds == 1 for result in results)


def percent(share: float) -> str:
    """Whole per cent; one digit more below ten."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def timing(result: Result) -> str:
    """A median with its spread, in ms."""
    t = result.milliseconds
    return whole(f"{number(t.median)} ({'once' if once(result) else span(t.low, t.high)})")


def memory(size: int | None) -> str:
    """Bytes in binary units."""
    if size is None:
        return NONE
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 999.5:
            return f"{number(value)} {unit}" if unit != "B" else f"{size} B"
        value /= 1024
    return f"{number(value)} GiB"


def error(value: float) -> str:
    """A relative error, one significant digit; float64 results may have none at all."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def limit(result: Result) -> str:
    """Share of the physical limit that was reached."""
    share = result.share_of_limit
    return NONE if share is None else percent(share)


def op_name(op: str) -> str:
    return OP_NAMES.get(op, op)


def plain_name(op: str) -> str:
    """An op's heading."""
    return escape(op_name(op))


def sizes(shape: Mapping[str, int], leave_out: str = "") -> str:
    """A shape in the field's letters, e.g. ``"B2 D512 L1024 N128"``."""
    parts = [f"{LETTERS[k]}{v}" if k in LETTERS else f"{k} {v}" for k, v in shape.items() if k != leave_out]
    return " ".join(parts) or NONE


def short(group: Group) -> str:
    """A group's shape, behind what else its name says."""
    return _without(group.name, [group.first.op, group.first.passes, group.first.dtype]) or sizes(group.first.shape)


def manner(result: Result) -> str:
    """Pass and dtype, without what goes without saying: a step's pass, float32."""
    parts = [result.passes] * (result.passes != "step") + [result.dtype] * (result.dtype != "float32")
    return ", ".join(parts)


def _without(name: str, words: Sequence[str]) -> str:
    """A name without words that its place in the report says already."""
    return " ".join(part for part in name.split() if part.strip(",") not in words).strip(" ,")


def machine_name(machine: Mapping[str, Any]) -> str:
    """What it computes with: a CPU and its threads, or the device."""
    device = str(machine["device"])
    if device != "cpu":
        return device
    threads = machine.get("threads")
    return f"{machine['cpu']}" + (f", {threads} thread{'s' * (threads != 1)}" if threads is not None else "")


def commit(machine: Mapping[str, Any]) -> str:
    """A commit as far as it takes to find it."""
    text = str(machine["commit"])
    found = re.fullmatch(r"([0-9a-f]{12})[0-9a-f]{28}(-dirty)?", text)
    return found[1] + (found[2] or "") if found else text


def missing(entries: Sequence[Missing]) -> list[tuple[str, str, list[str]]]:
    """Contender, reason and the groups that it holds for."""
    by: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        by.setdefault((entry.contender, entry.reason), []).append(entry.group)
    return [(contender, reason, names) for (contender, reason), names in by.items()]
