"""Balanced truncation: golden systems, and properties over systems that are hard on it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, optimize

from compressm.control import Balanced, DiagonalSystem, Reduction, balance, blend, real_gramians, slots
from compressm.control.coordinates import Coordinates
from compressm.control.obs import obs_subset
from compressm.errors import ArgumentError, NumericalError

GOLDEN = [f"lti_{size}_{kind}" for size in ("N16_H4", "N64_H8", "N256_H8", "N384_H64") for kind in ("init", "decay")]
KINDS = ("random", "clustered", "near_circle", "rank_deficient", "zero", "duplicate", "real", "tiny", "huge")


def relative(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((actual - oracle).norm() / oracle.norm())


def draw(kind: str, n: int, inputs: int, outputs: int, seed: int) -> DiagonalSystem:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def normal(*shape):
        return torch.complex(*(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)))

    decay, theta = -uniform(n).clamp(min=1e-3), 2 * math.pi * uniform(n)
    B, C = normal(n, inputs), normal(outputs, n)
    if kind == "clustered":
        decay, theta = -0.01 - 1e-7 * uniform(n), 1 + 1e-7 * uniform(n)
    elif kind == "near_circle":
        decay = -(10.0 ** (-12 + 10 * uniform(n)))
    elif kind == "rank_deficient":
        B = normal(n, 1) @ normal(1, inputs)
        C = normal(outputs, 1) @ normal(1, n)
    elif kind == "zero":
        B, C = (B, 0 * C) if seed % 2 else (0 * B, C)
    elif kind == "duplicate":
        decay, theta = decay[:1].expand(n), theta[:1].expand(n)
    elif kind == "real":
        theta = torch.zeros(n, dtype=torch.float64)
    elif kind == "tiny":
        B, C = B * 1e-140, C * 1e-140
    elif kind == "huge":
        B, C = B * 1e70, C * 1e70
    return DiagonalSystem(torch.complex(decay, theta), B, C)


@pytest.fixture(params=GOLDEN)
def case(request, golden):
    z = golden(request.param)
    return z, DiagonalSystem.from_lam(z["lambdas"], z["B"], z["C"])


def test_spectrum_of_the_paper_s_convention(case):
    z, system = case
    hsv = system.hankel_singular_values(convention="complex")
    assert float((hsv - z["hsv_ref"]).abs().max()) <= 1e-12 * float(z["hsv_ref"][0])
    assert relative(hsv.sum(), z["total_energy"]) < 1e-9


def test_truncation_meets_textbook_balanced_truncation(case):
    z, system = case
    balanced = balance(system, "complex")
    index = z["io_idx"]
    for rank in z["ranks"].tolist():
        reduced = balanced.reduce(rank)
        assert reduced.method == "balanced"
        impulse = reduced.system.impulse_response(64)
        assert relative(impulse[:, index][:, :, index], z[f"ref_r{rank}_imp"]) < 1e-9
        assert relative(impulse.flatten(1).norm(dim=1), z[f"ref_r{rank}_imp_fro"]) < 1e-9
        distance = (reduced.system.log_lam.exp()[:, None] - z[f"ref_r{rank}_eigs"][None, :]).abs().numpy()
        assert distance[optimize.linear_sum_assignment(distance)].max() < 1e-8


def test_impulse_response(case):
    z, system = case
    index = z["io_idx"]
    impulse = system.impulse_response(64)
    assert relative(impulse[:, index][:, :, index], z["full_imp"]) < 1e-12
    assert relative(impulse.flatten(1).norm(dim=1), z["full_imp_fro"]) < 1e-12


def test_frequency_response_is_the_transform_of_the_impulse_response():
    system = draw("random", 5, 2, 3, seed=1)
    system = DiagonalSystem(torch.complex(system.log_lam.real - 0.1, system.log_lam.imag), system.B, system.C)
    omega = torch.tensor([0.0, 0.3, 2.0, -1.0])
    impulse = system.impulse_response(600)
    t = torch.arange(600, dtype=torch.float64)
    oracle = torch.einsum("kt,toi->koi", torch.exp(-1j * omega.double()[:, None] * t), impulse)
    assert relative(system.frequency_response(omega), oracle) < 1e-12


def test_real_gramians_solve_the_lyapunov_equations():
    system = draw("random", 7, 2, 3, seed=2)
    A, B, C = (getattr(Coordinates.of(system, "real"), name).numpy() for name in "ABC")
    P, Q = real_gramians(system)
    assert np.allclose(P, linalg.solve_discrete_lyapunov(A, B @ B.T), rtol=1e-10, atol=1e-12)
    assert np.allclose(Q, linalg.solve_discrete_lyapunov(A.T, C.T @ C), rtol=1e-10, atol=1e-12)


def test_real_spectrum_does_not_see_which_mode_of_a_pair_is_kept():
    system = draw("random", 8, 2, 2, seed=3)
    flip = torch.arange(8) % 3 == 0
    flipped = DiagonalSystem(
        *(
            torch.where(mask, getattr(system, name).conj(), getattr(system, name))
            for name, mask in (("log_lam", flip), ("B", flip[:, None]), ("C", flip[None, :]))
        )
    )
    assert relative(flipped.hankel_singular_values(), system.hankel_singular_values()) < 1e-12
    assert relative(*(s.hankel_singular_values("complex") for s in (flipped, system))) > 1e-3


def test_cancelling_pair_has_no_real_states():
    log_lam = torch.tensor([-0.1 + 0.5j, -0.1 - 0.5j], dtype=torch.complex128)
    one = torch.tensor([[1.0 + 0.5j]], dtype=torch.complex128)
    system = DiagonalSystem(log_lam, torch.cat([one, one.conj()]), torch.cat([one, -one.conj()], 1))
    assert float(system.hankel_singular_values().max()) < 1e-7
    assert float(system.hankel_singular_values("complex").max()) > 1


def check_reduction(balanced: Balanced, reduction: Reduction, rank: int) -> None:
    """What must hold of every reduction of every system."""
    system = reduction.system
    assert system.order == rank
    for tensor in (system.log_lam, system.B, system.C, reduction.right, reduction.left):
        assert torch.isfinite(tensor).all()
    assert float(system.log_lam.real.max()) < 0
    n = balanced.hsv.shape[0]
    assert reduction.right.shape == (n, rank)
    assert reduction.left.shape == (rank, n)
    coordinates = Coordinates.of(balanced.system, balanced.convention)
    scale = float(balanced.system.B.norm()) * float(reduction.left.norm()) + 1e-300
    assert float((reduction.left @ coordinates.B.to(torch.complex128) - system.B).norm()) <= 1e-9 * scale
    scale = float(balanced.system.C.norm()) * float(reduction.right.norm()) + 1e-300
    C = reduction.multiplicity * (coordinates.C.to(torch.complex128) @ reduction.right)
    assert float((C - system.C).norm()) <= 1e-9 * scale


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 14),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    convention=st.sampled_from(["real", "complex"]),
    data=st.data(),
)
def test_never_unstable_never_nan_and_within_the_bound(kind, n, inputs, outputs, seed, convention, data):
    system = draw(kind, n, inputs, outputs, seed)
    rank = data.draw(st.integers(1, n), label="rank")
    balanced = balance(system, convention)
    hsv = balanced.hsv
    assert torch.isfinite(hsv).all()
    assert (hsv[:-1] >= hsv[1:]).all()
    assert (hsv >= 0).all()
    reduction = balanced.reduce(rank)
    check_reduction(balanced, reduction, rank)
    if reduction.method == "balanced" and kind not in ("near_circle", "clustered"):
        omega = torch.linspace(-math.pi, math.pi, 201, dtype=torch.float64)
        error = system.frequency_response(omega) - reduction.system.frequency_response(omega)
        if convention == "real":
            error = 0.5 * (error + error.flip(0).conj())
        bound = 2 * float(hsv[reduction.real_order :].sum())
        assert float(torch.linalg.matrix_norm(error, 2).max()) <= bound * (1 + 1e-6) + 1e-6 * float(hsv[0])


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), n=st.integers(2, 10), seed=st.integers(0, 10_000), data=st.data())
def test_measured_gramians_never_break_it(kind, n, seed, data):
    """Any positive semi-definite P and Q, also far from the system's own, give a stable system."""
    system = draw(kind, n, 2, 2, seed)
    generator = torch.Generator().manual_seed(seed)
    columns = data.draw(st.integers(1, 2 * n), label="columns")
    P, Q = (X @ X.T for X in torch.randn(2, 2 * n, columns, generator=generator, dtype=torch.float64))
    white_P, white_Q = real_gramians(system)
    balanced = balance(system, P=blend(P, white_P), Q=blend(Q, white_Q), fallback_Q=white_Q)
    rank = data.draw(st.integers(1, n), label="rank")
    check_reduction(balanced, balanced.reduce(rank), rank)


