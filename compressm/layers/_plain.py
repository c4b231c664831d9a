"""Whether a module is what its class says and nothing more, so that an op may read its parameters and not call it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of the kinds and of no subclass, with its own forward, and no hook on it or on all modules.

    Adapters, quantised layers, parametrizations and pruned weights are not plain: only calling the module gives what they make
    of its input.
    """
    m = module
    if type(m) not in kinds or "forward" in m.__dict__:
        return False
    hooked = m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks
    return not hooked and not _has_any_global_hook()
