"""transformers' Mamba-2 mixers on our kernels: outputs, gradients, prompts, decoding and padding are the library's."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from compressm import FixedRank, compress, load, save
from compressm.errors import ModelError

transformers = pytest.importorskip("transformers")

from compressm.integrations.transformers import accelerate_  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
VOCABULARY, LENGTH = 23, 12
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}


def mamba2():
    config = transformers.Mamba2Config(
        hidden_size=8, num_heads=4, head_dim=4, state_size=6, n_groups=2, num_hidden_layers=2, chunk_size=4, **COMMON
    )
    return transformers.Mamba2ForCausalLM(config)


def falcon(norm: bool):
    config = transformers.FalconH1Config(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, mamba_d_ssm=16,
        mamba_n_heads=4, mamba_d_head=4, mamba_d_state=6, mamba_chunk_size=4, mamba_rms_norm=norm, ssm_in_multiplier=0.7,
        ssm_multipliers=[0.5, 1.5, 0.8, 1.2, 0.9], **COMMON,
    )  # fmt: skip
    return transformers.FalconH1ForCausalLM(config)


def granite():
    config = transformers.GraniteMoeHybridConfig(
        hidden_size=8, intermediate_size=8, shared_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=6,
        mamba_chunk_size=4, layer_types=["mamba", "attention"], **COMMON,
    )  # fmt: skip
    return transformers.GraniteMoeHybridForCausalLM(config)


def bamba():
    config = transformers.BambaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, mamba_n_heads=4,
        mamba_d_head=4, mamba_d_state=6, mamba_chunk_size=4, attn_layer_indices=[1], **COMMON,
    )  # fmt: skip
    return transformers.BambaForCausalLM(config)


MODELS = {
    "Mamba-2": mamba2, "Falcon-H1": lambda: falcon(False), "Falcon-H1 with norm": lambda: falcon(True), "Granite": granite,
    "Bamba": bamba,
}  # fmt: skip


@pytest.fixture(params=MODELS)
def pair(request):
    """The library's model, and the same on our kernels."""
    torch.manual_seed(3)
    plain = MODELS[request.param]()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("dt_bias"):
                parameter.normal_(-1.0)
    return plain, accelerate_(copy.deepcopy(plain))


def tokens(batch=3):
    return torch.randint(3, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def mixers(model):
    return [module for module in model.modules() if type(module).__name__.startswith("Accelerated")]


def test_training(pair, assert_close):
    plain, ours = pair
    x = tokens()
    for model in pair:
        model.train()(input_ids=x, labels=x).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        if p.grad is not None:
            assert_close(q[1].grad, p.grad, name, torch.float32)
    with torch.profiler.profile() as recorded:
        ours(input_ids=x, labels=x)
    names = [event.name for event in recorded.events()]
    assert names.count("compressm_cpp::ssd") == names.count("compressm_cpp::causal_conv1d") == len(mixers(ours)) > 0
    assert all(mixer.kernel_plan.backend == "cpp" for mixer in mixers(ours))


def test_prompt_and_decoding(pair, assert_close):
    plain, ours = (model.eval() for model in pair)
    x = tokens()
    with torch.no_grad():
        assert_close(ours(x).logits, plain(x).logits, "whole")
        outs = [model(x[:, :7], use_cache=True) for model in (plain, ours)]
        caches = [out.cache for out in outs]
        assert_close(outs[1].logits, outs[0].logits, "prompt")
        for step in range(7, LENGTH):
            token = x[:, step : step + 1]
            expected, actual = (
                model(token, cache=cache, use_cache=True) for model, cache in zip((plain, ours), caches, strict=True)
            )
            assert_close(actual.logits, expected.logits, f"step {step}")
        expected = plain.generate(x, max_new_tokens=5, do_sample=False)
        assert torch.equal(ours.generate(x, max_new_tokens=5, do_sample=False), expected)


def test_padding(pair, assert_close):
    plain, ours = (model.eval() for model in pair)
    x, mask = tokens(), torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        expected, actual = (model(x, attention_mask=mask).logits for model in (plain, ours))
    assert_close(actual[:, 4:], expected[:, 4:], "behind the padding")


def test_there_and_back_and_after_a_cut(pair):
    plain, ours = pair
    with torch.no_grad():
        for model in pair:
            compress(model, FixedRank(4), calibration=[{"input_ids": tokens()}], multiple_of=1, refine=0)
        torch.testing.assert_close(ours(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    accelerate_(ours, mode=False)
    assert not mixers(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in plain.modules()]


def test_refused_without_a_change():
    model = mamba2()
    model.backbone.layers[1].mixer.activation = "gelu"
    with pytest.raises(ModelError, match=r"layers\.1\.mixer.*activation 'gelu'"):
        accelerate_(model)
    assert not mixers(model)
    with pytest.raises(ModelError, match="has no mixer that compressm knows"):
        accelerate_(torch.nn.Linear(2, 2))


class Wrapped(torch.nn.Module):
    """A convolution that is more than its parameters, as an adapter library leaves it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    weight, bias = (property(lambda self, name=name: getattr(self.base_layer, name)) for name in ("weight", "bias"))

    def forward(self, x):
        return self.base_layer(x)


@pytest.mark.parametrize("wrapped", [False, True])
def test_packed_sequences_do_not_see_each_other(wrapped, assert_close):
    torch.manual_seed(3)
    mixer = accelerate_(mamba2()).backbone.layers[0].mixer.eval()
    if wrapped:
        mixer.conv1d = Wrapped(mixer.conv1d)
    x = torch.randn(2, 9, 8)
    bounds = ([0, 4, 9], [0, 7, 9])
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2], dtype=torch.int32)
    with torch.no_grad():
        packed = mixer(x, seq_idx=seq_idx)
        for row, (begin, middle, end) in enumerate(bounds):
            for first, last in ((begin, middle), (middle, end)):
                assert_close(packed[row, first:last], mixer(x[row : row + 1, first:last])[0], f"row {row} from {first}")


def test_projected(pair, assert_close, tmp_path):
    """Maps behind the convolution: trained, decoded and stored by us, refused where the library would lose them."""
    model = pair[1].eval()
    size = model.config.to_dict()
    batch = tokens()
    report = compress(model, FixedRank(4), calibration=[batch], form="projected")
    assert all(layer.method.startswith("projected") and layer.rank_after == 4 for layer in report.layers)
    assert all(mixer.B_map.shape[1:] == (4, 6) for mixer in mixers(model))
    assert model.config.to_dict() == size
    with torch.no_grad():
        expected = model(batch).logits
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(batch, **options), model.generate(batch, use_cache=False, **options))
    with pytest.raises(ModelError, match="Store this model with"):
        model.save_pretrained(tmp_path / "lost")
    with pytest.raises(ModelError, match="has maps"):
        accelerate_(model, False)
    again = accelerate_(type(model)(model.config)).eval()
    load(save(tmp_path / "kept.safetensors", model), again)
    with torch.no_grad():
        assert torch.equal(again(batch).logits, expected)
    accelerate_(copy.deepcopy(pair[0])).save_pretrained(tmp_path / "plain")
