"""Every op of ``kernels.OPS`` by its record: right in values and gradients, planned, faked, measured, compiled for a GPU."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import FrozenInstanceError

import pytest
import torch
from conftest import TOLERANCES
from torch._subclasses.fake_tensor import FakeTensorMode

from compressm import kernels
from compressm.errors import ArgumentError, BackendError
from compressm.kernels import OPS
from compressm.kernels.core.op import Cost

CPU = torch.device("cpu")
CASES = [(name, sizes) for name, op in OPS.items() for sizes in op.small]
IDS = [f"{name} {' '.join(map(str, sizes.values()))}" for name, sizes in CASES]


def evaluate(op, sample, tensors, backend):
    """Outputs and the gradients of a functional of them, by name."""
    leaves = {name: t.detach().clone().requires_grad_(op.differentiable) for name, t in tensors.items()}
    outputs = op.run(leaves, sample.options, backend)
    if not op.differentiable:
        return outputs
    generator = torch.Generator().manual_seed(1)
    weighed = [(t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in outputs.values()]
    gradients = torch.autograd.grad(sum(weighed), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return outputs | {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def wide(tensors):
    return {name: t.to(torch.complex128 if t.is_complex() else torch.float64) for name, t in tensors.items()}


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=IDS)
def test_every_backend_agrees_with_the_reference_in_float64(name, sizes):
    op, ran = OPS[name], []
    for dtype, backend in itertools.product(op.dtypes, ("cpp", "torch", "reference", None)):
        torch.manual_seed(0)
        sample = op.draw(sizes, dtype, CPU)
        try:
            actual = evaluate(op, sample, sample.tensors, backend)
        except BackendError:
            continue
        ran.append(backend)
        for key, expected in evaluate(op, sample, wide(sample.tensors), "reference").items():
            assert actual[key].shape == expected.shape
            error = (actual[key].to(expected.dtype) - expected).norm() / expected.norm().clamp_min(1e-30)
            assert error <= TOLERANCES[dtype], (key, dtype, backend, float(error))
    assert {"reference", None} <= set(ran)


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=IDS)
def test_fake_outputs_look_like_real_ones(name, sizes):
    op = OPS[name]
    for dtype in op.dtypes:
        sample = op.draw(sizes, dtype, CPU)
        real = op.run({key: t.clone() for key, t in sample.tensors.items()}, sample.options)
        with FakeTensorMode() as mode:
            faked = {key: mode.from_tensor(t) for key, t in sample.tensors.items()}
            fake = op.run(faked, sample.options)
        for key, t in real.items():
            assert (fake[key].shape, fake[key].dtype, fake[key].device) == (t.shape, t.dtype, t.device)


@pytest.mark.parametrize("name", OPS)
def test_the_plan_names_the_backend_and_costs_nothing_to_print(name):
    op = OPS[name]
    tensors = op.draw(op.small[0], op.dtypes[0], CPU).tensors
    shapes = {key: tuple(axis + 2 for axis in range(axes.count(",") + 1)) for key, axes in op.shapes.items()}
    shapes = {key: tuple(tensors[key].shape) if key in tensors and tensors[key].dim() == len(shape) else shape
              for key, shape in shapes.items()}  # fmt: skip
    if name == "lti_scan":
        shapes |= {"B": tuple(tensors["B_re"].shape), "C": tuple(tensors["C_re"].shape)}
    if name == "gramians":
        shapes = {key: tuple(tensors[key].shape[1:]) for key in shapes}
    plan = kernels.plan(name, shapes, op.dtypes[0])
    assert plan.op == name
    assert str(plan).startswith(f"{name}: {plan.backend} ")
    assert kernels.plan(name, shapes, op.dtypes[0], backend="reference").backend == "reference"
    with pytest.raises(ArgumentError, match="shapes"):
        kernels.plan(name, {})


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=IDS)
def test_costs_grow_with_the_sizes_and_with_a_backward(name, sizes):
    op = OPS[name]
    once = op.cost(sizes, 4, False)
    assert once.bytes > 0 < once.flops
    assert op.cost({**sizes, "batch": 2 * sizes["batch"]}, 4, False).bytes > once.bytes
    assert op.cost(sizes, 2, False).bytes <= once.bytes
    both = op.cost(sizes, 4, True)
    assert all(more >= less for more, less in zip(vars(both).values(), vars(once).values(), strict=True))
    moved = sum(t.numel() * t.element_size() for t in op.draw(sizes, op.dtypes[0], CPU).tensors.values())
    assert once.bytes >= moved // 2  # no output is free


@pytest.mark.parametrize("name", OPS)
def test_slices_along_a_samples_axes_are_independent(name):
    op = OPS[name]
    sizes = max(op.small, key=lambda chosen: chosen["batch"])
    sample = op.draw(sizes, op.dtypes[0], CPU)
    for axes in sample.axes.values():
        if any(name not in axes for name in op.returns[:1]) or ("x" in axes and axes["x"] == 1 and name == "diagonal_scan"):
            continue
        tensors = wide(sample.tensors)
        whole = op.run({key: t.clone() for key, t in tensors.items()}, sample.options, "reference")
        part = {key: t.narrow(axes[key], -1 % t.shape[axes[key]], 1).clone() if key in axes else t.clone()
                for key, t in tensors.items()}  # fmt: skip
        for key, out in op.run(part, sample.options, "reference").items():
            torch.testing.assert_close(out, whole[key].narrow(axes[key], -1 % whole[key].shape[axes[key]], 1))


def test_records_are_frozen_and_found_in_their_folders():
    for name, op in OPS.items():
        with pytest.raises(FrozenInstanceError):
            op.name = "other"
        folder = importlib.import_module(f"compressm.kernels.{name}")
        assert op in folder.OPS
        assert op.title
        assert op.about
        assert isinstance(op.cost(op.sizes, 4, False), Cost)
        assert set(op.sizes) == set(op.small[0])
