"""Which adapter serves which layer: looked up by qualified class name along the MRO, without importing any layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compressm.adapters.base import Adapter
from compressm.adapters.parameters import label, own_parameter, parameter_at
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


def check_known(layers: Mapping[str, tuple[nn.Module, Adapter]]) -> None:
    """Refuse layers that own something which seems to depend on the rank and which their adapter does not know.

    A reduction would leave it as it is: subclasses and forks (looked up by name) of a known class may have a second scan, a
    norm over the states, a mask.  A parameter or buffer is suspect if one of its axes is as long as something that follows the
    rank, or once or twice the number of states, or if it is called like a state-space parameter and the number of states
    divides one of its axes.  An equal length may be chance: the adapter's :meth:`Adapter.independent` says so.

    Args:
        layers: from :func:`find_layers`.

    Raises:
        ModelError: names the first such layer, what it owns, and the way out.
    """
    for name, (module, adapter) in layers.items():
        if suspects := _suspects(module, adapter):
            raise ModelError(
                f"{label(module, name)} owns {', '.join(suspects[:4])}{', ...' if len(suspects) > 4 else ''}, which by name or "
                f"size may depend on its {adapter.rank(module)} states and which {type(adapter).__name__} does not know: a "
                "reduction would leave it as it is. Register an adapter that does, compressm.register_adapter(cls, adapter); "
                "where it has nothing to do with the states, let the adapter's independent() name it; or leave such layers "
                "alone with register_adapter(cls, None)"
            )


def _suspects(module: nn.Module, adapter: Adapter) -> list[str]:
    """What may depend on the rank and is not known, with its shape; what has a telling name comes first."""
    known, own = adapter.independent(module), adapter.parameters(module)
    written = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch."))  # not parametrize's, FSDP's
    if known is None and qualified_name(written) in _ADAPTERS:
        return []
    if any(parameter_at(module, key) is None for key in own) or (rank := adapter.rank(module)) == 1:
        return []  # the former is refused where parameters are looked at
    lengths = _lengths(module, adapter)
    found: dict[bool, list[str]] = {True: [], False: []}
    for key, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        if key not in own and not any(f"{key}.".startswith(f"{part}.") for part in known or ()):
            marked = _looks_like_a_mark(key) and any(length % rank == 0 for length in tensor.shape if length)
            if marked or lengths & set(tensor.shape):
                found[marked].append(f"{key} {tuple(tensor.shape)}")
    return found[True] + found[False]


def _lengths(module: nn.Module, adapter: Adapter) -> set[int]:
    """Lengths of axes that follow a layer's rank."""
    rank = adapter.rank(module)
    lengths = {rank, 2 * rank}
    for key, other in adapter.blank(module, rank + 1).items():
        lengths |= {now for now, then in zip(own_parameter(module, key).shape, other.shape, strict=True) if now != then}
    return lengths - {1}


def _looks_like_a_mark(key: str) -> bool:
    """Whether the parts of a mark occur in a name in their order, as those of ``A_log`` in ``A_b_log``."""
    parts = [part.rstrip("0123456789") for part in key.rpartition(".")[2].split("_")]
    for mark in SSM_MARKS:
        rest = iter(parts)
        if all(part in rest for part in mark.split("_")):
            return True
    return False


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
