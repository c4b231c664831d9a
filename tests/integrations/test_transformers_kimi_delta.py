"""transformers' Kimi Delta Attention: our kernels give the library's numbers, projected reductions, what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from compressm import At, Compressor, FixedRank, compress, inspect, load, save
from compressm.errors import ArgumentError, ModelError

transformers = pytest.importorskip("transformers")

from compressm.integrations.transformers import accelerate_  # noqa: E402
from compressm.layers.gated_delta_mixer import contraction, read  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
VOCABULARY, LENGTH = 23, 12
KINDS = {
    "kimi_linear": ("KimiLinearConfig", "KimiLinearDeltaAttention"),
    "glm5_next": ("Glm5NextTextConfig", "Glm5NextTextLinearAttention"),
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridDeltaAttention"),
}


def config(name):
    made = getattr(transformers, KINDS[name][0])()
    made.hidden_size, made.linear_head_dim, made.linear_num_heads = 8, 6, 2
    return made


@pytest.fixture(params=KINDS)
def layer(request):
    torch.manual_seed(0)
    module = getattr(getattr(transformers.models, request.param), f"modeling_{request.param}")
    made = getattr(module, KINDS[request.param][1])(config(request.param), 0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
        made.o_norm.weight.fill_(1)
    return nn.Sequential(made)


def hidden(batch=3, seed=1):
    return torch.randn(batch, LENGTH, 8, generator=torch.Generator().manual_seed(seed))


def test_the_numbers_are_the_library_s(layer, assert_close):
    """The gradients of both are those of float64."""
    ours, exact, x = accelerate_(copy.deepcopy(layer)), accelerate_(copy.deepcopy(layer)).double(), hidden()
    mask = torch.ones(3, LENGTH)
    mask[0, :4] = 0
    for model in (layer, ours, exact):
        model(x.to(next(model.parameters()).dtype)).square().sum().backward()
    assert_close(ours(x), layer(x))
    assert_close(ours[0](x, attention_mask=mask), layer[0](x, attention_mask=mask))
    for (name, oracle), theirs, own in zip(exact.named_parameters(), layer.parameters(), ours.parameters(), strict=True):
        assert_close(theirs.grad, oracle.grad, name)
        assert_close(own.grad, oracle.grad, name)
    assert ours[0].kernel_plan.op == "gated_delta_rule"


def test_what_no_token_uses_is_cut_without_a_change(layer):
    with torch.no_grad():
        layer[0].conv1d.weight[:24].view(2, 2, 6, -1)[:, :, [1, 4]] = 0
    model, x = accelerate_(layer).requires_grad_(False), hidden()
    before = model(x)
    (report,) = compress(model, FixedRank(4), calibration=[x]).layers
    assert report.method == "projected, subset of keys"
    assert report.state_bytes_after < report.state_bytes_before
    assert model[0].k_map.shape == (2, 4, 6)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)
    assert model[0].conv1d.weight.shape[0] == 36
    (report,) = compress(model, FixedRank(3), calibration=[x], refine=0).layers
    assert (report.rank_before, report.rank_after) == (4, 3)


def test_rows_decay_like_the_channels_that_they_mix(layer):
    model, x = accelerate_(layer).requires_grad_(False), hidden()
    whole = read(model[0], x)
    compress(model, FixedRank(3), calibration=[x], refine=0)
    maps, cut = model[0].k_map, read(model[0], x)
    for head in range(2):
        kept = maps[head].argmax(-1)
        torch.testing.assert_close(cut.g[:, :, head], whole.g[:, :, head, kept])
        torch.testing.assert_close(cut.k[:, :, head], whole.k[:, :, head, kept])
    maps.copy_(torch.linalg.qr(torch.randn(2, 6, 3)).Q.mT)
    cut = read(model[0], x)
    torch.testing.assert_close(cut.g, torch.einsum("blhk,hrk->blhr", whole.g, maps.square()))
    assert bool((cut.g <= 0).all())


def test_training_goes_on(layer):
    model, x = accelerate_(layer), hidden()
    optimizer = torch.optim.AdamW([{"params": [p for n, p in model.named_parameters() if "proj" in n]}, {"params": [
        p for n, p in model.named_parameters() if "proj" not in n
    ]}], lr=1e-2)  # fmt: skip
    compressor = Compressor(model, optimizer, policy=FixedRank(3), schedule=At([1]), calibration=[x])
    losses = []
    for _ in range(6):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
        losses.append(loss.item())
    assert losses[-1] < losses[2]
    held = optimizer.param_groups[1]["params"]
    assert any(p is model[0].k_map for p in held)
    assert any(p is model[0].q_map for p in held)
    assert torch.linalg.matrix_norm(contraction(model[0].k_map), 2).max() < 1 + 1e-6
    assert (model[0].k_map.argmax(-1).diff() != 0).all()


def test_what_is_refused(layer):
    with pytest.raises(ArgumentError, match=r"whose forward has no maps.*accelerate_"):
        compress(layer, FixedRank(3), calibration=[hidden()])
    model = accelerate_(layer)
    with pytest.raises(ArgumentError, match=r"as its library has one size for keys, values, gate and norm.*got 'strict'"):
        compress(model, FixedRank(3), calibration=[hidden()], form="strict")
    assert 0 < inspect(model).layers[0].slowest <= 1
    compress(model, FixedRank(3))
    with pytest.raises(ModelError, match="has maps, expected none"):
        accelerate_(model, False)


def test_a_model_decodes_and_is_stored_by_us(tmp_path):
    torch.manual_seed(3)
    made = transformers.KimiLinearConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
        linear_head_dim=6, linear_num_heads=2, layer_types=["linear_attention", "full_attention"], num_experts=2,
        num_experts_per_tok=1, first_k_dense_replace=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    plain = transformers.KimiLinearForCausalLM(made).eval()
    model = accelerate_(copy.deepcopy(plain))
    x = torch.randint(3, VOCABULARY, (3, LENGTH))
    compress(model, FixedRank(3), calibration=[x], refine=5)
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model.generate(x, **options), model.generate(x, use_cache=False, **options))
        with pytest.raises(ModelError, match="Store this model with"):
            model.save_pretrained(tmp_path / "lost")
        again = accelerate_(copy.deepcopy(plain))
        load(save(tmp_path / "kept.safetensors", model), again)
        assert torch.equal(again(x).logits, model(x).logits)
