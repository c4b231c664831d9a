"""Figures of compiled kernels that were not run: the file that holds them, and their section of the report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressm.errors import DataError

from .wording import NONE, code, escape, number, table


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Kernel(_Part):
    """The machine code of one kernel.

    Attributes:
        library: whose it is; states: N, or K.
        registers: of a lane; spills: bytes, of a lane; shared: bytes, of a program.
        instructions, products: in all, loops counted once, and those among them that multiply matrices.
        tiles: sizes of a program's blocks, and its warps.
        steps: of a program, or of a turn of its loop over steps.
        programs: how many of them a head needs for these steps; a turn of a loop over heads is one.
    """

    library: str
    name: str
    states: int = Field(ge=1)
    registers: int
    spills: int
    shared: int
    instructions: int
    products: int
    tiles: dict[str, int]
    steps: int = Field(ge=1)
    programs: float = Field(gt=0)

    @property
    def per_token(self) -> float:
        """Instructions, of warps, for one step of one head."""
        return self.instructions * self.tiles["warps"] * self.programs / self.steps


class Traffic(_Part):
    """Bytes that a forward pass moves per step and head, every tensor counted once per kernel that reads or writes it."""

    library: str
    states: int = Field(ge=1)
    bytes: float = Field(gt=0)


class Computation(_Part):
    """The kernels of one computation, ours and others'.

    Attributes:
        title: what is computed, and at which sizes.
        axis: what ``states`` are called.
        libraries: versions of whose kernels they are, but for our own.
    """

    title: str
    axis: str
    libraries: dict[str, str]
    kernels: tuple[Kernel, ...]
    traffic: tuple[Traffic, ...]


class Modelled(_Part):
    """What was compiled for one target, such as ``"sm_90"``, by the software of these versions."""

    target: str
    versions: dict[str, str]
    computations: tuple[Computation, ...]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Modelled:
        """Raises DataError where the file is missing or another."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            remedy = "Write it with python benchmarks/gpu_peers_aot.py --out"
            raise DataError(f"{path}: holds no figures of compiled kernels ({reason}). {remedy}") from error


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{escape(name)} {escape(version)}" for name, version in sorted(versions.items()))


def section(found: Modelled) -> list[str]:
    """Of every computation the bytes by library and states, then its kernels."""
    lines = [
        "## Modelled, not run", "",
        f"Compiled ahead of time for {code(found.target)} ({_versions(found.versions)}). No machine has run it: these figures"
        " say what a kernel needs, not how long it takes. Registers and spilled bytes are a lane's, shared memory is a"
        " program's; a loop's instructions count once, and so do its matrix products, each of a warp or of four. Instructions"
        " per token are those of one step of one head: instructions times the warps of a program times the programs that a head"
        " needs for a block of steps, divided by the steps of the block. A turn of a loop over steps or heads is a program; all"
        " other loops count once here, too.", "",
    ]  # fmt: skip
    for computation in found.computations:
        lines += _computation(computation)
    return lines


def _computation(found: Computation) -> list[str]:
    states = sorted({entry.states for entry in found.traffic}, reverse=True)
    moved = {(entry.library, entry.states): number(entry.bytes) for entry in found.traffic}
    libraries = dict.fromkeys(entry.library for entry in found.traffic)
    rows = [[code(name), *(moved.get((name, n), NONE) for n in states)] for name in libraries]
    against = f" ({_versions(found.libraries)})" if found.libraries else ""
    lines = [f"### {escape(found.title)}{against}", ""]
    lines += ["Bytes that a forward pass moves per step and head, each tensor once per kernel that reads or writes it:", ""]
    lines += table(("library", *(f"{found.axis}={n}" for n in states)), rows)
    headings = (
        "kernel", found.axis, "registers", "spilled bytes", "shared, KiB", "instructions", "per token", "matrix products",
        "tiles",
    )  # fmt: skip
    rows = [
        [
            f"{escape(k.library)} {code(k.name)}", str(k.states), str(k.registers), str(k.spills), number(k.shared / 1024),
            f"{k.instructions:,}", number(k.per_token), str(k.products),
            escape(" ".join(f"{name}={size}" for name, size in k.tiles.items())),
        ]
        for k in found.kernels
    ]  # fmt: skip
    return lines + table(headings, rows)
