"""The real mamba_ssm, installed without its CUDA build, on CPU."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import compressm
from compressm.errors import ArgumentError, BackendError, DependencyError
from compressm.integrations.mamba_ssm import mamba_inner_fn, patch
from compressm.kernels.selective_scan.reference import selective_scan as reference
from compressm.layers import Mamba, Mamba2

pytestmark = pytest.mark.filterwarnings("ignore:.*(custom_fwd|custom_bwd).*:FutureWarning")

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is None or importlib.util.find_spec("triton") is None,
    reason="mamba_ssm or triton is not installed",
)


@pytest.fixture(scope="module")
def package():
    """mamba_ssm, patched twice."""
    patch()
    patch()
    import mamba_ssm

    return mamba_ssm


@pytest.fixture(params=[True, False], ids=["fast path", "slow path"])
def pair(package, request):
    """Their layer and ours with the same weights."""
    theirs = package.Mamba(8, d_state=5, use_fast_path=request.param, layer_idx=0)
    with torch.no_grad():
        theirs.dt_proj.bias.add_(2.0)
        theirs.x_proj.weight.mul_(3.0)
    ours = Mamba(8, d_state=5, layer_idx=0)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@needs_package
def test_trains(pair, assert_close):
    x = torch.randn(3, 33, 8)
    grads = []
    for layer in pair:
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append({"input": inputs.grad, "output": out.detach()} | {n: p.grad for n, p in layer.named_parameters()})
    for name, value in grads[1].items():
        assert_close(grads[0][name], value, name)
    assert len(grads[0]) == len(list(pair[0].parameters())) + 2 == 11


@needs_package
def test_state_bytes_are_those_of_the_cache(pair):
    theirs, _ = pair
    said = compressm.inspect(theirs).layers[0].state_bytes
    assert said == sum(part.nbytes for part in theirs.allocate_inference_cache(1, 1))


@needs_package
def test_the_patched_scan_is_the_definition(package, assert_close):
    """Against the package's own slow reference, with a final state."""
    interface = sys.modules["mamba_ssm.ops.selective_scan_interface"]
    u, delta, z = torch.randn(3, 2, 6, 17).unbind(0)
    A, D, bias = -torch.rand(6, 5) - 0.1, torch.randn(6), torch.randn(6)
    B, C = torch.randn(2, 2, 3, 5, 17).unbind(0)
    arguments = (u, delta, A, B, C, D, z, bias, True, True)
    assert package.selective_scan_fn is interface.selective_scan_fn is compressm.kernels.selective_scan
    for mine, theirs in zip(interface.selective_scan_fn(*arguments), interface.selective_scan_ref(*arguments), strict=True):
        assert_close(mine, theirs)


@needs_package
def test_the_layer_runs_on_our_kernels(package):
    mixer, x = package.Mamba(8, d_state=5), torch.randn(2, 3, 8)
    with torch.profiler.profile() as recorded:
        mixer(x)
    names = {e.name for e in recorded.events()}
    assert {"compressm_cpp::selective_scan", "compressm_cpp::causal_conv1d"} <= names or "compressm_cpp::mamba_mixer" in names
    assert sys.modules["mamba_ssm.modules.mamba_simple"].mamba_inner_fn is mamba_inner_fn


@needs_package
@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"])
def test_the_layer_calls_its_sub_modules(package, name, assert_close):
    mixer, x = package.Mamba(8, d_state=5), torch.randn(2, 7, 8)
    scaled = copy.deepcopy(mixer)
    for parameter in getattr(scaled, name).parameters():
        parameter.data *= 1.5
    getattr(mixer, name).register_forward_hook(lambda module, args, out: 1.5 * out)
    assert_close(mixer(x).detach(), scaled(x).detach().double())
    cache = mixer.allocate_inference_cache(2, 7)
    steps = torch.cat([mixer.step(x[:, t : t + 1], *cache)[0] for t in range(7)], 1)
    assert_close(steps.detach(), scaled(x).detach().double())


