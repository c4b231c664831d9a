"""Where Triton kernels run in tests: on the GPU if there is one, else in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Device type of the tensors that Triton kernels get."""
    return "cuda" if torch.cuda.is_available() else "cpu"

@pytest.fixture
def record_calls(monkeypatch):
    """Records the calls of some functions of a module: ``record_calls(module, *names)`` is the list of names, as they run."""

    def start(module, *names):
        seen = []

        def recorded(function):
            def record(*args):
                seen.append(function.__name__)
                return function(*args)

            return record

        for name in names:
            monkeypatch.setattr(module, name, recorded(getattr(module, name)))
        return seen

    return start
