"""Whether a module is what its class says and nothing more, so that a fused op may read its parameters and not call it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """A ``kind`` and no subclass, no adapter around it, no hook on it or on all modules."""
    m = module
    hooked = m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks
    return type(m) is kind and not hooked and not _has_any_global_hook()
