"""scipy: balanced truncation of a dense system, as control textbooks have it (Laub et al. 1987).

Two Lyapunov equations, two factors by eigenvalues (Cholesky fails on Gramians that are singular to rounding), one singular
value decomposition, and eigenvalues of the reduced matrix, which make it diagonal again.
"""

from __future__ import annotations

import numpy as np
import torch

from compressm.benchmarking.problems import Answers, Contender, Problem
from compressm.benchmarking.reduction_problems import response
from compressm.benchmarking.timing import Timed
from peers.base import Peer


def dense_gramians(lam: np.ndarray, B: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P and Q by scipy's solver for any A."""
    from scipy.linalg import solve_discrete_lyapunov

    A = np.diag(lam)
    return solve_discrete_lyapunov(A, B @ B.conj().T), solve_discrete_lyapunov(A.conj().T, C.conj().T @ C)


def diagonal_gramians(lam: np.ndarray, B: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P and Q entry by entry, as A is diagonal."""
    denominator = 1 - lam[:, None] * lam.conj()
    return B @ B.conj().T / denominator, C.conj().T @ C / denominator.conj()


def truncation(gramians):
    """A contender with one of the two ways to the Gramians."""

    def make(problem: Problem) -> Contender:
        import scipy.linalg as linalg

        log_lam, B, C = (problem.inputs[name].cpu().numpy() for name in ("log_lam", "B", "C"))
        lam, rank = np.exp(log_lam), problem.sizes["rank"]

        def factor(P: np.ndarray) -> np.ndarray:
            values, vectors = linalg.eigh((P + P.conj().T) / 2)
            return vectors * np.sqrt(np.maximum(values, 0))

        def run():
            P, Q = gramians(lam, B, C)
            F, G = factor(P), factor(Q)
            left, hsv, right = linalg.svd(G.conj().T @ F)
            root = 1 / np.sqrt(hsv[:rank])
            into, back = (G @ left[:, :rank] * root).conj().T, F @ right[:rank].conj().T * root
            values, vectors = linalg.eig(into @ (lam[:, None] * back))
            return hsv, values, np.linalg.solve(vectors, into @ B), (C @ back) @ vectors

        def answers() -> Answers:
            hsv, values, b, c = (torch.from_numpy(part) for part in run())
            return {"hsv": hsv, "response": torch.view_as_real(response(torch.diag(values), b, c))}

        return Contender(Timed(run), answers)

    return make


PEERS = [
    Peer("scipy, Lyapunov equations", "scipy", "scipy", {"balanced_truncation": truncation(dense_gramians)}),
    Peer("numpy, diagonal Gramians", "scipy", "scipy", {"balanced_truncation": truncation(diagonal_gramians)}),
]
