"""Models, data and training for the processes of these tests; every number follows from seeds."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import compressm
from compressm.layers import LRU, Mamba, Mamba2

STEPS, AT = 8, (3, 6)


class Net(nn.Module):
    """tokens (batch, L) -> logits (batch, L, 12) through two residual layers; float64.

    ``kind``: ``"lru"``, ``"mamba"``, ``"mamba2"`` or ``"mamba2 with maps"``.
    """

    def __init__(self, kind: str, d_model: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, d_model)
        if kind == "lru":
            layers = [LRU(d_model, rank, max_phase=1.5) for rank in (9, 7)]
        elif kind == "mamba":
            layers = [Mamba(d_model, d_state=n, expand=1) for n in (7, 6)]
        else:
            maps = (8, 7) if kind == "mamba2 with maps" else (None, None)
            sizes = zip((7, 6), maps, strict=True)
            layers = [Mamba2(d_model, n, headdim=2, expand=1, d_features=features) for n, features in sizes]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(d_model, 12)
        self.double()

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def make(kind: str) -> Net:
    torch.manual_seed(0)
    return Net(kind)


def batches(count: int, size: int, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(12, (size, 12), generator=draw).cumsum(1) % 12 for _ in range(count)]


def own(items: list) -> list:
    """Those of this rank: every other one, as a DistributedSampler deals them."""
    return items[dist.get_rank() :: dist.get_world_size()]


def arguments(**options) -> dict:
    return {"policy": compressm.Energy(0.08), "schedule": compressm.At(list(AT)), **options}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> torch.Tensor:
    loss = loss_of(model, tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_alone(kind: str, **options):
    """One process on the whole of every batch: (losses, model, optimizer, compressor)."""
    model = make(kind)
    optimizer = adam(model)
    compressor = compressm.Compressor(model, optimizer, **arguments(calibration=batches(4, 4, seed=5), **options))
    losses = []
    for tokens in batches(STEPS, 8, seed=1):
        losses.append(float(step(model, optimizer, tokens)))
        compressor.step()
    return losses, model, optimizer, compressor


def train_together(kind: str, wrap, steps: int = STEPS, calibration=None, **options):
    """Each process on its part of every batch: (mean losses, wrapped model, optimizer, compressor)."""
    model = wrap(make(kind))
    optimizer = adam(model)
    calibration = own(batches(4, 4, seed=5)) if calibration is None else calibration
    compressor = compressm.Compressor(model, optimizer, **arguments(calibration=calibration, **options))
    losses = []
    for tokens in batches(STEPS, 8, seed=1)[:steps]:
        loss = step(model, optimizer, tokens.chunk(dist.get_world_size())[dist.get_rank()])
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size())
        compressor.step()
        model = compressor.rewrap()
    return losses, model, optimizer, compressor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered if it is sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state by name, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter).clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = whole(value).clone()
    return found


def assert_same_run(losses, model, optimizer, expected, reference, reference_optimizer) -> None:
    """Loss curves, parameters and optimizer state agree, but for the signs of an LRU's modes, which eigenvectors leave open.

    B and C of a mode enter the output as a product: their outer products are compared, and the absolute values of their
    moments.
    """
    torch.testing.assert_close(*(torch.tensor(curve, dtype=torch.float64) for curve in (losses, expected)), rtol=1e-11, atol=0)
    relative = 1e-11 if isinstance(model.layers[0], LRU) else 1e-6  # the refit of C works on float32 samples
    left, right = contents(model, optimizer), contents(reference, reference_optimizer)
    assert left.keys() == right.keys()
    for found in (left, right):
        for prefix in [name.removesuffix("nu_log") for name in found if name.endswith("nu_log")]:
            B, C = (torch.complex(found[f"{prefix}{m}_re"], found[f"{prefix}{m}_im"]) for m in "BC")
            found[f"{prefix}product"] = torch.view_as_real(torch.einsum("hn,nk->nhk", C, B))
        for name in list(found):
            if any(part in name for part in ("B_re", "B_im", "C_re", "C_im")):
                found[name] = found[name].abs()
    for name, value in left.items():
        assert value.shape == right[name].shape, name
        error = float((value - right[name]).norm())
        assert error <= relative * float(right[name].norm()) + 1e-12, f"{name}: {error}"


def assert_identical_everywhere(value: object) -> None:
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    assert all(other == said[0] for other in said), said


def progress(compressor: compressm.Compressor) -> dict:
    """Its state_dict without wall times."""
    state = compressor.state_dict()
    for report in state["history"]:
        del report["seconds"]
    return state


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in contents(model, optimizer).items()}
