"""Systems and layers stepped one input at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters.published_layers import S5Wrapper
from scipy import signal

from compressm.adapters import stream
from compressm.control import DiagonalSystem, StateSpace, Stream, singular_perturbation
from compressm.errors import ArgumentError, ModelError
from compressm.layers import LRU, S4D, S5

F64 = {"dtype": torch.float64}
LAYERS = {
    "lru": lambda: LRU(3, 5, **F64),
    "s5": lambda: S5(3, 5, discretization="bilinear", **F64),
    "pairs": lambda: S5(3, 5, conj_sym=True, **F64),
    "published": lambda: S5Wrapper(3, 5),
}


def some_system(modes=4, inputs=2, outputs=3) -> DiagonalSystem:
    log_lam = torch.complex(-0.05 - torch.rand(modes), 3 * torch.rand(modes))
    B, C = torch.randn(modes, inputs, dtype=torch.cfloat), torch.randn(outputs, modes, dtype=torch.cfloat)
    return DiagonalSystem(log_lam, B, C)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_s_stream_is_its_sequence(kind):
    layer, x = LAYERS[kind](), torch.randn(1, 33, 3, dtype=torch.float64)
    loop, expected = stream(layer), layer(x)[0].detach().numpy()
    np.testing.assert_allclose([loop.step(u) for u in x[0].numpy()], expected, atol=1e-12)
    loop.reset()
    np.testing.assert_allclose(loop.step(x[0, 0]), expected[0], atol=1e-12)


def test_a_model_s_stream_is_scipy_s_simulation():
    model = singular_perturbation(some_system(), 5)
    u = np.random.default_rng(0).normal(size=(40, 2))
    _, expected, states = signal.dlsim(signal.StateSpace(*model.arrays(), dt=1), u)
    loop = Stream(model)
    found = [loop.step(now) for now in u[:25]]
    np.testing.assert_allclose(loop.state, states[25], atol=1e-12)
    kept, again = loop.state, Stream(model)
    again.state = kept
    loop.step(u[25])
    assert not np.shares_memory(kept, loop.state)
    np.testing.assert_allclose([*found, *(again.step(now) for now in u[25:])], expected, atol=1e-12)


def test_outputs_are_the_caller_s():
    loop = Stream(some_system(), torch.ones(3, 2))
    first = loop.step([1.0, 2.0])
    kept = first.copy()
    loop.step([3.0, 4.0])
    np.testing.assert_array_equal(first, kept)


def test_what_cannot_be_streamed():
    with pytest.raises(ArgumentError, match=r"u: expected \(2,\)"):
        Stream(some_system()).step([1.0])
    with pytest.raises(ArgumentError, match=r"u: expected \(2,\)"):
        Stream(some_system()).step(1.0)
    with pytest.raises(ArgumentError, match=r"state: expected \(8,\)"):
        Stream(some_system()).state = np.zeros(3)
    with pytest.raises(ArgumentError, match=r"D: expected \(3, 2\)"):
        Stream(some_system(), torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="D: expected none"):
        Stream(StateSpace(*(torch.eye(2, dtype=torch.float64),) * 4), torch.eye(2))
    batch = DiagonalSystem(-torch.ones(2, 3) + 0j, torch.ones(2, 3, 1) + 0j, torch.ones(2, 1, 3) + 0j)
    with pytest.raises(ArgumentError, match="system: expected one system"):
        Stream(batch)
    for layer in (S4D(3, 6), S5(3, 5, bidir=True), torch.nn.Linear(3, 3), torch.nn.Sequential(LRU(3, 5))):
        with pytest.raises(ModelError, match="layer: got"):
            stream(layer)
