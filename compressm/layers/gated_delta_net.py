"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressm.errors import bad_argument, check_integer
from compressm.kernels import KernelPlan, plan
from compressm.layers.gated_delta_mixer import layout, mix, states, step
from compressm.layers.gated_norm import GatedRMSNorm
from compressm.layers.mamba_layer import MambaLayer


class GatedDeltaNet(MambaLayer):
    """The gated delta rule mixer: (B, L, d_model) -> (B, L, d_model).

    Each step erases what the state holds under its key and writes its value there.  Parameter names, shapes and initialisation
    are those of flash-linear-attention's ``GatedDeltaNet``, whose checkpoints load as they are.

    The projected form (``d_state=`` below ``head_dim``, or what a reduction makes of a layer) has two maps per head of keys
    behind convolution, activation and norm: ``k_map``, which stays a contraction whatever trains it, and ``q_map``.  The state
    has ``d_state`` rows then, and the projections stay.

    Args:
        d_model: channels in and out.
        expand_v: channels V of a value are ``expand_v * head_dim``.
        head_dim: channels K of a query or key.
        num_heads: heads H of queries and keys.
        num_v_heads: heads of values, a multiple of H; None: H.
        use_gate: the norm behind the rule has a SiLU gate.
        allow_neg_eigval: beta reaches 2 and not 1, so that a step can turn what it erases around.
        conv_size: taps of the causal convolutions.
        conv_bias: whether these have a bias.
        layer_idx: key of this layer in ``inference_params.key_value_memory_dict``.
        norm_eps: of the norm.
        device, dtype: of the parameters; ``A_log`` and ``dt_bias`` are kept in float32.
        d_state: rows of a head's state; None: ``head_dim``, without maps.

    Parameters (HV heads of values): ``q_proj.weight``, ``k_proj.weight`` (H K, d_model), ``v_proj.weight`` (HV V, d_model),
    ``a_proj.weight``, ``b_proj.weight`` (HV, d_model), ``A_log``, ``dt_bias`` (HV,), ``q_conv1d.weight``, ``k_conv1d.weight``
    (H K, 1, conv_size), ``v_conv1d.weight`` (HV V, 1, conv_size), ``g_proj.weight`` (HV V, d_model), ``o_norm.weight`` (V,),
    ``o_proj.weight`` (d_model, HV V), and with maps ``q_map`` and ``k_map`` (H, d_state, K).
    """

    mixing, stepping = mix, step
    takes_maps = True
    q_map: nn.Parameter | None
    k_map: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        use_gate: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        d_state: int | None = None,
    ) -> None:
        super().__init__()
        heads = num_heads if num_v_heads is None else num_v_heads
        sizes = {"d_model": d_model, "head_dim": head_dim, "num_heads": num_heads, "num_v_heads": heads, "conv_size": conv_size}
        for name, size in sizes.items():
            check_integer(name, size)
        if heads % num_heads:
            raise bad_argument("num_v_heads", got=heads, expected=f"a multiple of num_heads = {num_heads}")
        values = round(head_dim * expand_v)
        if values < 1 or not math.isclose(values, head_dim * expand_v, abs_tol=1e-5):
            got = f"{expand_v}, so {head_dim * expand_v} channels of a value with head_dim {head_dim}"
            raise bad_argument("expand_v", got=got, expected="a positive whole number of channels")
        if d_state is not None:
            check_integer("d_state", d_state, 1, head_dim, expected=f"an integer from 1 to head_dim = {head_dim}, or None")
        self.d_model, self.num_k_heads, self.num_v_heads, self.head_v_dim = d_model, num_heads, heads, values
        self.use_gate, self.allow_neg_eigval, self.conv_size = use_gate, allow_neg_eigval, conv_size
        self.layer_idx = layer_idx
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, inner = num_heads * head_dim, heads * values
        for name, size in (("q", keys), ("k", keys), ("v", inner), ("a", heads), ("b", heads)):
            setattr(self, f"{name}_proj", nn.Linear(d_model, size, bias=False, **options))
        single: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(heads, **single)) for _ in range(2))
        for name, size in (("q", keys), ("k", keys), ("v", inner)):
            conv = nn.Conv1d(size, size, conv_size, groups=size, padding=conv_size - 1, bias=conv_bias, **options)
            setattr(self, f"{name}_conv1d", conv)
        if use_gate:
            self.g_proj = nn.Linear(d_model, inner, bias=False, **options)
            self.o_norm: nn.Module = GatedRMSNorm(values, eps=norm_eps, norm_before_gate=True, **options)
        else:
            self.o_norm = nn.RMSNorm(values, eps=norm_eps, **options)
        self.o_proj = nn.Linear(inner, d_model, bias=False, **options)
        for name in ("q_map", "k_map"):
            shape = num_heads, d_state or head_dim, head_dim
            self.register_parameter(name, None if d_state is None else nn.Parameter(torch.empty(shape, **options)))
        self._init_rule()

    @torch.no_grad()
    def _init_rule(self) -> None:
        """What sub-modules do not draw: decay rates from .01 to 16, step sizes from .001 to .1, and orthonormal maps."""
        self.A_log.uniform_(0.01, 16).log_()
        dt = torch.exp(torch.rand_like(self.dt_bias) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp_min(1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        for q, k in zip(self.q_map, self.k_map, strict=True) if self.q_map is not None and self.k_map is not None else ():
            k.copy_(nn.init.orthogonal_(torch.empty(k.shape, device=k.device)))
            q.copy_(k)
        for parameter in (self.A_log, self.dt_bias, self.q_map, self.k_map):
            if parameter is not None:
                vars(parameter)["_no_weight_decay"] = True

    def reset_parameters(self) -> None:
        """Draw the initial parameters, those of the sub-modules included."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        self._init_rule()

    @property
    def head_k_dim(self) -> int:
        """Channels K of a query or key behind the convolution, read from the parameters."""
        return layout(self).features

    @property
    def d_state(self) -> int:
        """Rows of a head's state, read from the parameters."""
        return states(self)

    def plan_for(self, device: str, dtype: torch.dtype, batch: int, length: int) -> KernelPlan:
        shapes = {
            "k": (batch, length, self.num_k_heads, self.d_state), "v": (batch, length, self.num_v_heads, self.head_v_dim)
        }  # fmt: skip
        return plan("gated_delta_rule", shapes, dtype, device)

    @property
    def _state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """conv_state (B, channels of q, k and v, conv_size) and state (B, HV, K, V)."""
        return (sum(layout(self).convolved), self.conv_size), (self.num_v_heads, self.d_state, self.head_v_dim)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Zero (conv_state, state), shapes as in :meth:`step`; ``max_seqlen`` does not matter.

        The rule's state is float32 unless ``dtype`` says otherwise.
        """
        window, state = self._state_shapes
        conv: Any = self.q_conv1d
        weight, wide = conv.weight, torch.promote_types(self.A_log.dtype, torch.float32)
        conv_state = torch.zeros(batch_size, *window, device=weight.device, dtype=dtype or weight.dtype)
        return conv_state, torch.zeros(batch_size, *state, device=weight.device, dtype=dtype or wide)

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, heads={self.num_k_heads}/{self.num_v_heads}, head_dim={self.head_k_dim}"
        return f"{sizes}, head_v_dim={self.head_v_dim}" + ("" if self.k_map is None else f", d_state={self.d_state}")