def test_full_rank_is_the_identity():
    system = draw("random", 6, 2, 2, seed=4)
    reduction = balance(system).reduce(6)
    assert reduction.method == "identity"
    assert reduction.system is system
    assert relative(reduction.left @ reduction.right, torch.eye(6, dtype=torch.complex128)) < 1e-15


@pytest.mark.parametrize("convention", ["real", "complex"])
def test_bases_are_biorthogonal_and_project_the_dynamics(convention):
    system = draw("random", 12, 2, 3, seed=5)
    reduction = balance(system, convention).reduce(4)
    A = Coordinates.of(system, convention).A.to(torch.complex128)
    projected = reduction.left @ A @ reduction.right
    assert relative(reduction.left @ reduction.right, torch.eye(4, dtype=torch.complex128)) < 1e-9
    assert relative(projected, torch.diag(reduction.system.log_lam.exp())) < 1e-9


def test_real_reduction_beats_complex_on_the_real_system():
    worse = 0
    for seed in range(10):
        system = draw("random", 24, 2, 2, seed)
        full = system.impulse_response(300).real
        errors = [
            float((system.truncate(6, convention).impulse_response(300).real - full).norm())
            for convention in ("real", "complex")
        ]
        worse += errors[0] > errors[1]
    assert worse <= 2


