"""A hybrid of attention, experts and Mamba-2, such as Granite 4, is fine-tuned on new text and loses half its state meanwhile.

python examples/fine_tune_hybrid.py --model FOLDER
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, Trainer, TrainingArguments

import compressm
from compressm.integrations.transformers import CompressionCallback, accelerate_

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="a folder of save_pretrained that reads bytes; a tiny new model by default")
parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="any file; its bytes are the tokens")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--output", help="folder for the model; a temporary one by default")
arguments = parser.parse_args()
output = arguments.output or tempfile.mkdtemp()

tokens = torch.tensor(list(arguments.text.read_bytes()))
windows = tokens[: len(tokens) // arguments.length * arguments.length].view(-1, arguments.length)
train = [{"input_ids": window, "labels": window} for window in windows[:-8]]

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "shared_intermediate_size": 64, "num_hidden_layers": 3}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 32}
experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["mamba", "attention", "mamba"]}
tiny = GraniteMoeHybridConfig(vocab_size=256, pad_token_id=0, **sizes, **heads, **experts)
model = AutoModelForCausalLM.from_pretrained(arguments.model) if arguments.model else GraniteMoeHybridForCausalLM(tiny)
compression = CompressionCallback(
    policy=compressm.Shrink(0.5),  # attention and experts are left alone
    schedule=lambda total_steps: compressm.Once(total_steps, at=0.25),
    calibration=[{"input_ids": part} for part in windows[:32].split(8)],
)
trainer = Trainer(
    model=accelerate_(model),
    args=TrainingArguments(
        output_dir=output, max_steps=arguments.steps, per_device_train_batch_size=8, learning_rate=2e-3, logging_steps=10,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    ),
    train_dataset=train,
    callbacks=[compression],
)  # fmt: skip
trainer.train()
print(*compression.compressor.history, sep="\n")

trainer.save_model(output)
loaded = accelerate_(AutoModelForCausalLM.from_pretrained(output))
with torch.no_grad():
    loss = loaded(input_ids=windows[-8:], labels=windows[-8:]).loss
print(f"states per layer: {loaded.config.mamba_d_state}, held-out loss: {loss:.3f}, stored in {output}")
