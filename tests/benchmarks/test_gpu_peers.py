"""How programs divide the work, by which instructions per token are told: as our kernels launch, and in recorded figures."""

from __future__ import annotations

from pathlib import Path

import gpu_peers_grids
import pytest
import torch
from gpu_peers_grids import CHUNK, HEADS, divided
from reporting.modelled import Modelled

from compressm.kernels import gated_delta_rule, linear_attention
from compressm.kernels.gated_delta_rule import triton_backward as delta_backward
from compressm.kernels.gated_delta_rule import triton_call
from compressm.kernels.gated_delta_rule import triton_forward as delta_forward
from compressm.kernels.ssd import triton_backward, triton_forward, triton_launch

WALKS = ("ssd_states", "delta_states", "delta_reverse")  # loop over the chunks of a sequence
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Watched:
    """A kernel that notes how many programs it is launched with."""

    def __init__(self, kernel, seen, name):
        self.kernel, self.seen, self.name = kernel, seen, name

    def __getitem__(self, grid):
        self.seen[self.name] = grid[0]
        return self.kernel[grid]


@pytest.fixture
def watch(monkeypatch):
    def watched(names, *modules):
        seen = {}
        for module in modules:
            for name in names:
                kernel = getattr(module, f"_{name}_kernel", None)
                if kernel is not None:
                    monkeypatch.setattr(module, f"_{name}_kernel", Watched(kernel, seen, name))
        return seen

    return watched


def launched(name, tiles, states, width, length=33, heads=2):
    """Programs of a call."""
    steps, programs = divided(name, tiles, states, width)
    return heads * programs * (1 if name in WALKS else -(-length // steps))


def of_library(start):
    return [name for name in gpu_peers_grids.DIVIDED if name.startswith(start)]


def tensors(*widths, length=33, heads=2):
    return [torch.randn(1, length, heads, width, device=DEVICE, requires_grad=True) for width in widths]


def test_kernels_of_the_scan_launch_as_told(watch):
    names = of_library("ssd_")
    seen = watch(names, triton_forward, triton_backward)
    linear_attention(*tensors(40, 40, 33), backend="triton")[0].sum().backward()
    tiles = triton_launch._config(1, 2, 2, 33, 40, False, triton_launch.chunk_steps(40))
    assert seen == {name: launched(name, tiles, 40, 33) for name in names}
    assert seen["ssd_states"] == 8


def test_kernels_of_the_delta_rule_launch_as_told(watch):
    names = of_library("delta_")
    seen = watch(names, delta_forward, delta_backward)
    q, k, v = tensors(33, 33, 33)
    g, beta = -torch.rand(1, 33, 2, device=DEVICE), torch.rand(1, 33, 2, device=DEVICE)
    gated_delta_rule(q, k * 0.1, v, g, beta, backend="triton")[0].sum().backward()
    tiles = triton_call.config_of(33, 33, False)
    assert seen == {name: launched(name, tiles, 33, 33) for name in names}
    assert seen["delta_keys"] == 8


def test_what_divides_the_work_of_others():
    square = {"M": 64, "N": 64, "K": 32, "warps": 4}
    assert divided("chunk_state_fwd", square, 128, 64) == (32, 2)
    assert divided("bmm_chunk_fwd", square, 128, 64) == (64, CHUNK / 64 / HEADS)
    assert divided("state_passing_fwd", {"BLOCK_SIZE": 64}, 48, 64) == (CHUNK, 48)
    assert divided("chunk_fwd_h", {"BT": 64, "BK": 64, "BV": 64}, 100, 128) == (64, 4)


def test_recorded_figures_divide_the_work_likewise():
    found = Modelled.load(Path(gpu_peers_grids.__file__).parent / "modelled.json")
    for computation, width in zip(found.computations, (64, 128, 128), strict=True):
        for k in computation.kernels:
            assert (k.steps, k.programs) == divided(k.name, k.tiles, k.states, width), k.name
            assert k.per_token == pytest.approx(k.instructions * k.tiles["warps"] / k.steps * k.programs)
