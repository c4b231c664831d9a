"""Is every Triton kernel right on this device: outputs and gradients against float64, same bits twice, all memory written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from compressm.kernels import OPS
from compressm.kernels.core.gpu import Check
from compressm.kernels.core.op import Op
from gpu import problems
from gpu.problems import Problem, evaluate
from gpu.session import brief

# Largest relative error (2-norm of the difference over the 2-norm of the oracle), the table of the project's tests.  A sum that
# cancels may exceed it as far as the definition itself does in the same precision, see ROOM.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROOM = 4.0  # times the error of the reference in the inputs' precision


def ops() -> dict[str, Op]:
    """Those with cases for a GPU."""
    return {name: op for name, op in OPS.items() if op.gpu is not None}


def cases(op: str, dtype: str, smoke: bool) -> list[Check]:
    """All checks of an op in a dtype; on a smoke run one."""
    gpu = OPS[op].gpu_cases()
    return [gpu.SMOKE] if smoke else list(gpu.checks(DTYPES[dtype]))


def run_large(device: str, smoke: bool) -> Iterator[dict[str, Any]]:
    """Offsets that do not fit in 32 bits, in bfloat16 (state and Gramians as they are)."""
    for name, op in ops().items():
        for check in (op.gpu_cases().SMOKE,) if smoke else op.gpu_cases().LARGE:
            yield run(name, check, "float32" if smoke else "bfloat16", device, modes=(False,)) | {"large": True}


def run(op: str, check: Check, dtype: str, device: str, modes: tuple[bool, ...] = (True, False)) -> dict[str, Any]:
    """One case in deterministic mode twice and in the other one, as a row of results; ok is None where it does not fit."""
    sizes = " ".join(f"{name}={size}" for name, size in check.sizes.items())
    variant = " ".join(f"{name}={value}" for name, value in check.variant.items())
    row: dict[str, Any] = {"op": op, "case": f"{sizes}; {variant}", "dtype": dtype}
    if OPS[op].dtypes == (torch.float64,):
        row["dtype"] = "float64"
    started = time.perf_counter()
    try:
        torch.manual_seed(0)
        row |= verdict(problems.problem(OPS[op], check, DTYPES[dtype], device), row["dtype"], modes)
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
