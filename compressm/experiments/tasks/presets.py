"""The presets: what ``compressm train`` is asked for by name.  Each names a dataset and its runs, and any other settings."""

from __future__ import annotations

from typing import Any

from compressm.experiments.registry import Registry

_FOUR = {"runs": ("compressed", "full", "small", "small_narrow")}
_THREE = {"runs": ("compressed", "full", "small")}
_PAPER = {"recipe": "paper", "attempts": 4, "reduce_until": 0.1, "runs": ("compressed",)}
_SMNIST = {"dataset": "smnist", "steps": 200_000, "lr": 4e-4, "eval_every": 5000, "log_every": 500}
_SCIFAR = {
    "dataset": "scifar", "blocks": 6, "d_model": 512, "d_state": 384, "steps": 180_000, "lr": 1e-3, "ssm_lr_factor": 0.25,
    "weight_decay": 0.05, "warmup": 0.1, "cosine": True, "eval_every": 4500, "log_every": 100,
}  # fmt: skip
_LM = {
    **_THREE, "blocks": 2, "length": 256, "steps": 3000, "batch_size": 8, "lr": 6e-3, "weight_decay": 0.1,
    "max_grad_norm": 1.0, "warmup": 0.05, "cosine": True, "reduce_until": 0.1, "log_every": 20, "eval_every": 300,
}  # fmt: skip
_PLANT = {
    "dataset": "plant", "runs": ("compressed", "full", "small", "random_subset", "subspace"), "feedthrough": False,
    "d_state": 64, "error_bound": 0.12, "spectrum_weight": 5e-3, "reduce_until": 0.6, "steps": 1000, "batch_size": 8,
    "lr": 1e-2, "warmup": 0.05, "cosine": True, "log_every": 20, "eval_every": 100,
}  # fmt: skip
_TOKENS = {
    "blocks": 2, "d_model": 32, "tied": False, "batch_size": 32, "lr": 6e-3, "weight_decay": 0.05, "max_grad_norm": 1.0,
    "warmup": 0.05, "cosine": True, "min_lr_ratio": 0.1, "reduce_until": 0.3, "log_every": 20, "eval_every": 100,
}  # fmt: skip

PRESETS: Registry[dict[str, Any]] = Registry("preset")
PRESETS |= {
    "digits": {
        "title": "Handwritten digits, 64 pixels in a row", "dataset": "digits", **_FOUR,
        "blocks": 2, "d_model": 16, "d_state": 64, "steps": 2400, "lr": 4e-3,
        "warmup": 0.05, "cosine": True, "tau": 0.2, "log_every": 20, "eval_every": 200,
    },
    "smnist": {
        "title": "Sequential MNIST, 784 pixels in a row", "dataset": "smnist", **_FOUR, "steps": 20_000, "lr": 4e-3,
        "warmup": 0.05, "cosine": True, "tau": 0.04, "log_every": 100, "eval_every": 2000,
    },
    "smnist-baseline": {"title": "Sequential MNIST, the paper's full-size run", **_SMNIST, "runs": ("full",)},
    **{
        f"smnist-tau{tau}": {"title": f"Sequential MNIST, the paper's tau {tau}", **_SMNIST, **_PAPER, "tau": float(tau)}
        for tau in ("0.01", "0.02", "0.04")
    },
    "scifar": {"title": "Sequential CIFAR-10, 1024 pixels in a row", **_SCIFAR, **_FOUR, "tau": 0.05},
    "scifar-baseline": {"title": "Sequential CIFAR-10, the paper's full-size run", **_SCIFAR, "runs": ("full",)},
    **{
        f"scifar-tau{tau}": {"title": f"Sequential CIFAR-10, the paper's tau {tau}", **_SCIFAR, **_PAPER, "tau": float(tau)}
        for tau in ("0.05", "0.10", "0.15")
    },
    "stdlib-lm": {
        "title": "Next byte of Python's standard library, Mamba", "dataset": "stdlib", **_LM,
        "d_model": 128, "d_state": 128, "rank": 12,
    },
    "stdlib-lm-mamba2": {
        "title": "Next byte of Python's standard library, Mamba-2", "dataset": "stdlib", "model": "mamba2", **_LM,
        "d_model": 64, "d_state": 128, "rank": 16,
    },
    "recall": {
        "title": "Associative recall", "dataset": "recall", **_THREE, "blocks": 2, "d_model": 64,
        "expand": 1, "tied": False, "d_state": 64, "rank": 8, "steps": 800, "batch_size": 32, "lr": 1e-2,
        "weight_decay": 0.05, "max_grad_norm": 1.0, "warmup": 0.05, "cosine": True, "min_lr_ratio": 0.1,
        "reduce_until": 0.4375, "log_every": 10, "eval_every": 50,
    },
    "selective-copy": {
        "title": "Selective copying", "dataset": "selective_copy", **_THREE, **_TOKENS, "length": 48,
        "d_model": 64, "d_state": 32, "rank": 4, "steps": 1500, "lr": 1e-2,
    },
    "listops": {
        "title": "Value of nested lists", "dataset": "listops", **_THREE, **_TOKENS, "d_state": 32, "rank": 4, "steps": 2000,
    },
    "mnist14": {
        "title": "MNIST, 14 x 14 pixels in a row", "dataset": "mnist14", **_FOUR, "d_state": 128, "rank": 8, "steps": 1500,
        "batch_size": 50, "lr": 1e-2, "warmup": 0.05, "cosine": True, "reduce_until": 0.1, "log_every": 20, "eval_every": 300,
    },
    "tones": {
        "title": "Chords of two tones in noise", "dataset": "tones", **_FOUR, "d_state": 128, "rank": 8, "steps": 1000,
        "batch_size": 32, "lr": 3e-2, "dropout": 0.0, "warmup": 0.05, "cosine": True, "log_every": 20, "eval_every": 100,
    },
    "sysid": {
        "title": "Identification of a linear system of order 8", "dataset": "sysid", **_FOUR,
        "d_state": 64, "rank": 12, "steps": 1000, "batch_size": 8, "lr": 1e-2, "warmup": 0.05, "cosine": True, "log_every": 20,
        "eval_every": 100,
    },
    "words": {
        "title": "Synthesised words, 8000 samples of raw audio", "dataset": "words", **_FOUR, "blocks": 2, "d_model": 16,
        "d_state": 64, "steps": 600, "batch_size": 16, "lr": 4e-3, "dropout": 0.0, "warmup": 0.05, "cosine": True, "tau": 0.1,
        "log_every": 20, "eval_every": 100,
    },
    "plant": {"title": "Identification of a row of masses between springs", **_PLANT},
    "plant-arm": {"title": "Identification of an arm of two links", **_PLANT, "plant": "arm", "channels": 2, "sampling": 0.1},
}  # fmt: skip
