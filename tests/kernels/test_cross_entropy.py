"""The cross-entropy: losses and gradients against torch's in float64, ignored rows, extremes, threads, bad input."""

from __future__ import annotations

import pytest
import torch
from kernels.evaluation import check_threads
from kernels.layouts import lay_out
from torch.nn import functional as F

from compressm.errors import ArgumentError, BackendError
from compressm.kernels.fused_cpu import cross_entropy

CLASSES = (1, 2, 7, 16, 17, 37, 256, 1000)
IGNORED = -100


def random_inputs(*shape):
    """Float64 scores, exact in float32, and targets of which some are ignored, but not the first."""
    draw = torch.Generator().manual_seed(3)
    scores = 4 * torch.randn(shape, generator=draw) + 20 * torch.randn((*shape[:-1], 1), generator=draw)
    targets = torch.randint(shape[-1], shape[:-1], generator=draw)
    targets[torch.rand(shape[:-1], generator=draw) < 0.2] = IGNORED
    targets.flatten()[0] = 0
    return scores.double(), targets


def evaluate(scores, targets, dtype, backend, *, layout="dense", call=cross_entropy):
    """Losses of every reduction and the gradients of scores, by name."""
    results = {}
    for reduction in ("mean", "sum", "none"):
        leaf = lay_out(scores.to(dtype), layout).requires_grad_()
        out = call(leaf, lay_out(targets, "transposed"), reduction=reduction, backend=backend)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
        results |= {reduction: out.detach(), f"{reduction}.scores": torch.autograd.grad(out, leaf, weights)[0]}
    return results


def compare(scores, targets, assert_close, dtype=torch.float32, **options):
    oracle = evaluate(scores, targets, torch.float64, "reference")
    results = evaluate(scores, targets, dtype, options.pop("backend", "cpp"), **options)
    assert set(results) == set(oracle)
    for name, expected in oracle.items():
        assert results[name].dtype == (dtype if name.endswith(".scores") else torch.float32)
        assert_close(results[name].double(), expected, name, dtype)


def test_reference_is_that_of_torch():
    scores, targets = random_inputs(9, 5)
    for reduction in ("mean", "sum", "none"):
        ours = cross_entropy(scores, targets, reduction=reduction, backend="reference")
        torch.testing.assert_close(ours, F.cross_entropy(scores, targets, reduction=reduction))


@pytest.mark.parametrize("layout", ["dense", "slice", "transposed"])
@pytest.mark.usefixtures("poisoned_memory")
def test_cpp(assert_close, cpp_calls, layout):
    with cpp_calls() as seen:
        for classes in CLASSES:
            for rows in ((1,), (2, 33)):
                compare(*random_inputs(*rows, classes), assert_close, backend=None, layout=layout)
    assert seen == dict.fromkeys(("cross_entropy", "cross_entropy_backward"), 3 * 2 * len(CLASSES))


def test_every_instruction_set(assert_close, isa):
    for classes in CLASSES:
        scores, targets = random_inputs(19, classes)
        compare(scores, targets, assert_close)
        compare(scores.bfloat16().double(), targets, assert_close, torch.bfloat16)


def test_same_bits_for_any_thread_count():
    scores, targets = random_inputs(700, 257)
    check_threads(lambda: evaluate(scores, targets, torch.float32, "cpp"))


def test_scores_far_apart(assert_close):
    scores, targets = random_inputs(6, 40)
    scores[0, 3], scores[1, 5] = 1e4, -1e4
    scores[2], scores[3] = -3e38, 3e38
    scores[4, 10:] = -torch.inf
    targets[:] = torch.tensor([3, 4, 0, 7, 2, 39])
    compare(scores.float().double(), targets, assert_close)


