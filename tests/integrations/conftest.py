"""One thread, as the models are tiny and threads that wait for each other would be most of the time; and accelerate anew."""

from __future__ import annotations

import sys

import pytest
from global_state import threads


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture(autouse=True)
def another_accelerator():
    """What accelerate keeps for a whole process, such as a precision, is this test's own."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
