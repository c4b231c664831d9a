"""Hybrids whose layers keep different numbers of states: training, generation, saving, our loader; checkpoints in pieces."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from integrations.token_data import VOCABULARY, Tokens, tokens
from safetensors.torch import load_file, save_file

import compressm
from compressm.errors import ArgumentError, CheckpointError, ModelError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from compressm.integrations.transformers import CompressionCallback, accelerate_, from_pretrained, update_config  # noqa: E402

logging.getLogger("transformers").setLevel(logging.CRITICAL)
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
FIRST, SECOND = "model.layers.0.mamba", "model.layers.2.mamba"


def granite():
    """Two scans with attention between them, as Granite 4 has them."""
    torch.manual_seed(3)
    config = transformers.GraniteMoeHybridConfig(
        hidden_size=8, intermediate_size=8, shared_intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=16,
        mamba_chunk_size=8, layer_types=["mamba", "attention", "mamba"], **COMMON,
    )  # fmt: skip
    return transformers.GraniteMoeHybridForCausalLM(config)


def falcon():
    torch.manual_seed(3)
    config = transformers.FalconH1Config(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        mamba_d_ssm=16, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=16, mamba_chunk_size=8, **COMMON,
    )  # fmt: skip
    return transformers.FalconH1ForCausalLM(config)


def trainer(folder, model, **options):
    ranks = compressm.FixedRank({FIRST: 8, SECOND: 4})
    callback = CompressionCallback(
        policy=ranks, schedule=compressm.At([2]), uniform=False, calibration=[{"input_ids": tokens(4, seed=9)}]
    )
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[callback])


def uneven():
    model = granite()
    compressm.compress(model, compressm.FixedRank({FIRST: 8, SECOND: 4}), calibration=[{"input_ids": tokens()}])
    return update_config(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a checkpoint with layers of 8 and of 4 states."""
    folder = tmp_path_factory.mktemp("saved")
    uneven().save_pretrained(folder)
    return folder


@pytest.fixture
def pieces(saved, tmp_path):
    """A copy of it, to be damaged."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def sizes(model):
    return [layer.mamba.ssm_state_size for layer in (model.model.layers[0], model.model.layers[2])]


def test_every_layer_has_its_own_states_in_the_trainer(tmp_path):
    training = trainer(tmp_path, granite())
    training.train()
    model = training.model
    assert sizes(model) == [8, 4]
    said = json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())
    assert said["mamba_d_state"] == 8
    assert said["per_layer_config"] == {"2": {"mamba_d_state": 4}}
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        type(model).from_pretrained(tmp_path / "checkpoint-4")
    loaded, x = from_pretrained(tmp_path / "checkpoint-4"), tokens()
    assert type(loaded) is type(model)
    assert sizes(loaded) == [8, 4]
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model.eval()(x).logits)
        for decoding in (loaded, accelerate_(from_pretrained(tmp_path / "checkpoint-4", type(model)))):
            cached = decoding.generate(x, max_new_tokens=5, do_sample=False)
            assert torch.equal(cached, model.generate(x, max_new_tokens=5, do_sample=False, use_cache=False))
    again = trainer(tmp_path, granite())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sizes(again.model) == [8, 4]
    assert again.model.config.per_layer_config[2].mamba_d_state == 4


def test_what_was_loaded_shrinks_on(saved, tmp_path):
    model = from_pretrained(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.per_layer_config[2].mamba_d_state == 4
    compressm.compress(model, compressm.FixedRank(4), calibration=[{"input_ids": tokens()}])
    update_config(model).save_pretrained(tmp_path)
    assert "per_layer_config" not in json.loads((tmp_path / "config.json").read_text())
    x = tokens()
    for loaded in (type(model).from_pretrained(tmp_path, dtype="auto"), from_pretrained(tmp_path, dtype="auto")):
        assert loaded.config.mamba_d_state == 4
        assert torch.equal(loaded(x).logits, model(x).logits)


def test_what_else_the_config_says_of_single_layers_stays():
    model = granite()
    model.config.per_layer_config = {1: {"note": "a"}, 2: {"note": "b"}, 0: {"note": "c"}}
    compressm.compress(model, compressm.FixedRank({FIRST: 4, SECOND: 8}), calibration=[{"input_ids": tokens()}])
    said = update_config(model).config.to_dict()["per_layer_config"]
    assert said == {"0": {"note": "c", "mamba_d_state": 4}, "1": {"note": "a"}, "2": {"note": "b"}}
    compressm.compress(model, compressm.FixedRank({FIRST: 4, SECOND: 4}), calibration=[{"input_ids": tokens()}])
    config = update_config(model).config
    assert config.to_dict()["per_layer_config"] == {"0": {"note": "c"}, "1": {"note": "a"}, "2": {"note": "b"}}
    assert config.mamba_d_state == 4


def test_a_model_that_can_have_one_size_alone_is_refused(tmp_path):
    """FalconH1's multipliers are made by the library from the one size in the config."""
    model = falcon()
    names = [f"model.layers.{i}.mamba" for i in range(2)]
    with pytest.raises(ArgumentError, match=r"FalconH1Config has one mamba_d_state for all layers, as .*mup_vector"):
        trainer(tmp_path, model)
    compressm.compress(model, compressm.FixedRank(dict(zip(names, (8, 4), strict=True))), calibration=[{"input_ids": tokens()}])
    with pytest.raises(ModelError, match=r"mup_vector.*uniform=True"):
        update_config(model)
    assert model.config.mamba_d_state == 16


def _without(name):
    def damage(folder):
        (folder / name).unlink()

    return damage


def _truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def _config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def _no_json(folder):
    (folder / "config.json").write_text("{")


def _tensors(change):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _cut(state):
    state["model.layers.2.mamba.conv1d.weight"] = state["model.layers.2.mamba.conv1d.weight"][1:].clone()


DAMAGE = {
    "no config": (_without("config.json"), "has no config"),
    "no JSON": (_no_json, "has no config"),
    "no weights": (_without("model.safetensors"), "weights are not whole.*model.safetensors"),
    "half the weights": (_truncated, "weights are not whole"),
    "a tensor missing": (
        _tensors(lambda state: state.pop("model.layers.2.mamba.A_log")), r"no weights for model\.layers\.2\.mamba\.A_log"
    ),
    "a tensor of another size": (_tensors(_cut), "do not fit its config"),
    "other sizes in the config": (_config(per_layer_config={"0": {"mamba_d_state": 5}}), "do not fit its config"),
    "a size for attention": (_config(per_layer_config={"1": {"mamba_d_state": 5}}), r"of layers \[1\], which have none"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_half_a_checkpoint_is_named(pieces, name):
    damage, message = DAMAGE[name]
    damage(pieces)
    with pytest.raises(CheckpointError, match=f"(?s)^{pieces}: .*{message}"):
        from_pretrained(pieces)


def test_other_classes_are_refused(saved):
    for wrong in (transformers.AutoModelForCausalLM, torch.nn.Linear, "GraniteMoeHybridForCausalLM"):
        with pytest.raises(ArgumentError, match="model_class: expected a class of transformers' models"):
            from_pretrained(saved, wrong)
    with pytest.raises(CheckpointError, match="no-such-folder: has no config"):
        from_pretrained(saved / "no-such-folder")