def test_one_bad_row_spoils_no_other():
    scores, targets = random_inputs(20, 37)
    targets.clamp_(min=0)
    clean = evaluate(scores, targets, torch.float32, "cpp")
    scores[3, 36], scores[11, 0] = torch.nan, torch.inf
    spoilt = evaluate(scores, targets, torch.float32, "cpp")
    others = [row for row in range(20) if row not in (3, 11)]
    for name in ("none", "none.scores"):
        assert torch.equal(spoilt[name][others], clean[name][others])
        assert spoilt[name][[3, 11]].flatten(1 if name == "none.scores" else 0).isnan().any(-1).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_rows_that_are_ignored(backend):
    scores, targets = torch.randn(4, 9), torch.tensor([2, 8, 2, 0])
    scores[[0, 2]] = torch.nan
    leaf = scores.requires_grad_()
    loss = cross_entropy(leaf, targets, ignore_index=2, backend=backend)
    expected = F.cross_entropy(leaf.detach()[[1, 3]], targets[[1, 3]])
    torch.testing.assert_close(loss.detach(), expected)
    losses = cross_entropy(leaf, targets, ignore_index=2, reduction="none", backend=backend)
    assert losses[[0, 2]].tolist() == [0, 0]
    assert cross_entropy(leaf, torch.full((4,), IGNORED), backend=backend).isnan()
    if backend == "cpp":  # torch's own gradient is NaN there
        loss.backward()
        assert not leaf.grad[[0, 2]].any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(assert_close, backend, dtype):
    scores, targets = random_inputs(20, 65)
    compare(scores.to(dtype).double(), targets, assert_close, dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_in_nothing_out(dtype):
    scores, targets = torch.zeros(0, 3, 5, dtype=dtype, requires_grad=True), torch.zeros(0, 3, dtype=torch.int64)
    assert cross_entropy(scores, targets, reduction="none").shape == (0, 3)
    cross_entropy(scores, targets, reduction="sum").backward()
    assert scores.grad.shape == scores.shape
    assert cross_entropy(scores, targets).isnan()


def test_a_single_row():
    assert float(cross_entropy(torch.zeros(4), torch.tensor(1))) == pytest.approx(1.3862944)


def test_gradient_check():
    scores, targets = random_inputs(3, 5)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), scores.requires_grad_())


def test_custom_ops_are_well_formed():
    ops = torch.ops.compressm
    scores, targets = torch.randn(5, 9), torch.tensor([0, 8, 3, IGNORED, 1])
    forward = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    for reduction in ("mean", "sum", "none"):
        arguments = (scores.clone().requires_grad_(), targets, IGNORED, reduction)
        torch.library.opcheck(ops.cross_entropy.default, arguments, test_utils=forward)
        loss, normalizers = ops.cross_entropy(scores, targets, IGNORED, reduction)
        arguments = (torch.randn(loss.shape), scores, targets, normalizers, IGNORED, reduction)
        torch.library.opcheck(ops.cross_entropy_backward.default, arguments, test_utils=forward[:2])


def test_compiles_into_one_graph(assert_close):
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    compare(*random_inputs(2, 5, 8), assert_close, backend=None, call=compiled)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("scores", lambda t: t.long()),
        ("scores", lambda t: t[..., :0]),
        ("scores", lambda t: t[0, 0, 0]),
        ("targets", lambda t: t.int()),
        ("targets", lambda t: t[1:]),
        ("targets", lambda t: t.unsqueeze(-1)),
        ("targets", lambda t: t.to("meta")),
        ("reduction", lambda t: "average"),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    arguments = {"scores": torch.randn(2, 5, 6), "targets": torch.zeros(2, 5, dtype=torch.int64), "reduction": "mean"}
    arguments[name] = wrong(arguments[name])
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        cross_entropy(**arguments)


@pytest.mark.parametrize("target", [-1, 6, 2**40])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_targets_that_are_no_class(backend, target):
    with pytest.raises(IndexError, match=str(target)):
        cross_entropy(torch.randn(3, 6), torch.tensor([0, target, 1]), backend=backend)


def test_backends_that_cannot_run_say_why():
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        cross_entropy(torch.randn(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.int64), backend="cpp")
    with pytest.raises(BackendError, match="expected one of"):
        cross_entropy(torch.randn(1, 3), torch.zeros(1, dtype=torch.int64), backend="triton")
