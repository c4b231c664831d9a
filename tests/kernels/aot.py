"""Compiles every Triton kernel ahead of time for every target and reports, as JSON, what the machine code looks like.

It runs in a process of its own (``python aot.py [TARGET ...]``), because Triton compiles nothing in a process that interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from compressm.kernels import OPS
from compressm.kernels.core.gpu import MachineCode
from compressm.kernels.diagonal_scan import triton_scan
from compressm.kernels.gramians import triton_gramians

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}



def cases(target: GPUTarget) -> Iterator[MachineCode]:
    """Those of all ops."""
    for op in OPS.values():
        if op.gpu is not None:
            yield from op.gpu_cases().machine_code(target)


def compile_case(case: MachineCode, target: GPUTarget) -> Any:
    arguments = case.kernel.arg_names
    constants = {name: value for name, value in case.config.items() if name in arguments}
    options = {name: value for name, value in case.config.items() if name not in arguments}
    signature = {name: "constexpr" if name in constants else case.types[name] for name in arguments}
    return triton.compile(ASTSource(case.kernel, signature, constants), target=target, options=options)


def nvidia_code(compiled: Any) -> tuple[dict[str, int], list[str]]:
    """Registers and spilled bytes, and the SASS as lines: ``address:``, ``BRA address`` and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    lines = []
    for address, code in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass):
        code = re.sub(r"^@!?U?P\w+\s+", "", code)
        target = re.search(r"^BRA\S*.*?\b0x([0-9a-f]+)", code)
        lines += [f"{int(address, 16)}:", f"BRA {int(target[1], 16)}" if target else code]
    return {"registers": registers, "spills": spilled_bytes(compiled) if stack else 0}, lines


def spilled_bytes(compiled: Any) -> int:
    """What ptxas says of a kernel that uses its stack, where local arrays may lie as well as spilled registers."""
    ptx = compiled.asm["ptx"]
    tool = get_ptxas(compiled.metadata.target.arch).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool, "-v", f"--gpu-name={re.search(r'[.]target (sm_[0-9a-z]+)', ptx)[1]}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def amd_code(compiled: Any) -> tuple[dict[str, int], list[str]]:
    text = compiled.asm["amdgcn"]
    keys = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    usage = {key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in keys}
    lines = []
    for line in text.split("s_endpgm")[0].splitlines():
        code = line.split(";")[0].strip()
        target = re.match(r"s_c?branch\w*\s+(\S+)", code)
        if target:
            lines.append(f"BRA {target[1]}")
        elif code.endswith(":") or re.match(r"[sv]_|global_|buffer_|scratch_|ds_|flat_", code):
            lines.append(code)
    spills = usage["vgpr_spill_count"] + usage["sgpr_spill_count"]
    return {"registers": usage["vgpr_count"], "spills": spills}, lines


def longest_loop(lines: list[str]) -> list[str]:
    """Instructions of the longest loop, that is from a label to a later branch to it, without no-operations."""
    labels: dict[str, int] = {}
    longest: list[str] = []
    for at, line in enumerate(lines):
        if line.endswith(":"):
            labels[line[:-1]] = at
        elif line.startswith("BRA ") and line[4:] in labels:
            body = [code for code in lines[labels[line[4:]] : at + 1] if not code.endswith(":")]
            body = [code for code in body if not re.match(r"NOP|s_nop", code)]
            longest = max(longest, body, key=len)
    return longest


def inner_loop(lines: list[str]) -> list[str]:
    """Instructions of the shortest loop that has exponentials."""
    labels: dict[str, int] = {}
    loops = []
    for at, line in enumerate(lines):
        if line.endswith(":"):
            labels[line[:-1]] = at
        elif line.startswith("BRA ") and line[4:] in labels:
            body = [code for code in lines[labels[line[4:]] : at + 1] if not code.endswith(":")]
            loops.append([code for code in body if not re.match(r"NOP|s_nop", code)])
    return min((body for body in loops if any(re.match(r"MUFU|v_exp", code) for code in body)), key=len)


def conversions(ttgir: str, inner: bool) -> int:
    """Layout conversions, all of them or those in loops within loops."""
    count, loops = 0, []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1]:
            loops.pop()
        if "scf.for" in line:
            loops.append(indent)
        count += "convert_layout" in line and (len(loops) > 1 or not inner)
    return count


def report(name: str) -> Iterator[dict[str, Any]]:
    target = TARGETS[name]
    for case in cases(target):
        compiled = compile_case(case, target)
        usage, lines = (nvidia_code if target.backend == "cuda" else amd_code)(compiled)
        find = inner_loop if case.inner else longest_loop
        loop = find(lines) if case.loop else [code for code in lines if not code.endswith(":")]
        elements = case.elements or sum(bool(re.match(r"DFMA|v_fmac?_f64", code)) for code in loop) // 4
        per_element = round(len(loop) / elements, 1)
        yield {
            "kernel": case.name,
            "target": name,
            **usage,
            "per_element": per_element,
            "layout_conversions": conversions(compiled.asm["ttgir"], case.inner),
            "shared_memory": compiled.metadata.shared,
            "budget": case.budget._asdict(),
        }


def specialized(kernel: Any) -> list[str]:
    """Run-time arguments whose values would trigger another compilation."""
    return [p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]


if __name__ == "__main__":
    kernels = {case.kernel for case in cases(TARGETS["sm_90"])}
    print(json.dumps({
        "rows": [row for name in sys.argv[1:] or TARGETS for row in report(name)],
        "specialized": sorted({name for kernel in kernels for name in specialized(kernel)}),
        "why_not": [triton_scan.why_not("cpu", triton_scan.DTYPES[0]), triton_gramians.why_not("cpu")],
    }))  # fmt: skip
