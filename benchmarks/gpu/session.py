"""What the parts of a session share: the device, the clock, and the file that each part writes as it goes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "benchmarks" / "gpu_session.py"


@dataclass(frozen=True)
class Session:
    """One run.

    Attributes:
        out: folder of the results.
        device: ``"cuda"``, or ``"cpu"``, where kernels run in Triton's interpreter.
        smoke: tiny shapes and few rounds, to try the program itself.
        budget: seconds for the whole run.
        mamba: folder with the source of mamba_ssm, or None.
        last: the part that runs last, which may take all that is left.
    """

    out: Path
    device: str
    smoke: bool
    budget: float
    mamba: Path | None = None
    last: str = "train"
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def pick(self, full: Any, smoke: Any) -> Any:
        """The first, or on a smoke run the second."""
        return smoke if self.smoke else full


class Part:
    """Results of one part: a JSON object on disk that is whole after every change.

    ``checks`` and what ``fail`` adds decide the exit code; ``skipped`` says what is missing and why.
    """

    def __init__(self, session: Session, name: str, share: float) -> None:
        """share: of the budget, unless the part is the last."""
        self.session, self.name = session, name
        self.path = session.out / f"{name}.json"
        left = session.left()
        self._end = time.monotonic() + (left if name == session.last else min(share * session.budget, left))
        self.body: dict[str, Any] = {
            "part": name, "complete": False, "smoke": session.smoke, "machine": machine(session.device),
            "failed": [], "skipped": [],
        }  # fmt: skip
        self.save()

    def left(self) -> float:
        """Seconds that this part may still take."""
        return self._end - time.monotonic()

    def add(self, table: str, *rows: dict[str, Any]) -> None:
        """Append rows to a table."""
        self.body.setdefault(table, []).extend(rows)
        self.save()

    def set(self, key: str, value: Any) -> None:
        """Set one entry."""
        self.body[key] = value
        self.save()

    def fail(self, what: str, why: str) -> None:
        """Something is wrong: the session's exit code will say so."""
        self.body["failed"].append({"what": what, "why": why})
        self.save()

    def skip(self, what: str, why: str, *, for_time: bool = False) -> None:
        """Something was not done; for_time: it would be with more time, so that the part is not complete."""
        self.body["skipped"].append({"what": what, "why": why, "for_time": for_time})
        self.save()

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; else it is noted as skipped."""
        if self.left() >= seconds:
            return True
        self.skip(what, f"about {seconds:.0f} s needed, {self.left():.0f} s left", for_time=True)
        return False

    def finish(self) -> None:
        """Close the part."""
        self.body["complete"] = not any(entry["for_time"] for entry in self.body["skipped"])
        self.save()

    def save(self) -> None:
        """Replace the file in one go."""
        self.body["seconds"] = round(time.monotonic() - self.session.started, 1)
        write(self.path, self.body)


def write(path: Path, body: Any) -> None:
    """Replace a JSON file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(body, indent=1, default=str) + "\n")
    os.replace(draft, path)


def read(path: Path) -> dict[str, Any] | None:
    """A part's file, None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def machine(device: str) -> dict[str, Any]:
    """What a result says about where it was measured."""
    import triton

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    about = {
        "commit": git.stdout.strip(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__, "device": device,
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name, "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory, "capability": f"{properties.major}.{properties.minor}",
            "l2": properties.L2_cache_size, "cuda": torch.version.cuda,
        }  # fmt: skip
    return about


def brief(error: BaseException) -> str:
    """One line of an exception."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
