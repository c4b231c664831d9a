"""transformers' own Mamba model and Trainer, on CPU."""

from __future__ import annotations

import copy
import json
import logging
from contextlib import nullcontext

import pytest
import torch
from integrations.token_data import LENGTH, VOCABULARY, Counting, counted

import compressm
from compressm.errors import ArgumentError, ModelError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM  # noqa: E402

from compressm.integrations.transformers import (  # noqa: E402
    AcceleratedMambaMixer,
    CompressionCallback,
    accelerate_,
    from_pretrained,
    update_config,
)

logging.getLogger("transformers").setLevel(logging.ERROR)


def build(layers=2, dtype=torch.float32, **options):
    """A tiny language model whose scans matter."""
    torch.manual_seed(3)
    config = {"vocab_size": VOCABULARY, "hidden_size": 8, "state_size": 6, "num_hidden_layers": layers, "pad_token_id": 0}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5} | options
    model = MambaForCausalLM(MambaConfig(**config)).to(dtype)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.dt_proj.bias.add_(2.0)
            block.mixer.x_proj.weight.mul_(8.0)
            block.mixer.conv1d.bias.normal_()
    return model


def tokens(count=3, length=LENGTH):
    return torch.randint(3, VOCABULARY, (count, length))


def mixers(model):
    return [block.mixer for block in model.backbone.layers]


def sizes(model):
    return [(m.ssm_state_size, m.A_log.shape[1], m.x_proj.out_features, m.x_proj.weight.shape[0]) for m in mixers(model)]


@pytest.fixture(params=["as built", "reduced"])
def pair(request):
    """The library's model and its accelerated copy."""
    ours = build()
    if request.param == "reduced":
        compressm.compress(ours, compressm.FixedRank(3), calibration=[tokens()])
    plain = copy.deepcopy(ours)
    assert accelerate_(ours) is ours
    return plain, ours


class TestAccelerate:
    def test_training(self, pair, assert_close):
        plain, ours = pair
        x = tokens()
        losses = [model.train()(input_ids=x, labels=x).loss for model in pair]
        for loss in losses:
            loss.backward()
        assert_close(losses[1], losses[0], "loss")
        for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert_close(q.grad, p.grad, name)
        assert all(m.kernel_plan.backend == "cpp" for m in mixers(ours))
        with torch.profiler.profile() as recorded:
            ours(input_ids=x, labels=x)
        scans = {"compressm_cpp::selective_scan", "compressm_cpp::mamba_mixer"}
        assert len([e for e in recorded.events() if e.name in scans]) == len(mixers(ours))

    def test_prefill_and_decode(self, pair, assert_close):
        x = tokens()
        caches, full = [], pair[0].eval()(x).logits
        with torch.no_grad():
            for model in pair:
                out = model.eval()(x[:, :7], use_cache=True)
                caches.append(out.cache)
                assert_close(out.logits, full[:, :7], "prompt")
            for step in range(7, LENGTH):
                logits = [model(x[:, step : step + 1], cache=c).logits for model, c in zip(pair, caches, strict=True)]
                assert_close(logits[1], logits[0], f"step {step}")
                assert_close(logits[1][:, 0], full[:, step], f"step {step} and full forward")
        for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
            assert_close(mine.recurrent_states[0], theirs.recurrent_states[0], "recurrent state")
            assert_close(mine.conv_states[0], theirs.conv_states[0], "convolution state")

    def test_state_bytes_are_those_of_the_cache(self, pair):
        model = pair[0].eval()
        cache = model(tokens(1), use_cache=True).cache
        held = sum(layer.conv_states[0].nbytes + layer.recurrent_states[0].nbytes for layer in cache.layers)
        assert held == compressm.compress(model, compressm.FixedRank(2)).state_bytes_before

    def test_a_cache_goes_on_with_several_tokens(self, pair, assert_close):
        ours, x = pair[1].eval(), tokens()
        with torch.no_grad():
            full = ours(x).logits
            cache = ours(x[:, :5], use_cache=True).cache
            assert_close(ours(x[:, 5:9], cache=cache).logits, full[:, 5:9], "continuation")
            assert_close(ours(x[:, 9:10], cache=cache).logits, full[:, 9:10], "token behind it")

    def test_padding(self, pair, assert_close):
        x, mask = tokens(), torch.ones(3, LENGTH, dtype=torch.long)
        mask[0, :4] = mask[1, :1] = 0
        logits = [model.eval()(x, attention_mask=mask).logits for model in pair]
        assert_close(logits[1], logits[0], "logits")
        alone = pair[1](x[:1, 4:]).logits
        assert_close(logits[1][:1, 4:], alone, "without the padding")
        generated = [m.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in pair]
        assert torch.equal(*generated)
        assert generated[0].shape[1] > LENGTH

    def test_beams_and_gradient_checkpointing(self, pair, assert_close):
        x = tokens(2)
        generated = [m.eval().generate(x, max_new_tokens=5, num_beams=3, do_sample=False) for m in pair]
        assert torch.equal(*generated)
        grads = []
        for model in pair:
            model.activation_checkpointing_enable()
            model.train()(input_ids=x, labels=x).loss.backward()
            grads.append(mixers(model)[0].A_log.grad)
        assert_close(grads[1], grads[0], "A_log")

    def test_bfloat16_is_no_less_exact_than_the_library(self):
        plain = mixers(build(dtype=torch.bfloat16))[0]
        ours = mixers(accelerate_(build(dtype=torch.bfloat16)))[0]
        wide, x = copy.deepcopy(plain).double(), torch.randn(60, LENGTH, 8, dtype=torch.bfloat16)
        with torch.no_grad():
            exact = wide(x.double())
            errors = [float((mixer(x) - exact).norm() / exact.norm()) for mixer in (ours, plain)]
        assert errors[0] < errors[1] < 0.05

    def test_undo_and_state_dict(self, pair):
        plain, ours = pair
        assert list(ours.state_dict()) == list(plain.state_dict())
        ours(tokens())
        assert all(type(m) is AcceleratedMambaMixer for m in mixers(ours))
        accelerate_(accelerate_(ours), mode=False)
        assert [type(m) for m in mixers(ours)] == [type(m) for m in mixers(plain)]
        assert [vars(m).keys() for m in mixers(ours)] == [vars(m).keys() for m in mixers(plain)]

    def test_compression_after_it(self, pair, assert_close):
        plain, ours = pair
        x = tokens()
        ours(x)
        for model in pair:
            report = compressm.compress(model, compressm.FixedRank(2), calibration=[x])
        assert all("cpp" in layer.kernel_plan_after for layer in report.layers)
        assert_close(ours(x).logits, plain(x).logits, "logits")

    def test_pretrained(self, pair, tmp_path, assert_close):
        ours, x = update_config(pair[1]), tokens()
        ours.save_pretrained(tmp_path)
        loaded = accelerate_(MambaForCausalLM.from_pretrained(tmp_path))
        assert_close(loaded(x).logits, ours(x).logits, "logits")

    def test_a_wide_convolution(self, assert_close):
        plain = build(conv_kernel=9)
        ours, x = accelerate_(copy.deepcopy(plain)), tokens()
        assert_close(ours(x).logits, plain(x).logits, "logits")
        assert torch.equal(ours.generate(x[:, :4], max_new_tokens=6), plain.generate(x[:, :4], max_new_tokens=6))

    def test_refusals(self):
        with pytest.raises(ModelError, match="has no mixer that compressm knows"):
            accelerate_(torch.nn.Linear(2, 2))
        with pytest.raises(ModelError, match="activation 'relu'"):
            accelerate_(build(hidden_act="relu"))
        model = build()
        mixers(model)[1].forward = mixers(model)[1].forward
        with pytest.raises(ModelError, match="forward is wrapped"):
            accelerate_(model)
        assert not isinstance(mixers(model)[0], AcceleratedMambaMixer)


