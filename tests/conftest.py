"""Shared by all tests: tolerances by dtype, golden files, poisoned memory, Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import global_state
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, whose own functions are decorated then
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, which poisoned_memory asks for

AT_START = global_state.read()
DATA = Path(__file__).parent / "data"

# Largest relative error (2-norm of the difference over 2-norm of the oracle) by dtype; nothing loosens it.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope="session")
def golden():
    """Load a golden archive by name as a dict of float64 / complex128 / int64 tensors."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(DATA / f"{name}.npz") as archive:
            return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive.files}

    return load


@pytest.fixture
def assert_close():
    """assert_close(actual, oracle, name, scale=1): relative 2-norm error within the table for actual's dtype."""

    def check(actual: torch.Tensor, oracle: torch.Tensor, name: str = "", dtype: torch.dtype | None = None) -> None:
        assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
        assert torch.isfinite(actual).all(), f"{name}: not finite"
        bound = TOLERANCES[(dtype or actual.dtype).to_real()]
        wide = torch.complex128 if actual.is_complex() else torch.float64
        error = (actual.to(wide) - oracle.to(wide)).norm().item()
        assert error <= bound * oracle.to(wide).norm().item() + 1e-30, f"{name}: relative error {error / oracle.norm():.2e}"

    return check


@pytest.fixture
def poisoned_memory():
    """Memory that a kernel allocates and does not write holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def as_found():
    """A test leaves the process as the first one found it, so that no result depends on which tests ran before."""
    yield
    changed = global_state.restore(AT_START)
    assert not changed, "the test leaves state behind: " + "; ".join(changed)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws its own, reproducible random numbers."""
    torch.manual_seed(0)