@needs_package
def test_prompt_and_decode(pair, assert_close):
    theirs, _ = pair
    x = torch.randn(2, 12, 8)
    with torch.no_grad():
        full = theirs(x)
        cache = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
        assert_close(theirs(x[:, :7], cache), full[:, :7], "prompt")
        for step in range(7, 12):
            cache.seqlen_offset = step
            assert_close(theirs(x[:, step : step + 1], cache), full[:, step : step + 1], f"step {step}")


@needs_package
def test_a_language_model_is_compressed_while_it_trains(package):
    from mamba_ssm.models.config_mamba import MambaConfig

    config = MambaConfig(8, n_layer=2, vocab_size=16, ssm_cfg={"layer": "Mamba1"}, rms_norm=False, fused_add_norm=False)
    model = package.MambaLMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [torch.randint(16, (4, 20)) for _ in range(6)]
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([3]), calibration=batches[:1]
    )
    for x in batches:
        F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    assert compressor.ranks == {f"backbone.layers.{i}.mixer": 3 for i in range(2)}
    assert [block.mixer.d_state for block in model.backbone.layers] == [3, 3]


@needs_package
def test_what_is_not_patched_says_so(package):
    interface = sys.modules["mamba_ssm.ops.selective_scan_interface"]
    u = torch.randn(1, 2, 3)
    with pytest.raises(BackendError, match="CUDA extension is not installed"):
        interface.SelectiveScanFn.apply(u, u, -torch.ones(2, 4), torch.randn(1, 4, 3), torch.randn(1, 4, 3))


