"""Where Triton kernels run in tests: on the GPU if there is one, else in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Device type of the tensors that Triton kernels get."""
    return "cuda" if torch.cuda.is_available() else "cpu"
