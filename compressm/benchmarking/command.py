"""``compressm bench``: one op at a user's own sizes, beside what plain torch does."""

from __future__ import annotations

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from compressm.benchmarking import environment
from compressm.benchmarking.cases import OPS, Case, case
from compressm.benchmarking.limits import measure_ceilings
from compressm.benchmarking.op_problems import COMPILED, REFERENCE
from compressm.benchmarking.request import Request, word
from compressm.benchmarking.results import Result, Run
from compressm.benchmarking.running import OURS, Make, Tell, built_in, measure
from compressm.benchmarking.timing import Budget
from compressm.errors import ConfigError
from compressm.experiments.training import pick_device

SHORT = {"bytes": "bytes", "flops": "flops", "exponentials": "exps"}


def cases_of(request: Request) -> list[Case]:
    """One case per number of states.

    Raises:
        ConfigError: whatever is unknown, out of range or has no meaning for the op.
    """
    request.check({name: known.sizes for name, known in OPS.items()})
    op = OPS[request.op]
    pick_device(request.device)
    if torch.device(request.device).type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: got {request.device!r}, expected cpu or cuda: no others are measured")
    sizes = {**op.sizes, **request.sizes}
    passes = request.passes or op.passes[-1]
    asked = [{"states": states} for states in dict.fromkeys(request.numbers_of_states())] or [{}]
    return [case(request.op, {**sizes, **states}, passes, request.dtype, request.device) for states in asked]


def run(request: Request, tell: Tell) -> Run:
    """Measure; every contender's answers are compared with the float64 reference first.

    Args:
        request: see there.
        tell: gets a line now and then.

    Raises:
        ConfigError: see :func:`cases_of`.
    """
    cases = cases_of(request)
    tell("measuring what the machine allows")
    ceilings = measure_ceilings(request.device)
    budget = Budget() if request.rounds is None else Budget.of(request.rounds)
    outcome = measure([(c, _makers(c, request.compile)) for c in cases], ceilings, budget, tell)
    machine = environment.describe(request.device, ["torch", "triton"])
    results, skipped, failed = tuple(outcome.results), tuple(outcome.skipped), tuple(outcome.failed)
    return Run(machine=machine, ceilings=ceilings, results=results, skipped=skipped, failed=failed)


def _makers(chosen: Case, with_compile: bool) -> dict[str, Make]:
    level = OPS[chosen.op].level
    names = [OURS]
    names += OPS[chosen.op].rivals
    if level in ("op", "layer") and not OPS[chosen.op].rivals:
        names.append(REFERENCE)
    if with_compile and level != "reduction":
        names.append(COMPILED)
    return {name: built_in(name) for name in names}


def table(run: Run) -> Table:
    """One row per size and contender.

    ``full / this`` is how many times faster the same contender is here than at the most states; ``/ ours`` is its time over
    ours at the same size; the spread is half the distance of the 20th and 80th percentile.
    """
    first = run.results[0]
    same = {name: size for name, size in first.shape.items() if name != "states"}
    title = f"{first.op} {first.passes}, {first.dtype}, " + ", ".join(f"{word(n)} {size}" for n, size in same.items())
    worst = max(r.error for r in run.results)
    caption = f"every answer and gradient within {worst:.0e} of the float64 reference"
    found = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    found.title_justify = found.caption_justify = "left"
    for column in ("states", "", "ms", "spread", "full/this", "/ ours", "of limit", "peak MiB"):
        found.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    times = {(r.shape.get("states", 0), r.contender): r.milliseconds.median for r in run.results}
    most = max(states for states, _ in times)
    for r in run.results:
        states = r.shape.get("states", 0)
        full, ours = times.get((most, r.contender)), times.get((states, OURS))
        found.add_row(
            str(states) if states else "",
            r.contender,
            f"{r.milliseconds.median:.4g}",
            f"{(r.milliseconds.high - r.milliseconds.low) / 2 / r.milliseconds.median:.0%}",
            _ratio(full, r.milliseconds.median),
            _ratio(r.milliseconds.median, ours),
            _limit(r),
            "?" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.1f}",
        )
    return found


def _ratio(above: float | None, below: float | None) -> str:
    return "" if above is None or below is None else f"{above / below:.2f}x"


def _limit(r: Result) -> str:
    return "" if r.share_of_limit is None or r.limit_by is None else f"{r.share_of_limit:.0%} {SHORT[r.limit_by]}"


def ceilings_line(run: Run) -> str:
    """What the limits are made of."""
    c = run.ceilings
    return (
        f"this machine, measured just now: copies {c.copy_gb_per_s:.3g} GB/s, float32 products {c.matmul_gflop_per_s:.4g} "
        f"GFLOP/s, {c.exp_g_per_s:.3g}e9 exponentials/s; the limit is the slowest of the three for what the op needs at least"
    )


