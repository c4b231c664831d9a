"""The processes that train one model together, as calibration, planning and surgery see them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from compressm.adapters import Adapter
from compressm.adapters.parameters import own_parameter, parameter_at
from compressm.adapters.registry import qualified_name
from compressm.compression.common.described import described
from compressm.compression.common.models import Layers
from compressm.compression.common.workers import each
from compressm.compression.distributed.ddp import check_rewrappable, retire, rewrapped
from compressm.compression.surgery.audit import Ema, Optimizers, check_swappable, ema_slot, full_name
from compressm.compression.surgery.references import References
from compressm.errors import DistributedError, ModelError

Result = TypeVar("Result")


class Team:
    """One process alone: every question is answered at once, nothing is sent.

    Attributes:
        model: the plain module.
        size: processes.
        rank: this one's number.
    """

    size, rank = 1, 0

    model: nn.Module

    def __init__(self, model: nn.Module | None = None) -> None:
        if model is not None:
            self.model = model

    def each(self, function: Callable[[str, tuple[nn.Module, Adapter]], Result], layers: Layers) -> dict[str, Result]:
        """``{name: function(name, layer)}`` with the layers' parameters whole while it runs."""
        return each(function, layers)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All processes get through the block, or all raise.

        Raises:
            DistributedError: another process failed; says which and how.
        """
        yield

    @property
    def fixed(self) -> str:
        """What keeps the model from getting new parameters, in words; empty: nothing."""
        return ""

    def share(self, count: int) -> int:
        """This process's part of ``count``."""
        return count

    def add(self, value: Any) -> Any:
        """The sum over the processes of a tensor or an int."""
        return value

    def join(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one behind the other along the first dimension, whose size may differ."""
        return tensor

    def decide(self, value: Any) -> Any:
        """What rank 0 says, a JSON tree."""
        return value

    def same(self, what: str, value: Any) -> None:
        """Raise DistributedError on all processes unless ``value``, a JSON tree, is the same on all of them."""

    def align(self, batches: list) -> list:
        """The calibration batches that this process runs."""
        return batches

    def at_rest(self) -> None:
        """Leave the model as its wrapper leaves it between two training steps."""

    def check(self, layers: Layers, ema: Ema | None = None) -> None:
        """Refuse what cannot be reduced under this wrapper, before anything is touched.

        Raises:
            ModelError: see the message.
        """
        check_swappable(self.model, {name: (module, adapter.parameters(module)) for name, (module, adapter) in layers.items()})

    def carry_out(
        self, apply: Callable[[Sequence[str]], None], layers: Layers, optimizers: Optimizers, ema: Ema | None
    ) -> None:
        """Call ``apply(names)`` for all ``layers``, those that change; all of it happens, on all processes, or nothing."""
        apply(tuple(layers))

    def check_guard(self) -> None:
        """Raise ModelError where a snapshot of the whole model cannot be taken and put back."""

    def replaced(self) -> None:
        """Hear that parameters were replaced by other means than :meth:`carry_out`."""

    def reinstated(self) -> None:
        """Hear that the parameters from before the last reduction are back, the same objects."""

    def ready(self) -> None:
        """Raise ModelError unless the last reduction has been followed up."""

    def rewrap(self) -> nn.Module:
        """The model to train on after a reduction."""
        return self.model


class ProcessTeam(Team):
    """Several processes; what they exchange goes through one process group.

    Args:
        model: the plain module.
        group: its processes.
        device: where tensors lie while they are sent.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(model)
        self.group, self.device = group, device
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.source = dist.get_global_rank(group, 0)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # raised below, after the other processes have heard of it
            failure = error
        said = self._gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = {rank: text for rank, text in enumerate(said) if text is not None}
        if failed:
            rank, text = next(iter(failed.items()))
            raise DistributedError(
                f"{what}: failed on rank {rank} of {self.size}, expected all ranks to get through it; nothing has changed. "
                f"There it says: {text}"
            )

    def share(self, count: int) -> int:
        return count // self.size + (self.rank < count % self.size)

    def add(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            sent = value.to(self.device).clone()
            dist.all_reduce(sent, group=self.group)
            return sent.to(value.device)
        sent = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(sent, group=self.group)
        return int(sent)

    def join(self, tensor: Tensor) -> Tensor:
        counts = self._gathered(len(tensor))
        sent = torch.zeros(max(counts), *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
        sent[: len(tensor)] = tensor
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(received, sent, group=self.group)
        return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)]).to(tensor.device)

    def decide(self, value: Any) -> Any:
        said: list[Any] = [json.dumps(value) if self.rank == 0 else None]
        dist.broadcast_object_list(said, src=self.source, group=self.group, device=self.device)
        return json.loads(said[0])

    def same(self, what: str, value: Any) -> None:
        said = self._gathered(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
        others = [rank for rank, digest in enumerate(said) if digest != said[0]]
        if others:
            raise DistributedError(
                f"{what}: rank(s) {', '.join(map(str, others))} differ from rank 0, expected the same on all {self.size} "
                "ranks. Build model and Compressor alike on all of them, from the same seed or checkpoint"
            )

    def settle(self, layers: Layers, optimizers: Optimizers, ema: Ema | None) -> None:
        """Give all processes rank 0's new parameters, optimizer state and averages, to the last bit.

        Machines may round differently: the plan is the same everywhere, the digits are rank 0's.

        Raises:
            DistributedError: the processes do not hold the same kinds and shapes of tensors, or differ afterwards.
        """
        tensors, structure = _contents(layers, optimizers, ema)
        self.same("the plan and the shapes of the new parameters", structure)
        for tensor in tensors:
            self._adopt(tensor)
        self.same("new parameters and optimizer state", digest(tensors))

    def same_parameters(self, layers: Layers) -> None:
        """Raise DistributedError unless all processes hold the same parameters, to the last bit."""
        for name, (module, adapter) in layers.items():
            values = [own_parameter(module, key) for key in adapter.parameters(module)]
            self.same(f"parameters of layer {name!r} before the reduction", digest(values))

    @torch.no_grad()
    def _adopt(self, tensor: Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        target = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        sent = target.detach().to(self.device).contiguous()
        dist.broadcast(sent, src=self.source, group=self.group)
        target.copy_(sent)

    def _gathered(self, value: Any) -> list[Any]:
        """What every rank says, in their order."""
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value, group=self.group)
        return said


def digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of dtypes, shapes and bytes."""
    result = hashlib.sha256()
    for tensor in tensors:
        value = tensor.detach()
        value = (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).cpu().contiguous()
        result.update(f"{value.dtype} {tuple(value.shape)}".encode())
        result.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def _contents(layers: Layers, optimizers: Optimizers, ema: Ema | None) -> tuple[list[Tensor], list[Any]]:
    """Every tensor that belongs to the rank-dependent parameters of the layers, and a JSON description of all of it."""
    tensors: list[Tensor] = []
    structure: list[Any] = []

    def note(where: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() > 1:
            tensors.append(value.data)
            structure.append([where, str(value.dtype), list(value.shape)])
        elif isinstance(value, Tensor) and value.numel():
            structure.append([where, described(value.item())])
        elif isinstance(value, Mapping | list | tuple):
            structure.append([where, qualified_name(type(value))])
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                note(f"{where} {described(key)}", item)
        else:
            structure.append([where, described(value)])

    for name, (module, adapter) in layers.items():
        for key in adapter.parameters(module):
            where, parameter = full_name(name, key), parameter_at(module, key)
            if parameter is None:
                raise ModelError(f"parameter {where} is gone, expected it to be there after the reduction")
            note(where, parameter)
            for number, optimizer in enumerate(optimizers):
                for kind, value in sorted(optimizer.state.get(parameter, {}).items(), key=lambda item: str(item[0])):
                    note(f"{where} optimizer {number} {kind}", value)
            if ema is not None:
                slot, leaf = ema_slot(ema, name, key)
                note(f"{where} ema", slot[leaf])
    return tensors, structure


class ReplicatedTeam(ProcessTeam):
    """Every process holds the whole model (DistributedDataParallel).

    Args:
        wrapper: the DistributedDataParallel module.
        model: the plain module in it.
    """

    def __init__(self, wrapper: DistributedDataParallel, model: nn.Module) -> None:
        super().__init__(model, wrapper.process_group, wrapper.device)
        self.wrapper = wrapper
        self._retired: RemovableHandle | None = None

    @property
    def stale(self) -> bool:
        """Whether the wrapper still holds parameters that were replaced."""
        return self._retired is not None

    def ready(self) -> None:
        if self.stale:
            raise ModelError(
                "model: a reduction has replaced parameters and DistributedDataParallel still synchronises the old ones, "
                "expected model = compressor.rewrap() after every compressor.step()"
            )

    def check(self, layers: Layers, ema: Ema | None = None) -> None:
        check_rewrappable(self.wrapper)
        super().check(layers, ema)

    def carry_out(
        self, apply: Callable[[Sequence[str]], None], layers: Layers, optimizers: Optimizers, ema: Ema | None
    ) -> None:
        if not layers:
            return
        self.check(layers, ema)
        self.same_parameters(layers)
        before = References(layers, optimizers, ema)
        try:
            with self.together("the reduction"):
                apply(tuple(layers))
            self.settle(layers, optimizers, ema)
        except BaseException:
            before.restore()
            raise
        self.replaced()

    def replaced(self) -> None:
        if self._retired is None:
            self._retired = retire(self.wrapper)

    def reinstated(self) -> None:
        if self._retired is not None:
            self._retired.remove()
            self._retired = None

    def rewrap(self) -> nn.Module:
        if self.stale:
            self.wrapper, self._retired = rewrapped(self.wrapper), None
        return self.wrapper
