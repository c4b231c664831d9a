"""Compiles every Triton kernel ahead of time for every target and reports, as JSON, what the machine code looks like.

It runs in a process of its own (``python aot.py``), because Triton compiles nothing in a process that interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from compressm.kernels import (
    _causal_conv1d_triton,
    _gramians_triton,
    _lti_scan_triton,
    _selective_scan_triton,
    _selective_scan_triton_bwd,
    _selective_scan_triton_fwd,
    _selective_state_update_triton,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_SCAN = {"L": "i32", "N": "i32", "stretches": "i32", "steps": "i32"}
_FORWARD = dict.fromkeys(("lam", "starts"), "*fp32") | _SCAN
_BACKWARD = dict.fromkeys(("lam", "carries", "start", "grad_lam", "grad_start"), "*fp32") | _SCAN
_GRAMIANS = {
    "work": "*i64", "systems": "*i64", "spectra": "*fp64", "features": "*fp64", "out": "*fp64", "states": "i32", "plane": "i32",
}  # fmt: skip
_CONV = dict.fromkeys(("weight", "bias", "state", "grad_state", "shares"), "*fp32") | dict.fromkeys(
    ("D", "L", "stretches", "stride_b", "stride_d", "grad_stride_b", "grad_stride_d"), "i32"
)


class Case(NamedTuple):
    """A kernel with the types of its arguments and its constants.

    ``elements``: what one turn of its loop, or without ``loop`` the whole kernel, handles per lane.  ``inner``: the loop, and
    the layouts that matter, are those of a loop within another.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    config: dict[str, Any]
    elements: int | None = None
    loop: bool = True
    inner: bool = False


def cases(target: GPUTarget) -> Iterator[Case]:
    lanes = {"BN": target.warp_size}
    forward = _lti_scan_triton.FORWARD_CONFIG | lanes
    backward = _lti_scan_triton.BACKWARD_CONFIG | lanes
    kernel = _lti_scan_triton._diagonal_scan_fwd_kernel
    for dtype in ("fp32", "bf16"):
        types = _FORWARD | dict.fromkeys(("x", "h"), f"*{dtype}")
        yield Case(f"scan_fwd_{dtype}", kernel, types, forward | {"REVERSE": False, "STORE": True}, forward["U"])
    types = _FORWARD | {"x": "*bf16", "h": "*fp32"}
    yield Case("scan_ends_bf16", kernel, types, forward | {"REVERSE": True, "STORE": False}, forward["U"])
    kernel = _lti_scan_triton._diagonal_scan_bwd_kernel
    for dtype in ("fp32", "bf16"):
        types = _BACKWARD | dict.fromkeys(("grad_h", "h", "grad_x"), f"*{dtype}")
        yield Case(f"scan_bwd_{dtype}", kernel, types, backward | {"REVERSE": True}, backward["U"])
    config = _gramians_triton.CONFIG | {"num_warps": _gramians_triton.TILE**2 // target.warp_size}
    yield Case("gramians", _gramians_triton._gramians_kernel, _GRAMIANS, config)
    yield from convolution_cases(target)
    yield from selective_cases(target)


def convolution_cases(target: GPUTarget) -> Iterator[Case]:
    config = _causal_conv1d_triton.CONFIG | {"WIDTH": 4, "SILU": True}
    elements = config["BT"] // (config["num_warps"] * target.warp_size)
    for dtype in ("fp32", "bf16"):
        types = _CONV | dict.fromkeys(("x", "out", "grad", "grad_x"), f"*{dtype}")
        for name in ("fwd", "bwd"):
            kernel = getattr(_causal_conv1d_triton, f"_causal_conv1d_{name}_kernel")
            yield Case(f"conv_{name}_{dtype}", kernel, types, config, elements, loop=False)


def types_of(kernel: Any, dtype: str, float32: str) -> dict[str, str]:
    """Types of the arguments of a kernel of the selective scan: those that ``float32`` names are, other tensors ``dtype``."""
    wide = float32.split()
    types = {name: "*fp32" if name in wide else f"*{dtype}" for name in kernel.arg_names}
    for name in types:
        if re.search(r"_[bdtn]$", name) or name in ("L", "N", "steps", "width", "head", "channels", "groups", "one"):
            types[name] = "i32"
    return types | {"cu_seqlens": "*i32", "rows": "*i64"}


def selective_cases(target: GPUTarget) -> Iterator[Case]:
    """The selective scan for many aligned channels, the types that differ on one target only, and the decode step."""
    main = target == TARGETS["sm_90"]
    fast = {"FAST": target.backend == "cuda", "SOFTPLUS": True, "enable_fp_fusion": True}
    shared = fast | {"TRAIN": True, "EVEN": True, "cu_seqlens": None}
    shared |= dict.fromkeys(("U", "DELTA", "Z", "OUT", "GRAD", "Y", "GDELTA", "GZ"), _selective_scan_triton.TIME)
    settings = _selective_scan_triton._config(8, 1536, 2048, 16)
    warps = settings["threads"] // target.warp_size
    shared |= {key: settings[key] for key in ("R", "BD", "T")}
    elements = 8 * settings["R"]
    kernel = _selective_scan_triton_fwd._selective_scan_fwd_kernel
    for dtype in ("bf16", "fp32") if main else ("bf16",):
        types = types_of(kernel, dtype, "A D bias initial last carries")
        yield Case(f"selective_fwd_{dtype}", kernel, types, shared | {"num_warps": warps}, elements, inner=True)
    kernel = _selective_scan_triton_bwd._selective_scan_bwd_kernel
    float32 = "A D bias grad_last carries scratch grad_BC grad_D grad_bias"
    for dtype in ("bf16", "fp32") if main else ("bf16",):
        config = shared | {"DETERMINISTIC": False, "W": warps, "num_warps": warps}
        yield Case(f"selective_bwd_{dtype}", kernel, types_of(kernel, dtype, float32), config, elements, inner=True)
    if main:
        config = shared | {"DETERMINISTIC": True, "W": 2 * warps, "num_warps": 2 * warps, "BD": 2 * settings["BD"]}
        yield Case("selective_bwd_deterministic_bf16", kernel, types_of(kernel, "bf16", float32), config, elements, inner=True)
    kernel = _selective_state_update_triton._selective_state_update_kernel
    fast |= {"TIED": False, "DENSE": True, "num_warps": 128 // target.warp_size}
    config = _selective_state_update_triton.config(16) | fast
    elements = config["BD"] * config["BN"] // 128
    yield Case("state_update_bf16", kernel, types_of(kernel, "bf16", "state A D bias"), config, elements)


def compile_case(case: Case, target: GPUTarget) -> Any:
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
        }


def specialized(kernel: Any) -> list[str]:
    """Run-time arguments whose values would trigger another compilation."""
    return [p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]


if __name__ == "__main__":
    kernels = {case.kernel for case in cases(TARGETS["sm_90"])}
    print(json.dumps({
        "rows": [row for name in TARGETS for row in report(name)],
        "specialized": sorted({name for kernel in kernels for name in specialized(kernel)}),
        "why_not": [_lti_scan_triton.why_not("cpu", _lti_scan_triton.DTYPES[0]), _gramians_triton.why_not("cpu")],
    }))  # fmt: skip
