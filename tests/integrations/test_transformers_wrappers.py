"""Models that hide the transformers model inside of them from the Trainer: PEFT, torch.compile, a module of one's own."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from integrations.token_data import VOCABULARY, Counting, counted
from torch import nn

import compressm
from compressm.compression import StaleCopyWarning
from compressm.errors import ArgumentError, ModelError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from transformers import MambaConfig, MambaForCausalLM, MambaModel  # noqa: E402

from compressm.integrations.transformers import CompressionCallback, save_base, update_config  # noqa: E402

logging.getLogger("transformers").setLevel(logging.CRITICAL)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
REDUCED = "has reduced the base of this model"


def config():
    return MambaConfig(
        vocab_size=VOCABULARY, hidden_size=8, state_size=6, num_hidden_layers=2, initializer_range=0.5, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def base():
    torch.manual_seed(3)
    return MambaForCausalLM(config())


def lora(model, *targets, **options):
    torch.manual_seed(5)
    targets = list(targets or ["in_proj"])
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options))


class Classifier(nn.Module):
    """A head around a backbone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.backbone, self.head = MambaModel(config()), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.backbone(input_ids).last_hidden_state)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits.mT, labels), "logits": logits}


def trainer(folder, model, callback=None, **options):
    settings = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 2, "save_steps": 3, "learning_rate": 1e-2,
        "report_to": [], "use_cpu": True, "seed": 5, "disable_tqdm": True, "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    if callback is None:
        callback = CompressionCallback(policy=compressm.Energy(tau=0.3), schedule=compressm.At([4]), calibration=counted())
    args = transformers.TrainingArguments(**settings | options)
    return transformers.Trainer(model=model, args=args, train_dataset=Counting(), eval_dataset=Counting(), callbacks=[callback])


def ranks(model):
    return {module.A_log.shape[1] for module in model.modules() if hasattr(module, "A_log")}


def logits(model):
    with torch.no_grad():
        out = model.eval()(counted()[0]["input_ids"])
    return out["logits"]


class TestAdapters:
    def test_merged_model_and_adapter_load(self, tmp_path, assert_close):
        model = lora(base(), modules_to_save=["norm_f"])
        training = trainer(tmp_path, model)
        with pytest.warns(StaleCopyWarning, match=REDUCED):
            training.train()
        (rank,) = ranks(model)
        assert rank == model.config.state_size < 6
        training.save_model(str(tmp_path / "adapter"))
        save_base(model, tmp_path / "saved")
        expected = logits(model)
        for folder in (tmp_path / "saved", tmp_path / "checkpoint-8" / "base"):
            reduced = MambaForCausalLM.from_pretrained(folder)
            assert reduced.config.state_size == rank
            assert_close(logits(peft.PeftModel.from_pretrained(reduced, tmp_path / "adapter")), expected, str(folder))
        assert not (tmp_path / "checkpoint-3" / "base").exists()
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert_close(logits(MambaForCausalLM.from_pretrained(tmp_path / "merged")), expected, "merged")

    def test_adapters_of_transformers_itself(self, tmp_path, assert_close):
        model = base()
        compressm.compress(model, compressm.FixedRank(2))
        update_config(model)
        expected = logits(model)
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False), model)
        model._hf_peft_config_loaded = True  # what add_adapter does, which asks for another version of peft
        assert (logits(model) - expected).norm() > 0.1 * expected.norm()
        save_base(model, tmp_path)
        assert model._hf_peft_config_loaded
        assert_close(logits(MambaForCausalLM.from_pretrained(tmp_path)), expected, "stored base")

    def test_resumes_on_the_stored_base_only(self, tmp_path):
        def run(folder, model, **options):
            training = trainer(folder, model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", StaleCopyWarning)
                training.train(**options)
            return dict(model.named_parameters())

        whole = run(tmp_path, lora(base()))
        checkpoint = tmp_path / "checkpoint-6"
        with pytest.raises(ModelError, match="its adapters belong to a base with states"):
            run(tmp_path / "again", lora(base()), resume_from_checkpoint=str(checkpoint))
        stored = MambaForCausalLM.from_pretrained(checkpoint / "base")
        for model, start in ((lora(stored), checkpoint), (lora(base()), tmp_path / "checkpoint-3")):
            resumed = run(tmp_path / "again", model, resume_from_checkpoint=str(start))
            assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_refusals(self, tmp_path):
        model = lora(base(), "in_proj", "x_proj")
        with pytest.raises(ModelError, match=r"x_proj\.weight is not a plain parameter.*LoRA"):
            trainer(tmp_path, model)
        with pytest.raises(ModelError, match=r"x_proj\.weight is not a plain parameter.*LoRA"):
            compressm.compress(model, compressm.FixedRank(2), calibration=counted())
        assert ranks(model) == {6}
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
        with pytest.raises(ArgumentError, match="load_best_model_at_end"):
            trainer(tmp_path, lora(base()), **best)
        with pytest.raises(ModelError, match="no transformers model inside"):
            save_base(nn.Linear(2, 2), tmp_path / "nothing")

    def test_without_a_reduction_nothing_is_said_or_stored(self, tmp_path):
        run = CompressionCallback(policy=compressm.FixedRank(6), schedule=compressm.At([4]), calibration=counted())
        trainer(tmp_path, lora(base()), run).train()
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (3, 6, 8)]
        assert not list(tmp_path.glob("*/base"))


def test_a_head_around_a_backbone(tmp_path):
    model = Classifier()
    training = trainer(tmp_path, model)
    training.train()
    (rank,) = ranks(model)
    assert model.backbone.config.state_size == rank < 6
    model.backbone.save_pretrained(tmp_path / "backbone")
    loaded = MambaModel.from_pretrained(tmp_path / "backbone")
    ids = counted()[0]["input_ids"]
    assert torch.equal(loaded(ids).last_hidden_state, model.backbone(ids).last_hidden_state)
    again = Classifier()
    trainer(tmp_path, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.backbone.config.state_size == rank
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_update_config_looks_through_wrappers():
    plain = base()
    for model in (plain, torch.compile(plain, backend="eager"), lora(copy.deepcopy(plain)), nn.ModuleList([plain])):
        compressm.compress(model, compressm.FixedRank(2))
        assert update_config(model) is model
        held = next(module for module in model.modules() if isinstance(module, MambaForCausalLM))
        assert held.config.state_size == 2
        plain = base()
    two = nn.ModuleList([base(), base()])
    compressm.compress(two[1], compressm.FixedRank(3))
    update_config(two)
    assert [model.config.state_size for model in two] == [6, 3]
    with pytest.raises(ModelError, match="holds no transformers model"):
        update_config(nn.Linear(2, 2))
