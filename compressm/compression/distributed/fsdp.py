"""FSDP2 (``torch.distributed.fsdp.fully_shard``): layers gathered one by one, reduced, and sharded again in place.

torch has no public call that gives a sharded module a parameter of another shape.  What is used beyond the public DTensor
functions (torch 2.10 to 2.13): ``FSDPModule._get_fsdp_state()``, the state's ``_fsdp_param_groups`` (``_fsdp_param_group``
up to 2.11), a group's ``fsdp_params`` and ``offload_policy``, the constructor of ``FSDPParam`` and its attributes named in
``KNOWN``.  :func:`sharded_parameters` checks all of them and raises before anything is touched if torch has changed one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, distribute_tensor

from compressm.adapters import Adapter
from compressm.adapters.parameters import holder, own_parameter, parameter_at
from compressm.compression.common.models import Layers
from compressm.compression.common.workers import each
from compressm.compression.distributed.team import ProcessTeam, Result
from compressm.compression.surgery.audit import Ema, Optimizers, ema_slot, full_name
from compressm.compression.surgery.references import References, take_back
from compressm.compression.surgery.stale import check_optimizers_outside
from compressm.errors import DataError, ModelError, OptimizerError

CONSTRUCTOR = (
    "param", "module_info", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn", "mp_policy",
    "offload_policy",
)  # fmt: skip
KNOWN = (
    "_module_info", "mesh_info", "post_forward_mesh_info", "device", "fsdp_placement", "mp_policy", "offload_to_cpu",
    "is_dtensor", "sharded_param", "_post_load_hook_handle", "_param_fqn", "init_dtype_attrs",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where FSDP keeps one parameter: ``group.fsdp_params[index]``."""

    group: Any
    index: int

    @property
    def held(self) -> Any:
        """FSDP's record of it."""
        return self.group.fsdp_params[self.index]


@dataclass(frozen=True)
class Renewal:
    """FSDP's record of a parameter before and after it was sharded anew."""

    place: Place
    old: Any
    new: Any

    def keep(self) -> None:
        """Let go of the old record."""
        self.old._post_load_hook_handle.remove()

    def undo(self) -> None:
        """Put the old record back."""
        self.new._post_load_hook_handle.remove()
        self.place.group.fsdp_params[self.place.index] = self.old


def sharded_parameters(model: nn.Module) -> dict[int, Place]:
    """Every parameter that FSDP shards, by the id of its DTensor.

    Raises:
        ModelError: torch's internals are not those known here.
    """
    found: dict[int, Place] = {}
    try:
        if tuple(inspect.signature(FSDPParam).parameters) != CONSTRUCTOR:
            raise AttributeError(f"FSDPParam{inspect.signature(FSDPParam)}")
        for module in model.modules():
            if not isinstance(module, FSDPModule):
                continue
            state = module._get_fsdp_state()
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            for group in filter(None, groups):
                group.offload_policy  # noqa: B018 (must exist)
                for index, held in enumerate(group.fsdp_params):
                    for name in KNOWN:
                        getattr(held, name)
                    found[id(held.sharded_param)] = Place(group, index)
    except AttributeError as error:
        raise ModelError(
            f"model: torch {torch.__version__} keeps fully_shard's parameters in another way than compressm knows ({error}), "
            "expected torch 2.10 to 2.13. Reduce the plain model and shard it afterwards"
        ) from error
    return found


