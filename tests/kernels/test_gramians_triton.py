"""The Triton Gramians, on a GPU or in the interpreter, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import gramians, gramians_many
from compressm.kernels.gramians import triton_gramians as triton_gramians

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def system(n, inputs, outputs, decay=0.1, batch=()):
    """complex128 (log_lam, B, C) with moduli within ``decay`` of one."""
    log_lam = torch.complex(
        -decay * (0.1 + torch.rand(*batch, n, dtype=torch.float64)), 6.28 * torch.rand(*batch, n, dtype=torch.float64)
    )
    B = torch.randn(*batch, n, inputs, dtype=torch.complex128)
    return log_lam, B, torch.randn(*batch, outputs, n, dtype=torch.complex128)


@pytest.fixture
def launches(monkeypatch):
    """Grids of the kernel's launches."""
    grids = []
    kernel = triton_gramians._gramians_kernel

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_gramians, "_gramians_kernel", Recorder())
    monkeypatch.setattr(triton_gramians, "why_not", lambda device: None)
    return grids


@pytest.fixture
def check(device, assert_close):
    """check(systems): every matrix of every system, and the symmetries that hold exactly."""

    def run(systems):
        results = gramians_many([tuple(t.to(device) for t in parts) for parts in systems], backend="triton")
        for parts, result in zip(systems, results, strict=True):
            oracle = gramians(*parts, backend="reference")
            for name in ("P", "S", "Q", "S_Q"):
                assert_close(getattr(result, name).cpu(), getattr(oracle, name), f"{name} of {tuple(parts[1].shape)}")
            assert torch.equal(result.P, result.P.mH)
            assert torch.equal(result.Q, result.Q.mH)
            assert torch.equal(result.S, result.S.mT)
            assert torch.equal(result.S_Q, result.S_Q.mT)

    return run


def test_systems_of_every_shape_in_one_launch(check, launches):
    check([system(5, 3, 2), system(1, 1, 1), system(100, 2, 3), system(12, 1, 40), system(13, 5, 1), system(16, 0, 1)])
    assert launches == [(1 + 1 + 28 + 1 + 1 + 1,)]


@pytest.mark.parametrize("n", [128, 300])
def test_large_systems(check, n):
    check([system(n, 1, 2)])


def test_batches(check, launches, device, assert_close):
    check([system(5, 2, 1, batch=(2, 3)), system(17, 1, 1, batch=(2,)), system(3, 1, 1, batch=(0,))])
    assert launches == [(6 + 2 * 3,)]
    shared, varied = system(5, 3, 2), system(5, 3, 2, batch=(2, 1))
    mixed = shared[0], varied[1], shared[2].expand(3, 2, 5)
    result, oracle = gramians(*(t.to(device) for t in mixed), backend="triton"), gramians(*mixed, backend="reference")
    for name in ("P", "S", "Q", "S_Q"):
        assert getattr(result, name).shape == (2, 3, 5, 5)
        assert_close(getattr(result, name).cpu(), getattr(oracle, name), name)


def test_no_states(device):
    empty = [t.to(device) for t in system(0, 2, 3)]
    assert gramians(*empty, backend="triton").P.shape == (0, 0)


@pytest.mark.parametrize("decay", [1.0, 1e-3, 1e-9, 1e-13])
def test_no_cancellation_near_the_unit_circle(device, decay):
    log_lam, B, C = system(5, 2, 1, decay)
    log_lam[1] = log_lam[0] + torch.tensor(-decay + 1e-3j * decay)
    log_lam[2] = log_lam[0].conj() - decay
    oracle = gramians(log_lam, B, C, backend="reference")
    result = gramians(log_lam.to(device), B.to(device), C.to(device), backend="triton")
    for actual, expected in zip(result, oracle, strict=True):
        assert ((actual.cpu() - expected).abs() <= 1e-12 * expected.abs() + 1e-14).all()


def test_golden(golden, device):
    z = golden("lti_N64_H8_decay")
    parts = torch.complex(z["lambdas"].abs().log(), z["lambdas"].angle()), z["B"], z["C"]
    result = gramians(*(t.to(device) for t in parts), backend="triton")
    for letter in "PQ":
        assert (getattr(result, letter).cpu() - z[letter]).norm() <= 1e-12 * z[letter].norm()


def test_real_systems_need_no_second_pair(device, assert_close):
    log_lam, B, C = -torch.rand(4).double() - 0.01, torch.randn(4, 2).double(), torch.randn(3, 4).double()
    result = gramians(log_lam.to(device), B.to(device), C.to(device), backend="triton")
    assert_close(result.S, result.P)
    assert_close(result.S_Q, result.Q)
    assert float(result.P.imag.abs().max()) == 0


def test_automatic_choice(device, launches):
    parts = [t.to(device) for t in system(3, 1, 1)]
    gramians(*parts)
    assert len(launches) == (device == "cuda")
    parts[1].requires_grad_()
    assert gramians(*parts).P.requires_grad
    assert len(launches) == (device == "cuda")


def test_calls_that_triton_cannot_run_say_why(device):
    parts = [t.to(device) for t in system(3, 1, 1)]
    with pytest.raises(BackendError, match="not on meta"):
        gramians(*(t.to("meta") for t in parts), backend="triton")
    with pytest.raises(ArgumentError, match="one device"):
        gramians_many([tuple(parts), tuple(t.to("meta") for t in parts)])
    parts[0].requires_grad_()
    with pytest.raises(BackendError, match="no backward"):
        gramians(*parts, backend="triton")
