"""One run of the benchmarks: measures a family when its first contender is asked for, and writes the results at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from peers import PEERS

from compressm.benchmarking import environment
from compressm.benchmarking.cases import Case, Family, registry
from compressm.benchmarking.limits import higher, limited_by, measure_ceilings
from compressm.benchmarking.results import Ceilings, Missing, Result, Run
from compressm.benchmarking.running import OURS, Make, Outcome, measure
from compressm.benchmarking.timing import Budget

RESULTS = Path(__file__).parent / "results"
UNKNOWN = Ceilings(copy_gb_per_s=1, matmul_gflop_per_s=1, exp_g_per_s=1)  # where nothing is timed


@dataclass(frozen=True)
class Entry:
    """One contender of one case."""

    family: Family
    case: Case
    contender: str

    @property
    def key(self) -> tuple[str, str]:
        """(group, contender)."""
        return self.case.group, self.contender


def entries(device: str) -> list[Entry]:
    """All there is to measure on a device."""
    found = []
    for family in registry(device):
        for case in family.cases:
            names = [OURS, *(peer.name for peer in PEERS if case.op in peer.ops)]
            found += [Entry(family, case, name) for name in names if family.only is None or name in family.only]
    return found


def results_path(device: str, whole: bool) -> Path:
    """Where a run writes: the committed file for a whole run, one beside it for a part."""
    kind = device.partition(":")[0]
    if kind == "cuda":
        import torch

        kind = "-".join(torch.cuda.get_device_name(device).lower().split())
    return RESULTS / f"{kind}.json" if whole else RESULTS / "partial" / f"{kind}.json"


@dataclass
class Suite:
    """The run of this session.

    Attributes:
        device: that is measured.
        budget: of every contender.
        path: of the results.
        selected: what this session is to measure.
        timed: False only judges answers.
        resume: take over groups from ``path`` that were measured on this machine at this commit.
        tell: prints a line.
    """

    device: str
    budget: Budget
    path: Path
    selected: list[Entry]
    timed: bool
    resume: bool
    tell: Callable[[str], None]
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _run: Run | None = None
    _earlier: set[tuple[str, str]] = field(default_factory=set)

    def start(self) -> None:
        """Look at the machine, once."""
        if self._run is not None:
            return
        self.tell("measuring the machine's ceilings")
        ceilings = measure_ceilings(self.device) if self.timed else UNKNOWN
        machine = environment.describe(self.device, [peer.package for peer in PEERS])
        machine["matmul_1024_ms"] = environment.quietness(self.device)
        self._run = Run(machine=machine, ceilings=ceilings)
        self.tell(f"{ceilings}, 1024^3 product {machine['matmul_1024_ms']}")
        if self.resume and self.path.exists():
            self._take_over(Run.load(self.path))

    def _take_over(self, earlier: Run) -> None:
        for key in ("cpu", "device", "torch", "commit", "versions"):
            if earlier.machine[key] != self._run.machine[key] or str(earlier.machine[key]).endswith("-dirty"):
                self.tell(f"{self.path.name} is of another {key} ({earlier.machine[key]}): starting anew")
                return
        self._run = earlier.model_copy(update={"failed": ()})  # they get another chance
        self._earlier = {(r.group, r.contender) for r in (*earlier.results, *earlier.skipped)}

    def verdict(self, entry: Entry) -> tuple[Result | Missing | None, list[float]]:
        """What became of a contender, and its samples in seconds: none if it was taken over, skipped or failed."""
        self.start()
        if entry.key not in self._earlier and entry.family.name not in self._outcomes:
            self._measure(entry.family)
        outcome = self._outcomes.get(entry.family.name, Outcome())
        known = (*self._run.results, *self._run.skipped, *self._run.failed, *outcome.skipped, *outcome.failed)
        return next((r for r in known if (r.group, r.contender) == entry.key), None), outcome.samples.get(entry.key, [])

    def _measure(self, family: Family) -> None:
        wanted = [e for e in self.selected if e.family.name == family.name and e.key not in self._earlier]
        self.tell(f"== {family.name}")
        skipped: list[Missing] = []
        cases: list[tuple[Case, dict[str, Make]]] = []
        for case in dict.fromkeys(entry.case for entry in wanted):
            names = [entry.contender for entry in wanted if entry.case == case]
            cases.append((case, makers(case, names, skipped)))
        if self.timed:
            self._raise_ceilings()
        outcome = measure(cases, self._run.ceilings, self.budget, self.tell, timed=self.timed)
        outcome.skipped += skipped
        self._outcomes[family.name] = outcome
        for entry in outcome.results:
            share = "" if entry.share_of_limit is None else f", {entry.share_of_limit:.0%} of the limit by {entry.limit_by}"
            self.tell(f"{entry.group} | {entry.contender}: {entry.milliseconds.median:.4g} ms{share}")
        if self.timed:
            self._add(outcome)

    def _raise_ceilings(self) -> None:
        """Measure the ceilings again, as a first look may have met a busy machine, and every limit by the highest."""
        ceilings = higher(self._run.ceilings, measure_ceilings(self.device))
        results = tuple(limited_by(result, ceilings) for result in self._run.results)
        self._run = self._run.model_copy(update={"ceilings": ceilings, "results": results})

    def _add(self, outcome: Outcome) -> None:
        parts = {name: (*getattr(self._run, name), *getattr(outcome, name)) for name in ("results", "skipped", "failed")}
        self._run = Run(machine=self._run.machine, ceilings=self._run.ceilings, **parts)
        self._run.save(self.path)


def makers(case: Case, names: Iterable[str], skipped: list[Missing]) -> dict[str, Make]:
    """Of the named contenders that can run; the others are added to ``skipped``."""
    found: dict[str, Make] = {}
    by_name = {peer.name: peer for peer in PEERS}
    for name in names:
        if name == OURS:
            found[name] = lambda problem: problem.built_in[OURS]()
            continue
        reason = by_name[name].reason(case)
        if reason is None:
            found[name] = by_name[name].ops[case.op]
        else:
            skipped.append(Missing(group=case.group, contender=name, reason=reason))
    return found
