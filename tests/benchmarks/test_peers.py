"""Every peer that is installed computes what we compute."""

from __future__ import annotations

import pytest
from benchmarking.sizes import small
from peers import PEERS, jax_lru_model, jax_scans

from compressm.benchmarking.cases import OPS

SAME = {(jax_scans.ORIGINAL, "scifar")}  # as with smnist, and compiling takes a while
ENTRIES = [(peer, op) for peer in PEERS for op in peer.ops if (peer.name, op) not in SAME]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("peer", "op"), ENTRIES, ids=[f"{op}-{peer.name}" for peer, op in ENTRIES])
def test_peer_agrees_with_the_float64_reference(peer, op):
    chosen = small(op)
    reason = peer.reason(chosen)
    if reason is not None:
        pytest.skip(reason)
    problem = chosen.build()
    assert problem.oracle
    contender = peer.ops[op](problem)
    assert problem.error(contender.answers()) < problem.tolerance
    contender.timed.run(*contender.timed.arguments())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_training_step_in_jax_is_compiled_once_for_the_gate_and_the_clock(monkeypatch):
    jax = pytest.importorskip("jax")
    jitted, jit = [], jax.jit

    def recording(*arguments, **options):
        jitted.append(jit(*arguments, **options))
        return jitted[-1]

    monkeypatch.setattr(jax, "jit", recording)
    contender = jax_lru_model.step(small("smnist").build())
    contender.answers()
    for _ in range(2):
        contender.timed.run()
    assert [function._cache_size() for function in jitted] == [1]


def test_every_op_has_peers_and_every_peer_an_op():
    assert {op for peer in PEERS for op in peer.ops} == set(OPS) - {"attempt", "attempt-s5", "waiting"}
    assert len({peer.name for peer in PEERS}) == len(PEERS)
