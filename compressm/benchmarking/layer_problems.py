"""Problems of whole layers: the inputs are x and the layer's parameters by their names."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressm.benchmarking import counts
from compressm.benchmarking.op_problems import BOTH, COMPILED, REFERENCE
from compressm.benchmarking.problems import Function, Op, Problem, in_slabs, slabs_for
from compressm.benchmarking.request import SIZES
from compressm.benchmarking.results import Counts, Pass
from compressm.kernels import OPS as RECORDS
from compressm.kernels import causal_conv1d, lti_scan_planar, selective_scan
from compressm.layers import LRU, Mamba
from compressm.layers.mamba_mixer import mix


def layer_problem(
    layer: nn.Module, sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, least: Counts, cells: int
) -> Problem:
    """Of a layer that maps (batch, L, channels) to the same; ``cells`` is how many states the whole sequence takes."""
    shape = [sizes[name] for name in ("batch", "length", "channels")]
    device = next(layer.parameters()).device
    x = torch.randn(shape, device=device).to(dtype).requires_grad_(passes != "forward")
    weight = torch.randn(shape, device=device).to(dtype) if passes != "forward" else None
    inputs = {"x": x, **dict(layer.named_parameters())}
    exact = copy.deepcopy(layer).double()

    def answer(p: dict[str, Tensor]) -> Tensor:
        return functional_call(exact, {name: t for name, t in p.items() if name != "x"}, (p["x"],))

    oracle = in_slabs(answer, inputs, weight, {"x": 0}, 0, slabs_for(cells, shape[0], device))
    problem = Problem(passes, dtype, device, inputs, weight, oracle, least, dict(sizes), {"layer": layer})
    problem.built_in["compressm"] = lambda: problem.contender(lambda p: layer(p["x"]))
    return problem


def in_compiled_chunks(op: str) -> Function:
    """A scan as torch.compile gets it, of its arguments by name."""
    compiled = RECORDS[op].compiled
    assert compiled is not None
    return compiled({}, torch.float32)


def lru_operands(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of :func:`compressm.kernels.lti_scan_planar` from x and an LRU's parameters."""
    gamma = p["gamma_log"].exp()[:, None]
    return {
        "u": p["x"],
        "log_decay": -p["nu_log"].exp(),
        "phase": p["theta_log"].exp(),
        "B_re": gamma * p["B_re"],
        "B_im": gamma * p["B_im"],
        "C_re": p["C_re"],
        "C_im": p["C_im"],
        "D": p["D"],
    }


def lru(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """An LRU layer as it is initialised."""
    batch, length, channels, states = (sizes[name] for name in ("batch", "length", "channels", "states"))
    layer = LRU(channels, states, device=device)
    least = counts.of_op("lti_scan", sizes, dtype.itemsize, passes != "forward")
    problem = layer_problem(layer, sizes, passes, dtype, least, batch * length * states)
    scanned: Callable[..., Any] = lti_scan_planar  # a tensor, as the last state isn't asked for
    problem.built_in[REFERENCE] = lambda: problem.contender(lambda p: scanned(**lru_operands(p), backend="reference"))

    def unrolled():
        scan = in_compiled_chunks("lti_scan")
        return problem.contender(lambda p: scan(lru_operands(p)))

    problem.built_in[COMPILED] = unrolled
    return problem


class _Mixer(Mamba):
    """A Mamba layer around another scan and another convolution."""

    scan: Callable[..., Any]
    convolution: Callable[..., Any]

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return mix(self, hidden_states, scan=self.scan, convolution=self.convolution)


def mamba_with(scan, convolve):
    """A Mamba layer as a function of x and its parameters around another scan and another convolution.

    Args:
        scan: of the arguments of :func:`compressm.kernels.selective_scan` by name.
        convolve: (x (batch, D, L), weight (D, width), bias) -> silu of the causal convolution.
    """

    def by_name(u, delta, A, B, C, D, z, delta_bias, **_) -> Tensor:
        return scan(
            {"u": u, "delta": delta, "A": A, "B": B.unsqueeze(1), "C": C.unsqueeze(1), "D": D, "z": z, "delta_bias": delta_bias}
        )

    @functools.cache
    def mixer(channels: int, states: int, taps: int) -> _Mixer:
        with torch.device("meta"):
            layer = _Mixer(channels, states, taps)
        layer.scan, layer.convolution = by_name, lambda x, weight, bias, **_: convolve(x, weight, bias)
        return layer

    def call(p: dict[str, Tensor]) -> Tensor:
        layer = mixer(p["x"].shape[-1], p["A_log"].shape[1], p["conv1d.weight"].shape[-1])
        return functional_call(layer, {name: t for name, t in p.items() if name != "x"}, (p["x"],))

    return call


def torch_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With torch's own operators."""
    width = weight.shape[1]
    out = nn.functional.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])
    return nn.functional.silu(out[..., : x.shape[-1]])


def mamba(sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """A Mamba layer as it is initialised; its parameters but A_log and D are of the dtype."""
    batch, length, channels, states = (sizes[name] for name in ("batch", "length", "channels", "states"))
    layer = Mamba(channels, states, device=device, dtype=dtype)
    least = counts.mamba(batch, length, channels, states, dtype.itemsize, passes != "forward")
    problem = layer_problem(layer, sizes, passes, dtype, least, batch * length * layer.d_inner * states)

    def reference():
        def scan(p: dict[str, Any]) -> Any:
            return selective_scan(**p, delta_softplus=True, backend="reference")

        def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return causal_conv1d(x, weight, bias, activation="silu", backend="reference")

        return problem.contender(mamba_with(scan, convolve))

    problem.built_in[REFERENCE] = reference
    problem.built_in[COMPILED] = lambda: problem.contender(mamba_with(in_compiled_chunks("selective_scan"), torch_convolution))
    return problem


OPS = {
    "lru": Op("layer", SIZES["lru"], BOTH, lru, "an LRU layer"),
    "mamba": Op("layer", SIZES["mamba"], BOTH, mamba, "a Mamba layer, expand 2"),
}
