"""``compressm doctor``: what this machine has, what therefore runs where, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressm import config
from compressm._version import __version__
from compressm.errors import EXTRAS
from compressm.kernels import OPS
from compressm.kernels.core import cpp
from compressm.kernels.gated_delta_rule.form import HELD

if TYPE_CHECKING:
    from rich.console import Group

FIRST_BUILD = "after one build of 2 to 6 minutes at the first call, or now: compressm doctor --build"
ISAS = {"avx512": "AVX-512", "avx2": "AVX2", "portable": "portable"}
NEEDED_FOR = {"train": "compressm train, report and bench, plots", "integrations": "hooks for transformers, Lightning, PEFT"}


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; prints as two tables and a list (``print`` or rich).

    Attributes:
        found: what was looked for, and what is there.
        runs: which tensors run on what.
        missing: a sentence for each thing that is not there: what that means, and the way out.
    """

    found: dict[str, str]
    runs: dict[str, str]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"missing": list(self.missing)}

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        for heading, rows in (("Found", self.found), ("What runs where", self.runs)):
            table = Table(title=heading, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
            table.add_column(style="cyan", no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in rows.items():
                table.add_row(Text(name), Text(value))
            parts += [table, ""]
        parts.append(Text("Missing" if self.missing else "Nothing is missing", style="bold"))
        listed = Table(box=None, pad_edge=False, show_header=False)
        for line in self.missing:
            listed.add_row("-", Text(line))
        return Group(*parts, *([listed] if self.missing else []))

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        file = StringIO()
        Console(file=file, width=80, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def diagnose(*, build: bool = False) -> Diagnosis:
    """Look at this installation and machine.

    Args:
        build: first build the C++ kernels where there are none yet, which takes some minutes; else nothing is built.
    """
    if build:
        cpp.why_not()
    kernels = cpp.found()
    found = {
        "compressm": f"{__version__}, in {Path(cpp.PACKAGE)}",
        "Python": f"{platform.python_version()}, {sys.executable}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "triton": _version("triton") or "not installed",
        "compiler": f"{kernels.compiler}: {kernels.version}" if kernels.compiler else "none",
        "ninja": _version("ninja") or "not installed",
        "instruction set": _instruction_set(kernels),
        "GPU": _gpus(),
        "C++ kernels": _library(kernels),
        "older builds": f"{len(kernels.others)} in {kernels.builds}, for other sources, torch or compilers",
        **{f"extra [{extra}]": _extra(extra) for extra in EXTRAS},
    }
    if not kernels.others:
        del found["older builds"]
    return Diagnosis(found, _runs(kernels), tuple(_missing(kernels)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _instruction_set(kernels: cpp.Found) -> str:
    """The library's own word where there is one, else torch's."""
    if kernels.library is not None and cpp.why_not() is None:
        return ISAS[cpp.library().isa()]
    name = torch.backends.cpu.get_cpu_capability().lower()
    return f"{ISAS.get(name, ISAS['portable'])}, as torch says"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    cuda, names = torch.cuda, []
    for index in range(cuda.device_count()):
        facts = cuda.get_device_properties(index)
        names.append(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    return "; ".join(names)


def _library(kernels: cpp.Found) -> str:
    if kernels.library is not None:
        origin = "came with the installation" if kernels.prebuilt else "built"
        return f"{origin}: {kernels.library.name} in {kernels.library.parent}"
    return f"none: {kernels.reason}" if kernels.reason else f"not built yet, will lie in {kernels.builds}"


def _absent(extra: str) -> list[str]:
    return sorted({package for module, package in EXTRAS[extra].items() if find_spec(module) is None})


def _extra(extra: str) -> str:
    absent = _absent(extra)
    return f"without {', '.join(absent)}" if absent else "complete"


def _runs(kernels: cpp.Found) -> dict[str, str]:
    plain = "plain torch, the reference"
    compiled = f"C++, {_instruction_set(kernels).partition(',')[0]}"
    cpu = f"{plain}: {kernels.reason}" if kernels.reason else compiled if kernels.library else f"{compiled}, {FIRST_BUILD}"
    triton = [op.name for op in OPS.values() if op.gpu is not None]
    others = [op.name for op in OPS.values() if op.gpu is None]
    gpu = f"Triton: {', '.join(triton)}" + (f"; {plain}: {', '.join(others)}" if others else "")
    gpu += f". gated_delta_rule, and linear_attention with decays of channels, up to {HELD} key channels a head; else {plain}"
    if _version("triton") is None:
        gpu = f"{plain}: triton is not installed"
    runs = {
        "CPU, float32, bfloat16, float16": cpu,
        "CPU, float64": f"{plain}, step by step",
        "GPU": gpu if torch.cuda.is_available() else "nothing, there is none",
    }
    if (chosen := config.backend()) is not None:
        runs["COMPRESSM_BACKEND"] = f"{chosen} wherever an op has it, whatever is said above"
    return runs


def _missing(kernels: cpp.Found) -> Iterator[str]:
    if kernels.reason is not None:
        yield (
            f"C++ kernels ({kernels.reason}): CPU tensors run on plain torch, several times slower. Install a C++20 compiler "
            "(apt install g++) and ninja, or name a folder that can be written to by COMPRESSM_BUILD_DIR"
        )
    if torch.cuda.is_available() and _version("triton") is None:
        yield "triton: GPU tensors run on plain torch. pip install triton"
    if not torch.cuda.is_available() and any(os.path.exists(device) for device in ("/dev/nvidia0", "/dev/kfd")):
        yield f"a torch that finds this machine's GPU: {torch.__version__} does not. pytorch.org has one for its driver"
    for extra in EXTRAS:
        if absent := _absent(extra):
            yield f"{', '.join(absent)}: {NEEDED_FOR[extra]}. pip install 'compressm[{extra}]'"