def test_obs_keeps_what_cannot_be_predicted():
    """Modes that duplicate another one cost nothing, and the refit leaves the response unchanged."""
    system = draw("random", 3, 2, 2, seed=6)
    double = DiagonalSystem(*(torch.cat([getattr(system, k)] * 2, axis) for k, axis in (("log_lam", 0), ("B", 0), ("C", 1))))
    P, _ = real_gramians(double)
    modes, embedding = obs_subset(Coordinates.of(double, "real"), P, 3)
    assert sorted(m % 3 for m in modes.tolist()) == [0, 1, 2]
    reduction = balance(double)._subset(3)
    assert relative(reduction.system.impulse_response(50).real, double.impulse_response(50).real) < 1e-4
    assert embedding.shape == (12, 6)


def test_obs_takes_over_where_balancing_cannot(monkeypatch):
    system = draw("random", 8, 2, 2, seed=7)
    monkeypatch.setattr("compressm.control.balancing.MAX_CONDITION", 0.5)
    balanced = balance(system)
    reduction = balanced.reduce(3)
    assert reduction.method == "obs"
    check_reduction(balanced, reduction, 3)
    poles = system.log_lam[None, :] - reduction.system.log_lam[:, None]
    assert float(poles.abs().min(1).values.max()) == 0


def test_data_free_q_takes_over_where_measured_gramians_are_unstable():
    """States only ever seen along x but felt along y, nearly orthogonal to it: the projected eigenvalue leaves the circle."""
    system = DiagonalSystem(*(torch.tensor(v, dtype=torch.complex128) for v in ([-0.1 + 1j, -0.2], [[1], [1]], [[1, 1]])))
    x, y = torch.tensor([[1.0, 0, 0, 0], [0.1, 0, 1.0, 0]], dtype=torch.float64)
    P, Q = torch.outer(x, x), torch.outer(y, y)
    assert balance(system, P=P, Q=Q).reduce(1).method == "obs"
    balanced = balance(system, P=P, Q=Q, fallback_Q=real_gramians(system)[1])
    reduction = balanced.reduce(1)
    assert reduction.method == "balanced, data-free Q"
    check_reduction(balanced, reduction, 1)


