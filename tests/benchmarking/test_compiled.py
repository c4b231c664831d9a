"""What torch.compile is given: one graph for all chunks of a scan, right with and without gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from benchmarking.sizes import small

from compressm.benchmarking.op_problems import COMPILED
from compressm.kernels.core.unrolled import UNROLL


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize("op", ["selective_scan", "lti_scan"])
def test_one_compilation_serves_all_chunks(op, passes, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    problem = small(op, passes, length=4 * UNROLL).build()
    contender = problem.built_in[COMPILED]()
    for _ in range(2):
        assert problem.error(contender.answers()) < problem.tolerance
    assert len(graphs) == 1
