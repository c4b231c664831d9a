"""``LightningModule.load_from_checkpoint`` of reduced runs.

Lightning builds the module from the checkpoint's hyperparameters, which say the numbers of states before any reduction, and
loads the weights at once: only a method of the user's class is called in between.  So the base class learns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import nn

from compressm.adapters import find_layers
from compressm.compression.surgery.audit import full_name
from compressm.integrations._common import tell_configs
from compressm.integrations.resizing import take_ranks

_taught: set[type[nn.Module]] = set()
_loading: ContextVar[bool] = ContextVar("loading from a checkpoint", default=False)


def teach_load_from_checkpoint(base: Any) -> None:
    """Let ``load_from_checkpoint`` of ``LightningModule`` and its subclasses give the new module the checkpoint's ranks.

    ``load_state_dict`` of modules that exist already stays as it is.  Doing it again changes nothing.

    Args:
        base: the class ``LightningModule`` of lightning or pytorch_lightning.
    """
    if base in _taught:
        return
    _taught.add(base)
    method = vars(base)["load_from_checkpoint"]

    @wraps(method.__func__)
    def load_from_checkpoint(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
        token = _loading.set(True)
        try:
            return method.__func__(cls, *args, **kwargs)
        finally:
            _loading.reset(token)

    @wraps(base.load_state_dict)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if _loading.get():
            whole = {
                name: (module, adapter)
                for name, (module, adapter) in find_layers(self, strict=False).items()
                if all(full_name(name, key) in state_dict for key in adapter.parameters(module))
            }
            take_ranks(self, whole, state_dict)
            tell_configs(self)
        return super(base, self).load_state_dict(state_dict, *args, **kwargs)

    base.load_from_checkpoint = type(method)(load_from_checkpoint)
    base.load_state_dict = load_state_dict
