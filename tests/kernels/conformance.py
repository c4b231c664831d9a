"""An op as users of mamba_ssm and causal-conv1d call it, against float64: every output and the gradient of every tensor."""

from __future__ import annotations

import torch


def compare(call, tensors, assert_close, grads=True):
    """``call(tensors, backend)`` on the backend that is chosen for it, against the reference on the same numbers in float64.

    Args:
        call: returns a tensor or a tuple of tensors.
        tensors: by name, each in the dtype and layout in which it is given; None is left out.
        grads: compare the gradients of a random linear functional as well.
    """
    given = {name: t.detach().requires_grad_(grads) for name, t in tensors.items() if t is not None}
    exact = {name: t.detach().double().requires_grad_(grads) for name, t in given.items()}
    results, oracle = (out if isinstance(out, tuple) else (out,) for out in (call(given, None), call(exact, "reference")))
    for k, (result, expected) in enumerate(zip(results, oracle, strict=True)):
        assert_close(result.detach(), expected.detach(), f"output {k}")
    if not grads:
        return
    weights = [torch.randn(result.shape).to(result.dtype) for result in results]
    loss = sum((result * weight).sum(dtype=torch.float32) for result, weight in zip(results, weights, strict=True))
    exact_loss = sum((result * weight.double()).sum() for result, weight in zip(oracle, weights, strict=True))
    actual, expected = (torch.autograd.grad(t, list(leaves.values())) for t, leaves in ((loss, given), (exact_loss, exact)))
    for name, gradient, right in zip(given, actual, expected, strict=True):
        assert_close(gradient, right, f"gradient of {name}")


def cycle(values, number):
    """One of ``values`` for the configuration of this number, so that a grid of options meets all of them."""
    return values[number % len(values)]
