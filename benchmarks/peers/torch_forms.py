"""Plain torch: the definition step by step, the same unrolled and compiled, and torch's own convolution."""

from __future__ import annotations

from compressm.benchmarking.guard_problems import DISK, SAVE
from compressm.benchmarking.lti_problems import EAGER
from compressm.benchmarking.op_problems import COMPILED, REFERENCE
from compressm.benchmarking.running import built_in
from compressm.kernels import OPS
from peers.base import Peer

LOOPS = [*(op for op, record in OPS.items() if not record.rivals), "lru", "mamba"]
NAMES = sorted({name for record in OPS.values() for name in record.rivals})
RIVALS = {name: [op for op, record in OPS.items() if name in record.rivals] for name in NAMES}
PEERS = [
    Peer(REFERENCE, "torch", "torch", dict.fromkeys(LOOPS, built_in(REFERENCE))),
    Peer(
        COMPILED, "torch", "torch",
        dict.fromkeys((op for op, record in OPS.items() if record.compiled), built_in(COMPILED)),  # more would take minutes
    ),
    *(Peer(name, "torch", "torch", dict.fromkeys(ops, built_in(name))) for name, ops in RIVALS.items()),
    Peer(EAGER, "torch", "torch", {"loop": built_in(EAGER)}),
    Peer(DISK, "torch", "torch", {"rollback": built_in(DISK)}),
    Peer(SAVE, "torch", "torch", {"rollback": built_in(SAVE)}),
]  # fmt: skip
