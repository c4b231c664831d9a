"""Custom ops that cost little in eager mode.

``torch.library.custom_op`` sends every call through the dispatcher and back into Python, several times where a gradient is
asked for: some 100 microseconds that a small model waits for.  An op of this module is such an op, and all that traces or
transforms a program sees it as one; a plain eager call goes to the same kernel, and the same backward, directly.  The
backward is the registered formula, or, where the kernel is an op of the C++ library that has a gradient, the library's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})  # types of arguments that hide nothing


def in_cpp(*arguments: Any) -> bool:
    """Of an op whose last argument is the name of the backend, one of which has a gradient of its own."""
    return arguments[-1] == "cpp"


class CustomOp:
    """A custom op; call it like its kernel.

    Args:
        name: ``"namespace::name"``.
        kernel: what it computes; annotated, returns new tensors.
        mutates: names of the arguments that it writes to.  With any, no gradient passes through the op.
        differentiable: whether the kernel has a gradient of its own (csrc/autograd.h), the same as the registered formula; a
            function of the arguments where it depends on them.

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

    Not so where something expects to meet the op (torch.compile, a dispatch mode such as fake tensors, torch.func,
    torch.jit.trace), or a tensor is more than a tensor.
    """
    if torch.compiler.is_compiling():
        return False
    seen = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()
    return not seen and _PLAIN.issuperset(map(type, args))
