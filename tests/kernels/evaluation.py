"""What the tests of several ops share: numbers, one evaluation with its gradients, and how it is compared."""

from __future__ import annotations

import torch
from global_state import threads


def normals(seed, dtype=torch.float64):
    """A function that draws normal numbers of a shape."""
    draw = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=draw, dtype=dtype)


def with_gradients(leaves, **outputs):
    """Outputs, and the gradients of a random linear functional of them in all leaves that are not None, on the CPU, by name."""
    draw = normals(7)
    weights = [draw(*t.shape).to(t.device, t.dtype) for t in outputs.values()]
    present = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    gradients = torch.autograd.grad(
        list(outputs.values()), list(present.values()), weights, allow_unused=True, materialize_grads=True
    )
    return {name: tensor.detach().cpu() for name, tensor in {**outputs, **dict(zip(present, gradients, strict=True))}.items()}


def check(results, oracle, assert_close, dtype):
    """Every result of an evaluation within the table for ``dtype``."""
    assert set(results) == set(oracle)
    for name, expected in oracle.items():
        assert_close(results[name].to(torch.float64), expected, name, dtype)


def check_threads(evaluate):
    """An evaluation has the same bits for any number of threads."""
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(evaluate())
    for name, value in results[0].items():
        assert all(torch.equal(other[name], value) for other in results[1:]), name


def check_inductor(op, inputs, assert_close, **options):
    """An op inside of a compiled function has the gradients of its reference."""
    compiled = torch.compile(lambda **k: op(**k)[0] * 2.0, fullgraph=True)
    leaves = {name: t.float().requires_grad_() for name, t in inputs.items()}
    actual = torch.autograd.grad(compiled(**leaves, backend="cpp", **options).sum(), list(leaves.values()))
    exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    expected = torch.autograd.grad(2 * op(**exact, backend="reference", **options)[0].sum(), list(exact.values()))
    for name, a, b in zip(leaves, actual, expected, strict=True):
        assert_close(a, b, name)
