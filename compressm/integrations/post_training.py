"""A folder of ``save_pretrained`` with fewer states: calibrated, cut, distilled and stored again, after training."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.compression import FixedRank, ReductionReport, compress
from compressm.compression.common.models import compressible_layers
from compressm.errors import CheckpointError, CompressmError, ConfigError, needs_extra
from compressm.inputs import check_counts, check_model_folder, check_new_folder, check_there
from compressm.integrations._token_files import token_sequences

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
BATCH_TOKENS = 2048  # that run through the model at a time


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint.

    Attributes:
        loss_before, loss_after: mean cross entropy of the next token, in nats, on sequences that calibration has not seen.
        seconds: of the whole, and ``report.seconds`` of the reduction in it.
        report: every layer.
    """

    loss_before: float
    loss_after: float
    seconds: float
    report: ReductionReport

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        losses = {"loss_before": self.loss_before, "loss_after": self.loss_after}
        return {**losses, "seconds": self.seconds, "reduction": self.report.to_dict()}

    def rows(self) -> list[tuple[str, str, str]]:
        """What to say of it: words, and the figures before and after."""
        layers, sizes = self.report.layers, (self.report.state_bytes_before, self.report.state_bytes_after)
        ranks = [", ".join(map(str, sorted({getattr(x, f"rank_{side}") for x in layers}))) for side in ("before", "after")]
        bytes_ = ["" if size is None else f"{size:,}" for size in sizes]
        return [
            ("states per layer", ranks[0], ranks[1]),
            ("held-out loss, nats per token", f"{self.loss_before:.4f}", f"{self.loss_after:.4f}"),
            ("bytes of state per sequence", bytes_[0], bytes_[1]),
        ]


def compress_checkpoint(
    checkpoint: Path,
    out: Path,
    data: Sequence[Path],
    *,
    states: int,
    sequences: int = 64,
    length: int = 512,
    held_out: int = 16,
    multiple_of: int | None = None,
    refine: int | None = None,
    device: torch.device | str = "cpu",
) -> Outcome:
    """Give a causal language model of transformers fewer states, and store it so that ``from_pretrained`` loads it.

    Args:
        checkpoint: folder that ``save_pretrained`` wrote, with any mixer that compressm knows.
        out: folder for the result; is made, or empty.
        data: texts, and folders of them, or token ids (see :func:`token_sequences`).
        states: of every layer afterwards.
        sequences, length: calibration sequences, and their tokens.
        held_out: further sequences, between them, on which the loss is measured.
        multiple_of: what ``states`` must be a multiple of; None: what the layers' own kernels need.
        refine: steps of local distillation, as for :func:`compressm.compress`.
        device: where it runs.

    Raises:
        CheckpointError: no checkpoint, or half of one; ``out`` is not empty or cannot be written.
        ConfigError, ArgumentError: a number does not fit the model, or a layer's class has no room for fewer states.
        DataError: too few tokens, or none.
        ModelError: the model has no layer to compress.
        DependencyError: transformers is not installed.
    """
    started = time.perf_counter()
    check_counts(states, sequences, length, held_out, multiple_of)
    check_model_folder(checkpoint)
    check_new_folder(out)
    check_there(data)
    model, tokenizer = _load(checkpoint)
    _check_states(model, states)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = token_sequences(data, tokenizer, vocabulary, sequences + held_out, length).to(device)
    watched = torch.tensor([(i + 1) * held_out // len(tokens) > i * held_out // len(tokens) for i in range(len(tokens))])
    model = _on_own_kernels(model.to(device))
    _check_storable(model)
    before = _loss(model, tokens[watched])
    report = compress(
        model, FixedRank(states), calibration=_batches(tokens[~watched]), multiple_of=multiple_of, uniform=True,
        sequences=sequences, refine=refine,
    )  # fmt: skip
    after = _loss(model, tokens[watched])
    _store(_on_own_kernels(model, False), tokenizer, out)
    return Outcome(before, after, time.perf_counter() - started, report)


def _check_states(model: nn.Module, states: int) -> None:
    """There must be layers, with more states than shall be left."""
    ranks = {name: adapter.rank(module) for name, (module, adapter) in compressible_layers(model).items()}
    if states >= (most := max(ranks.values())):
        raise ConfigError(f"--states {states}: the layers have {most}, expected fewer. Nothing was written")


def _check_storable(model: nn.Module) -> None:
    """What is left must be a model of the library's own classes, without new parameters."""
    for name, (module, adapter) in compressible_layers(model).items():
        if adapter.forms and (new := adapter.in_form(module, None).needs(module)):
            raise ConfigError(
                f"{name}: a {type(module).__qualname__} can only lose states behind new parameters ({', '.join(new)}), which "
                "from_pretrained does not know. Nothing was written. In Python: accelerate_(model), compressm.compress and "
                "compressm.save"
            )


def _load(checkpoint: Path) -> tuple[Any, Any]:
    """The model, all of whose weights must be there, and the tokenizer or None."""
    with needs_extra("compressm compress"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True, output_loading_info=True)
    except CompressmError:
        raise
    except Exception as error:  # of transformers, safetensors, json, pickle: whatever the files make them raise
        raise CheckpointError(f"{checkpoint}: cannot be loaded ({type(error).__name__}: {error})") from error
    model, found = loaded
    if lacking := sorted(found["missing_keys"]):
        named = ", ".join(lacking[:3]) + (", ..." if lacking[3:] else "")
        raise CheckpointError(
            f"{checkpoint}: lacks {len(lacking)} of the model's weights ({named}), expected all of them. Was it copied whole?"
        )
    if not any((checkpoint / name).exists() for name in TOKENIZER_FILES):
        return model.eval(), None
    try:
        return model.eval(), AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"{checkpoint}: its tokenizer cannot be loaded ({type(error).__name__}: {error})") from error


def _on_own_kernels(model: Any, mode: bool = True) -> Any:
    """The model with our kernels in those mixers that have them, or back with the library's."""
    from compressm.integrations._mamba_mixer import _own_class, accelerate_

    known = any(_own_class(module) is not None for module in model.modules())
    return accelerate_(model, mode) if known else model


def _batches(tokens: Tensor) -> list[dict[str, Any]]:
    few = max(1, BATCH_TOKENS // tokens.shape[1])
    return [{"input_ids": part, "use_cache": False} for part in tokens.split(few)]


@torch.no_grad()
def _loss(model: nn.Module, tokens: Tensor) -> float:
    """Mean cross entropy of the next token."""
    total = 0.0
    for batch in _batches(tokens):
        logits, ids = model(**batch).logits[:, :-1].float(), batch["input_ids"][:, 1:]
        total += float(F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum"))
    return total / tokens[:, 1:].numel()


def _store(model: Any, tokenizer: Any, out: Path) -> None:
    """The whole folder, or nothing: it is written beside ``out`` and renamed."""
    from compressm.integrations.transformers import update_config

    update_config(model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            made = Path(folder, "made")
            model.save_pretrained(made)
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            check_new_folder(out)
            if out.exists():
                out.rmdir()
            made.rename(out)
    except OSError as error:
        raise CheckpointError(f"--out {out}: cannot be written ({error}). Nothing is there") from error
