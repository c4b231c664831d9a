"""What a comparison consists of: methods, seeds, learning rates to try, and the runs that follow from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressm.errors import ConfigError
from compressm.experiments.declared import check_counts
from compressm.experiments.methods import METHODS
from compressm.experiments.runs import write_text
from compressm.experiments.settings import read_settings, resolve
from compressm.experiments.tasks.models import MODELS
from compressm.experiments.tasks.settings import Settings

DESIGN_FILE = "design.json"
TUNING_SEEDS = 1_000_000  # seeds for tuning begin so far from those that are reported on


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        method: by which it is trained.
        seed: of the run.
        multiple: of the preset's learning rate; None: the one that tuning finds best.
    """

    method: str
    seed: int
    multiple: float | None = None

    @property
    def tuning(self) -> bool:
        """Whether it only helps to choose a learning rate."""
        return self.multiple is not None

    @property
    def key(self) -> str:
        """Names its files."""
        return f"{self.method}-seed{self.seed}" + (f"-lr{self.multiple:g}" if self.multiple is not None else "")

    def path(self, out: Path, suffix: str) -> Path:
        """Of its record (``.json``) or checkpoint (``.safetensors``)."""
        return out / ("tuning" if self.tuning else "runs") / f"{self.key}{suffix}"


@dataclass(frozen=True)
class Design:
    """What ``compressm compare`` was asked for.

    Attributes:
        preset: the task.
        overrides: settings that differ from the preset's.
        methods: to compare, in the order of the report; the first is compared with all others.  Those that others need are
            among them.
        seeds: how many each is reported on, from the settings' ``seed`` on.
        multiples: of the learning rate that are tried for each; empty: none, all train with the preset's.
        tuning_seeds: how many each multiple is tried with.
        data_dir: folder of the data; None downloads them.
    """

    preset: str
    overrides: Mapping[str, Any]
    methods: tuple[str, ...]
    seeds: int
    multiples: tuple[float, ...] = ()
    tuning_seeds: int = 2
    data_dir: str | None = None

    @property
    def base(self) -> Settings:
        """The settings that all runs share."""
        return resolve(self.preset, {**self.overrides, "runs": self.order})

    @property
    def order(self) -> tuple[str, ...]:
        """The methods, those that others need before them."""
        return in_order(self.methods, resolve(self.preset, self.overrides))

    def report_jobs(self) -> list[Job]:
        """The runs that are reported on: all methods with the first seed, then with the next."""
        first = self.base.seed
        return [Job(name, first + number) for number in range(self.seeds) for name in self.order]

    def tuning_jobs(self, method: str) -> list[Job]:
        """The runs that choose a method's learning rate."""
        first = self.base.seed + TUNING_SEEDS
        return [Job(method, first + number, m) for number in range(self.tuning_seeds) for m in self.multiples]

    def jobs(self) -> list[Job]:
        """All runs, in the order in which they are begun where nothing else decides."""
        return [*(job for name in self.order for job in self.tuning_jobs(name)), *self.report_jobs()]

    def needs(self, method: str) -> tuple[str, ...]:
        """The methods whose runs must be finished before."""
        return needs(method, resolve(self.preset, self.overrides))

    def before(self, job: Job) -> list[Job]:
        """The runs that must be finished before a run begins."""
        tuned = [self.tuning_jobs(name) for name in self.needs(job.method)]
        if job.tuning:
            return [other for jobs in tuned for other in jobs]
        return [*self.tuning_jobs(job.method), *(Job(name, job.seed) for name in self.needs(job.method))]

    def settings(self, job: Job, multiple: float) -> Settings:
        """Of one run, with a multiple of the preset's learning rate."""
        base = self.base
        runs = in_order((job.method,), base)
        return read_settings({**base.to_dict(), "runs": runs, "seed": job.seed, "lr": base.lr * multiple})

    def write(self, out: Path) -> None:
        """Note in the output folder what its runs have in common.

        Raises:
            ConfigError: it holds runs of another comparison.
            CheckpointError: it cannot be written.
        """
        path, mine = out / DESIGN_FILE, self._common()
        folders = [out / name for name in ("runs", "tuning")]
        if path.exists() and any(folder.is_dir() and any(folder.iterdir()) for folder in folders):
            try:
                theirs = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}: cannot be read ({error}). Choose another --out") from error
            if theirs != mine:
                changed = [key for key in mine if not isinstance(theirs, dict) or theirs.get(key) != mine[key]]
                raise ConfigError(
                    f"--out {out}: holds a comparison with another {', '.join(changed)}; expected the same, as its runs are "
                    "taken over. Only methods and seeds may be added. Choose another folder"
                )
            return
        for folder in folders:
            make_folder(folder)
        write_text(path, json.dumps(mine, indent=1))

    def _common(self) -> dict[str, Any]:
        return {
            "preset": self.preset, "overrides": dict(self.overrides), "multiples": list(self.multiples),
            "tuning_seeds": self.tuning_seeds, "data_dir": self.data_dir,
        }  # fmt: skip


def needs(method: str, settings: Settings) -> tuple[str, ...]:
    """The methods whose runs a method takes something over from."""
    return METHODS[method].needs(settings, MODELS[settings.model](settings))


def in_order(methods: Iterable[str], settings: Settings) -> tuple[str, ...]:
    """Methods and what they need, each once and after what it needs."""
    found: list[str] = []
    for name in methods:
        found += [other for other in (*in_order(needs(name, settings), settings), name) if other not in found]
    return tuple(found)


def make_folder(path: Path) -> None:
    """Make a folder in the output folder.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}, expected a folder that can be written") from error


def plan(
    preset: str,
    overrides: Mapping[str, Any],
    methods: Iterable[str] | None,
    *,
    seeds: int,
    multiples: Iterable[float] = (),
    tuning_seeds: int = 2,
    data_dir: str | None = None,
) -> Design:
    """The design of a comparison, checked.

    Args:
        preset: the task.
        overrides: of the preset's settings; ``runs`` is not one of them.
        methods: in the order of the report, whose first is compared with all others; None: the preset's.
        seeds, multiples, tuning_seeds, data_dir: see :class:`Design`.

    Raises:
        ConfigError: an unknown name or a value out of range.
    """
    if "runs" in overrides:
        raise ConfigError("--set runs: got it with compare, expected --methods. Leave it out")
    multiples = tuple(dict.fromkeys(multiples))
    check_counts(seeds, tuning_seeds, multiples)
    settings = resolve(preset, overrides)
    names = tuple(dict.fromkeys(settings.runs if methods is None else methods))
    extra = (name for name in in_order(names, settings) if name not in names)
    design = Design(preset, dict(overrides), (*names, *extra), seeds, multiples, tuning_seeds, data_dir)
    if design.base.seed + seeds > TUNING_SEEDS:
        raise ConfigError(f"seed: got {design.base.seed} with {seeds} seeds, expected less than {TUNING_SEEDS:,} in all")
    return design
