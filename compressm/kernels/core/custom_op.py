"""Custom ops that cost little in eager mode.

``torch.library.custom_op`` sends every call through the dispatcher and back into Python, several times where a gradient is
asked for: some 100 microseconds that a small model waits for.  An op of this module is such an op, and all that traces a
program sees it as one, whatever the sizes; a plain eager call goes to the same kernel, and the same backward, directly.  The
backward is the registered formula, or, where the kernel is an op of the C++ library that has a gradient, the library's own.

Kernels have one derivative, in reverse mode.  Under forward-mode AD and the derivatives of ``torch.func`` the choice of a
backend (``dispatch``) takes the reference, whose operations are torch's own; ``torch.func.vmap`` by itself runs the kernels,
one call for each of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

_PLAIN = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})  # types of arguments that hide nothing


_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutogradOther
)
WAY_OUT = 'backend="reference", COMPRESSM_BACKEND=reference for all calls, or float64 tensors'


def in_cpp(*arguments: Any) -> bool:
    """Of an op whose last argument is the name of the backend, one of which has a gradient of its own."""
    return arguments[-1] == "cpp"


class CustomOp:
    """A custom op; call it like its kernel.

    Args:
        name: ``"namespace::name"``.
        kernel: what it computes; annotated, returns new tensors.  What depends on sizes is decided here, not by its callers.
        mutates: names of the arguments that it writes to.  With any, no gradient passes through the op.
        differentiable: whether the kernel has a gradient of its own (csrc/core/autograd.h), the same as the registered formula;
            a function of the arguments where it depends on them.

    Attributes:
        op: the op as ``torch.library`` knows it.
    """

    def __init__(
        self, name: str, kernel: Callable, mutates: tuple[str, ...] = (), differentiable: bool | Callable[..., bool] = False
    ) -> None:
        self.op = torch.library.custom_op(name, kernel, mutates_args=mutates)
        self._name = name.partition("::")[2]
        self._kernel = kernel
        self._differentiable = differentiable if callable(differentiable) else lambda *_: differentiable
        self._written = [k for k, argument in enumerate(inspect.signature(kernel).parameters) if argument in mutates]
        self._function: type[torch.autograd.Function] | None = None
        if self._name.endswith("_backward"):
            self.op.register_autograd(self._no_second_derivative)

    def _no_second_derivative(self, *_: Any) -> NoReturn:
        raise NotImplementedError(f"{self._name}: the kernels have no second derivative. Use {WAY_OUT}")

    def register_fake(self, fake: Callable) -> Callable:
        """Decorator: the function that makes outputs of the right shape, dtype and strides, uncomputed."""
        return self.op.register_fake(fake)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """The formula of the gradient, as ``torch.library.register_autograd`` takes it, positional arguments only."""
        self.op.register_autograd(backward, setup_context=setup_context)
        kernel = self._kernel

        def forward(ctx: Any, *args: Any) -> Any:
            output = kernel(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self._name, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        if not plain_call(*args):
            return self.op(*args)
        if self._differentiable(*args):
            return self._kernel(*args)
        if not (torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)):
            for k in self._written:
                if not args[k].is_inference():
                    torch.autograd.graph.increment_version(args[k])
            return self._kernel(*args)
        return self.op(*args) if self._function is None else self._function.apply(*args)


def custom_op(
    name: str, mutates: tuple[str, ...] = (), differentiable: bool | Callable[..., bool] = False
) -> Callable[[Callable], CustomOp]:
    """Decorator: makes a kernel the :class:`CustomOp` ``name``."""
    return lambda kernel: CustomOp(name, kernel, mutates, differentiable)


def plain_call(*args: Any) -> bool:
    """Whether an op may go straight to its kernel.

    Not so where something expects to meet the op (torch.compile, a dispatch mode such as fake tensors, torch.jit.trace) or
    torch's own operations (torch.func, forward-mode AD), or a tensor is more than a tensor.
    """
    if torch.compiler.is_compiling():
        return False
    seen = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()
    return not seen and forward_ad._current_level < 0 and _PLAIN.issuperset(map(type, args))


def transformed() -> bool:
    """Whether forward-mode AD or a transform of torch.func that differentiates is at work."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    transforms = torch._C._functorch.get_interpreter_stack()
    return any(transform.key() in (TransformType.Grad, TransformType.Jvp) for transform in transforms)


def recomputed_gradients(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> Any:
    """The backward of an op that keeps nothing but its arguments: runs ``function`` again and differentiates it.

    Made for the kernel of an op, in which torch records no graph otherwise.

    Args:
        function: of ``tensors``, differentiable; returns as many tensors as there are ``grads``.
        grads: of its results; None for zero.

    Returns:
        a gradient for each of ``tensors``, in the memory layout of ``torch.empty_like``; empty for None.  The
        first tensor is not None.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        wanted = [leaf for leaf in leaves if leaf is not None]
        pairs = zip(function(*leaves), grads, strict=True)
        reached = [(out, grad) for out, grad in pairs if grad is not None and out.requires_grad]
        outputs, given = [out for out, _ in reached], [grad for _, grad in reached]
        if outputs:
            found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True, materialize_grads=True))
        else:
            found = iter([torch.zeros_like(leaf) for leaf in wanted])
    none = wanted[0].new_empty((0,))
    return tuple(none.clone() if t is None else torch.empty_like(t).copy_(next(found)) for t in tensors)
