"""What would go wrong without a sound: each says so, before anything has changed."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings

import pytest
import torch
from mixed_runs import Mixed, batch, compressor_of, layer_parameters, loss_of, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

import compressm
from compressm.compression import StaleCopyWarning
from compressm.compression.surgery import stale
from compressm.compression.surgery.audit import audit, signature
from compressm.errors import ArgumentError, ModelError, OptimizerError


@pytest.fixture
def trained():
    """A model and its optimizer after two steps."""
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, [optimizer], 2)
    return model, optimizer


def reduce(model, optimizer, rank=5, **options):
    return compressm.compress(model, compressm.FixedRank(rank), optimizer=optimizer, **options)


def unchanged(model):
    return [layer.d_state for layer in model.layers] == [16, 16]


# An optimizer that trains something else.


def test_optimizer_built_before_the_parameters_were_materialised():
    """The model was moved after the optimizer had been built, in one of the ways that replace parameters."""
    with torch.device("meta"):
        model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters())
    model.to_empty(device="cpu")
    with pytest.raises(OptimizerError, match=r"layers\.0\.nu_log.*on meta\) that are not this model's.*before \.to\(\)"):
        compressor_of(model, optimizer)


def test_optimizer_built_before_a_conversion_that_replaces_parameters():
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    if any(p is q for p in model.parameters() for q in optimizer.param_groups[0]["params"]):
        compressor_of(model, optimizer)  # this torch swaps the tensors and keeps the objects
    else:
        with pytest.raises(OptimizerError, match=r"layers\.0\.nu_log.*float32 on cpu\) that are not this model's"):
            compressor_of(model, optimizer)


def test_optimizer_of_another_model():
    model = Mixed()
    with pytest.raises(OptimizerError, match=r"does not hold 9 trainable.*was built for another model"):
        compressor_of(model, torch.optim.AdamW(copy.deepcopy(model).parameters()))


# The audit after a reduction.


class Hoarder(torch.optim.SGD):
    """Keeps its parameters in an attribute of its own as well."""

    def __init__(self, params, **options):
        params = list(params)
        super().__init__(params, **options)
        self.flat = {"chunks": [(p, p.numel()) for p in params]}


def test_an_optimizer_that_keeps_dead_parameters_elsewhere(snapshot):
    model = Mixed()
    optimizer = Hoarder(model.parameters(), lr=1e-2, momentum=0.9)
    train(model, [optimizer], 2)
    before = snapshot(model, optimizer)
    with pytest.raises(OptimizerError, match=r"Hoarder\['flat'\]\['chunks'\]\[\d+\]\[0\] still holds a replaced parameter"):
        reduce(model, optimizer)
    before.check()


def test_state_of_another_dtype_than_before(trained):
    model, optimizer = trained
    before = signature(model, [optimizer])
    audit(model, [optimizer], before=before)
    state = optimizer.state[model.layers[0].B_re]
    state["exp_avg"] = state["exp_avg"].double()
    with pytest.raises(OptimizerError, match=r"exp_avg of layers\.0\.B_re became torch\.float64 .*, expected torch\.float32"):
        audit(model, [optimizer], before=before)


def test_state_of_another_shape(trained):
    model, optimizer = trained
    optimizer.state[model.layers[1].A_log]["max_exp_avg_sq"] = torch.zeros(3, 3)
    with pytest.raises(OptimizerError, match=r"max_exp_avg_sq of layers\.1\.A_log has shape \(3, 3\), expected \(16, 16\)"):
        compressor_of(model, optimizer)


# Averaged copies.


def test_an_average_that_is_the_live_model(trained):
    model, optimizer = trained
    for ema in (dict(model.named_parameters()), {name: p.detach() for name, p in model.named_parameters()}):
        with pytest.raises(ArgumentError, match=r"ema: expected a copy with its own memory, got the live layers\.0\.nu_log"):
            compressor_of(model, optimizer, ema=ema)


def test_an_average_that_did_not_follow_is_refused_at_the_next_reduction(trained):
    """Somebody put old values back, from a checkpoint say."""
    model, optimizer = trained
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    old = dict(ema)
    compressor = compressor_of(model, optimizer, ema=ema, schedule=compressm.At([1, 2]), policy=compressm.Shrink(0.5))
    compressor.step()
    ranks = compressor.ranks
    ema.update(old)
    with pytest.raises(ArgumentError, match=r"ema: expected layers\.0\.nu_log of shape \(8,\), got shape \(16,\)"):
        compressor.step()
    assert compressor.ranks == ranks


def test_an_average_that_does_not_take_the_new_values_undoes_everything(trained, snapshot):
    class Frozen(dict):
        def __setitem__(self, key, value):
            pass

    model, optimizer = trained
    ema = Frozen({name: p.detach().clone() for name, p in model.named_parameters()})
    before = snapshot(model, optimizer, ema=ema)
    with pytest.raises(ArgumentError, match=r"ema: expected layers\.0\.nu_log of shape \(5,\), got shape \(16,\)"):
        reduce(model, optimizer, ema=ema)
    before.check()


def test_an_average_outside_into_which_one_state_would_broadcast():
    model = Mixed(("lru", "lru"))
    optimizer = torch.optim.AdamW(model.parameters())
    average = AveragedModel(model)
    average.update_parameters(model)
    with pytest.warns(StaleCopyWarning, match="AveragedModel.*not passed as ema=.*silently"):
        reduce(model, optimizer, rank=1)
    average.update_parameters(model)  # torch broadcasts (1, 8) into (16, 8)
    assert average.module.layers[0].B_re.shape == (16, 8)
    del average
    gc.collect()


def test_an_average_outside_of_other_shapes_fails_in_torch(trained):
    model, optimizer = trained
    average = AveragedModel(model)
    average.update_parameters(model)
    reduce(model, optimizer, rank=3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        average.update_parameters(model)


def test_an_average_that_follows_is_no_stranger():
    model = Mixed(("lru", "lru"))
    optimizer = torch.optim.AdamW(model.parameters())
    average = AveragedModel(model)
    average.update_parameters(model)
    reduce(model, optimizer, rank=1, ema=average)
    average.update_parameters(model)
    assert average.module.layers[0].d_state == 1


# Copies that share the weights until they are replaced.


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["trace", "export", "tied"])
def test_traced_exported_and_tied_copies(kind, snapshot):
    """Only layers outside the kernels trace; what matters is that the copy holds the same parameters."""

    class Half(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.A_log, self.weight = layer.A_log, layer.x_proj.weight

        def forward(self, x):
            return x @ self.weight.T + self.A_log.sum()

    model = Mixed(("mamba", "mamba"))
    optimizer = torch.optim.AdamW(model.parameters())
    half, x = Half(model.layers[0]), torch.zeros(1, model.layers[0].x_proj.weight.shape[1])
    if kind == "trace":
        half = torch.jit.trace(half, x)
    elif kind == "export":
        half = torch.export.export(half, (x,)).module()
    gc.collect()
    before = snapshot(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(StaleCopyWarning, match=r"outside the model, .* holds layers\.0\.(A_log|x_proj\.weight)"):
            reduce(model, optimizer)
    before.check()
    with pytest.warns(StaleCopyWarning, match="keeps the old weights") as caught:
        reduce(model, optimizer)
    assert len(caught) == 1
    assert half(x).isfinite().all()


def test_models_that_share_whole_modules_are_no_strangers(trained):
    model, optimizer = trained
    other = nn.Sequential(model.layers[0], nn.Linear(8, 8))
    wrapper = nn.ModuleDict({"inner": model})
    reduce(model, optimizer)
    assert other[0].d_state == wrapper["inner"].layers[1].d_state == 5


def test_a_compiled_model_runs_the_new_weights(trained):
    """Dynamo guards on the parameters' sizes, so that it compiles again: as many graphs again as before, and no more."""
    model, optimizer = trained
    compiles = []

    def backend(graph, inputs):
        compiles.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    x, _ = batch(0)
    compiled(x).sum().backward()
    graphs = len(compiles)
    assert graphs
    old = compiled(x).detach()
    reduce(model, optimizer, rank=2)
    model.zero_grad()
    out = compiled(x)
    torch.testing.assert_close(out, model(x))
    assert not torch.allclose(out, old)
    out.sum().backward()
    assert model.layers[0].B_re.grad.shape == (2, 8)
    assert len(compiles) == 2 * graphs
    compiled(x)
    assert len(compiles) == 2 * graphs
    torch._dynamo.reset()


