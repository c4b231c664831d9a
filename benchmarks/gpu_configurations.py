"""Compiles the configurations that a GPU session sweeps, ahead of time for sm_90 and without a GPU.

    PYTHONPATH=. python benchmarks/gpu_configurations.py [--kernel "selective_scan backward"] [--every]

A line each: registers a lane, spilled bytes, shared memory, and for the selective scan the instructions per state and step of
the inner loop with its spills.  Without --every only what spills or does not compile is printed, and a count of the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

import aot  # noqa: E402
from gpu.sweep import key  # noqa: E402
from gpu.tunables import tunables  # noqa: E402

from compressm.kernels.core.gpu import MachineCode  # noqa: E402

TARGET = aot.TARGETS["sm_90"]


def constants(case: MachineCode, config: dict[str, Any]) -> dict[str, Any]:
    """What the kernel and the compiler get for a configuration."""
    own = {name: value for name, value in config.items() if name not in ("threads", "stretches", "elements")}
    if "threads" in config:
        own["num_warps"] = config["threads"] // 32
        own |= {"W": own["num_warps"]} if "W" in case.kernel.arg_names else {}
    if "elements" in config:
        own["BD"] = max(1, config["elements"] // case.config["BN"])
    return case.config | own


def rows(wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kernel and configuration, what the compiler says) of every configuration that compiles differently."""
    cases = {case.name: case for case in aot.cases(TARGET)}
    for tunable in tunables():
        case, seen = cases[tunable.code], set()
        for config in tunable.configs if wanted in tunable.name else ():
            settings = constants(case, config)
            if tuple(settings.items()) in seen:
                continue
            seen.add(tuple(settings.items()))
            try:
                compiled = aot.compile_case(case._replace(config=settings), TARGET)
                usage, lines = aot.nvidia_code(compiled)
                usage["shared"] = compiled.metadata.shared
                if case.inner:
                    loop = aot.inner_loop(lines)
                    usage["per_element"] = round(len(loop) / (8 * config["R"]), 1)
                    usage["spills_in_loop"] = sum(code.startswith(("LDL", "STL")) for code in loop)
            except Exception as error:  # of one configuration: it is printed in its place
                usage = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            yield f"{tunable.name}: {key(config)}", usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--every", action="store_true", help="print every configuration")
    arguments = parser.parse_args()
    clean = 0
    for name, usage in rows(arguments.kernel):
        bad = "error" in usage or usage["spills"]
        clean += not bad
        if bad or arguments.every:
            print(name, *(f"{word} {value}" for word, value in usage.items()), flush=True)
    print(f"{clean} configurations compile without spills")


if __name__ == "__main__":
    main()
