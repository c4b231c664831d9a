"""Hybrids of transformers, whose other layers are attention and experts: their Mamba-2 mixers shrink while the Trainer runs."""

from __future__ import annotations

import logging

import pytest
import torch
from integrations.token_data import VOCABULARY, Tokens, tokens

import compressm

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from compressm.errors import ModelError  # noqa: E402
from compressm.integrations.transformers import CompressionCallback, save_base  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)


def granite():
    """A scan and attention, each with experts behind it, as Granite 4 has them."""
    torch.manual_seed(3)
    config = transformers.GraniteMoeHybridConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, shared_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, mamba_n_heads=4,
        mamba_d_head=4, mamba_d_state=128, mamba_chunk_size=8, layer_types=["mamba", "attention"], pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return transformers.GraniteMoeHybridForCausalLM(config)


def training(folder, model, **options):
    """128, 64 and 32 states within 5 steps."""
    callback = CompressionCallback(
        policy=compressm.Shrink(0.5), schedule=compressm.At([2, 4]), calibration=[{"input_ids": tokens(4, seed=9)}]
    )
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", **options,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[callback])


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True, "bf16": True}])
def test_a_hybrid_shrinks_in_the_trainer_and_round_trips(tmp_path, options):
    trainer = training(tmp_path, granite(), **options)
    trainer.train()
    callback = next(call for call in trainer.callback_handler.callbacks if isinstance(call, CompressionCallback))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    layer = model.model.layers[0].mamba
    assert [report.ranks for report in callback.compressor.history] == [{"model.layers.0.mamba": n} for n in (64, 32)]
    assert model.config.mamba_d_state == layer.ssm_state_size == 32
    assert layer.in_proj.weight.shape == (16 + 16 + 2 * 32 + 4, 8)
    trainer.save_model(str(tmp_path / "model"))
    again = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32)
    x = tokens()
    with torch.no_grad():
        logits = model.eval()(x).logits
        torch.testing.assert_close(again.eval()(x).logits, logits)
        cached = again.generate(x[:1], max_new_tokens=4, do_sample=False)
        assert torch.equal(cached, again.generate(x[:1], max_new_tokens=4, do_sample=False, use_cache=False))


LORA = {"r": 2, "init_lora_weights": False}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
class TestAdapters:
    """LoRA beside the scan trains through a reduction; on in_proj, whose rows a reduction selects, it is refused first."""

    def test_beside_the_scan(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(granite(), peft.LoraConfig(target_modules=["out_proj", "q_proj"], **LORA))
        with pytest.warns(compressm.compression.StaleCopyWarning, match="reduced the base"):
            training(tmp_path, model).train()
        base = model.get_base_model()
        assert base.config.mamba_d_state == base.model.layers[0].mamba.ssm_state_size == 32
        model.save_pretrained(tmp_path / "adapters")
        save_base(model, tmp_path / "base")
        again = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapters")
        x = tokens()
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(x).logits, model.eval()(x).logits)

    def test_on_the_projection(self, tmp_path):
        peft = pytest.importorskip("peft")
        plain = granite()
        model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["in_proj"], **LORA))
        message = r"in_proj\.weight is not a plain parameter.*merge adapters such as LoRA, or leave this projection out"
        with pytest.raises(ModelError, match=message):
            training(tmp_path, model)
        with pytest.raises(ModelError, match=message):
            compressm.compress(model, compressm.FixedRank(32))
        assert plain.model.layers[0].mamba.ssm_state_size == 128
        merged = model.merge_and_unload().requires_grad_(True)
        training(tmp_path, merged).train()
        assert merged.config.mamba_d_state == 32