def trainer(folder, callback, model=None, optimizers=(None, None), **options):
    settings = {
        "output_dir": str(folder), "max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
        "save_steps": 5, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 5,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    args = transformers.TrainingArguments(**settings | options)
    model = accelerate_(build()) if model is None else model
    return transformers.Trainer(
        model=model, args=args, train_dataset=Counting(), eval_dataset=Counting(), callbacks=[callback], optimizers=optimizers
    )


def callback(**options):
    defaults = {"policy": compressm.Energy(tau=0.3), "schedule": compressm.At([4, 7]), "calibration": counted()}
    return CompressionCallback(**defaults | options)


class TestTrainer:
    def test_compresses_in_optimizer_steps_and_round_trips(self, tmp_path, assert_close):
        run, micro = callback(), []
        training = trainer(tmp_path, run)
        training.model.register_forward_hook(lambda *_: micro.append(1) if training.model.training else None)
        training.train()
        assert len(micro) == 30
        assert run.compressor.step_count == training.state.global_step == 10
        assert [report.step for report in run.compressor.history] == [4, 7]
        rank = training.model.config.state_size
        assert rank < 6
        assert sizes(training.model) == [(rank, rank, 1 + 2 * rank, 1 + 2 * rank)] * 2
        optimizer = run.compressor.optimizers[0]
        assert isinstance(optimizer, torch.optim.AdamW)
        assert optimizer.state[mixers(training.model)[0].A_log]["exp_avg"].shape[1] == rank
        assert all("cpp" in layer.kernel_plan_after for layer in run.compressor.history[-1].layers)

        training.save_model(str(tmp_path / "final"))
        loaded = MambaForCausalLM.from_pretrained(tmp_path / "final")
        x = tokens(2)
        assert loaded.config.state_size == rank
        assert_close(loaded(x).logits, training.model.eval()(x).logits, "loaded")
        generated = loaded.generate(x, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
        full = loaded(generated.sequences[:, :-1]).logits[:, LENGTH - 1 :]
        assert_close(torch.stack(generated.logits, 1), full, "generation with cache and full forward")

    @pytest.mark.parametrize("checkpoint", [5, 10])
    def test_resumes_a_reduced_checkpoint(self, tmp_path, checkpoint):
        whole = trainer(tmp_path / "whole", callback(), max_steps=15, lr_scheduler_type="constant")
        whole.train()
        stopped = trainer(tmp_path / "part", callback(), max_steps=checkpoint, lr_scheduler_type="constant")
        with nullcontext() if checkpoint > 7 else pytest.warns(compressm.compression.ScheduleWarning, match=r"at \[7\]"):
            stopped.train()
        saved = json.loads((tmp_path / "part" / f"checkpoint-{checkpoint}" / "trainer_state.json").read_text())
        assert saved["stateful_callbacks"]["CompressionCallback"]["attributes"]["compressor"]["step"] == checkpoint
        again = callback()
        resumed = trainer(tmp_path / "part", again, max_steps=15, lr_scheduler_type="constant")
        assert resumed.model.config.state_size == 6
        resumed.train(resume_from_checkpoint=True)
        assert again.compressor.step_count == 15
        assert [report.step for report in again.compressor.history] == [4, 7]
        assert resumed.model.config.state_size == whole.model.config.state_size < 6
        for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(p, q), name

    def test_the_best_model_may_be_of_another_rank(self, tmp_path):
        run = callback(policy=compressm.FixedRank(1), schedule=compressm.At([9]))
        training = trainer(tmp_path, run, load_best_model_at_end=True, eval_strategy="steps", eval_steps=5, save_steps=5)
        metrics = iter([1.0, 2.0])
        evaluate = training.evaluate
        training.evaluate = lambda *a, **k: evaluate(*a, **k) | {"eval_loss": next(metrics)}
        training.train()
        assert training.state.best_model_checkpoint.endswith("checkpoint-5")
        assert training.model.config.state_size == 6
        assert sizes(training.model) == [(6, 6, 13, 13)] * 2
        training.model(tokens())

    def test_an_optimizer_of_the_user_follows(self, tmp_path):
        def run(folder, steps, **options):
            model, compression = accelerate_(build()), callback()
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
            training = trainer(folder, compression, model, (optimizer, scheduler), max_steps=steps)
            training.train(**options)
            assert compression.compressor.optimizers == (optimizer,)
            return dict(model.named_parameters())

        whole, _ = run(tmp_path / "whole", 15), run(tmp_path / "part", 10)
        resumed = run(tmp_path / "part", 15, resume_from_checkpoint=True)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_a_callback_may_join_later(self, tmp_path):
        class Nothing(transformers.TrainerCallback):
            pass

        trainer(tmp_path, Nothing(), max_steps=5).train()
        late = callback(schedule=compressm.At([3, 8]))
        trainer(tmp_path, late).train(resume_from_checkpoint=True)
        assert late.compressor.step_count == 10
        assert [report.step for report in late.compressor.history] == [8]

    @pytest.mark.parametrize("tolerance", [0.0, 10.0])
    def test_checkpoints_wait_for_the_guard(self, tmp_path, tolerance):
        worse = iter(range(1, 100))
        guard = compressm.Rollback(lambda model: next(worse), tolerance=tolerance, recovery=3, jump=None, failures=1)
        run = callback(policy=compressm.FixedRank(2), schedule=compressm.At([4]), guard=guard)
        training = trainer(tmp_path, run)
        training.train()
        rank = 6 if tolerance == 0 else 2
        assert training.model.config.state_size == rank
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-7"]
        assert MambaForCausalLM.from_pretrained(tmp_path / "checkpoint-7").config.state_size == rank

    def test_schedule_from_the_number_of_steps(self, tmp_path):
        run = callback(schedule=compressm.Once)
        trainer(tmp_path, run, max_steps=-1, num_train_epochs=2, save_strategy="no", bf16=True).train()
        assert run.compressor.schedule == compressm.Once(16)
        assert [report.step for report in run.compressor.history] == [3]

    def test_refusals(self, tmp_path, monkeypatch):
        with pytest.raises(ArgumentError, match="restores itself"):
            trainer(tmp_path, callback(), restore_callback_states_from_checkpoint=True)
        config = FalconMambaConfig(vocab_size=VOCABULARY, hidden_size=8, state_size=6, num_hidden_layers=1)
        with pytest.raises(ModelError, match=r"FalconMambaMixer\) looks like a state-space layer"):
            trainer(tmp_path, callback(), model=FalconMambaForCausalLM(config))
        monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
        with pytest.raises(ModelError, match="runs on 2 processes"):
            trainer(tmp_path, callback())

    def test_unequal_ranks_go_into_the_config_one_by_one(self, tmp_path, assert_close):
        model = build()
        names = [f"backbone.layers.{i}.mixer" for i in range(2)]
        compressm.compress(model, compressm.FixedRank(dict(zip(names, (2, 3), strict=True))))
        update_config(model).save_pretrained(tmp_path)
        assert [config.state_size for config in model.config.per_layer_config] == [2, 3]
        loaded, x = from_pretrained(tmp_path), tokens()
        assert [size[0] for size in sizes(loaded)] == [2, 3]
        assert_close(loaded(x).logits, model(x).logits, "logits")
