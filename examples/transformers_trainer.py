"""transformers' MambaForCausalLM, on compressm's kernels, loses states inside Trainer.train() and is saved as ever.

python examples/transformers_trainer.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainingArguments

import compressm
from compressm.integrations.transformers import CompressionCallback, accelerate_

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="any file; its bytes are the tokens")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--state-size", type=int, default=16)
parser.add_argument("--keep", type=int, default=6, help="states that stay")
parser.add_argument("--output", help="folder for the checkpoints and the model; a temporary one by default")
arguments = parser.parse_args()
output = arguments.output or tempfile.mkdtemp()

tokens = torch.tensor(list(arguments.text.read_bytes()))
windows = tokens[: len(tokens) // arguments.length * arguments.length].view(-1, arguments.length)
train = [{"input_ids": window, "labels": window} for window in windows[:-8]]

torch.manual_seed(0)
config = MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=arguments.state_size)
model = accelerate_(MambaForCausalLM(config))
compression = CompressionCallback(
    policy=compressm.FixedRank(arguments.keep),
    schedule=lambda total_steps: compressm.Once(total_steps, at=0.25),
    calibration=[{"input_ids": windows[:32]}],
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output, max_steps=arguments.steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=3e-3, logging_steps=10, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    ),
    train_dataset=train,
    callbacks=[compression],
)  # fmt: skip
trainer.train()
print(*compression.compressor.history, sep="\n")

trainer.save_model(output)
loaded = accelerate_(MambaForCausalLM.from_pretrained(output))
with torch.no_grad():
    loss = loaded(input_ids=windows[-8:], labels=windows[-8:]).loss
generated = loaded.generate(tokens[:16].unsqueeze(0), max_new_tokens=32, do_sample=False)
print(f"states per layer: {loaded.config.state_size}, held-out loss: {loss:.3f}, and it writes:")
print(bytes(generated[0].tolist()).decode(errors="replace"))