class ShardedTeam(ProcessTeam):
    """Every process holds a part of every parameter (``fully_shard``).

    Args:
        model: the model, some of whose modules are sharded.

    Raises:
        ModelError: tensor parallelism, CPU offload, several meshes, or internals of torch that are not known.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.at_rest()
        meshes = []
        for parameter in model.parameters():
            if isinstance(parameter, DTensor) and parameter.device_mesh not in meshes:
                meshes.append(parameter.device_mesh)
        if len(meshes) != 1:
            raise ModelError(
                f"model: its parameters are sharded over {len(meshes)} device meshes, expected one. Pass the same mesh to "
                "every fully_shard"
            )
        members = meshes[0].mesh.flatten().tolist()
        whole = meshes[0].get_group() if meshes[0].ndim == 1 else dist.new_group(members, use_local_synchronization=True)
        super().__init__(model, whole, torch.device(meshes[0].device_type))
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.at_a_time = self.decide(torch.get_num_threads())  # layers gathered; the same everywhere, threads need not be

    def at_rest(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def check_guard(self) -> None:
        raise ModelError(
            "guard: got a Rollback for a model under fully_shard, whose shards it cannot put aside, expected None. Keep a "
            "checkpoint from before the reduction (compressm.save_sharded) to go back to"
        )

    @property
    def fixed(self) -> str:
        return "fully_shard"

    def share(self, count: int) -> int:
        """One at least: all processes take part in every forward pass."""
        return max(1, super().share(count))

    def align(self, batches: list) -> list:
        """As many as the process with the fewest has: a forward pass gathers parameters, so all must take part in it."""
        counts = self._gathered(len(batches))
        if min(counts) == 0:
            raise DataError(
                f"calibration: rank(s) {[rank for rank, count in enumerate(counts) if count == 0]} got no batch, expected one "
                "on every rank: with fully_shard every forward pass needs all of them. Give every rank its own part of the data"
            )
        return batches[: min(counts)]

    def check(self, layers: Layers, ema: Ema | None = None) -> None:
        places = sharded_parameters(self.model)
        for name, (module, adapter) in layers.items():
            for key in adapter.parameters(module):
                parameter, full = parameter_at(module, key), full_name(name, key)
                if parameter is None:
                    continue  # the adapter says so
                if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                    raise ModelError(f"parameter {full} carries gradient hooks, which would be lost. Remove them first")
                if id(parameter) in places:
                    _check_place(full, places[id(parameter)].held)
                elif isinstance(parameter, DTensor):
                    raise ModelError(f"parameter {full} is a DTensor, expected a plain one or one that fully_shard keeps")
                if ema is not None and isinstance(ema, nn.Module):
                    slot, leaf = ema_slot(ema, name, key)
                    if isinstance(slot.get(leaf), DTensor):
                        raise ModelError(f"ema: {full} of the averaged module is sharded. Keep averages in a dict of tensors")

    def each(self, function: Callable[[str, tuple[nn.Module, Adapter]], Result], layers: Layers) -> dict[str, Result]:
        """As many layers at a time are gathered as there are threads to work on them."""
        result: dict[str, Result] = {}
        rest = iter(layers.items())
        while part := dict(islice(rest, self.at_a_time)):
            with ExitStack() as stack:
                for module, adapter in part.values():
                    stack.enter_context(_whole(module, adapter))
                with self.together("reading the layers"):
                    result |= each(function, part)
        return result

    def carry_out(
        self, apply: Callable[[Sequence[str]], None], layers: Layers, optimizers: Optimizers, ema: Ema | None
    ) -> None:
        """Layer by layer: gather, reduce, compare, shard; if one fails, those before it are put back."""
        self.at_rest()
        with self.together("the reduction"):
            self.check(layers, ema)
            parameters = {full_name(n, key): parameter_at(m, key) for n, (m, a) in layers.items() for key in a.parameters(m)}
            check_optimizers_outside({id(parameter): name for name, parameter in parameters.items()}, optimizers)
        before = References(layers, optimizers, ema)
        renewals: list[Renewal] = []
        try:
            for name, layer in layers.items():
                with unsharded(self, name, layer, optimizers, ema, renewals):
                    with self.together(f"reducing layer {name!r}"):
                        apply((name,))
                    self.settle({name: layer}, optimizers, ema)
        except BaseException:
            take_back([*(renewal.undo for renewal in renewals), before.restore])
            raise
        for renewal in renewals:
            renewal.keep()


def _check_place(full: str, held: Any) -> None:
    """Refuse parameters that cannot be sharded again in the same way."""
    reasons = {
        "is offloaded to the CPU": held.offload_to_cpu,
        "is split by tensor parallelism as well": held.is_dtensor,
        "is shared between modules": bool(held._module_info.shared_modules),
    }
    for reason, there in reasons.items():
        if there:
            raise ModelError(f"parameter {full} {reason}, expected one that fully_shard alone keeps. Reduce before sharding")


@contextmanager
def _whole(module: nn.Module, adapter: Adapter) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """The parameters that the adapter reads are plain and complete meanwhile: by name, (the sharded one, the plain one)."""
    gathered: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for key in adapter.reads(module):
        parameter = parameter_at(module, key)
        if isinstance(parameter, DTensor):
            plain = nn.Parameter(parameter.full_tensor().detach(), requires_grad=parameter.requires_grad)
            plain.__dict__.update(_marks(parameter))
            gathered[key] = (parameter, plain)
    slots = {key: holder(module, key) for key in gathered}
    try:
        for key, (owner, leaf) in slots.items():
            owner._parameters[leaf] = gathered[key][1]
        yield gathered
    finally:
        for key, (owner, leaf) in slots.items():
            if owner._parameters[leaf] is gathered[key][1]:
                owner._parameters[leaf] = gathered[key][0]


@contextmanager
def unsharded(
    team: ShardedTeam,
    name: str,
    layer: tuple[nn.Module, Adapter],
    optimizers: Optimizers,
    ema: Ema | None = None,
    renewals: list[Renewal] | None = None,
) -> Iterator[None]:
    """One layer is plain meanwhile, with its optimizer state and average; parameters replaced in between are sharded after.

    Args:
        renewals: receives a record of every parameter sharded anew.

    Raises:
        OptimizerError: state that cannot be gathered.
        ModelError: a new parameter cannot be split evenly where torch asks for it.
    """
    module, adapter = layer
    places, renewals = sharded_parameters(team.model), [] if renewals is None else renewals
    changing = set(adapter.parameters(module))
    with _whole(module, adapter) as gathered:
        averages = _gather_averages(ema, name, gathered.keys() & changing)
        states: dict[tuple[int, int], dict[str, Any]] = {}
        for key, (sharded, plain) in gathered.items():
            for number, optimizer in enumerate(optimizers):
                if sharded in optimizer.state:
                    state = states[number, id(plain)] = optimizer.state.pop(sharded)
                    optimizer.state[plain] = _whole_state(full_name(name, key), state, sharded) if key in changing else state
        _replace(optimizers, {id(sharded): plain for sharded, plain in gathered.values()})
        yield
        swaps: dict[int, nn.Parameter] = {}
        for key, (sharded, plain) in gathered.items():
            now = own_parameter(module, key)
            target: Any = sharded if now is plain else _shard(places[id(sharded)], now, renewals)
            swaps[id(now)] = target
            for number, optimizer in enumerate(optimizers):
                if now in optimizer.state:
                    state = optimizer.state.pop(now)
                    kept = states.get((number, id(now)))
                    optimizer.state[target] = _shard_state(state, now, target) if kept is None else kept
        _replace(optimizers, swaps)
        for slot, leaf, mesh, placements in averages:
            slot[leaf] = distribute_tensor(slot[leaf], mesh, placements, src_data_rank=None)


def _whole_state(full: str, state: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """A parameter's optimizer state with whole tensors."""
    odd = [key for key, value in state.items() if isinstance(value, DTensor) and value.shape != parameter.shape]
    if odd:
        raise OptimizerError(f"optimizer: state {', '.join(odd)} of {full} is sharded in another shape than its parameter")
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def _gather_averages(ema: Ema | None, name: str, keys: Iterable[str]) -> list[tuple[MutableMapping[str, Any], str, Any, Any]]:
    """Make sharded averages whole; returns where they lie and how they were sharded."""
    found: list[tuple[MutableMapping[str, Any], str, Any, Any]] = []
    if ema is None:
        return found
    for key in sorted(keys):
        slot, leaf = ema_slot(ema, name, key)
        value = slot.get(leaf)
        if isinstance(value, DTensor):
            found.append((slot, leaf, value.device_mesh, value.placements))
            slot[leaf] = value.full_tensor()
    return found