def test_batched_systems_agree_with_single_ones():
    systems = [draw("random", 5, 2, 3, seed) for seed in range(4)]
    batch = DiagonalSystem(*(torch.stack([getattr(s, k) for s in systems]).unflatten(0, (2, 2)) for k in ("log_lam", "B", "C")))
    assert batch.batch_shape == (2, 2)
    assert batch.hankel_singular_values().shape == (2, 2, 10)
    assert relative(batch.hankel_singular_values()[1, 0], systems[2].hankel_singular_values()) < 1e-13
    assert batch.truncate(2).order == 2
    assert relative(batch.truncate(2).impulse_response(5)[0, 1], systems[1].truncate(2).impulse_response(5)) < 1e-10
    assert batch.error_bound(2).shape == (2, 2)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 12), seed=st.integers(0, 10_000), data=st.data())
def test_modes_say_what_an_order_takes(kind, n, seed, data):
    """A cut to the states that an order takes keeps at least that order, unless the guards object."""
    system = draw(kind, n, 2, 2, seed)
    convention = data.draw(st.sampled_from(["real", "complex"]))
    balanced = balance(system, convention)
    order = data.draw(st.integers(1, len(balanced.hsv)), label="order")
    modes = balanced.modes(order)
    assert slots(order, convention) <= modes <= n
    fresh = balance(system, convention)
    reduction = fresh.reduce(modes)
    check_reduction(fresh, reduction, modes)
    order = min(order, balanced._bases.rank)
    if order and modes < n:
        eigen = balanced._eigen(balanced._bases, order)
        sound = float(eigen.values.abs().max()) < 1 and float(torch.linalg.cond(eigen.vectors)) < 1e4
        assert reduction.method == "balanced" or not sound
        assert reduction.real_order >= order or not sound


def test_large_systems_are_searched_in_proportion():
    """Most eigenvalues real: far fewer states than 2 rank fit, and few decompositions must find how many."""
    generator = torch.Generator().manual_seed(0)
    n = 140
    theta = torch.where(torch.arange(n) % 5 == 0, torch.rand(n, generator=generator), torch.zeros(())).double()
    decay = -0.01 - torch.rand(n, generator=generator).double()
    B, C = torch.randn(2, n, n, generator=generator).double()
    system = DiagonalSystem(torch.complex(decay, theta), B, C)
    balanced = balance(system)
    reduction = balanced.reduce(100)
    assert reduction.method == "balanced"
    assert len(balanced._known) <= 8
    assert 97 <= int((reduction.right.abs().sum(0) > 0).sum()) <= 100
    order = balanced.modes(150)
    again = balanced.reduce(order)
    assert again.real_order >= 150


def test_slots():
    assert [slots(m, "real") for m in (1, 2, 3, 8)] == [1, 1, 2, 4]
    assert slots(3, "complex") == 3


def test_wrong_input_is_named():
    system = draw("random", 4, 2, 2, seed=8)
    with pytest.raises(ArgumentError, match="rank: expected an integer from 1 to 4, got 5"):
        system.truncate(5)
    with pytest.raises(ArgumentError, match="convention"):
        system.hankel_singular_values("imaginary")
    with pytest.raises(ArgumentError, match="B: expected"):
        DiagonalSystem(system.log_lam, system.B.T, system.C)
    with pytest.raises(NumericalError, match="unit circle"):
        DiagonalSystem(-system.log_lam, system.B, system.C)
    with pytest.raises(NumericalError, match="C: 1 of 8 entries are NaN"):
        DiagonalSystem(system.log_lam, system.B, torch.where(torch.arange(8).view(2, 4) == 3, torch.nan, system.C))
    with pytest.raises(ArgumentError, match="P: expected"):
        balance(system, P=torch.eye(4))
