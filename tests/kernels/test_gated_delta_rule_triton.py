"""The gated delta rule in Triton, on a GPU or in the interpreter, against the float64 definition: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from kernels.evaluation import check
from kernels.gated_delta_rule_cases import GOLDEN, TENSORS, evaluate, mixed_decays, random_inputs

from compressm.errors import BackendError
from compressm.kernels import gated_delta_rule, plan
from compressm.kernels.gated_delta_rule import triton_call, triton_launch
from compressm.kernels.gated_delta_rule.op import gated_delta_rule_op

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FORMS = pytest.mark.parametrize("channelwise", [False, True], ids=["head", "channel"])


@pytest.fixture
def configure(monkeypatch):
    """Run chunks of T steps in tiles of these sizes, whatever the shapes."""

    def set_config(T, BK, BP, BN, BV, BC=16):
        config = {"T": T, "BK": BK, "BP": BP, "BN": BN, "BC": BC, "BV": BV, "threads": 128, "stages": 1}
        monkeypatch.setattr(triton_call, "config_of", lambda *_: config)

    return set_config


def compare(inputs, assert_close, device, dtype=torch.float32, **options):
    inputs = {k: t if t is None or k == "initial_state" else t.to(dtype).double() for k, t in inputs.items()}
    oracle = evaluate(inputs, torch.float64, "reference", **options)
    options = {k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in options.items()}
    results = evaluate({k: t if t is None else t.to(device) for k, t in inputs.items()}, dtype, "triton", **options)
    check({name: t.cpu() for name, t in results.items()}, oracle, assert_close, dtype)
    assert all(results[name].dtype == (dtype if name in ("o", *TENSORS[:5]) else torch.float32) for name in results)


def test_keys_wider_than_any_model_has(assert_close, device):
    """A tile of 512 rows of a state, in chunks of 16 steps."""
    shapes = {"k": (1, 17, 1, 300), "v": (1, 17, 1, 3)}
    assert plan("gated_delta_rule", shapes, device=device, backend="triton").get("BK") == 512
    compare(random_inputs(1, 17, 1, 1, 300, 3), assert_close, device)


def test_keys_too_wide_for_a_program_run_in_torch():
    """Whatever the GPU, which need not be there; what was chosen without a look at sizes runs in chunks."""
    sizes = {keys: {"k": (1, 17, 1, keys), "v": (1, 17, 1, 3)} for keys in (520, 1030)}
    fits, exceeds = (plan("gated_delta_rule", shapes, device="cuda") for shapes in sizes.values())
    assert (fits.backend, fits.get("BK"), exceeds.backend, exceeds.form) == ("triton", 1024, "reference", "chunks")
    assert "K = 1030 exceeds the 1024 key channels a head" in str(exceeds)
    inputs = random_inputs(1, 17, 1, 1, 1030, 3)
    named = {"backend": "triton"}
    for call in (lambda: plan("gated_delta_rule", sizes[1030], **named), lambda: gated_delta_rule(**inputs, **named)):
        with pytest.raises(BackendError, match=r"K = 1030 exceeds the 1024 .*cut the layer.*leave backend out"):
            call()
    tensors = [None if t is None else t.float().requires_grad_() for t in (inputs.get(name) for name in TENSORS)]
    results = []
    for backend in ("triton", "chunked"):
        o, _ = gated_delta_rule_op(*tensors, None, None, False, 0, backend)
        results.append((o, *torch.autograd.grad(o.square().sum(), tensors)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 5, 3), (1, 33, 1, 2, 5, 3), (1, 20, 1, 1, 40, 17)], ids=str)
def test_a_decay_for_every_head(assert_close, device, shape):
    compare(random_inputs(*shape), assert_close, device)


def test_a_decay_for_every_channel(assert_close, device):
    compare(random_inputs(1, 33, 1, 1, 5, 3, channelwise=True), assert_close, device)


@FORMS
def test_keys_of_length_one_and_a_scale_without_states(assert_close, device, channelwise):
    inputs = random_inputs(1, 20, 1, 2, 5, 3, channelwise=channelwise, state=False)
    inputs["k"] = 3.0 * inputs["k"]
    compare(inputs, assert_close, device, use_qk_l2norm_in_kernel=True, scale=0.7)


@pytest.mark.parametrize(
    ("tiles", "length", "channelwise"),
    [((16, 32, 16, 16, 16), 20, False), ((64, 32, 16, 32, 16), 67, False), ((64, 32, 16, 32, 16), 60, True)], ids=str,
)  # fmt: skip
def test_every_tile_and_decays_of_all_sizes(assert_close, device, tiles, length, channelwise, configure):
    configure(*tiles)
    inputs = mixed_decays(random_inputs(1, length, 1, 1, 21, 18, channelwise=channelwise))
    compare(inputs, assert_close, device)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_at_which_a_head_forgets_all(assert_close, device, dtype, channelwise):
    inputs = random_inputs(1, 20, 1, 1, 5, 3, channelwise=channelwise)
    inputs["g"][:, 5], inputs["g"][:, 11] = -1e9, torch.finfo(torch.bfloat16).min
    compare(inputs, assert_close, device, dtype, use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize(
    ("bounds", "integer", "channelwise"),
    [([0, 7, 7, 40, 41], torch.int32, False), ([0, 0, 32, 64], torch.int64, False), ([0, 7, 7, 20], torch.int64, True)],
    ids=str,
)  # fmt: skip
def test_packed_sequences(assert_close, device, bounds, integer, channelwise):
    inputs = random_inputs(1, bounds[-1], 1, 1, 5, 3, channelwise=channelwise, sequences=len(bounds) - 1)
    compare(inputs, assert_close, device, cu_seqlens=torch.tensor(bounds, dtype=integer))


@pytest.mark.parametrize(
    ("dtype", "sizes", "channelwise"),
    [(torch.bfloat16, (40, 16), False), (torch.float16, (16, 40), False), (torch.bfloat16, (17, 5), True)], ids=str,
)  # fmt: skip
def test_half_precision(assert_close, device, dtype, sizes, channelwise):
    inputs = random_inputs(1, 40, 1, 1, *sizes, channelwise=channelwise)
    compare(inputs, assert_close, device, dtype, use_qk_l2norm_in_kernel=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN[::2])
def test_golden(golden, assert_close, device, name):
    g = golden(name)
    leaves = {key: g[key].to(device, torch.float32).requires_grad_() for key in TENSORS}
    o, last = gated_delta_rule(**leaves, scale=g["scale"].item(), output_final_state=True, backend="triton")
    assert_close(o.detach().cpu(), g["out"], "out")
    assert_close(last.detach().cpu(), g["last_state"], "last state")
    weights = g["w"].to(o), g["w_state"].to(last)
    for key, gradient in zip(leaves, torch.autograd.grad((o, last), list(leaves.values()), weights), strict=True):
        assert_close(gradient.cpu(), g[f"grad_{key}"], key)


@FORMS
def test_slices_dtypes_and_expanded_gradients(assert_close, device, channelwise):
    """q, k and v cut out of one projection in bfloat16, the steps in float32; no gradient of the final states."""
    inputs = random_inputs(1, 20, 1, 1, 8, 8, channelwise=channelwise, state=False)
    joined = torch.cat([inputs[name] for name in "qkv"], 3).bfloat16().to(device).requires_grad_()
    leaves = {name: inputs[name].float().to(device).requires_grad_() for name in ("g", "beta")}
    gated_delta_rule(*joined.split(8, 3), **leaves, backend="triton")[0].sum().backward()
    oracle = {name: t.detach().cpu().double().requires_grad_() for name, t in {"joined": joined, **leaves}.items()}
    q, k, v = oracle["joined"].split(8, 3)
    gated_delta_rule(q, k, v, oracle["g"], oracle["beta"], backend="reference")[0].sum().backward()
    for name, leaf in {"joined": joined, **leaves}.items():
        assert_close(leaf.grad.cpu(), oracle[name].grad, name, torch.bfloat16)


@pytest.mark.parametrize(("length", "channelwise"), [(20, False), (7, True)], ids=["head", "channel"])
def test_same_bits_every_time(device, length, channelwise):
    inputs = {name: t.to(device) for name, t in random_inputs(1, length, 1, 1, 5, 3, channelwise=channelwise).items()}
    first, second = (evaluate(inputs, torch.float32, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


EMPTY = [(0, 6, 2, 4, 5, 3), (2, 0, 2, 4, 5, 3), (2, 6, 2, 0, 5, 3), (2, 6, 2, 4, 0, 3), (2, 6, 2, 4, 5, 0)]


@pytest.mark.parametrize("shape", EMPTY, ids=["batch", "L", "HV", "K", "V"])
def test_nothing_to_scan(shape, assert_close, device):
    compare(random_inputs(*shape), assert_close, device)


def test_custom_op_is_well_formed(device):
    inputs = random_inputs(1, 20, 1, 1, 4, 3, sequences=3)
    arguments = [t.float().to(device).requires_grad_() for t in inputs.values()]
    bounds = torch.tensor([0, 3, 3, 20], device=device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(gated_delta_rule_op.op, (*arguments, bounds, None, True, 0, "triton"), test_utils=tests)


def test_plans_are_consistent(device):
    for keys in (1, 16, 17, 100, 256, 300):
        for values in (1, 64, 65, 256):
            for dtype in (torch.float32, torch.bfloat16):
                shapes = {"k": (2, 65, 2, keys), "v": (2, 65, 4, values)}
                chosen = plan("gated_delta_rule", shapes, dtype, device, "triton")
                assert chosen.get("BK") >= keys
                assert {chosen.get(key) for key in ("T", "BP", "BN", "BC", "BV")} <= {16, 32, 64}
                assert chosen.get("threads") % 64 == 0


def test_calls_that_triton_cannot_run_say_why(device):
    inputs = {name: t.to(device) for name, t in random_inputs().items()}
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        gated_delta_rule(**inputs, backend="triton")
    assert "float8" in triton_launch.why_not(device, torch.float8_e4m3fn)
