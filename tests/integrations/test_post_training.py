"""``compressm compress``: a checkpoint folder of transformers gets fewer states, loads as ever, or stays as it is."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from experiments.cli_cases import run

from compressm.errors import ArgumentError, CheckpointError, CompressmError, ConfigError, DataError, ModelError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

logging.getLogger("transformers").setLevel(logging.ERROR)
LETTERS = "abcdefghijklmnopqrst "
TEXT = "the cat sat on the mat and the dog sat on the log " * 40
COMMON = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
QUICK = ["--sequences", "6", "--held-out", "2", "--length", "16", "--refine", "8"]


def mamba2(**options):
    options = {"hidden_size": 8, "num_heads": 4, "head_dim": 4, "state_size": 16, "num_hidden_layers": 2} | options
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(n_groups=1, chunk_size=4, **COMMON, **options))


def granite():
    """A scan and attention, each with experts behind it."""
    config = transformers.GraniteMoeHybridConfig(
        hidden_size=8, intermediate_size=8, shared_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=16,
        mamba_chunk_size=4, layer_types=["mamba", "attention"], **COMMON,
    )  # fmt: skip
    return transformers.GraniteMoeHybridForCausalLM(config)


DELTA = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def kimi_linear():
    config = transformers.KimiLinearConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=4,
        qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4, head_dim=4, linear_head_dim=16, linear_num_heads=2,
        layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "dense"], **COMMON,
    )  # fmt: skip
    return transformers.KimiLinearForCausalLM(config)


def half_used(model):
    """Every other channel of keys and queries is zero, and values are so large that the norm's eps hardly matters."""
    taps = model.model.layers[0].linear_attn.conv1d.weight
    with torch.no_grad():
        taps[:64:2] = 0
        taps[64:] *= 100
    return model


def qwen3_next():
    """Projections that are interleaved by heads of keys, and experts."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return half_used(transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**COMMON, **DELTA, **experts)))


def olmo_hybrid():
    """Steps that may turn what they erase around."""
    config = transformers.OlmoHybridConfig(**COMMON, **DELTA, linear_allow_neg_eigval=True)
    return half_used(transformers.OlmoHybridForCausalLM(config))


def attention():
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **COMMON
    )
    return transformers.LlamaForCausalLM(config)


def tokenizer():
    """One token a letter, from 3 on."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i + 3 for i, c in enumerate(LETTERS)} | {"?": 0}, "?"))
    inner.pre_tokenizer = split
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", pad_token="?")


def stored(folder, build=mamba2, *, texts=True):
    torch.manual_seed(3)
    build().save_pretrained(folder)
    if texts:
        tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def ids(path):
    rows = np.random.default_rng(0).integers(3, 23, (9, 17))
    if path.suffix == ".npy":
        np.save(path, rows)
    else:
        path.write_text(json.dumps(rows.tolist()))
    return path


SIZE = {mamba2: "state_size", granite: "mamba_d_state", qwen3_next: "linear_key_head_dim", olmo_hybrid: "linear_key_head_dim"}
LOST = {mamba2: 0.5, granite: 0.5, qwen3_next: 0.05, olmo_hybrid: 0.05}


