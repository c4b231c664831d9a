"""The machine code of our kernels beside that of mamba_ssm's and flash-linear-attention's, compiled ahead of time.

    PYTHONPATH=. python benchmarks/gpu_peers_aot.py [--target sm_90] [--fla FOLDER] [--out benchmarks/modelled.json]

A row is one kernel: registers of a lane, spilled bytes, shared memory, instructions and matrix instructions in all, the tiles
and warps of a program, and the instructions per token and head that follow from how programs divide the work
(``gpu_peers_grids``).  Loops are counted once, so that rows tell what a program needs, not how long it takes.

mamba_ssm tunes its tiles on the machine; what is shown is its configuration with tiles of 64 x 64, or the first where it has
none.  Its kernels depend on N where a tile holds all states of a row; the others are shown once.  flash-linear-attention tunes
as well: shown is one configuration of four warps, and tiles no larger than 64, which need not be the one that it would choose.
Its kernels know K as a constant.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from benchmarks.gpu_peers_grids import CHUNK, HEADS, divided
from benchmarks.reporting.modelled import Computation, Kernel, Modelled, Traffic
from compressm.integrations.mamba_ssm import stand_in_for_the_extension
from compressm.kernels.core.gpu import Budget, MachineCode
from compressm.kernels.gated_delta_rule import gpu as delta
from compressm.kernels.gated_delta_rule import triton_call
from compressm.kernels.ssd import gpu, triton_launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
import aot

STATES = (128, 64, 48, 32, 16)
WIDTH = 64  # channels of a head of Mamba-2's scan
KEYS, VALUES, FLA_HEADS, FLA_CHUNK = (128, 64, 32, 16), 128, 16, 64  # of the computations of flash-linear-attention
ONES = r"_(hdim|dstate|dim|ak|bk|k|csize|csize_k|csize_n|outn)$"  # strides of neighbours
FLOAT32 = r"^(dt|dA_cumsum|dA_cs|cb|dcb|ddt|D|dD|res|ddA_cumsum|states|dstates|dprev_states|db|dc|final_states)_ptr$"
FIXED = {
    "IS_CAUSAL": True, "HAS_D": True, "D_HAS_HDIM": False, "HAS_Z": False, "HAS_SEQ_IDX": False, "HAS_INITSTATES": False,
    "HAS_DDA_CS": True, "HAS_RESIDUAL": True, "DETERMINISTIC_REDUCTION": False, "IS_TRITON_22": True,
    "dot_dtype": triton.language.bfloat16, "z_ptr": None, "out_x_ptr": None, "seq_idx_ptr": None, "initstates_ptr": None,
}  # fmt: skip


def of_mamba() -> Iterator[tuple[str, Any]]:
    """(name, tuned kernel): those of a forward and backward that multiply matrices or pass states."""
    stand_in_for_the_extension()
    from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing

    for module, names in (
        (ssd_chunk_state, ("_chunk_state_fwd_kernel", "_chunk_state_bwd_db_kernel")),
        (ssd_state_passing, ("_state_passing_fwd_kernel",)),
        (ssd_bmm, ("_bmm_chunk_fwd_kernel", "_bmm_chunk_bwd_kernel")),
        (
            ssd_chunk_scan,
            (
                "_chunk_scan_fwd_kernel", "_chunk_scan_bwd_dstates_kernel", "_chunk_scan_bwd_dc_kernel",
                "_chunk_scan_bwd_dcb_kernel", "_chunk_scan_bwd_ddAcs_stable_kernel",
            ),
        ),
        (ssd_combined, ("_chunk_scan_chunk_state_bwd_dx_kernel",)),
    ):  # fmt: skip
        for name in names:
            yield name.strip("_").removesuffix("_kernel"), getattr(module, name)


FLA_DELTA = {
    "fla.ops.gated_delta_rule.chunk_fwd": ("chunk_gated_delta_rule_fwd_kkt_solve_kernel",),
    "fla.ops.gated_delta_rule.wy_fast": ("recompute_w_u_fwd_kernel", "prepare_wy_repr_bwd_kernel"),
    "fla.ops.common.chunk_delta_h": (
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
    ),
    "fla.ops.common.chunk_o": ("chunk_fwd_kernel_o", "chunk_bwd_kernel_dv_local", "chunk_bwd_kernel_dqkwg"),
}  # fmt: skip
FLA_SIMPLE = {
    "fla.ops.common.chunk_h": ("chunk_fwd_kernel_h", "chunk_bwd_kernel_dh"),
    "fla.ops.common.chunk_o": ("chunk_fwd_kernel_o", "chunk_bwd_kernel_dv", "chunk_bwd_kernel_dqkwg"),
}
FLA_ABSENT = dict.fromkeys((
    "gk", "gv", "g_gamma", "cu_seqlens", "chunk_indices", "chunk_offsets", "split_offsets", "h0", "ht", "dht", "dh0",
))  # fmt: skip


def of_fla(modules: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    """(name, kernel): those of a forward and backward that multiply matrices."""
    for module, names in modules.items():
        for name in names:
            kernel = getattr(importlib.import_module(module), name)
            while not isinstance(kernel, triton.JITFunction):
                kernel = kernel.fn
            yield name.replace("_kernel", ""), kernel


def compile_fla(kernel: Any, keys: int, erases: bool, target: Any) -> tuple[Any, dict[str, int]]:
    """(compiled, its blocks and warps), without first and last states; erases: of the gated delta rule."""
    blocks = {"BT": FLA_CHUNK, "BC": 16, "BK": min(64, keys), "BV": 64, "BS": FLA_CHUNK}
    blocks = {name: size for name, size in blocks.items() if name in kernel.arg_names}
    fixed = {"B": 8, "H": FLA_HEADS, "HV": FLA_HEADS, "HQ": FLA_HEADS, "K": keys, "V": VALUES, "NG": 1, **blocks}
    fixed |= {"USE_G": True, "SAVE_NEW_VALUE": True, "USE_DW": erases}
    constants = {parameter.name: fixed.get(parameter.name, False) for parameter in kernel.params if parameter.is_constexpr}
    constants |= {name: None for name in (FLA_ABSENT if erases else (*FLA_ABSENT, "dw")) if name in kernel.arg_names}
    wide = ("g", "dg") if erases or "fwd" in kernel.__name__ else ("g", "dg", "h", "dh")
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("T", "scale"):
            signature[name] = "i32" if name == "T" else "fp32"
        else:
            signature[name] = "*fp32" if name in wide else "*bf16"
            attributes[at,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2}), {**blocks, "warps": 4}


def compile_theirs(tuned: Any, states: int, target: Any) -> tuple[Any, dict[str, int]]:
    """(compiled, its blocks and warps), of arguments that are aligned as in a Mamba-2 layer."""
    kernel = tuned.fn
    square = [c for c in tuned.configs if (c.kwargs.get("BLOCK_SIZE_M"), c.kwargs.get("BLOCK_SIZE_N")) == (64, 64)]
    chosen = (square or tuned.configs)[0]
    blocks = {"BLOCK_SIZE_K": 64, **chosen.kwargs, "BLOCK_SIZE_DSTATE": max(16, triton.next_power_of_2(states))}
    blocks = {name: value for name, value in blocks.items() if name in kernel.arg_names}
    constants = {name: value for name, value in (FIXED | blocks).items() if name in kernel.arg_names}
    constants |= {name: 1 for name in kernel.arg_names if name.startswith("stride_") and re.search(ONES, name)}
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if not name.endswith("_ptr") else "*fp32" if re.search(FLOAT32, name) else "*bf16"
        attributes[at,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options), {**blocks, "warps": chosen.num_warps}


def kernel(library: str, name: str, states: int, compiled: Any, blocks: dict[str, int], width: int) -> Kernel:
    usage, lines = aot.nvidia_code(compiled)
    code = [line for line in lines if not line.endswith(":") and not line.startswith("NOP")]
    products = sum(bool(re.match(r"\S*MMA|UTC\S*MMA", line)) for line in code)
    tiles = {key.removeprefix("BLOCK_SIZE_"): value for key, value in blocks.items()}
    steps, programs = divided(name, tiles, states, width)
    return Kernel(
        library=library, name=name, states=states, **usage, shared=compiled.metadata.shared, instructions=len(code),
        products=products, tiles=tiles, steps=steps, programs=programs,
    )  # fmt: skip


def ours(
    states: int, types_of: Any, found: Iterator[tuple[str, Any, Any, int]], target: Any, width: int
) -> Iterator[Kernel]:
    for name, jitted, config, elements in found:
        case = MachineCode(name, jitted, types_of(jitted, "bf16"), config, Budget(0, 0), elements)
        blocks = {key: config[key] for key in ("T", "BK", "BP", "BN", "BV") if key in config and key in jitted.arg_names}
        blocks |= {"warps": config["num_warps"]}
        yield kernel("compressm", name, states, aot.compile_case(case, target), blocks, width)


def of_mamba_2(target: Any) -> Iterator[Kernel]:
    for states in STATES:
        yield from ours(states, gpu.types_of, gpu.of_products(target, "bf16", states), target, WIDTH)
    for states in STATES:
        for name, tuned in of_mamba():
            if states == STATES[0] or "BLOCK_SIZE_DSTATE" in tuned.fn.arg_names:
                yield kernel("mamba_ssm", name, states, *compile_theirs(tuned, states, target), WIDTH)


def of_delta_rule(target: Any) -> Iterator[Kernel]:
    for keys in KEYS:
        yield from ours(keys, delta.types_of, delta.of_products(target, "bf16", keys, False), target, VALUES)
    for keys in KEYS:
        for name, jitted in of_fla(FLA_DELTA):
            yield kernel("fla", name, keys, *compile_fla(jitted, keys, True, target), VALUES)


def of_simple_gla(target: Any) -> Iterator[Kernel]:
    for keys in KEYS:
        products = gpu.of_products(target, "bf16", keys, FLA_HEADS, FLA_HEADS, VALUES, scaled=True)
        yield from ours(keys, gpu.types_of, products, target, VALUES)
    for keys in KEYS:
        for name, jitted in of_fla(FLA_SIMPLE):
            yield kernel("fla", name, keys, *compile_fla(jitted, keys, False, target), VALUES)


def moved(peer: str, found: dict[int, tuple[float, float]]) -> tuple[Traffic, ...]:
    """Of bytes of compressm and of a peer, by states."""
    pairs = ((name, n, b) for n, both in found.items() for name, b in zip(("compressm", peer), both, strict=True))
    return tuple(Traffic(library=name, states=n, bytes=round(b, 1)) for name, n, b in pairs)


def bytes_of_mamba_2(states: int) -> tuple[float, float]:
    """Of a forward pass in bfloat16, per step and head."""
    x, mixing, state = 2 * WIDTH, 2 * states / HEADS, 2 * WIDTH * states
    decays = 5 * 4  # numbers a step
    ours = 2 + decays  # decays from dt
    ours += x + mixing + decays + state / triton_launch.chunk_steps(states)  # states in front of the chunks
    ours += 2 * x + 2 * mixing + decays + state / triton_launch.chunk_steps(states)  # outputs
    theirs = 2 + 8  # step sizes and sums of decays, float32, from dt
    theirs += x + mixing + 8 + 2 * state / CHUNK  # what chunks add to the states, float32
    theirs += 3 * state / CHUNK  # read, and the states in front of them
    theirs += 2 * mixing + 4 * CHUNK / HEADS  # products of C and B, float32
    theirs += 2 * x + mixing + 8 + 4 * CHUNK / HEADS + state / CHUNK  # outputs
    return ours, theirs


def bytes_of_delta_rule(keys: int) -> tuple[float, float]:
    """Of a forward pass in bfloat16, per step and head; decays of fla are float32."""
    k, v, state, T = 2 * keys, 2 * VALUES, 2 * keys * VALUES, triton_call.config_of(keys, VALUES, True)["T"]
    rows = 7 * 4  # numbers a step
    ours = 4 + rows  # from decays and gains
    ours += 2 * k + rows + 6 * T  # triangles of products, one of them in float32
    ours += 6 * T  # its inverse
    ours += k + v + rows + 2 * T + state / T + v  # states in front of the chunks, and what steps write
    ours += k + rows + v + state / T + 2 * T + v  # outputs
    theirs = 2 + 4  # sums of decays
    theirs += k + 6 + 4 * FLA_CHUNK  # the inverse, into zeros
    theirs += k + v + 6 + 2 * FLA_CHUNK + k + v  # keys and values times it
    theirs += 2 * k + v + 4 + state / FLA_CHUNK + v  # states
    theirs += 2 * k + v + 4 + state / FLA_CHUNK + v  # outputs
    return ours, theirs


def bytes_of_simple_gla(keys: int) -> tuple[float, float]:
    """As of the delta rule; ours are the kernels of Mamba-2."""
    k, v, state, T, decays = 2 * keys, 2 * VALUES, 2 * keys * VALUES, triton_launch.chunk_steps(keys), 5 * 4
    ours = 2 + decays
    ours += k + v + decays + state / T
    ours += 2 * k + 2 * v + decays + state / T
    theirs = 2 + 4 + k + v + 4 + state / FLA_CHUNK
    theirs += 2 * k + 2 * v + 4 + state / FLA_CHUNK
    return ours, theirs


def computation(title: str, axis: str, libraries: dict[str, str], kernels: Iterator[Kernel], traffic: Any) -> Computation:
    """Of these kernels, which are shown while they compile."""
    print(f"\n{title}\n{'kernel':44} {axis:>4} {'regs':>5} {'spills':>6} {'shared':>7} {'instr':>6} {'token':>6} {'mma':>4}  "
          "tiles")  # fmt: skip
    found = []
    for k in kernels:
        tiles = " ".join(f"{name}={size}" for name, size in k.tiles.items())
        print(f"{k.library + ' ' + k.name:44} {k.states:4} {k.registers:5} {k.spills:6} {k.shared:7} {k.instructions:6} "
              f"{k.per_token:6.1f} {k.products:4}  {tiles}", flush=True)  # fmt: skip
        found.append(k)
    for entry in traffic:
        print(f"{entry.library}, {axis}={entry.states}: {entry.bytes} bytes per step and head in a forward pass")
    return Computation(title=title, axis=axis, libraries=libraries, kernels=tuple(found), traffic=traffic)


def computations(target: Any, fla: Path | None) -> Iterator[Computation]:
    title = f"Mamba-2's scan in bfloat16, {HEADS} heads of {WIDTH} channels in one group"
    traffic = moved("mamba_ssm", {n: bytes_of_mamba_2(n) for n in STATES})
    yield computation(title, "N", {"mamba_ssm": importlib.metadata.version("mamba_ssm")}, of_mamba_2(target), traffic)
    if fla is None:
        return
    sys.path.insert(0, str(fla))
    libraries = {"flash-linear-attention": importlib.import_module("fla").__version__}
    sizes = f"in bfloat16, {FLA_HEADS} heads, values of {VALUES} channels"
    traffic = moved("fla", {n: bytes_of_delta_rule(n) for n in KEYS})
    yield computation(f"The gated delta rule {sizes}", "K", libraries, of_delta_rule(target), traffic)
    traffic = moved("fla", {n: bytes_of_simple_gla(n) for n in KEYS})
    yield computation(f"Linear attention with a decay a head {sizes}", "K", libraries, of_simple_gla(target), traffic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=[name for name in aot.TARGETS if name.startswith("sm_")], default="sm_90")
    parser.add_argument("--fla", type=Path, help="folder with the unpacked wheels of flash-linear-attention and fla-core")
    parser.add_argument("--out", type=Path, help="also write all figures as JSON, for the speed report")
    given = parser.parse_args()
    found = tuple(computations(aot.TARGETS[given.target], given.fla))
    if given.out is not None:
        versions = {"triton": importlib.metadata.version("triton")}
        Modelled(target=given.target, versions=versions, computations=found).save(given.out)


if __name__ == "__main__":
    main()