@pytest.mark.parametrize("given", ["nothing", "B", "C", "biases"])
def test_inner_function(given, assert_close):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    xz, conv, bias, dt_weight, out_weight = random(2, 12, 9), random(6, 1, 4), random(6), random(6, 2), random(8, 6)
    A, D, dt_bias = -random(6, 5).abs(), random(6), random(6)
    B, C = (random(2, 5, 9) if given == name else None for name in "BC")
    biases = {"B_proj_bias": random(5), "C_proj_bias": random(5)} if given == "biases" else {}
    x_weight = random(2 + 5 * ((B is None) + (C is None)), 6)
    out = mamba_inner_fn(xz, conv, bias, x_weight, dt_weight, out_weight, None, A, B, C, D, dt_bias, **biases)

    x, z = xz.chunk(2, 1)
    x = F.silu(F.conv1d(x, conv, bias, groups=6, padding=3)[..., :9])
    rows = list((x_weight @ x).split([2] + [5] * (len(x_weight) // 5), 1))
    delta = dt_weight @ rows.pop(0)
    B = rows.pop(0) if B is None else B
    C = rows.pop(0) if C is None else C
    if biases:
        B, C = B + biases["B_proj_bias"][:, None], C + biases["C_proj_bias"][:, None]
    y, _ = reference(x, delta, A, B[:, None], C[:, None], D, z, dt_bias, None, None, True)
    assert_close(out, (out_weight @ y).mT)
    with pytest.raises(ArgumentError, match="b_rms_weight"):
        mamba_inner_fn(xz, conv, bias, x_weight, dt_weight, out_weight, None, A, b_rms_weight=D)


MAMBA2 = {
    "norm": {"ngroups": 1},
    "groups": {"ngroups": 2, "norm_before_gate": True},
    "D of heads and channels": {"D_has_hdim": True},
    "no norm": {"rmsnorm": False},
    "beside an MLP": {"d_ssm": 8},
    "limits": {"dt_limit": (0.02, 0.05)},
}


def mamba2_pair(package, options):
    """Their Mamba2 and ours with the same weights, none of them at a special value."""
    options = {"d_state": 6, "headdim": 4, "layer_idx": 0, "chunk_size": 8, **options}
    theirs, ours = package.Mamba2(8, **options), Mamba2(8, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@needs_package
@pytest.mark.parametrize("whole", [True, False], ids=["one function", "its parts"])
@pytest.mark.parametrize("options", MAMBA2.values(), ids=MAMBA2)
def test_mamba2_on_a_cpu(package, options, whole, assert_close):
    theirs, ours = mamba2_pair(package, options)
    theirs.use_mem_eff_path = whole
    x, grads = torch.randn(2, 19, 8), []
    for layer in (theirs, ours):
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        out.square().sum().backward()
        grads.append({"input": inputs.grad, "output": out.detach()} | {n: p.grad for n, p in layer.named_parameters()})
    for name, value in grads[1].items():
        assert_close(grads[0][name], value, name)


@needs_package
def test_mamba2_keeps_sequences_of_a_row_apart(package, assert_close):
    theirs, ours = mamba2_pair(package, {})
    x, seq_idx = torch.randn(2, 19, 8), (torch.arange(19) >= 7).int().expand(2, 19)
    for whole in (True, False):
        theirs.use_mem_eff_path = whole
        assert_close(theirs(x, seq_idx=seq_idx), ours(x, seq_idx=seq_idx))


@needs_package
def test_mamba2_decodes_from_its_prompt(package, assert_close):
    theirs, _ = mamba2_pair(package, {"ngroups": 2})
    x, parameters = torch.randn(2, 9, 8), SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with torch.no_grad():
        whole, first = theirs(x), theirs(x[:, :6], inference_params=parameters)
        assert_close(first, whole[:, :6])
        for t in range(6, 9):
            parameters.seqlen_offset = t
            assert_close(theirs(x[:, t : t + 1], inference_params=parameters), whole[:, t : t + 1])


@needs_package
def test_mamba2_simple_learns_its_first_states(package, assert_close):
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple

    theirs = Mamba2Simple(8, d_state=6, headdim=4, chunk_size=8, learnable_init_states=True)
    with torch.no_grad():
        theirs.init_states.normal_()
    results = []
    for whole in (True, False):
        theirs.use_mem_eff_path = whole
        theirs.zero_grad()
        out = theirs(torch.linspace(-1, 1, 2 * 11 * 8).view(2, 11, 8))
        out.square().sum().backward()
        results.append((out.detach(), theirs.init_states.grad))
    assert results[0][1].abs().max() > 0
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


@needs_package
@pytest.mark.parametrize("given", ["bias", "groups", "no gate"])
def test_gated_norm(package, given, assert_close):
    from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref, rmsnorm_fn

    x, z, weight = torch.randn(3, 8), None if given == "no gate" else torch.randn(3, 8), torch.randn(8)
    for before in (True, False):
        rest = (torch.randn(8) if given == "bias" else None, z, 1e-3, 4 if given == "groups" else None, before)
        assert_close(rmsnorm_fn(x, weight, *rest), rms_norm_ref(x, weight, *rest))


@needs_package
def test_transformers_takes_what_was_patched(package):
    """It takes mamba_ssm's functions where that can be imported, which on a CPU are Triton's no more."""
    code = """
import torch, transformers
from transformers import Mamba2Config
from compressm.integrations.mamba_ssm import patch
patch()
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from compressm.integrations.transformers import accelerate_
config = Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=2, chunk_size=4, num_hidden_layers=1)
mixer, x = Mamba2Mixer(config, layer_idx=0), torch.randn(2, 7, 16)
for training in (True, False):
    own = mixer.train(training)(x)
    torch.testing.assert_close(own, accelerate_(mixer)(x))
    accelerate_(mixer, False)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_package
def test_states_of_packed_rows_are_refused(package):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    one = torch.ones(1, 4, 1, 1)
    with pytest.raises(BackendError, match="return_varlen_states"):
        mamba_chunk_scan_combined(one, one[..., 0], -one[0, 0, 0], one, one, 4, return_varlen_states=True)


def test_without_the_package():
    code = """
import sys
sys.modules["mamba_ssm"] = None
from compressm.errors import DependencyError
from compressm.integrations.mamba_ssm import patch
try:
    patch()
except DependencyError as error:
    assert isinstance(error, ImportError) and "MAMBA_SKIP_CUDA_BUILD" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert issubclass(DependencyError, ImportError)