@pytest.mark.parametrize("build", SIZE)
def test_it_loads_and_generates_with_half_the_states(build, tmp_path, text):
    folder, out = stored(tmp_path / "model", build), tmp_path / "new" / "half"
    before = build.__name__, {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run("compress", folder, "--states", 8, "--data", text, "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    for words in ("states per layer", "16", "held-out loss", "bytes of state per sequence", f"stored in {out}"):
        assert "".join(words.split()) in "".join(result.output.split())
    assert before == (build.__name__, {path.name: path.read_bytes() for path in folder.iterdir()})
    assert [path.name for path in out.parent.iterdir()] == ["half"]
    model, old = (transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (out, folder))
    assert getattr(model.config, SIZE[build]) == 8
    assert transformers.AutoTokenizer.from_pretrained(out)("cat")["input_ids"] == [5, 3, 22]
    x = torch.tensor([tokenizer()("the dog sat")["input_ids"]])
    with torch.no_grad():
        assert (model(x).logits - old(x).logits).norm() < LOST[build] * old(x).logits.norm()
        steps = model.generate(x, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
        full = model(steps.sequences).logits[:, x.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack(steps.logits, 1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ids.npy", "ids.json"])
def test_ids_and_json(kind, tmp_path):
    folder, out = stored(tmp_path / "model", texts=False), tmp_path / "out"
    data = tmp_path / "data"
    data.mkdir()
    ids(data / kind)
    result = run("compress", folder, "--states", 8, "--data", data, "--out", out, *QUICK, "--json")
    told = json.loads(result.stdout)
    assert 0 < told["seconds"]
    assert told["loss_before"] != told["loss_after"]
    reduction = told["reduction"]
    assert set(reduction["ranks"].values()) == {8}
    assert reduction["state_bytes_after"] < reduction["state_bytes_before"]
    assert all(layer["refine_error_before"] > 0 for layer in reduction["layers"])
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    x = torch.from_numpy(np.concatenate(np.random.default_rng(0).integers(3, 23, (9, 17)))[: 8 * 16]).view(8, 16)
    with torch.no_grad():
        losses = [float(model(x[i : i + 1], labels=x[i : i + 1]).loss) for i in (3, 7)]
    assert np.mean(losses) == pytest.approx(told["loss_after"], rel=1e-4)


def test_what_is_wrong_is_named_and_nothing_written(tmp_path, text):
    folder, out = stored(tmp_path / "model"), tmp_path / "out"
    bare, other = stored(tmp_path / "bare", texts=False), stored(tmp_path / "other", attention)
    kimi = stored(tmp_path / "kimi", kimi_linear)
    torn, lacking = stored(tmp_path / "torn"), stored(tmp_path / "lacking")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    model = mamba2(num_hidden_layers=1)
    model.save_pretrained(lacking)
    (lacking / "config.json").write_text((folder / "config.json").read_text())
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("kept")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "no.json").write_text('{"a": 1}')
    np.save(tmp_path / "large.npy", np.full(900, 24))
    np.save(tmp_path / "real.npy", np.ones(900))
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (tmp_path / "none", 8, text, out, [], CheckpointError, "none: no such folder"),
        (empty, 8, text, out, [], CheckpointError, "no config.json"),
        (torn, 8, text, out, [], CheckpointError, "torn: cannot be loaded"),
        (lacking, 8, text, out, [], CheckpointError, "lacks .* of the model's weights"),
        (other, 8, text, out, [], ModelError, "no state-space layer"),
        (kimi, 8, text, out, [], ConfigError, r"only lose states behind new parameters \(k_map, q_map\).*Nothing was written"),
        (folder, 6, text, out, [], ArgumentError, "multiple of 4.* 6 states"),
        (folder, 8, text, out, ["--multiple-of", "3"], ConfigError, "--states 8: expected a multiple of 3"),
        (folder, 16, text, out, [], ConfigError, "--states 16: the layers have 16"),
        (folder, 0, text, out, [], ConfigError, "--states: got 0"),
        (folder, 8, text, out, ["--device", "nonsense"], ConfigError, "device: got 'nonsense'"),
        (folder, 8, text, out, ["--refine", "-1"], ArgumentError, "refine: expected a number of steps"),
        (folder, 8, text, out, ["--length", "1"], ConfigError, "--length: got 1, expected 2"),
        (folder, 8, text, out, ["--length", "1000"], DataError, "2000 tokens, expected at least 8000"),
        (folder, 8, tmp_path / "nothing", out, [], DataError, "nothing: no such file"),
        (folder, 8, tmp_path / "binary", out, [], DataError, "cannot be read as text"),
        (bare, 8, text, out, [], DataError, "has no tokenizer"),
        (bare, 8, tmp_path / "no.json", out, [], DataError, "cannot be read as token ids"),
        (bare, 8, tmp_path / "large.npy", out, [], DataError, "ids from 24 to 24, expected 0 to 23"),
        (bare, 8, tmp_path / "real.npy", out, [], DataError, "holds float64"),
        (folder, 8, text, full, [], CheckpointError, "full: exists already"),
        (folder, 8, text, text, [], CheckpointError, "text.txt: exists already"),
        (folder, 8, text, text / "below", [], CheckpointError, "below: .* is no folder, expected a folder that can be written"),
    ]
    for checkpoint, states, data, target, more, kind, words in cases:
        there = sorted(tmp_path.iterdir())
        with pytest.raises(CompressmError, match=words) as caught:
            run("compress", checkpoint, "--states", states, "--data", data, "--out", target, *QUICK, *more)
        assert type(caught.value) is kind
        assert sorted(tmp_path.iterdir()) == there
    assert [path.name for path in full.iterdir()] == ["file"]


def test_nothing_is_half_there(tmp_path, text, monkeypatch):
    folder, out = stored(tmp_path / "model"), tmp_path / "out"
    saved = transformers.PreTrainedTokenizerFast.save_pretrained

    def full(self, *arguments, **options):
        saved(self, *arguments, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    there = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"out: cannot be written .*No space left"):
        run("compress", folder, "--states", 8, "--data", text, "--out", out, *QUICK)
    assert sorted(tmp_path.iterdir()) == there
