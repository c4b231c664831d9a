"""mamba_ssm: its modules on compressm's kernels, without its CUDA extension and without causal-conv1d."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor
from torch.nn import functional as F

from compressm.errors import BackendError, DependencyError, bad_argument
from compressm.integrations import _mamba_ssm_functions as cpu
from compressm.kernels import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from compressm.layers.mamba_mixer import mix, step

__all__ = ["patch"]

EXTENSION = "selective_scan_cuda"
OPS = "mamba_ssm.ops"


def patch() -> None:
    """Give mamba_ssm the operators of compressm: Mamba-1 on CPU and GPU, with any number of states, Mamba-2 on CPU.

    Imports mamba_ssm.  ``Mamba`` gets the forward pass and the decode step of :class:`compressm.layers.Mamba`, which call its
    sub-modules, so that adapters on them act; its constructor, parameters and caches stay.  ``selective_scan_fn`` and
    ``mamba_inner_fn`` are replaced wherever the package uses them.  What ``Mamba2`` and ``Mamba2Simple`` are made of, and what
    transformers takes of the package for its Mamba-2 models (``mamba_chunk_scan_combined``,
    ``mamba_split_conv1d_scan_combined``, ``selective_state_update``, ``rmsnorm_fn``), computes tensors on a CPU by compressm
    and others as before.  Mamba3 stays as it is.  Calling it again changes nothing.  The package without its CUDA build::

        MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm
        pip install einops transformers

    Raises:
        DependencyError: mamba_ssm, or a package that it imports, is not installed.
    """
    stand_in_for_the_extension()
    try:
        interface = importlib.import_module(f"{OPS}.selective_scan_interface")
        layer = importlib.import_module("mamba_ssm.modules.mamba_simple")
        mamba2 = [importlib.import_module(f"mamba_ssm.modules.{name}") for name in ("mamba2", "mamba2_simple")]
        homes = {name: importlib.import_module(f"{OPS}.triton.{home}") for name, (home, _) in ON_CPU.items()}
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"mamba_ssm: cannot be imported ({error}). Install it with MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip "
            "install --no-build-isolation --no-deps mamba-ssm, then pip install einops transformers"
        ) from error
    for name, ours in (("selective_scan_fn", selective_scan), ("mamba_inner_fn", mamba_inner_fn)):
        _replace(name, getattr(interface, name), ours)
    layer.Mamba.forward, layer.Mamba.step = _forward, _step
    for name, (_, ours) in ON_CPU.items():
        theirs = getattr(homes[name], name)
        if getattr(theirs, "on_cpu", None) is not ours:
            _replace(name, theirs, _chosen_by_device(theirs, ours))
    for module in mamba2:
        for name, function in (("causal_conv1d_fn", causal_conv1d), ("causal_conv1d_update", causal_conv1d_update)):
            if vars(module).get(name, ...) is None:
                setattr(module, name, function)


# By name: in which module of mamba_ssm.ops.triton it is, and what computes it on a CPU.
ON_CPU: dict[str, tuple[str, Callable[..., Any]]] = {
    "mamba_chunk_scan_combined": ("ssd_combined", cpu.mamba_chunk_scan_combined),
    "mamba_split_conv1d_scan_combined": ("ssd_combined", cpu.mamba_split_conv1d_scan_combined),
    "selective_state_update": ("selective_state_update", selective_state_update),
    "rmsnorm_fn": ("layernorm_gated", cpu.rmsnorm_fn),
}


def _replace(name: str, theirs: Any, ours: Any) -> None:
    """Put ours in place of theirs wherever the package has it under this name."""
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "mamba_ssm"]:
        if vars(module).get(name) is theirs:
            setattr(module, name, ours)


def _chosen_by_device(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Ours for a first argument on a CPU, else theirs."""

    @functools.wraps(theirs)
    def function(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (ours if first.device.type == "cpu" else theirs)(first, *args, **kwargs)

    vars(function)["on_cpu"] = ours
    return function


def _forward(self: Any, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
    """(B, L, d_model) -> the same shape; at ``seqlen_offset`` 0 the states are kept, behind it one token advances them."""
    if inference_params is None:
        return mix(self, hidden_states)
    states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
    if inference_params.seqlen_offset > 0:
        return self.step(hidden_states, *states)[0]
    return mix(self, hidden_states, states)


def _step(self: Any, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token (B, 1, d_model): (output, conv_state, ssm_state), the states in place."""
    return step(self, hidden_states, conv_state, ssm_state), conv_state, ssm_state


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    **rest: Any,
) -> Tensor:
    """A whole Mamba mixer behind its first projection, with the arguments of mamba_ssm's function of this name.

    Args:
        xz: (batch, 2 D, L), the convolution's input and the gate.
        conv1d_weight: (D, 1, width); x_proj_weight: (R + 2N, D), without the rows of a B or C that is given;
            delta_proj_weight: (D, R); out_proj_weight: (d_model, D).
        A, B, C, D, delta_bias, delta_softplus: as in :func:`compressm.kernels.selective_scan`; None for B or C takes them from
            the token, plus ``B_proj_bias`` or ``C_proj_bias`` (N,).
        rest: ``checkpoint_lvl`` does not matter, as the states are never kept; normalisation of B, C or delta is not supported.

    Returns:
        (batch, L, d_model).

    Raises:
        ArgumentError: a weight of a normalisation is given, or shapes do not fit.
    """
    for name, value in rest.items():
        if name.endswith("_rms_weight") and value is not None:
            raise bad_argument(name, got="a tensor", expected="None: B, C and delta are taken as they are")
    x_in, z = xz.chunk(2, dim=1)
    x: Any = causal_conv1d(x_in, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    rank, order = delta_proj_weight.shape[1], A.shape[1]
    sizes = [rank, order if B is None else 0, order if C is None else 0]
    low_rank, B_t, C_t = F.linear(x.mT, x_proj_weight).split(sizes, dim=-1)
    if B is None:
        B = (B_t if B_proj_bias is None else B_t + B_proj_bias).mT
    if C is None:
        C = (C_t if C_proj_bias is None else C_t + C_proj_bias).mT
    delta = F.linear(low_rank, delta_proj_weight).mT
    y: Any = selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def stand_in_for_the_extension() -> None:
    """mamba_ssm imports its CUDA extension unconditionally: where there is none, a module of that name that refuses calls."""
    if EXTENSION in sys.modules or importlib.util.find_spec(EXTENSION) is not None:
        return
    module = ModuleType(EXTENSION, "Stands in for mamba_ssm's CUDA extension, which is not installed.")
    module.__spec__ = ModuleSpec(EXTENSION, None)
    vars(module).update(fwd=_refuse, bwd=_refuse)
    sys.modules[EXTENSION] = module


def _refuse(*_: Any) -> NoReturn:
    raise BackendError(
        f"{EXTENSION}: mamba_ssm's CUDA extension is not installed. Call mamba_ssm.Mamba or selective_scan_fn after "
        "compressm.integrations.mamba_ssm.patch(), which do not need it"
    )