# CUDA graphs, whose capture is the one thing here that this machine need not have.


class Graph:
    """Stands for a captured graph: replaying it does nothing."""

    def replay(self):
        pass


@pytest.fixture
def capture(monkeypatch):
    """torch.cuda.make_graphed_callables itself, with the driver's calls taken out."""
    for name, value in {
        "CUDAGraph": Graph,
        "Stream": lambda *a, **k: None,
        "stream": lambda *a, **k: contextlib.nullcontext(),
        "graph": lambda *a, **k: contextlib.nullcontext(),
        "synchronize": lambda *a, **k: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: (0, 0))
    return torch.cuda.make_graphed_callables


def test_a_graphed_module_is_refused(trained, snapshot, capture):
    model, optimizer = trained
    model.layers[0] = capture(model.layers[0], (torch.randn(4, 9, 8, requires_grad=True),))
    before = snapshot(model, optimizer)
    with pytest.raises(ModelError, match=r"layers\.0\.\w+, .*are part of a CUDA graph \(torch\.cuda\.make_graphed_callables\)"):
        reduce(model, optimizer)
    assert unchanged(model)
    before.check()
    del model.layers[0].forward
    gc.collect()
    reduce(model, optimizer)
    assert loss_of(model, 0).isfinite()
    assert all(p.shape[0] == 5 or p.shape[1] == 5 for p in model.layers[0].parameters() if p.ndim == 2)


def test_graphs_of_other_modules_are_no_obstacle(trained, capture):
    model, optimizer = trained
    model.head = capture(model.head, (torch.randn(4, 8, requires_grad=True),))
    reduce(model, optimizer)
    assert not unchanged(model)


def test_other_graphs_alive_are_told(trained, monkeypatch):
    """A CUDA graph says nothing of what it reads: all that can be told is that there is one."""

    class Captured:
        pass

    graph = Captured()
    model, optimizer = trained
    name, old = next(iter(layer_parameters(model).items()))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Captured)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stale.check_copies(model, {name: (old, old)}, None, [optimizer])  # on the CPU there is nothing to say

    class OnGPU(nn.Parameter):
        is_cuda = True

    with pytest.warns(StaleCopyWarning, match=r"1 CUDA graphs.*captured before this reduction"):
        stale.check_copies(model, {name: (OnGPU(old.detach()), old)}, None, [optimizer])
    del graph
