"""The machine code of our kernels of Mamba-2's scan beside that of mamba_ssm's, compiled ahead of time, without a GPU.

    PYTHONPATH=. python benchmarks/gpu_peers_aot.py [--target sm_90]

A row is one kernel: registers of a lane, spilled bytes, shared memory, instructions and matrix instructions in all, the tiles
and warps of a program.  Loops are counted once, so that rows tell what a program needs, not how long it takes.  mamba_ssm tunes
its tiles on the machine; what is shown is its configuration with tiles of 64 x 64, or the first where it has none.  Its kernels
depend on N where a tile holds all states of a row; the others are shown once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from compressm.integrations.mamba_ssm import stand_in_for_the_extension
from compressm.kernels.core.gpu import Budget, MachineCode
from compressm.kernels.ssd import gpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
import aot

STATES = (128, 64, 32, 16)
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


def row(name: str, states: int, compiled: Any, blocks: dict[str, int]) -> str:
    usage, lines = aot.nvidia_code(compiled)
    code = [line for line in lines if not line.endswith(":")]
    products = sum(bool(re.match(r"\S*MMA|UTC\S*MMA", line)) for line in code)
    tiles = " ".join(f"{key.removeprefix('BLOCK_SIZE_')}={value}" for key, value in blocks.items())
    return (
        f"{name:36} {states:4} {usage['registers']:5} {usage['spills']:6} {compiled.metadata.shared:7} {len(code):6} "
        f"{products:4}  {tiles}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=[name for name in aot.TARGETS if name.startswith("sm_")], default="sm_90")
    target = aot.TARGETS[parser.parse_args().target]
    print(f"{'kernel':36} {'N':>4} {'regs':>5} {'spills':>6} {'shared':>7} {'instr':>6} {'mma':>4}  tiles")
    for states in STATES:
        for name, kernel, config, elements in gpu.of_products(target, "bf16", states):
            case = MachineCode(name, kernel, gpu.types_of(kernel, "bf16"), config, Budget(0, 0), elements)
            blocks = {key: config[key] for key in ("T", "BP", "BN")} | {"warps": config["num_warps"]}
            print(row(f"compressm {name}", states, aot.compile_case(case, target), blocks), flush=True)
    for states in STATES:
        for name, tuned in of_mamba():
            if states == STATES[0] or "BLOCK_SIZE_DSTATE" in tuned.fn.arg_names:
                compiled, blocks = compile_theirs(tuned, states, target)
                print(row(f"mamba_ssm {name}", states, compiled, blocks), flush=True)


if __name__ == "__main__":
    main()
