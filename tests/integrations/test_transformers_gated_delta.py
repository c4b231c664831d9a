"""transformers' gated delta rule mixers: our kernels give the library's numbers; both forms, saved and loaded again."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from compressm import At, FixedRank, compress, load, save
from compressm.errors import ArgumentError, ModelError

transformers = pytest.importorskip("transformers")

from compressm.integrations.transformers import CompressionCallback, accelerate_, update_config  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
VOCABULARY, LENGTH = 23, 12
COMMON = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "initializer_range": 0.3,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def qwen3_next():
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**COMMON, **experts))


def qwen3_5():
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**COMMON))


def olmo():
    return transformers.OlmoHybridForCausalLM(transformers.OlmoHybridConfig(**COMMON, linear_allow_neg_eigval=True))


MODELS = {"Qwen3-Next": qwen3_next, "Qwen3.5": qwen3_5, "OLMo-hybrid": olmo}


@pytest.fixture(params=MODELS)
def pair(request):
    """The library's model, and the same on our kernels."""
    torch.manual_seed(3)
    plain = MODELS[request.param]().eval()
    return plain, accelerate_(copy.deepcopy(plain))


def tokens(batch=3, seed=0):
    return torch.randint(3, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def mixers(model):
    return [module for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet")]


def generations(model, batch):
    """With a cache, and without."""
    options = {"max_new_tokens": 4, "do_sample": False}
    return model.generate(batch, **options), model.generate(batch, use_cache=False, **options)


def test_training_and_decoding_are_the_library_s(pair, assert_close):
    plain, ours = pair
    assert len(mixers(ours)) == 1
    x, mask = tokens(), torch.ones(3, LENGTH, dtype=torch.long)
    for model in pair:
        model(x, labels=x).loss.backward()
    for (name, expected), actual in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if not name.endswith("mlp.gate.weight"):  # of one expert of two: nothing but rounding
            assert_close(actual.grad, expected.grad, name)
    mask[1, :4] = 0
    with torch.no_grad():
        assert_close(ours(x).logits, plain(x).logits, "whole")
        masked = [model(x, attention_mask=mask).logits[:, 4:] for model in pair]
        assert_close(masked[1], masked[0], "behind the padding")
        cached, whole = generations(ours, x)
        assert torch.equal(cached, whole)
        assert torch.equal(cached, plain.generate(x, max_new_tokens=4, do_sample=False))
    assert mixers(ours)[0].kernel_plan.op == "gated_delta_rule"


def test_strict_is_saved_and_loaded_by_the_library(pair, tmp_path, assert_close):
    plain, ours = pair
    with torch.no_grad():
        for model in pair:
            (layer,) = compress(model, FixedRank(8), calibration=[tokens()], refine=0).layers
            assert layer.method == "strict, backward subset"
            assert layer.state_bytes_after < 0.6 * layer.state_bytes_before
        assert_close(ours(tokens()).logits, plain(tokens()).logits)
        update_config(plain)
        plain.save_pretrained(tmp_path)
        again = type(plain).from_pretrained(tmp_path).eval()
        assert again.config.linear_key_head_dim == 8
        torch.testing.assert_close(again(tokens()).logits, plain(tokens()).logits)
        cached, whole = generations(again, tokens())
        assert torch.equal(cached, whole)
    for name, module in again.named_modules():
        if hasattr(module, "out_features"):
            assert module.weight.shape[0] == module.out_features == plain.get_submodule(name).out_features, name
    assert mixers(plain)[0].conv_dim == mixers(plain)[0].conv1d.out_channels == 2 * 2 * 8 + 16


def test_projected_is_stored_by_us(pair, tmp_path):
    model, batch = pair[1], tokens()
    with pytest.raises(ArgumentError, match="accelerate_"):
        compress(pair[0], FixedRank(8), form="projected")
    (layer,) = compress(model, FixedRank(5), calibration=[batch], form="projected", refine=0).layers
    assert layer.method == "projected, orthonormal keys"
    assert mixers(model)[0].k_map.shape == (2, 5, 16)
    assert model.config.linear_key_head_dim == 16
    cached, whole = generations(model, batch)
    assert torch.equal(cached, whole)
    with pytest.raises(ModelError, match="Store this model with"):
        model.save_pretrained(tmp_path / "lost")
    again = accelerate_(copy.deepcopy(pair[0]))
    load(save(tmp_path / "kept.safetensors", model), again)
    with torch.no_grad():
        assert torch.equal(again(batch).logits, model(batch).logits)


def test_a_trainer_halves_the_keys(tmp_path):
    """Fine-tuned with a cut, saved by the Trainer, loaded by the library."""
    torch.manual_seed(0)
    model = qwen3_next()
    data = [{"input_ids": row, "labels": row} for row in tokens(16)]
    callback = CompressionCallback(
        policy=FixedRank(8), schedule=lambda total: At([2]), calibration=[tokens(4)]
    )
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=4, per_device_train_batch_size=4, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert set(callback.compressor.ranks.values()) == {8}
    trainer.save_model(tmp_path / "saved")
    again = transformers.Qwen3NextForCausalLM.from_pretrained(tmp_path / "saved").eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits)
        cached, whole = generations(again, tokens())
    assert torch.equal(cached, whole)
