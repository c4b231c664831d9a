"""What can be tuned: every Triton kernel with the configurations to try, the shapes to try them on, and how to launch one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressm.kernels import (
    _causal_conv1d_triton,
    _gramians_triton,
    _lti_scan_triton,
    _selective_scan_triton,
    _selective_scan_triton_bwd,
    _selective_scan_triton_fwd,
    _selective_state_update_triton,
)
from gpu import problems

Config = dict[str, Any]
Shape = tuple[int, ...]
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Tunable:
    """One kernel.

    Attributes:
        name: for tables.
        kernel: the Triton function, whose compiled forms tell registers and spills.
        configs: to try.
        shapes: to time, by name.
        small: the shape to check a configuration on.
        build: (shape, configuration or None for the planned one, device) -> a call that launches and returns the results.
        planned: shape -> the configuration that runs by default.
        graph: a launch can be captured in a CUDA graph.
    """

    name: str
    kernel: Any
    configs: tuple[Config, ...]
    shapes: dict[str, Shape]
    small: Callable[[Config], Shape]
    build: Callable[[Shape, Config | None, str], Call]
    planned: Callable[[Shape], Config]
    graph: bool = True


def _tiles(rows: tuple[int, ...], steps: tuple[int, ...], threads: tuple[int, ...], registers: tuple[int | None, ...]):
    for R in rows:
        for T in steps:
            for count in threads:
                for most in registers:
                    limit = {} if most is None else {"maxnreg": most}
                    yield {"R": R, "BD": count * 8 // T, "T": T, "threads": count, **limit}


@functools.lru_cache(maxsize=1)
def _scan_inputs(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Arguments of the launches of the selective scan, (batch, D, L, N), up to delta_softplus."""
    torch.manual_seed(0)
    p = problems.selective_scan(*shape, dtype, device).inputs
    return (*(p[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")), None, None)


def _scan_config(shape: Shape, threads: int = _selective_scan_triton.THREADS) -> Config:
    batch, channels, length, states = shape
    return _selective_scan_triton._config(batch, channels, length, states, 1, threads)


def scan_forward(shape: Shape, config: Config | None, device: str) -> Call:
    arguments = _scan_inputs(shape, device)
    return lambda: _selective_scan_triton.forward(*arguments, True, True, config)[:2]


def scan_backward(shape: Shape, config: Config | None, device: str, deterministic: bool = False) -> Call:
    arguments = _scan_inputs(shape, device)
    planned = _scan_config(shape)
    forward = planned if config is None else planned | {key: config[key] for key in ("R", "BD", "T", "threads")}
    out, _, checkpoints, y = _selective_scan_triton.forward(*arguments, True, True, forward)
    weight = torch.randn(out.shape, device=device, generator=torch.Generator(device).manual_seed(1)).to(out.dtype)

    def call() -> tuple[Tensor, ...]:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            return _selective_scan_triton.backward(weight, None, *arguments, checkpoints, y, True, config)[:6]
        finally:
            torch.use_deterministic_algorithms(False)

    return call


@functools.lru_cache(maxsize=1)
def _diagonal_inputs(shape: Shape, device: str) -> tuple[Tensor, ...]:
    batch, length, states, word = shape
    torch.manual_seed(0)
    dtype = torch.float32 if word == 4 else torch.bfloat16
    p = problems.diagonal_scan(batch, length, states, dtype, device).inputs
    return tuple(p.values())


def diagonal_forward(shape: Shape, config: Config | None, device: str) -> Call:
    x, decay, phase, start = _diagonal_inputs(shape, device)
    options = _split_off(config)
    return lambda: (_lti_scan_triton.diagonal_scan_forward(x, decay, phase, start, False, **options),)


def diagonal_backward(shape: Shape, config: Config | None, device: str) -> Call:
    x, decay, phase, start = _diagonal_inputs(shape, device)
    h = _lti_scan_triton.diagonal_scan_forward(x, decay, phase, start, False)
    options = _split_off(config)
    return lambda: _lti_scan_triton.diagonal_scan_backward(x, h, decay, phase, start, False, **options)


def _split_off(config: Config | None) -> dict[str, Any]:
    """Keyword arguments of the scan's launches: the launch configuration and the number of stretches."""
    if config is None:
        return {}
    launch = {key: value for key, value in config.items() if key != "stretches"}
    return {"config": launch, "stretches": config.get("stretches")}


@functools.lru_cache(maxsize=1)
def _conv_inputs(shape: Shape, device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return problems.causal_conv1d(*shape, 4, torch.bfloat16, device).inputs


def conv_forward(shape: Shape, config: Config | None, device: str) -> Call:
    p = _conv_inputs(shape, device)
    x, weight, bias, states = p.values()
    return lambda: (_causal_conv1d_triton.forward(x, weight, bias, None, states, None, True, config),)


def conv_backward(shape: Shape, config: Config | None, device: str) -> Call:
    p = _conv_inputs(shape, device)
    x, weight, bias, states = p.values()
    return lambda: _causal_conv1d_triton.backward(x, x, weight, bias, None, states, None, True, config)


def update(shape: Shape, config: Config | None, device: str) -> Call:
    torch.manual_seed(0)
    p = problems.state_update(*shape, torch.bfloat16, device).inputs
    one_head = {"state": 1, "x": 1, "dt": 1, "z": 1, "A": 0, "D": 0, "dt_bias": 0}
    p = {name: t.unsqueeze(one_head[name]) if name in one_head else t for name, t in p.items()}
    given = [p[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    launch = None
    if config is not None:
        planned = _selective_state_update_triton.config(shape[2])
        elements, warps = config["elements"], config["num_warps"]
        launch = planned | {"BD": max(1, elements // planned["BN"]), "num_warps": warps}
    return lambda: (_selective_state_update_triton.state_update(*given, None, None, True, -1, launch),)


def gramians(shape: Shape, config: Config | None, device: str) -> Call:
    torch.manual_seed(0)
    p = problems.gramians(*shape, device).inputs
    config = config or _gramians_triton.CONFIG
    return lambda: _gramians_triton.gramian_quads([tuple(p.values())], config)[0]


FUSION = {"enable_fp_fusion": True}
LANES = tuple({"BN": 32 * warps, "num_warps": warps, **FUSION} for warps in (1, 2, 4))
SCANS = {"B8 D1536 L2048 N16": (8, 1536, 2048, 16), "B8 D1536 L2048 N128": (8, 1536, 2048, 128),
         "B4 D2560 L4096 N16": (4, 2560, 4096, 16), "B1 D1536 L2048 N16": (1, 1536, 2048, 16)}  # fmt: skip
DIAGONALS = {"B50 L1024 N384 fp32": (50, 1024, 384, 4), "B50 L1024 N93 bf16": (50, 1024, 93, 2),
             "B50 L784 N28 fp32": (50, 784, 28, 4), "B4 L8192 N64 fp32": (4, 8192, 64, 4)}  # fmt: skip
CONVOLUTIONS = {"B8 D1536 L2048": (8, 1536, 2048), "B1 D5120 L4096": (1, 5120, 4096)}


def _scan_small(config: Config) -> Shape:
    return 1, config["R"] * config["BD"], 2 * config["T"] + 8, 3


def _tunables(tiles: dict[str, tuple[Config, ...]]) -> tuple[Tunable, ...]:
    scan, lti, conv = _selective_scan_triton, _lti_scan_triton, _causal_conv1d_triton
    diagonal = tuple({**lanes, "U": U} for lanes in LANES for U in (8, 16, 24))
    stretched = tuple({**LANES[0], "U": 16, "stretches": n} for n in (1, 2, 8, 16, 32))
    diagonal_back = tuple({**lanes, "U": U} for lanes in LANES for U in (4, 8, 16))
    convs = tuple({"BT": BT, "num_warps": w, **FUSION} for BT in (256, 512, 1024, 2048) for w in (1, 2, 4, 8))
    updates = tuple({"elements": e, "num_warps": w} for e in (256, 512, 1024, 2048) for w in (1, 2, 4, 8))
    pairs = tuple({"T": T, "num_warps": w, **FUSION} for T, w in ((8, 2), (16, 4), (16, 8), (32, 8)))
    backward = _selective_scan_triton_bwd._selective_scan_bwd_kernel
    return (
        Tunable(
            "selective_scan forward", _selective_scan_triton_fwd._selective_scan_fwd_kernel, tiles["forward"], SCANS,
            _scan_small, scan_forward, _scan_config,
        ),
        Tunable("selective_scan backward", backward, tiles["backward"], SCANS, _scan_small, scan_backward, _scan_config),
        Tunable(
            "selective_scan backward, deterministic", backward, tiles["deterministic"], SCANS, _scan_small,
            functools.partial(scan_backward, deterministic=True), lambda shape: _scan_config(shape, 2 * scan.THREADS),
        ),
        Tunable(
            "diagonal_scan forward", lti._diagonal_scan_fwd_kernel, diagonal + stretched, DIAGONALS,
            lambda config: (2, 600, 40, 4), diagonal_forward, lambda shape: lti.FORWARD_CONFIG,
        ),
        Tunable(
            "diagonal_scan backward", lti._diagonal_scan_bwd_kernel, diagonal_back, DIAGONALS,
            lambda config: (2, 600, 40, 4), diagonal_backward, lambda shape: lti.BACKWARD_CONFIG,
        ),
        Tunable(
            "causal_conv1d forward", conv._causal_conv1d_fwd_kernel, convs, CONVOLUTIONS,
            lambda config: (1, 3, 2 * config["BT"] + 8), conv_forward, lambda shape: conv.CONFIG,
        ),
        Tunable(
            "causal_conv1d backward", conv._causal_conv1d_bwd_kernel, convs, CONVOLUTIONS,
            lambda config: (1, 3, 2 * config["BT"] + 8), conv_backward, lambda shape: conv.CONFIG,
        ),
        Tunable(
            "selective_state_update", _selective_state_update_triton._selective_state_update_kernel, updates,
            {f"B{b} D2560 N{n}": (b, 2560, n) for b in (128, 1) for n in (128, 16)},
            lambda config: (2, 200, 128), update,
            lambda shape: {"elements": _selective_state_update_triton.ELEMENTS, "num_warps": 4},
        ),
        Tunable(
            "gramians", _gramians_triton._gramians_kernel, pairs, {"6 systems, N384 H512": (6, 384, 512)},
            lambda config: (2, 40, 3), gramians, lambda shape: _gramians_triton.CONFIG, graph=False,
        ),
    )  # fmt: skip


TILES = {
    "forward": tuple(_tiles((1, 2), (32, 64, 128, 256), (64, 128, 256), (None, 128))),
    "backward": tuple(_tiles((1, 2), (32, 64, 128, 256), (64, 128), (None, 168))),
    "deterministic": tuple(_tiles((1, 2), (64, 128), (128, 256), (None,))),
}
TUNABLES = _tunables(TILES)
