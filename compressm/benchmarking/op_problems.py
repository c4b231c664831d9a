"""Problems of the single ops, from their records."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from compressm.benchmarking import counts
from compressm.benchmarking.problems import Answers, Contender, Function, Op, Problem, in_slabs, leaves, slabs_for
from compressm.benchmarking.results import Pass
from compressm.benchmarking.timing import Timed
from compressm.kernels import OPS as RECORDS
from compressm.kernels.core.op import Op as Record
from compressm.kernels.core.op import Sample

REFERENCE = "reference loop"
COMPILED = "torch.compile"
BOTH: tuple[Pass, ...] = ("forward", "forward+backward")


def problem(record: Record, sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device) -> Problem:
    """What an op computes of a random sample, with what torch alone computes the same beside it."""
    sample = record.draw(sizes, dtype, device)
    if record.writes:
        return _advancing(record, sample, sizes, passes, dtype, device)
    inputs = leaves(sample.tensors, passes)

    call = functools.partial(_first_output, record, sample)
    reference = functools.partial(call, backend="reference")
    with torch.no_grad():
        weight = torch.randn_like(call(inputs)) if passes != "forward" else None
    axes = next(iter(sample.axes.values()))
    along = axes[record.returns[0]]
    cut = {name: axis for name, axis in axes.items() if name in inputs}
    first = next(iter(cut))
    slabs = slabs_for(math.prod(sizes.values()), inputs[first].shape[cut[first]], device)
    least = counts.of_op(record.name, sizes, dtype.itemsize, weight is not None)
    oracle = in_slabs(reference, inputs, weight, cut, along, slabs)
    found = Problem(passes, dtype, device, inputs, weight, oracle, least, dict(sizes))
    contenders: dict[str, Function] = {"compressm": call, REFERENCE: reference}
    contenders |= {name: make(sizes, dtype) for name, make in record.rivals.items()}
    found.built_in.update({name: functools.partial(found.contender, function) for name, function in contenders.items()})
    found.built_in[COMPILED] = lambda: found.contender(_compiled(record, reference, sizes, dtype))
    return found


def _first_output(record: Record, sample: Sample, tensors: dict[str, Tensor], backend: str | None = None) -> Tensor:
    return record.run(tensors, sample.options, backend)[record.returns[0]]


def _compiled(record: Record, reference: Function, sizes: Mapping[str, int], dtype: torch.dtype) -> Function:
    return torch.compile(reference, dynamic=False) if record.compiled is None else record.compiled(sizes, dtype)


def _advancing(
    record: Record, sample: Sample, sizes: Mapping[str, int], passes: Pass, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Of an op that advances a tensor in place: every answer starts from the same copy of it."""

    call = functools.partial(_first_output, record, sample)
    reference = functools.partial(call, backend="reference")
    wide = {name: t.double() for name, t in sample.tensors.items()}
    oracle = {"out": reference(wide), **{name: wide[name] for name in record.writes}}
    least = counts.of_op(record.name, sizes, dtype.itemsize, False)
    found = Problem(passes, dtype, device, sample.tensors, None, oracle, least, dict(sizes))
    found.extras["writes"] = record.writes
    contenders = {"compressm": call, REFERENCE: reference}
    found.built_in.update({name: functools.partial(in_place, found, function) for name, function in contenders.items()})
    found.built_in[COMPILED] = lambda: in_place(found, _compiled(record, reference, sizes, dtype))
    return found


def in_place(problem: Problem, function: Function) -> Contender:
    """A contender that advances the problem's tensors in place and returns the output."""
    writes = problem.extras["writes"]
    own = problem.inputs | {name: problem.inputs[name].clone() for name in writes}

    @torch.no_grad()
    def run() -> Tensor:
        return function(own)

    def answers() -> Answers:
        for name in writes:
            own[name].copy_(problem.inputs[name])
        return {"out": run(), **{name: own[name].clone() for name in writes}}

    return Contender(Timed(run), answers)


OPS = {
    name: Op(
        "op", dict(record.sizes), BOTH if record.differentiable else ("forward",), functools.partial(problem, record),
        record.about, str(record.dtypes[0]).removeprefix("torch."), tuple(record.rivals),
    )
    for name, record in RECORDS.items()
}  # fmt: skip
