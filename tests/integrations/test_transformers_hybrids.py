"""Hybrids of transformers, whose other layers are attention and experts: their Mamba-2 mixers shrink while the Trainer runs."""

from __future__ import annotations

import logging

import pytest
import torch

import compressm

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from compressm.integrations.transformers import CompressionCallback  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
VOCABULARY, LENGTH = 23, 12


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


def tokens(count=3, seed=0):
    return torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = tokens(1, seed=index)[0]
        return {"input_ids": row, "labels": row}


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True, "bf16": True}])
def test_a_hybrid_shrinks_in_the_trainer_and_round_trips(tmp_path, options):
    callback = CompressionCallback(
        policy=compressm.Shrink(0.5), schedule=compressm.At([2, 4]), calibration=[{"input_ids": tokens(4, seed=9)}]
    )
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=granite(), args=args, train_dataset=Tokens(), callbacks=[callback])
    trainer.train()
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
