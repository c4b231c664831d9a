"""Linear attention with decays of channels in Triton, on a GPU or in the interpreter, against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from kernels.evaluation import check
from kernels.linear_attention_cases import evaluate, random_inputs

from compressm.errors import BackendError
from compressm.kernels import linear_attention, plan
from compressm.kernels.linear_attention.op import linear_attention_op
from compressm.kernels.ssd import triton_launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def compare(inputs, assert_close, device, dtype=torch.float32, **options):
    inputs = {k: t.to(dtype).double() if k in "qkv" else t for k, t in inputs.items()}
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    options = {k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in options.items()}
    results = evaluate(inputs, dtype, "triton", device=device, **options)
    check(results, oracle, assert_close, dtype)
    assert all(t.dtype == (dtype if name in ("out", *"qkv") else torch.float32) for name, t in results.items())


@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 5, 3), (1, 33, 1, 2, 5, 3)], ids=str)
def test_linear_attention(assert_close, device, shape):
    compare(random_inputs(*shape), assert_close, device)


def test_several_tiles_and_strong_decays(assert_close, device):
    compare(random_inputs(1, 20, 1, 1, 40, 33, strength=40.0, sequences=0), assert_close, device, scale=0.7)


def test_packed_sequences_with_a_normaliser(assert_close, device):
    inputs = random_inputs(1, 20, 1, 1, 5, 3, sequences=3, normalize=True)
    compare(inputs, assert_close, device, cu_seqlens=torch.tensor([0, 7, 7, 20]), normalize=True)


def test_half_precision(assert_close, device):
    compare(random_inputs(1, 20, 1, 1, 16, 8), assert_close, device, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 0.7), (torch.bfloat16, None), (torch.float32, 1.0)], ids=str)
def test_heads_of_one_decay_scale_their_queries_in_the_kernels(assert_close, device, dtype, scale, monkeypatch):
    """No tensor of scaled queries is made; what is read of first states, and of final states' gradients, has the scale once."""
    queries, launched = [], triton_launch.forward
    monkeypatch.setattr(triton_launch, "forward", lambda *given: queries.append(given[4]) or launched(*given))
    inputs = {name: t.to(dtype) for name, t in random_inputs(1, 20, 1, 2, 5, 3, decay="scalar").items()}
    compare({name: t.double() for name, t in inputs.items()}, assert_close, device, dtype, scale=scale)
    assert torch.equal(queries[0].cpu(), inputs["q"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_at_which_a_head_forgets_all(assert_close, device, dtype):
    """Log decays of masks: what decays little behind such a step must not drown in it."""
    inputs = random_inputs(1, 20, 1, 2, 5, 3, decay="scalar")
    inputs["g"][:, 5], inputs["g"][:, 11, 0] = -1e9, torch.finfo(torch.float32).min
    compare(inputs, assert_close, device, dtype)


def test_gradients_are_contiguous_and_expanded_ones_are_read(assert_close, device):
    """v that lies with L last, no gradient of the final states."""
    inputs = random_inputs(1, 20, 1, 1, 5, 8, sequences=0)
    oracle = {name: t.clone().requires_grad_() for name, t in inputs.items() if t is not None}
    linear_attention(**oracle, backend="reference")[0].sum().backward()
    leaves = {name: t.float().to(device) for name, t in inputs.items() if t is not None}
    leaves["v"] = leaves["v"].movedim(1, 3).contiguous().movedim(3, 1)
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    linear_attention(**leaves, backend="triton")[0].sum().backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad.cpu(), oracle[name].grad, name)


@pytest.mark.parametrize("shape", [(0, 6, 2, 4, 5, 3), (2, 0, 2, 4, 5, 3), (2, 6, 2, 4, 0, 3), (2, 6, 2, 4, 5, 0)], ids=str)
def test_nothing_to_scan(shape, assert_close, device):
    compare(random_inputs(*shape), assert_close, device)


def test_custom_op_is_well_formed(device):
    inputs = random_inputs(1, 9, 1, 1, 4, 3, sequences=3)
    arguments = [t.float().to(device).requires_grad_() for t in inputs.values()]
    bounds = torch.tensor([0, 3, 3, 9], device=device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(linear_attention_op.op, (*arguments, bounds, 0.5, 0, "triton"), test_utils=tests)


def test_keys_too_wide_for_a_program_run_in_torch():
    """With decays of channels, whatever the GPU, which need not be there; those of heads have no bound."""
    q, v = (1, 17, 1, 1030), (1, 17, 1, 3)
    chosen = plan("linear_attention", {"q": q, "v": v, "g": q}, device="cuda")
    assert (chosen.backend, chosen.form) == ("reference", "chunks")
    assert "K = 1030 exceeds the 1024 key channels a head" in str(chosen)
    assert plan("linear_attention", {"q": q, "v": v}, device="cuda").backend == "triton"
    tensors = [torch.randn(size, requires_grad=True) for size in (q, q, v)] + [torch.full(q, -0.1, requires_grad=True)]
    with pytest.raises(BackendError, match=r"K = 1030 exceeds the 1024 .*cut the layer.*leave backend out"):
        linear_attention(*tensors, backend="triton")
    results = []
    for backend in ("triton", "chunked"):
        out, _ = linear_attention_op(*tensors, None, None, 0.5, 0, backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_plans_and_calls_that_triton_cannot_run(device):
    shapes = {"q": (2, 65, 2, 100), "v": (2, 65, 4, 64), "g": (2, 65, 4, 100)}
    chosen = plan("linear_attention", shapes, torch.bfloat16, device, "triton")
    assert (chosen.op, chosen.backend, chosen.get("T"), chosen.get("BK")) == ("linear_attention", "triton", 64, 128)
    inputs = {name: t.to(device) for name, t in random_inputs().items()}
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        linear_attention(**inputs, backend="triton")
