"""mamba_ssm: its CUDA kernel where it was built, else its reference loop."""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch

from compressm.benchmarking.cases import Case
from compressm.benchmarking.layer_problems import mamba_with, torch_convolution
from compressm.benchmarking.op_problems import in_place
from compressm.benchmarking.problems import Contender, Problem
from compressm.integrations.mamba_ssm import EXTENSION, stand_in_for_the_extension
from peers.base import Peer, quadratic_backward


def _kernel_built() -> bool:
    spec = importlib.util.find_spec(EXTENSION)
    return spec is not None and spec.origin is not None


def _scan(device: torch.device):
    if device.type != "cuda" or not _kernel_built():
        return _loop()
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn


@functools.cache
def _loop():
    """The reference loop; where the kernels were not built the package is forgotten again, or transformers would call them."""
    built = _kernel_built()
    stand_in_for_the_extension()
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    if not built:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("mamba_ssm", EXTENSION)]:
            del sys.modules[name]
    return selective_scan_ref


def needs_kernel(case: Case) -> str | None:
    """The CUDA kernel of another peer runs on a GPU only, and only where it was built."""
    if torch.device(case.device).type != "cuda":
        return "its kernels run on a GPU only"
    return None if _kernel_built() else "its CUDA extension was not built"


def needs_loop(case: Case) -> str | None:
    """The reference loop where the kernel does not run."""
    if needs_kernel(case) is None:
        return "the CUDA kernel runs instead"
    return quadratic_backward(case)


def selective_scan(problem: Problem) -> Contender:
    """``selective_scan_fn`` or ``selective_scan_ref``."""
    scan = _scan(problem.device)
    return problem.contender(lambda p: scan(**p, delta_softplus=True))


def mamba(problem: Problem) -> Contender:
    """The layer around its scan; with the kernel its own module, else the same projections and torch's convolution."""
    scan = _scan(problem.device)
    if not _kernel_built() or problem.device.type != "cuda":
        return problem.contender(mamba_with(lambda p: scan(**p, delta_softplus=True), torch_convolution))
    from mamba_ssm import Mamba

    own, sizes = problem.extras["layer"], problem.sizes
    layer = Mamba(sizes["channels"], d_state=sizes["states"], device=problem.device, dtype=problem.dtype)
    layer.load_state_dict(own.state_dict())
    inputs = {"x": problem.inputs["x"], **dict(layer.named_parameters())}
    return Problem(
        problem.passes, problem.dtype, problem.device, inputs, problem.weight, problem.oracle, problem.counts, sizes
    ).contender(lambda p: layer(p["x"]))


def selective_state_update(problem: Problem) -> Contender:
    """Its Triton kernel."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return in_place(problem, lambda p: selective_state_update(**p, dt_softplus=True))


PEERS = [
    Peer(
        "mamba_ssm, CUDA kernel", "mamba_ssm", "mamba-ssm",
        {"selective_scan": selective_scan, "mamba": mamba, "selective_state_update": selective_state_update}, needs_kernel,
    ),
    Peer("mamba_ssm, reference loop", "mamba_ssm", "mamba-ssm", {"selective_scan": selective_scan, "mamba": mamba}, needs_loop),
]  # fmt: skip
