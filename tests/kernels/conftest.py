"""Where kernels run in tests: Triton on a GPU or in its interpreter (tests/conftest.py), C++ on every instruction set."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from compressm.kernels.core import cpp


@pytest.fixture
def device() -> str:
    """Device type of the tensors that Triton kernels get."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    """Name of the instruction set that the C++ kernels use in the test, each in turn; skips what the processor lacks."""
    library = cpp.library()
    if not library.select_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.select_isa("auto")


@pytest.fixture
def cpp_calls():
    """``with cpp_calls() as seen:`` counts the calls of the C++ library's ops by name, once the block has ended."""

    @contextmanager
    def record():
        seen = Counter()
        with torch.profiler.profile() as recorded:
            yield seen
        for event in recorded.events():
            namespace, _, name = event.name.partition("::")
            if namespace == "compressm_cpp":
                seen[name] += 1

    return record


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
