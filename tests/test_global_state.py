"""The guard sees every change of the process's state, names it and takes it back."""

from __future__ import annotations

import os

import global_state
import pytest
import torch

CHANGES = {
    "environment": lambda: os.environ.update(OMP_NUM_THREADS="7"),
    "number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradients enabled": lambda: torch.set_grad_enabled(False),
    "anomaly detection": lambda: torch.set_anomaly_enabled(True),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "fill uninitialized memory": lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
    "float32 matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "flush denormal": lambda: torch.set_flush_denormal(True),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "autocast dtype": lambda: torch.set_autocast_dtype("cpu", torch.float16),
    "cudnn benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "cudnn deterministic": lambda: setattr(torch.backends.cudnn, "deterministic", True),
    "opt_einsum": lambda: setattr(torch.backends.opt_einsum, "enabled", False),
}


@pytest.mark.parametrize("name", global_state.ACCESS)
def test_a_change_is_named_and_taken_back(name):
    before = global_state.read()
    CHANGES[name]()
    (sentence,) = global_state.restore(before)
    assert sentence.startswith(f"{name}: was ")
    assert global_state.restore(before) == []
