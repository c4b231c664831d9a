"""Data Gramians against brute force, and the promise to leave no trace."""

from __future__ import annotations

import collections
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import compressm
from compressm.adapters import find_layers, lti
from compressm.compression.planning.batches import take
from compressm.compression.planning.calibration import CalibrationWarning, collect
from compressm.errors import ArgumentError, DataError, NumericalError
from compressm.layers import LRU


def relative(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((actual - oracle).norm() / oracle.norm())


def measure(model, batches, **kwargs):
    layers = find_layers(model)
    systems = {name: adapter.read(module, name) for name, (module, adapter) in layers.items()}
    return collect(model, layers, batches, **kwargs), systems


class Watched(nn.Module):
    """Linear -> LRU -> tanh -> Linear over every step; keeps what the oracle needs."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.before, self.lru = nn.Linear(2, 3, dtype=dtype), LRU(3, 5, dtype=dtype)
        self.after = nn.Linear(3, 4, dtype=dtype)

    def forward(self, x):
        return self.after(torch.tanh(self.lru(self.before(x))))


def brute_force(model: Watched, batches, seed=0):
    """P and Q by one-step recurrences; the gradient at the layer's output from the chain rule written out."""
    lru = model.lru
    lam = torch.exp(torch.complex(-lru.nu_log.exp(), lru.theta_log.exp())).detach()
    B = (lru.gamma_log.exp()[:, None] * torch.complex(lru.B_re, lru.B_im)).detach()
    C = torch.complex(lru.C_re, lru.C_im).detach()
    states, adjoints = [], []
    for index, x in enumerate(batches):
        u = model.before(x).detach().to(torch.complex128)
        y = lru(model.before(x)).detach()
        generator = torch.Generator().manual_seed(seed + index)
        v = torch.randn(*x.shape[:2], 4, generator=generator).double()
        g = ((v @ model.after.weight) * (1 - torch.tanh(y) ** 2)).detach()
        h = torch.zeros(len(x), 5, dtype=torch.complex128)
        p = torch.zeros_like(h)
        for t in range(x.shape[1]):
            h = lam * h + u[:, t] @ B.T
            states.append(torch.cat([h.real, h.imag], 1))
        for t in reversed(range(x.shape[1])):
            p = lam.conj() * p + g[:, t].to(C) @ C.conj()
            adjoints.append(torch.cat([p.real, p.imag], 1))
    X, Y = torch.cat(states), torch.cat(adjoints)
    return X.T @ X / len(X), Y.T @ Y / len(Y), len(X)


@pytest.mark.parametrize("chunk", [lti.CHUNK_BYTES, 1000])
def test_gramians_are_second_moments(monkeypatch, chunk):
    """Also where states are run in small chunks of time and batch."""
    monkeypatch.setattr(lti, "CHUNK_BYTES", chunk)
    model = Watched()
    batches = [torch.randn(4, 33, 2, dtype=torch.float64), torch.randn(3, 17, 2, dtype=torch.float64)]
    measured, _ = measure(model, batches, rows_per_state=None)
    P, Q, rows = brute_force(model, batches)
    assert measured["lru"].sequences == 7
    assert measured["lru"].rows == rows
    assert relative(measured["lru"].P, P) < 1e-12
    assert relative(measured["lru"].Q, Q) < 1e-12


def test_white_noise_gives_the_data_free_gramian():
    model = Watched()
    lru = LRU(3, 5, r_max=0.95, dtype=torch.float64)
    model = nn.Sequential(lru)
    measured, systems = measure(model, [torch.randn(64, 900, 3, dtype=torch.float64)], rows_per_state=None)
    white_P, white_Q = compressm.control.real_gramians(systems["0"])
    assert relative(measured["0"].P, white_P) < 0.05
    assert relative(measured["0"].Q, white_Q) < 0.05


@pytest.mark.parametrize("size", [1, 7, 500])
def test_subsampling_sees_all_times_whatever_the_batch_size(size):
    """States grow along the sequence, so a sample of early steps only would be far off."""
    model = nn.Sequential(LRU(1, 2, r_min=0.98, r_max=0.99, max_phase=0.01, dtype=torch.float64))
    data = torch.ones(500, 24, 1, dtype=torch.float64)
    batches = data.split(size)
    full, _ = measure(model, [data], sequences=500, rows_per_state=None)
    some, _ = measure(model, batches, sequences=500, rows_per_state=40)
    assert 80 <= some["0"].rows <= 320
    assert some["0"].rows < full["0"].rows / 20
    assert relative(some["0"].P, full["0"].P) < 0.3


def test_initial_states_count():
    model = nn.Sequential(LRU(2, 3, dtype=torch.float64))
    x = torch.randn(2, 4, 2, dtype=torch.float64)
    start = torch.randn(2, 3, dtype=torch.complex128)
    measured, _ = measure(model, [x], forward=lambda m, batch: m[0](batch, initial_state=start), rows_per_state=None)
    states = []
    for t in range(1, 5):
        _, last = model[0](x[:, :t], start, return_last_state=True)
        states.append(torch.cat([last.real, last.imag], 1))
    X = torch.cat(states).detach()
    assert relative(measured["0"].P, X.T @ X / 8) < 1e-12


def test_leaves_no_trace(training, snapshot):
    run = training()
    model = run.model.train()
    model.lrus[0].eval()
    model.register_buffer("tensor", torch.zeros(3))

    class Noisy(nn.Module):
        """Writes buffers even in eval mode, in place and anew, and draws random numbers."""

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))
            self.register_buffer("last", torch.zeros(3))

        def forward(self, x):
            self.calls += 1
            self.last = x.detach().flatten()[:3]
            return x + 0 * torch.rand(1) * random.random() * np.random.rand()  # noqa: NPY002

    model.norms[0] = nn.Sequential(model.norms[0], Noisy())
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    before = snapshot(model, run.optimizer)
    modes = [module.training for module in model.modules()]
    attributes = {key: value for key, value in vars(model.lrus[0]).items() if not isinstance(value, dict)}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    threads = torch.is_grad_enabled()
    with torch.no_grad():
        measured, _ = measure(model, [torch.randn(3, 12, 2, dtype=torch.float64, generator=run.random)])
    assert all(gramians.Q is not None for gramians in measured.values())
    before.check()
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert torch.is_grad_enabled() == threads
    assert {key: value for key, value in vars(model.lrus[0]).items() if not isinstance(value, dict)} == attributes
    assert not model.lrus[0]._forward_hooks