def _replace(optimizers: Optimizers, swaps: Mapping[int, nn.Parameter]) -> None:
    """Put parameters at the places of others, by id, in all groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [swaps.get(id(parameter), parameter) for parameter in group["params"]]


def _shard(place: Place, parameter: nn.Parameter, renewals: list[Renewal]) -> nn.Parameter:
    """Let FSDP keep a new whole parameter at a place; returns its sharded form, which is in the module then."""
    old = place.held
    axis, parts = old.fsdp_placement.dim, old.mesh_info.mesh.size(-1)
    if axis > 0 and parameter.shape[axis] % parts:
        raise ModelError(
            f"parameter {old._param_fqn} of new shape {tuple(parameter.shape)} is sharded along dimension {axis}, expected a "
            f"multiple of {parts} there. Pass multiple_of={parts} to the Compressor, or shard along dimension 0"
        )
    new = FSDPParam(
        parameter, old._module_info, old.mesh_info, old.post_forward_mesh_info, old.device,
        lambda _: old.fsdp_placement, old.mp_policy, place.group.offload_policy,
    )  # fmt: skip
    new._param_fqn = old._param_fqn
    new.init_dtype_attrs(old.mp_policy)
    new.sharded_param.__dict__.update(_marks(parameter))
    place.group.fsdp_params[place.index] = new
    renewals.append(Renewal(place, old, new))
    return new.sharded_param


def _shard_state(state: Mapping[str, Any], plain: Tensor, sharded: DTensor) -> dict[str, Any]:
    """Optimizer state of a whole parameter, as that of the sharded one: every process keeps its part, nothing is sent."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == plain.shape:
            return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
        return value

    return {key: part(value) for key, value in state.items()}


def _marks(parameter: Tensor) -> dict[str, Any]:
    """Attributes that somebody has set on a parameter, such as ``_no_weight_decay``."""
    return {key: value for key, value in parameter.__dict__.items() if key != "_is_param" and not key.startswith("_fsdp")}
