"""Configurations of every kernel: each is checked against the planned one on a small shape, then timed on the shapes that
matter.  The outcome is the table behind the plan: the best configuration, and what the planned one loses to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compressm.kernels.core.gpu import Config, Tunable
from gpu.checks import TOLERANCES
from gpu.session import Part, Session, brief
from gpu.timing import Timer
from gpu.tunables import tunables


def entries(smoke: bool) -> list[tuple[Tunable, Config]]:
    """Every kernel with every configuration; on a smoke run the first of some kernels."""
    if smoke:
        return [(tunable, tunable.configs[0]) for tunable in tunables() if tunable.smoke]
    return [(tunable, config) for tunable in tunables() for config in tunable.configs]


def key(config: Config) -> str:
    """A configuration as text."""
    return " ".join(f"{name}={value}" for name, value in config.items() if name != "enable_fp_fusion")


def check_all(device: str, smoke: bool, shard: int, shards: int) -> Iterator[dict[str, Any]]:
    """Rows of a share of the configurations: right or not, registers, spills and shared memory."""
    for tunable, config in entries(smoke)[shard::shards]:
        row: dict[str, Any] = {"kernel": tunable.name, "config": key(config)}
        shape = tunable.smoke if smoke else tunable.small(config)
        try:
            expected = tunable.build(shape, None, device)()
            before = compiled(tunable.kernel)
            actual = tunable.build(shape, config, device)()
            row |= usage(tunable.kernel, before)
            errors = [_error(a, b) for a, b in zip(actual, expected, strict=True)]
            bound = TOLERANCES[actual[0].dtype.to_real()]
            row |= {"ok": max(errors) <= bound, "worst": max(errors), "tolerance": bound}
        except Exception as error:  # of one configuration: it is not timed
            row |= {"ok": False, "error": brief(error)}
        yield row


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    error = ((actual.to(wide) - expected.to(wide)).norm() / expected.to(wide).norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def compiled(kernel: Any) -> dict[Any, Any]:
    """Compiled forms of a Triton function on the present device; none in the interpreter."""
    caches = getattr(kernel, "device_caches", None)
    return dict(caches[torch.cuda.current_device()][0]) if caches and torch.cuda.is_available() else {}


def usage(kernel: Any, before: dict[Any, Any]) -> dict[str, int]:
    """Registers a lane, spills and shared memory of what was compiled since ``before``."""
    fresh = [form for name, form in compiled(kernel).items() if name not in before]
    if not fresh:
        return {}
    return {"registers": fresh[-1].n_regs, "spills": fresh[-1].n_spills, "shared": fresh[-1].metadata.shared}


def out_of_resources(row: dict[str, Any]) -> bool:
    """Whether a configuration cannot run on this device at all, which is no error of the kernel."""
    return "OutOfResources" in row.get("error", "")


def time_all(session: Session, part: Part, timer: Timer, broken: set[str]) -> None:
    """Time the configurations that are right, the planned one beside them, and note the best.

    broken: names of kernels whose checks failed, which are not timed.
    """
    rows = part.body.get("configurations", [])
    right = {(row["kernel"], row["config"]) for row in rows if row["ok"]}
    for tunable in tunables():
        known = [config for config in tunable.configs if (tunable.name, key(config)) in right]
        shapes = tunable.shapes if not session.smoke else {"smoke": tunable.smoke} if tunable.smoke else {}
        if not known:
            continue
        if tunable.name.split()[0] in broken:
            part.skip(f"sweep of {tunable.name}", "its check failed")
            continue
        for name, shape in shapes.items():
            if part.has_time(f"sweep of {tunable.name} on {name}", session.pick(6.0, 0.0)):
                part.add("sweep", _time(tunable, name, shape, known, session, timer))


def _time(
    tunable: Tunable, name: str, shape: tuple[int, ...], configs: list[Config], session: Session, timer: Timer
) -> dict[str, Any]:
    planned = key(tunable.planned(shape))
    calls: dict[str, Callable[[], object]] = {}
    lost: dict[str, Any] = {}
    pool = torch.cuda.graph_pool_handle() if session.device == "cuda" else None
    for label, config in [(f"{planned} (plan)", None), *((key(c), c) for c in configs if _fits(tunable, shape, c))]:
        try:
            call = tunable.build(shape, config, session.device)
            calls[label] = graphed(call, session.device, pool) if tunable.graph else call
        except Exception as error:  # of one configuration: it is named in the row
            lost[label] = brief(error)
    times = timer.interleaved(calls, session.pick(2.0, 0.0))
    medians = {label: t["median"] for label, t in times.items() if "median" in t}
    best = min(medians, key=medians.__getitem__)
    plan = medians[f"{planned} (plan)"]
    return {
        "kernel": tunable.name, "shape": name, "plan": planned, "plan_ms": plan, "best": best, "best_ms": medians[best],
        "plan_over_best": plan / medians[best], "milliseconds": medians, "errors": lost,
    }  # fmt: skip


def _fits(tunable: Tunable, shape: tuple[int, ...], config: Config) -> bool:
    """Stretches are tried only where the plan might split: where sequences and states do not fill the device."""
    return "stretches" not in config or shape[0] * -(-shape[2] // 32) < 512


def graphed(call: Callable[[], object], device: str, pool: Any = None) -> Callable[[], object]:
    """The same work as a graph, without what Python takes to launch it; on a CPU the call itself.

    pool: shared by graphs that are replayed one at a time and whose results nobody reads.
    """
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return functools.partial(_replay, graph)


def _replay(graph: torch.cuda.CUDAGraph) -> None:
    graph.replay()
