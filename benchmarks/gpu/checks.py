"""Is every Triton kernel right on this device: outputs and gradients against float64, same bits twice, all memory written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from gpu import problems
from gpu.problems import Problem, evaluate
from gpu.session import brief

# Largest relative error (2-norm of the difference over the 2-norm of the oracle), the table of the project's tests.  A sum that
# cancels may exceed it as far as the definition itself does in the same precision, see ROOM.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROOM = 4.0  # times the error of the reference in the inputs' precision
STATES = (12, 13, 100, 128, 300)
LENGTHS = (1, 33, 257, 2000, 2048)
BOUNDS = [0, 7, 7, 300, 1024, 1999, 2000]
Case = tuple[str, tuple[Any, ...], dict[str, Any]]


def cases(op: str, dtype: str, smoke: bool) -> list[Case]:
    """(maker in gpu.problems, sizes, options) of every case of an op; gramians have one dtype, float64."""
    return list((SMOKE if smoke else FULL)[op](dtype))


def _selective(dtype: str) -> Iterator[Case]:
    for at, states in enumerate(STATES):
        for length in LENGTHS:
            if dtype != "float32" and (at + length) % 3:
                continue
            options = {"groups": 3 if length % 2 else 1, "channels_last": bool((at + length // 2) % 2)}
            yield "selective_scan", (2, 48, length, states), options
    yield "selective_scan", (1, 48, BOUNDS[-1], 13), {"bounds": BOUNDS}
    yield "selective_scan", (2, 40, 264, 16), {"bare": True}
    for states in (16, 128):
        yield "selective_scan", (8, 1536, 2048, states), {"seen": "channels"}
    yield "selective_scan", (8, 1536, 2000, 12), {"seen": "channels", "channels_last": True}


def _diagonal(dtype: str) -> Iterator[Case]:
    for at, states in enumerate(STATES):
        for length in LENGTHS:
            if dtype == "float32" or (at + length) % 3 == 0:
                yield "diagonal_scan", (3, length, states), {"reverse": bool(at % 2), "bare": length % 2 == 0}
    yield "diagonal_scan", (1, 20_000, 5), {"fastest": 0.5}  # in stretches
    yield "diagonal_scan", (50, 1024, 384), {}
    if dtype == "float32":
        for channels, states in ((8, 256), (8, 28), (64, 256), (512, 93)):
            yield "lti_scan", (4, 784, channels, states), {}


def _convolution(dtype: str) -> Iterator[Case]:
    for width in (1, 3, 4, 8):
        for length in LENGTHS:
            options = {"channels_last": length % 2 == 1, "silu": width != 3}
            yield "causal_conv1d", (2, 48, length, width), options
    yield "causal_conv1d", (8, 1536, 2048, 4), {}


def _update(dtype: str) -> Iterator[Case]:
    for states in (1, *STATES):
        yield "state_update", (3, 96, states), {"groups": 3 if states % 2 else 1}
    yield "state_update", (128, 2560, 128), {}


def _gramians(dtype: str) -> Iterator[Case]:
    for states in (1, 5, *STATES):
        yield "gramians", (2, states, 8), {}
    yield "gramians", (6, 384, 512), {}


FULL = {
    "selective_scan": _selective, "diagonal_scan": _diagonal, "causal_conv1d": _convolution,
    "selective_state_update": _update, "gramians": _gramians,
}  # fmt: skip
SMOKE = {
    "selective_scan": lambda dtype: [("selective_scan", (1, 2, 9, 2), {"seen": "channels"})],
    "diagonal_scan": lambda dtype: [("diagonal_scan", (1, 9, 3), {"seen": "batch"})],
    "causal_conv1d": lambda dtype: [("causal_conv1d", (1, 2, 9, 4), {})],
    "selective_state_update": lambda dtype: [("state_update", (1, 3, 5), {"seen": "batch"})],
    "gramians": lambda dtype: [("gramians", (1, 3, 2), {"seen": "batch"})],
}

# More than 2^31 elements: of the inputs of one sequence, of the selective scan's checkpoints, or of the output.
LARGE: list[tuple[str, Case]] = [
    ("selective_scan", ("selective_scan", (512, 2050, 2048, 8), {"seen": "batch"})),
    ("selective_scan", ("selective_scan", (1, 262_208, 8200, 2), {"seen": "channels", "channels_last": True})),
    ("selective_scan", ("selective_scan", (1, 262_208, 8200, 2), {"seen": "channels", "bare": True})),
    ("selective_scan", ("selective_scan", (204, 4000, 2048, 300), {"seen": "batch", "bare": True})),
    ("diagonal_scan", ("diagonal_scan", (520, 2048, 1024), {"seen": "batch"})),
    ("diagonal_scan", ("diagonal_scan", (1, 1_050_000, 1024), {"seen": "time", "bare": True})),
    ("causal_conv1d", ("causal_conv1d", (520, 2050, 2048, 4), {"seen": "batch"})),
    ("selective_state_update", ("state_update", (8200, 2048, 130), {"seen": "batch"})),
    ("gramians", ("gramians", (1900, 384, 2), {"seen": "batch"})),
]
LARGE_SMOKE = [("diagonal_scan", ("diagonal_scan", (2, 70, 3), {"seen": "time", "bare": True}))]


def run_large(device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    """Offsets that do not fit in 32 bits, in bfloat16 (state and Gramians as they are)."""
    for op, case in LARGE_SMOKE if smoke else LARGE:
        yield run(op, case, "float32" if smoke else "bfloat16", device, modes=(False,)) | {"large": True}


def run(op: str, case: Case, dtype: str, device: str, modes: tuple[bool, ...] = (True, False)) -> dict[str, Any]:
    """One case in deterministic mode twice and in the other one, as a row of results; ok is None where it does not fit."""
    maker, sizes, options = case
    row: dict[str, Any] = {"op": op, "case": f"{maker}{sizes} {options}", "dtype": dtype}
    started = time.perf_counter()
    try:
        torch.manual_seed(0)
        if maker == "gramians":
            row["dtype"], problem = "float64", problems.gramians(*sizes, device=device, **options)
        else:
            problem = getattr(problems, maker)(*sizes, DTYPES[dtype], device, **options)
        row |= verdict(problem, row["dtype"], modes)
    except torch.OutOfMemoryError as error:
        row |= {"ok": None, "error": brief(error)}
    except Exception as error:  # of one case: it is a failed check
        row |= {"ok": False, "error": brief(error)}
    if device == "cuda":
        torch.cuda.empty_cache()
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def verdict(problem: Problem, dtype: str, modes: tuple[bool, ...]) -> dict[str, Any]:
    """Relative errors by name (the worst of the modes) and whether the same bits come twice."""
    weights: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    found: dict[str, Any] = {}
    oracle = None
    for deterministic in modes:
        with Mode(deterministic):
            results, weights = evaluate(problem, problem.inputs, "triton", weights)
            if deterministic:
                again, _ = evaluate(problem, problem.inputs, "triton", weights)
                found["same_bits"] = all(torch.equal(t, again[name]) for name, t in results.items())
                del again
        if oracle is None:
            oracle = _oracle(problem, weights)
        for name, error in _compare(problem, results, oracle).items():
            errors[name] = max(errors.get(name, 0.0), error)
        del results
    bound = TOLERANCES[getattr(torch, dtype)]
    worst = max(errors, key=errors.__getitem__)
    within = errors[worst] <= bound
    if not within:
        plain = _compare(problem, evaluate(problem, problem.inputs, "reference", weights)[0], oracle)
        within = all(error <= max(bound, ROOM * plain[name]) for name, error in errors.items())
        found["reference_errors"] = plain
    ok = within and found.get("same_bits", True)
    return found | {"ok": ok, "worst": errors[worst], "where": worst, "tolerance": bound, "errors": errors}


def _oracle(problem: Problem, weights: problems.Tensors) -> problems.Tensors:
    wide = {
        name: t[problem.part.get(name, ())].to(torch.complex128 if t.is_complex() else torch.float64)
        for name, t in problem.inputs.items()
    }
    return evaluate(problem, wide, "reference", weights)[0]


def _compare(problem: Problem, results: problems.Tensors, oracle: problems.Tensors) -> dict[str, float]:
    errors = {}
    for name, expected in oracle.items():
        actual = results[name]
        if name.startswith("grad "):
            actual = actual[problem.part.get(name.removeprefix("grad "), ())]
        else:
            seen = problem.seen.get(name, ())
            actual, expected = actual[seen], expected[seen]
        error = ((actual.to(expected.dtype) - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        errors[name] = error if error == error else float("inf")
    return errors


class Mode:
    """Deterministic algorithms, with memory that nothing has written full of NaN; or neither."""

    def __init__(self, deterministic: bool) -> None:
        self.deterministic = deterministic

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)
