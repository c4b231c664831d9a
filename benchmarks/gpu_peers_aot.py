"""The machine code of our kernels of Mamba-2's scan beside that of mamba_ssm's, compiled ahead of time, without a GPU.

    PYTHONPATH=. python benchmarks/gpu_peers_aot.py [--target sm_90] [--out benchmarks/modelled.json]

A row is one kernel: registers of a lane, spilled bytes, shared memory, instructions and matrix instructions in all, the tiles
and warps of a program.  Loops are counted once, so that rows tell what a program needs, not how long it takes.  mamba_ssm tunes
its tiles on the machine; what is shown is its configuration with tiles of 64 x 64, or the first where it has none.  Its kernels
depend on N where a tile holds all states of a row; the others are shown once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from benchmarks.reporting.modelled import Kernel, Modelled, Traffic
from compressm.integrations.mamba_ssm import stand_in_for_the_extension
from compressm.kernels.core.gpu import Budget, MachineCode
from compressm.kernels.ssd import gpu, triton_launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
import aot

STATES = (128, 64, 48, 32, 16)
HEADS, WIDTH, CHUNK = 24, 64, 256  # heads of a group, channels of a head, steps of mamba_ssm's chunks
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


def kernel(library: str, name: str, states: int, compiled: Any, blocks: dict[str, int]) -> Kernel:
    usage, lines = aot.nvidia_code(compiled)
    code = [line for line in lines if not line.endswith(":")]
    products = sum(bool(re.match(r"\S*MMA|UTC\S*MMA", line)) for line in code)
    tiles = {key.removeprefix("BLOCK_SIZE_"): value for key, value in blocks.items()}
    return Kernel(
        library=library, name=name, states=states, **usage, shared=compiled.metadata.shared, instructions=len(code),
        products=products, tiles=tiles,
    )  # fmt: skip


def kernels(target: Any) -> Iterator[Kernel]:
    for states in STATES:
        for name, jitted, config, elements in gpu.of_products(target, "bf16", states):
            case = MachineCode(name, jitted, gpu.types_of(jitted, "bf16"), config, Budget(0, 0), elements)
            blocks = {key: config[key] for key in ("T", "BP", "BN")} | {"warps": config["num_warps"]}
            yield kernel("compressm", name, states, aot.compile_case(case, target), blocks)
    for states in STATES:
        for name, tuned in of_mamba():
            if states == STATES[0] or "BLOCK_SIZE_DSTATE" in tuned.fn.arg_names:
                yield kernel("mamba_ssm", name, states, *compile_theirs(tuned, states, target))


def traffic(states: int) -> tuple[Traffic, Traffic]:
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
    return (
        Traffic(library="compressm", states=states, bytes=round(ours, 1)),
        Traffic(library="mamba_ssm", states=states, bytes=round(theirs, 1)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=[name for name in aot.TARGETS if name.startswith("sm_")], default="sm_90")
    parser.add_argument("--out", type=Path, help="also write all figures as JSON, for the speed report")
    given = parser.parse_args()
    print(f"{'kernel':36} {'N':>4} {'regs':>5} {'spills':>6} {'shared':>7} {'instr':>6} {'mma':>4}  tiles")
    found = []
    for k in kernels(aot.TARGETS[given.target]):
        tiles = " ".join(f"{name}={size}" for name, size in k.tiles.items())
        print(f"{k.library + ' ' + k.name:36} {k.states:4} {k.registers:5} {k.spills:6} {k.shared:7} {k.instructions:6} "
              f"{k.products:4}  {tiles}", flush=True)  # fmt: skip
        found.append(k)
    moved = [entry for states in STATES for entry in traffic(states)]
    for entry in moved:
        print(f"{entry.library}, N={entry.states}: {entry.bytes} bytes per step and head in a forward pass")
    if given.out is not None:
        versions = {name: importlib.metadata.version(name) for name in ("triton", "mamba_ssm")}
        title = f"Mamba-2's scan in bfloat16, {HEADS} heads of {WIDTH} channels in one group"
        Modelled(title=title, target=given.target, versions=versions, kernels=found, traffic=moved).save(given.out)


if __name__ == "__main__":
    main()
