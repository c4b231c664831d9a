"""Mamba-2's scan given what does not fit: an error that names it, from the function as from the C++ op below it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernels.ssd_cases import TENSORS, random_inputs

from compressm.errors import ArgumentError
from compressm.kernels import ssd
from compressm.kernels.core import cpp

SIZES = (2, 6, 4, 3, 2, 5)  # no two axes that meet are of one length
BLAMED = {"x": "x|dt|B|C|z|initial_states", "B": "B|C|initial_states", "C": "C|B"}  # of these several, where they do not fit


@st.composite
def changes(draw):
    """A function of a tensor to one of another shape or of another kind."""
    kind = draw(st.sampled_from(["integers", "complex", "truth", "more", "fewer", "shorter", "longer", "nothing"]))
    at = draw(st.integers(0, 9))
    kinds = {"integers": torch.int64, "complex": torch.complex64, "truth": torch.bool}

    def change(t):
        axis = at % t.dim()
        if kind in kinds:
            return t.to(kinds[kind])
        if kind == "more":
            return t.unsqueeze(at % (t.dim() + 1))
        if kind == "fewer":
            return t.select(axis, 0)
        if kind == "longer":
            return torch.cat([t, t], axis)
        return t.narrow(axis, 0, t.shape[axis] - 1 if kind == "shorter" else 0)

    return change


@given(st.sampled_from(TENSORS), changes(), st.booleans(), st.sampled_from([None, "reference"]))
@settings(max_examples=150, deadline=None)
def test_one_wrong_tensor_is_named(name, change, wide_skip, backend):
    inputs = {key: t.float() for key, t in random_inputs(*SIZES, wide_skip=wide_skip).items()}
    inputs[name] = change(inputs[name])
    assume(not (name == "D" and wide_skip and inputs["D"].shape == (SIZES[2],)))  # the other form that it may have
    with pytest.raises(ArgumentError, match=rf"^({BLAMED.get(name, name)}): expected"):
        ssd(**inputs, backend=backend)


@given(st.sampled_from(TENSORS), changes(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_kernel_itself_refuses_it(name, change, wide_skip):
    inputs = {key: t.float() for key, t in random_inputs(*SIZES, wide_skip=wide_skip).items()}
    inputs[name] = change(inputs[name])
    assume(not (name == "D" and wide_skip and inputs["D"].shape == (SIZES[2],)))  # the other form that it may have
    arguments = (*inputs.values(), None, None, True, 0.0, math.inf, True, 4)
    gradients = torch.ones(SIZES[:4]), torch.ones(SIZES[0], *SIZES[2:4], SIZES[5])
    with pytest.raises(RuntimeError, match="expected"):
        cpp.library().ssd(*arguments)
    with pytest.raises(RuntimeError, match="expected"):
        cpp.library().ssd_backward(*gradients, *arguments)


@pytest.mark.parametrize("name", TENSORS)
def test_other_kinds_of_numbers_are_named(name):
    inputs = {key: t.float() for key, t in random_inputs(*SIZES).items()}
    t = inputs[name]
    for wrong in (t.to(torch.float8_e4m3fn), t.to_sparse(), t.tolist(), t.numpy()):
        with pytest.raises(ArgumentError, match=rf"^{name}: expected a (dense )?tensor"):
            ssd(**{**inputs, name: wrong})
    for packing in ("seq_idx", "cu_seqlens"):
        with pytest.raises(ArgumentError, match=rf"^{packing}: expected a tensor, got list"):
            ssd(**inputs, **{packing: [0, 6]})
