"""transformers' Mamba mixer on compressm's kernels."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mamba.modeling_mamba import MambaMixer

from compressm.adapters.gated_delta_net import GATED_DELTA_NETS
from compressm.adapters.kimi_delta import KIMI_DELTAS
from compressm.adapters.mamba2 import TRANSFORMERS as MAMBA2S
from compressm.errors import ModelError
from compressm.integrations._gated_delta_mixer import accelerated as accelerated_delta
from compressm.integrations._mamba2_mixer import accelerated as accelerated_mamba2
from compressm.kernels import KernelPlan, plan, selective_scan, selective_state_update
from compressm.layers._planned import PlannedLayer
from compressm.layers.mamba2_mixer import without_padding
from compressm.layers.mamba_mixer import SILU, convolve, convolve_step, decay, mix, project, select

DELTAS = (*GATED_DELTA_NETS, *KIMI_DELTAS)


class AcceleratedMambaMixer(PlannedLayer, MambaMixer):
    """A ``MambaMixer`` whose convolution, scan and decode step are ours; parameters and cache are the library's."""

    def forward(self, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        """Run over a sequence, or over its continuation.

        Args:
            hidden_states: (B, L, hidden_size).
            cache: the model's cache; without earlier tokens in it the sequence is a prompt.
            attention_mask: (B, L), zero where a token is padding; None: no padding.

        Returns:
            (B, L, hidden_size).
        """
        length = hidden_states.shape[1]
        self.remember(hidden_states, projected=True)
        if cache is None and attention_mask is None:
            return mix(self, hidden_states)
        conv_state = state = None
        if cache is not None:
            conv_state, state = cache.get_conv_state(self.layer_idx), cache.get_recurrent_state(self.layer_idx)
        x, z = project(self, without_padding(hidden_states, attention_mask))
        x = without_padding(self._convolve(x, cache, conv_state).mT, attention_mask)
        dt, B, C, dt_bias = select(self, x)
        y: Any
        if state is not None and length == 1:
            y = selective_state_update(
                state, x[:, 0], dt[:, 0], decay(self), B[:, 0], C[:, 0], self.D, z[..., 0], dt_bias, dt_softplus=True
            ).unsqueeze(-1)
        else:
            y = selective_scan(
                x.mT, dt.mT, decay(self), B.mT, C.mT, self.D, z, dt_bias, delta_softplus=True,
                return_last_state=cache is not None, initial_state=state,
            )  # fmt: skip
            if cache is not None:
                y, last = y
                cache.update_recurrent_state(last, self.layer_idx)
        return self.out_proj(y.mT.to(hidden_states.dtype))

    def _convolve(self, x: Tensor, cache: Any, conv_state: Tensor | None) -> Tensor:
        """silu(causal convolution) of x (B, D, L) behind what the cache remembers."""
        length = x.shape[-1]
        if conv_state is not None and length == 1 and not cache.is_recording_past(self.layer_idx):
            return convolve_step(self, x[..., 0], conv_state).unsqueeze(-1)
        if cache is None:
            return convolve(self, x)
        x = cache.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        return convolve(self, x)[..., -length:]

    def plan_for(self, device: str, dtype: torch.dtype, batch: int, length: int) -> KernelPlan:
        shapes = {"u": (batch, self.intermediate_size, length), "A": tuple(self.A_log.shape)}
        return plan("selective_scan", shapes, dtype, device)


def accelerate_(model: nn.Module, mode: bool = True) -> nn.Module:
    """Run every Mamba-1, Mamba-2 and gated delta rule mixer of a transformers model on compressm's kernels; in place.

    Outputs, cache and state_dict are the library's; they differ where a cache is continued by several tokens at once, as
    there the library forgets the scan's state, and where a Mamba-2 has a ``time_step_limit``, which the library does not apply
    in decoding.

    Mamba-2 mixers and those of the delta rule can be reduced in form ``"projected"`` then.  ``save_pretrained`` of a model with
    maps raises ModelError: the library could not load them; store it with ``compressm.save``.

    Args:
        model: such as ``MambaForCausalLM``, or a hybrid, whose other layers are left alone; before or after reductions.
        mode: False goes back to the library's own forward.

    Returns:
        the model.

    Raises:
        ModelError: no such mixer, one with another activation than SiLU, one whose forward has been replaced, or, going back,
            one with maps; nothing has changed.
    """
    mixers = {name: module for name, module in model.named_modules() if _own_class(module) is not None}
    if not mixers:
        expected = "one of transformers' Mamba-1, Mamba-2 or gated delta rule models"
        raise ModelError(f"model: {type(model).__name__} has no mixer that compressm knows, expected {expected}")
    own: Any
    for name, mixer in mixers.items():
        if mode:
            _check(name, mixer)
        elif _mapped(mixer):
            own = _own_class(mixer)
            raise ModelError(f"layer {name!r}: has maps, expected none, as {own.__name__} has no place for them")
    for mixer in mixers.values():
        own = _own_class(mixer)
        if type(mixer) is not (new := _accelerated(own) if mode else own):
            mixer.__class__ = new
            vars(mixer).pop("_last_call", None)
    for owner in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        if mode:
            vars(owner)["save_pretrained"] = MethodType(_save_pretrained, owner)
        else:
            vars(owner).pop("save_pretrained", None)
    return model


def _save_pretrained(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of models without maps."""
    mapped = [name for name, module in model.named_modules() if _mapped(module)]
    if mapped:
        raise ModelError(
            f"save_pretrained: {', '.join(mapped[:4])} have maps (form 'projected'), which from_pretrained would leave out, "
            "expected layers of the library's own. Store this model with compressm.save, or reduce with form='strict'"
        )
    return type(model).save_pretrained(model, *args, **kwargs)


def _mapped(module: nn.Module) -> bool:
    """Whether a mixer has maps behind its convolution."""
    return any(module._parameters.get(name) is not None for name in ("B_map", "k_map"))


def _own_class(module: nn.Module) -> type[nn.Module] | None:
    """The library's class of a mixer; None of another module."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    kinds = dict(zip(names, type(module).__mro__, strict=True))
    return next((kind for name, kind in kinds.items() if kind is MambaMixer or name in (*MAMBA2S, *DELTAS)), None)


def _accelerated(own: Any) -> type[nn.Module]:
    if own is MambaMixer:
        return AcceleratedMambaMixer
    return accelerated_delta(own) if f"{own.__module__}.{own.__qualname__}" in DELTAS else accelerated_mamba2(own)


def _check(name: str, mixer: Any) -> None:
    own: Any = _own_class(mixer)
    if type(mixer) not in (own, _accelerated(own)):
        raise ModelError(
            f"layer {name!r}: {type(mixer).__qualname__} overrides {own.__name__}, expected transformers' own class"
        )
    if mixer.activation not in SILU:  # the scan's gate is one
        raise ModelError(f"layer {name!r}: activation {mixer.activation!r}, expected 'silu'. Leave this model as it is")
    if "forward" in vars(mixer) or any(hasattr(module, "_hf_hook") for module in mixer.modules()):
        raise ModelError(
            f"layer {name!r}: its forward is wrapped (device_map with several devices or offloading does that), expected "
            "transformers' own. Load the model onto one device, or call accelerate.hooks.remove_hook_from_submodules(model)"
        )
