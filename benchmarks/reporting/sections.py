"""The report's words and tables, each from a run's figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressm.benchmarking.results import Level, Run

from .analysis import (
    OURS,
    Curve,
    Group,
    Spread,
    computations,
    contenders,
    curves,
    families,
    groups,
    is_ours,
    noise,
    shrinking_steps,
    tally,
)
from .wording import (
    NONE,
    RESOURCES,
    code,
    commit,
    error,
    escape,
    limit,
    manner,
    memory,
    milliseconds,
    missing,
    number,
    once,
    percent,
    plain_name,
    short,
    sizes,
    span,
    table,
    times,
    timing,
    whole,
)

LEVELS: dict[Level, str] = {
    "op": "Single ops", "layer": "Layers", "step": "Training steps beside peers", "reduction": "Reductions",
}  # fmt: skip
LEGEND = [
    "Times are medians in ms. In brackets: a peer's time over compressm's, 2x took twice as long. **Bold**: it is faster than"
    " compressm. \"same\": the spreads overlap; \"once\": timed in one round, without a spread.",
    "",
]  # fmt: skip
BUSY = 1.25  # a matrix product's median over its best time, above which the machine did other work
SCATTERED = 0.25  # the same for the typical spread of the times over their median
GROWTH = [
    "### Growth",
    "",
    "Slope of log time over log size, by least squares through all sizes: 1 is growth in proportion, 0 is none. Below 1 a"
    " part of the time does not depend on that size.",
    "",
]
METHOD = [
    "## How it was measured",
    "",
    "- No time without a right answer: every contender's outputs and gradients are compared with a float64 reference on the"
    " same inputs first. One that is wrong is listed as failed. The errors that passed stand beside the times.",
    "- All contenders of a computation run in one process, in turn, round after round, so that a slow moment of the machine"
    " hits all alike. Slow ones take part in fewer rounds; one round has no spread.",
    "- On a CPU with glibc the process keeps what contenders free meanwhile, as `compressm train` does: who asks for the same"
    " memory again does not wait for the system, whoever it is.",
    "- Times are medians, their spread is from the 20th to the 80th percentile of the rounds. A quotient's spread goes from the"
    " least to the largest quotient of these. One of two counts as faster only where this range lies on one side of 1.",
    "- Peak memory is what a call holds at most beyond what was there before it, in a call of its own.",
    "- The physical limit is the longest of three times: bytes over copy bandwidth, floating point operations over the rate of"
    " float32 matrix products, exponentials over their rate. Counted is the least that the computation takes, whoever runs it;"
    " the rates are the machine's own, measured in the same run. More than 100 % happens where data stay in a cache or where a"
    " contender needs fewer operations than were counted.",
    "- B is the batch, L the length of a sequence, D its channels, N the states.",
    "",
]


def introduction(runs: Mapping[str, Run]) -> list[str]:
    """Where it all comes from."""
    files = ", ".join(code(f"{name}.json") for name in runs)
    return [
        f"Generated from {files} by `python -m benchmarks.reporting.report`; `make bench` measures anew."
        " [How it was measured](#how-it-was-measured) is at the end.",
        "",
    ]


def in_short(runs: Mapping[str, Run], titles: Mapping[str, str]) -> list[str]:
    """How the comparisons with peers came out, all of them counted."""
    lines = ["## Against peers", ""]
    rows = []
    for name, run in runs.items():
        count = tally(groups(run))
        losses = f"**{len(count.slower)}**" if count.slower else "0"
        rows.append([titles[name], str(count.faster), str(count.even), losses, str(len(run.failed))])
    lines += table(("machine", "compressm faster", "spreads overlap", "peer faster", "failed"), rows)
    words = "Every pair of compressm and a peer on the same computation counts once; all of them are below. What failed was"
    return [*lines, f"{words} wrong or raised an error, and has no time.", ""]


def machine(run: Run) -> list[str]:
    """What it is, what ran on it, and what it sustains."""
    about, top = run.machine, run.ceilings
    parts = [f"{escape(about['cpu'])}, device {escape(about['device'])}"]
    parts += [f"{escape(about[key])} {key}" for key in ("cores", "threads") if about.get(key) is not None]
    names = {"python": "Python", "torch": "torch", "triton": "triton", "compressm": "compressm"}
    software = [f"{words} {escape(about[key])}" for key, words in names.items() if about.get(key) is not None]
    versions = about["versions"]
    if isinstance(versions, Mapping):
        software += [f"{escape(name)} {escape(version)}" for name, version in sorted(versions.items()) if name not in names]
    return [
        f"- Machine: {', '.join(parts)}.",
        f"- It sustains: copies {number(top.copy_gb_per_s)} GB/s (read plus written), float32 matrix products"
        f" {number(top.matmul_gflop_per_s)} GFLOP/s, {number(top.exp_g_per_s)} billion exponentials per second.",
        f"- Software: {', '.join(software)}.",
        f"- Commit {code(commit(about))}, measured {escape(about['date'])}.",
        *_quiet(run),
        "",
    ]


def _quiet(run: Run) -> list[str]:
    """Whether other work disturbed the run, by what it noted of a matrix product and by the scatter of the times."""
    parts, disturbed, scatter = [], False, noise(run)
    product = run.machine.get("matmul_1024_ms")
    if isinstance(product, Mapping) and {"median", "best"} <= set(product):
        median, best = product["median"], product["best"]
        parts.append(f"at the start a 1024^3 float32 matrix product took {number(median)} ms, at best {number(best)} ms")
        disturbed = median > BUSY * best
    if scatter is not None:
        parts.append(f"half of all times have a spread wider than {percent(scatter)} of their median")
        disturbed = disturbed or scatter > SCATTERED
    if not parts:
        return []
    words = f"- Quiet or not: {'; '.join(parts)}."
    return [words + " **Other work was going on: take these times with care.**" if disturbed else words]


def slower(run: Run) -> list[str]:
    """Every comparison that compressm loses, the worst first, and where it has no time at all."""
    found = tally(groups(run))
    lines = ["### Where a peer is faster", ""]
    for entry in run.failed:
        if is_ours(entry.contender):
            lines += [f"**{escape(entry.contender)} failed** in {escape(entry.group)}: {escape(entry.reason)}.", ""]
    if not found.total:
        return [*lines, "No peer was timed.", ""]
    if not found.slower:
        return [*lines, f"Nowhere beyond the spread. Comparisons: {found.total}.", ""]
    rows = []
    for group, name, spread in found.slower:
        theirs = next(r for r in group.results if r.contender == name)
        pair = f"{milliseconds(theirs.milliseconds)} / {milliseconds(group.ours.milliseconds)}"
        inverse = Spread(1 / spread.value, 1 / spread.high, 1 / spread.low)
        where = ", ".join(filter(None, (plain_name(group.first.op), escape(manner(group.first)), whole(escape(short(group))))))
        rows.append([where, code(name), whole(pair), times(inverse, once(theirs, group.ours))])
    words = f"In {len(found.slower)} of {found.total} comparisons a peer takes less time than compressm, beyond the spread."
    headings = ("computation", "peer", "ms, peer / compressm", "peer faster by")
    return [*lines, words, "", *table(headings, rows, left=2)]


def with_limit(run: Run) -> list[Group]:
    """Groups where ours has a physical limit beside it."""
    return [group for group in groups(run) if group.ours is not None and group.ours.limit_ms is not None]


def limits(run: Run) -> list[str]:
    """How near to what the machine allows ours comes, by op and pass."""
    lines = ["### Share of the physical limit", ""]
    rows = []
    for (op, _, _), of in computations(with_limit(run)).items():
        ours = [group.ours for group in of]
        shares = sorted(r.share_of_limit for r in ours)
        reach = percent(shares[0]) if len(shares) == 1 else f"{percent(shares[0])} to {percent(shares[-1])}"
        bound = dict.fromkeys(RESOURCES[r.limit_by] for r in ours if r.limit_by is not None)
        peers = [r.share_of_limit for group in of for r in group.results if not is_ours(r.contender) and r.limit_ms is not None]
        best = percent(max(peers)) if peers else NONE
        words = ", ".join(filter(None, (plain_name(op), escape(manner(ours[0])))))
        rows.append([words, str(len(ours)), reach, ", ".join(bound) or NONE, best])
    if not rows:
        return [*lines, "No limit was counted.", ""]
    headings = ("computation", "shapes", "compressm reaches", "limit set by", "best of any peer")
    return [*lines, *table(headings, rows)]


def by_level(run: Run) -> dict[Level, dict[str, list[Group]]]:
    """Groups by level and op. What only compressm runs is left to the headline and the curves where these have it."""
    curved = {r.group for curve in curves(run) for r in curve.results}
    stepped = {r.group for step in shrinking_steps(run) for r in step.results}
    found: dict[Level, dict[str, list[Group]]] = {}
    for group in groups(run):
        alone = len(group.results) == 1 and group.ours is not None
        if not (alone and group.name in curved | stepped):
            found.setdefault(group.first.level, {}).setdefault(group.first.op, []).append(group)
    return {level: found[level] for level in LEVELS if level in found}


def op_heading(found: Sequence[Group], op: str) -> list[str]:
    """Title and how the comparisons of one op came out."""
    lines, count = [f"#### {plain_name(op)}", ""], tally(found)
    if not count.total:
        return lines
    words = f"{count.total} comparison{'s' * (count.total > 1)} with peers: compressm faster {count.faster}, spreads overlap"
    words += f" {count.even}, peer faster " + (f"**{len(count.slower)}**." if count.slower else "0.")
    return [*lines, words, ""]


def left_out(found: Sequence[Group], most: int) -> list[str]:
    """What the picture does not show."""
    drawn = sum(1 for group in found if group.ratios())
    return [] if drawn <= most else [f"The picture shows the first {most} of {drawn} shapes; the tables have all.", ""]


def op_tables(found: Sequence[Group], run: Run) -> list[str]:
    """Per pass and dtype: a line per shape with every contender beside ours, then all figures folded away."""
    failed = {(entry.group, entry.contender) for entry in run.failed}
    lines: list[str] = []
    for of in computations(found).values():
        names = [name for name in contenders(r for group in of for r in group.results) if name != OURS]
        headings = ["shape", f"{OURS}, ms", *(f"{escape(name)}" for name in names), "of the limit, set by"]
        rows = [[whole(escape(short(group))), *_cells(group, names, failed)] for group in of]
        words = escape(manner(of[0].first))
        lines += [f"**{words}**", ""] if words else []
        lines += table(headings, rows) + _all_figures(of, f"All figures, {words}" if words else "All figures")
    return lines


def _cells(group: Group, names: Sequence[str], failed: set[tuple[str, str]]) -> list[str]:
    ours, ratios = group.ours, group.ratios()
    of = {r.contender: r for r in group.results}

    def cell(name: str) -> str:
        if name not in of:
            return "failed" if (group.name, name) in failed else NONE
        time = milliseconds(of[name].milliseconds)
        if name not in ratios or name == OURS:
            return time
        verdict = ratios[name].verdict
        words = [f"{number(ratios[name].value)}x", *["same"] * (verdict == 0), *["once"] * once(of[name])]
        text = f"{time} ({', '.join(words)})"
        return whole(f"**{text}**" if verdict < 0 else text)

    bound = NONE
    if ours is not None and ours.limit_ms is not None:
        bound = whole(limit(ours) + (f", {RESOURCES[ours.limit_by]}" if ours.limit_by else ""))
    return [*map(cell, (OURS, *names)), bound]


def _all_figures(found: Sequence[Group], summary: str) -> list[str]:
    headings = ("shape", "contender", "ms", "20–80 %", "rounds", "over compressm", "peak memory", "error", "of the limit")
    rows = []
    for group in found:
        ratios, label = group.ratios(), whole(escape(short(group)))
        for r in group.results:
            t = r.milliseconds
            ratio = "1" if r is group.ours else NONE
            if r.contender in ratios:
                ratio = times(ratios[r.contender], once(r, group.ours))
            spread = NONE if once(r) else span(t.low, t.high)
            rows.append([label, code(r.contender), number(t.median), spread, str(t.rounds), ratio,
                         whole(memory(r.peak_bytes)), error(r.error), limit(r)])  # fmt: skip
            label = ""
    return _folded(f"{summary}: spread, memory, error against float64", table(headings, rows, left=2))


def growth(run: Run) -> dict[str, list[list[Curve]]]:
    """Families of curves by op."""
    found: dict[str, list[list[Curve]]] = {}
    for family in families(curves(run)):
        found.setdefault(family[0].results[0].op, []).append(family)
    return found


def slopes(found: Sequence[Sequence[Curve]]) -> list[str]:
    """Slope of every contender in every family."""
    names = contenders(curve.results[0] for family in found for curve in family)
    rows = []
    for family in found:
        longest = max(family, key=lambda curve: len(curve.results))
        by_name = {curve.results[0].contender: curve for curve in family}
        first, ends = longest.results[0], longest.sizes
        where = [f"{longest.axis} {ends[0]}–{ends[-1]}", sizes(longest.fixed)]
        rows.append([*map(whole, where), escape(manner(first)), *(_slope(by_name.get(name), ends) for name in names)])
    headings = ("along", "at", "pass", *(escape(name) for name in names))
    return table(headings, rows, left=3) + _times_along(found)


def _times_along(found: Sequence[Sequence[Curve]]) -> list[str]:
    """Ours at every size, folded away."""
    rows = []
    for curve in (curve for family in found for curve in family if curve.results[0].contender == OURS):
        label = whole(f"{curve.axis}, {sizes(curve.fixed)}, {manner(curve.results[0])}")
        for size, r in zip(curve.sizes, curve.results, strict=True):
            rows.append([label, str(size), timing(r), whole(memory(r.peak_bytes)), error(r.error), limit(r)])
            label = ""
    headings = ("along, at", "size", "ms", "peak memory", "error", "of the limit")
    return _folded("All figures of compressm along these axes", table(headings, rows)) if rows else []


def _folded(summary: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "</details>", ""]


def _slope(curve: Curve | None, ends: Sequence[int]) -> str:
    if curve is None:
        return NONE
    own = curve.sizes
    alike = (own[0], own[-1]) == (ends[0], ends[-1])
    return whole(f"{curve.slope:.2f}" if alike else f"{curve.slope:.2f} ({own[0]}–{own[-1]})")


def without_a_time(run: Run) -> list[str]:
    """What was skipped or failed, and why."""
    lines = ["### Without a time", ""]
    if not run.skipped and not run.failed:
        return [*lines, "Nothing was skipped and nothing failed.", ""]
    rows = []
    for kind, entries in (("**failed**", run.failed), ("skipped", run.skipped)):
        for contender, reason, names in missing(entries):
            where = "; ".join(escape(name) for name in names)
            if len(names) > 3:
                where = f"<details><summary>{len(names)} computations</summary>{where}</details>"
            rows.append([code(contender), kind, escape(reason), where])
    headings = ("contender", "", "why", "where")
    return [*lines, *table(headings, rows, left=4)]
