"""Gramians against 50-digit arithmetic, golden files and each other."""

from __future__ import annotations

import mpmath
import pytest
import torch

from compressm.errors import ArgumentError, BackendError
from compressm.kernels import gramians, gramians_many


def system(n: int, inputs: int, outputs: int, decay: float = 0.1, batch: tuple[int, ...] = ()):
    log_lam = torch.complex(
        -decay * (0.1 + torch.rand(*batch, n, dtype=torch.float64)), 6.28 * torch.rand(*batch, n, dtype=torch.float64)
    )
    B = torch.randn(*batch, n, inputs, dtype=torch.complex128)
    return log_lam, B, torch.randn(*batch, outputs, n, dtype=torch.complex128)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("decay", [1.0, 1e-3, 1e-9, 1e-13])
def test_no_cancellation_near_the_unit_circle(backend, decay):
    log_lam, B, C = system(3, 2, 1, decay)
    log_lam[1] = log_lam[0] + torch.tensor(-decay + 1e-3j * decay)
    result = gramians(log_lam, B, C, backend=backend)
    with mpmath.workdps(50):
        lam = [mpmath.exp(mpmath.mpc(value.real.item(), value.imag.item())) for value in log_lam]
        b = [[mpmath.mpc(x.real.item(), x.imag.item()) for x in row] for row in B]
        c = [mpmath.mpc(x.real.item(), x.imag.item()) for x in C[0]]
        for i in range(3):
            for j in range(3):
                oracle = {
                    "P": sum(x * mpmath.conj(y) for x, y in zip(b[i], b[j], strict=True))
                    / (1 - lam[i] * mpmath.conj(lam[j])),
                    "S": sum(x * y for x, y in zip(b[i], b[j], strict=True)) / (1 - lam[i] * lam[j]),
                    "Q": mpmath.conj(c[i]) * c[j] / (1 - mpmath.conj(lam[i]) * lam[j]),
                    "S_Q": mpmath.conj(c[i] * c[j]) / (1 - mpmath.conj(lam[i] * lam[j])),
                }
                for name, value in oracle.items():
                    actual = complex(getattr(result, name)[i, j])
                    assert abs(actual - complex(value)) <= 1e-12 * abs(complex(value)) + 1e-14, (name, i, j)


@pytest.mark.parametrize("name", ["lti_N16_H4_init", "lti_N64_H8_decay", "lti_N256_H8_init", "lti_N384_H64_decay"])
def test_golden(golden, name):
    z = golden(name)
    log_lam = torch.complex(z["lambdas"].abs().log(), z["lambdas"].angle())
    result = gramians(log_lam, z["B"], z["C"])
    for letter in "PQ":
        actual = getattr(result, letter)
        if letter in z:
            assert (actual - z[letter]).norm() <= 1e-12 * z[letter].norm()
        else:
            rows = z[f"{letter}_rows"]
            assert (actual[z["P_rows_idx"]] - rows).norm() <= 1e-12 * rows.norm()
            assert abs(actual.norm() / z[f"{letter}_fro"] - 1) < 1e-12
            assert abs(actual.trace().real / z[f"{letter}_trace"] - 1) < 1e-12


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (13, 1, 4)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_forms_agree(shape, batch, backend, assert_close):
    parts = system(*shape, batch=batch)
    oracle, actual = gramians(*parts, backend="reference"), gramians(*parts, backend=backend)
    for name in ("P", "S", "Q", "S_Q"):
        assert_close(getattr(actual, name), getattr(oracle, name), name)
    assert (
        torch.equal(actual.P.mH.resolve_conj(), actual.P) or (actual.P.mH - actual.P).norm() < 1e-13 * actual.P.norm()
    )


def test_many_shapes_at_once(assert_close):
    systems = [system(5, 3, 2), system(1, 1, 1), system(100, 4, 7)]
    for parts, result in zip(systems, gramians_many(systems), strict=True):
        assert_close(result.P, gramians(*parts, backend="reference").P)
    assert gramians_many([]) == []


def test_real_systems_need_no_second_pair(assert_close):
    log_lam, B, C = -torch.rand(4, dtype=torch.float64) - 0.01, torch.randn(4, 2).double(), torch.randn(3, 4).double()
    result = gramians(log_lam, B, C)
    assert_close(result.S, result.P)
    assert_close(result.S_Q, result.Q)
    assert float(result.P.imag.abs().max()) == 0


def test_gradients_run_where_there_is_a_backward():
    parts = [tensor.requires_grad_() for tensor in system(4, 2, 3)]
    assert torch.autograd.gradcheck(lambda *t: tuple(gramians(*t)), parts)
    with pytest.raises(BackendError, match="no backward"):
        gramians(*parts, backend="cpp")


def test_wrong_input_is_named():
    log_lam, B, C = system(4, 2, 3)
    with pytest.raises(ArgumentError, match="C: expected"):
        gramians(log_lam, B, C.T)
    with pytest.raises(BackendError, match="expected one of cpp, torch, reference, triton, got 'cuda'"):
        gramians(log_lam, B, C, backend="cuda")
