"""Which adapter serves which layer: looked up by qualified class name along the MRO, without importing any layer."""

from __future__ import annotations

from torch import nn

from compressm.adapters.base import Adapter, label
from compressm.errors import ModelError, bad_argument

# Parameters that only state-space layers carry; a module that owns one and has no adapter is reported, never skipped.
SSM_MARKS = frozenset(
    {
        "A_log", "nu_log", "theta_log", "nu", "Lambda_re", "Lambda_im", "Lambda", "log_Lambda", "log_lambda",
        "log_step", "log_dt", "log_A_real", "A_real", "inv_dt", "inv_A_real", "log_A_imag", "A_imag",
    }
)  # fmt: skip

_ADAPTERS: dict[str, Adapter | None] = {}


def qualified_name(cls: type) -> str:
    """``module.Class`` as the registry keys it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register_adapter(target: str | type, adapter: Adapter | None) -> None:
    """Make layers of a class (and of its subclasses) compressible.

    Args:
        target: the layer class, or its qualified name such as ``"mamba_ssm.modules.mamba_simple.Mamba"``.
        adapter: an :class:`Adapter`; None leaves layers of this class alone.

    Raises:
        ArgumentError: ``target`` is neither a class nor a dotted name, or ``adapter`` is no Adapter.
    """
    if isinstance(target, type):
        target = qualified_name(target)
    if not isinstance(target, str) or "." not in target:
        raise bad_argument("target", got=repr(target), expected="a class or a qualified name like 'package.module.Class'")
    if adapter is not None and not isinstance(adapter, Adapter):
        got = f"the class {adapter.__name__}" if isinstance(adapter, type) else type(adapter).__name__
        remedy = "Subclass compressm.adapters.Adapter and pass an instance"
        raise bad_argument("adapter", got=got, expected="an Adapter instance or None", remedy=remedy)
    _ADAPTERS[target] = adapter


def supported_layers() -> tuple[str, ...]:
    """Qualified names of the layer classes that can be compressed."""
    return tuple(sorted(name for name, adapter in _ADAPTERS.items() if adapter is not None))


def _parameter_names(module: nn.Module) -> set[str]:
    """Names of a module's own parameters, parametrized and pruned ones included."""
    computed = module._modules.get("parametrizations")
    names = {name.removesuffix("_orig") for name in module._parameters}
    return names | set(computed) if isinstance(computed, nn.ModuleDict) else names


def find_layers(model: nn.Module, *, strict: bool = True) -> dict[str, tuple[nn.Module, Adapter]]:
    """Every compressible layer of a model, by module name, in the model's order.

    Args:
        model: any module; a layer itself is found under the name ``""``.
        strict: raise on modules that look like state-space layers but have no adapter.

    Raises:
        ModelError: such a module was found.
    """
    found: dict[str, tuple[nn.Module, Adapter]] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(not outer or name.startswith(outer + ".") for outer in inside):
            continue
        key = next((q for q in map(qualified_name, type(module).__mro__) if q in _ADAPTERS), None)
        if key is not None:
            inside.append(name)
            adapter = _ADAPTERS[key]
            if adapter is not None:
                found[name] = (module, adapter)
        elif strict and (marks := sorted(SSM_MARKS & _parameter_names(module))):
            raise ModelError(
                f"{label(module, name)} looks like a state-space layer (it owns {', '.join(marks)}) but no adapter is "
                f"registered for {qualified_name(type(module))}; supported: {', '.join(supported_layers())}. "
                "Register one with compressm.register_adapter(cls, adapter), or register_adapter(cls, None) to leave it alone"
            )
    return found