def test_an_error_leaves_no_trace_either(training, snapshot):
    run = training()
    before = snapshot(run.model, run.optimizer)
    with pytest.raises(ZeroDivisionError):
        measure(run.model, [run.batch()[0]], forward=lambda model, batch: model(batch) / (1 // 0))
    before.check()
    assert run.model.training
    assert not run.model.lrus[0]._forward_hooks


Pair = collections.namedtuple("Pair", "x y")


class Keyword(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *, inputs, labels=None):
        return {"loss": labels, "logits": self.inner(inputs)}


def test_kinds_of_batches_agree(training):
    model = training().model
    x, y = torch.randn(6, 9, 2, dtype=torch.float64), torch.arange(6)
    oracle, _ = measure(model, [x], sequences=5)
    for batches in (
        [(x, y)], [[x, y]], [Pair(x, y)], iter([x]), (b for b in [x]), [x[:2], x[2:2], x[2:]],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6),
    ):  # fmt: skip
        measured, _ = measure(model, batches, sequences=5, rows_per_state=None)
        full, _ = measure(model, [x], sequences=5, rows_per_state=None)
        for name in oracle:
            assert measured[name].sequences == 5
            assert relative(measured[name].P, full[name].P) < 1e-12
    keyword, _ = measure(Keyword(model), [{"inputs": x, "labels": y}], sequences=5)
    for name, gramians in oracle.items():
        assert torch.equal(keyword[f"inner.{name}"].P, gramians.P)
        assert torch.equal(keyword[f"inner.{name}"].Q, gramians.Q)


def test_the_last_batch_is_cut_and_keeps_its_type():
    x, y = torch.zeros(4, 3), torch.arange(4)
    taken = take([Pair(x, y), Pair(x, (y, {"z": y}))], 6)
    assert [count for _, count in taken] == [4, 2]
    batch = taken[1][0]
    assert isinstance(batch, Pair)
    assert isinstance(batch.y, tuple)
    assert batch.y[1]["z"].tolist() == [0, 1]


def test_too_little(training):
    model = training().model
    for empty in ([], iter(()), [torch.zeros(0, 9, 2)]):
        with pytest.raises(DataError, match=r"calibration: got no sequences.*Is the iterator already exhausted\?"):
            measure(model, empty)
    with pytest.raises(DataError, match=r"no batch reached layer\(s\) 'lrus\.0', 'lrus\.1'"):
        measure(model, [torch.zeros(2, 9, 2)], forward=lambda m, x: m.head(torch.zeros(1, 4, dtype=torch.float64)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_batches_that_are_not_finite(training, value):
    run = training()
    x = run.batch()[0]
    x[0, 3, 1] = value
    with pytest.raises(NumericalError, match=r"Gramian P of layer 'lrus\.0' is not finite.*Look for NaN"):
        measure(run.model, [x], rows_per_state=None)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (torch.zeros(2, 9, 2), "calibration: expected an iterable of batches.*got Tensor.*single batch into a list"),
        ({"x": torch.zeros(2, 9, 2)}, "calibration.*got dict"),
        (3, "calibration.*got int"),
        (["text"], "calibration batch: expected a tensor"),
        ([torch.zeros(())], "calibration batch"),
    ],
)
def test_wrong_batches(training, batches, match):
    with pytest.raises(ArgumentError, match=match):
        measure(training().model, batches)


def test_outputs_without_tensor_and_wrong_counts(training):
    run = training()
    x = [run.batch()[0]]
    with pytest.raises(ArgumentError, match=r"forward: expected a tensor.*model output of type str"):
        measure(run.model, x, forward=lambda model, batch: [model(batch), "text"][1])
    for sequences in (0, True, 2.0):
        with pytest.raises(ArgumentError, match="sequences: expected a positive integer"):
            measure(run.model, x, sequences=sequences)


def test_without_backward_q_is_data_free(training):
    run = training()

    def forward(model, batch):
        with torch.no_grad():
            return model(batch)

    x = run.batch()[0]
    match = r"calibration: no gradient of the model's output reached layer\(s\) 'lrus\.0', 'lrus\.1'"
    with pytest.warns(CalibrationWarning, match=match):
        measured, _ = measure(run.model, [x], forward=forward)
    assert all(gramians.Q is None for gramians in measured.values())
    with pytest.warns(CalibrationWarning, match=match) as caught:
        report = compressm.compress(
            run.model, compressm.FixedRank(3), optimizer=run.optimizer, calibration=[x], forward=forward
        )
    assert caught[0].filename == __file__
    assert {layer.gramians for layer in report.layers} == {"data P, data-free Q"}
