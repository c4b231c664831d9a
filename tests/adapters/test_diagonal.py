"""S5 and S4D layers, ours and published ones: reading, edits, moments, data Gramians, training with a Compressor."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from adapters.diagonal_layers import ALL, S4DS, S5S, H, apply, described, made, relative, response, signal, signal_of
from adapters.published_layers import S5SSM, S5Wrapper
from torch import nn

import compressm
from compressm.adapters import find_layers
from compressm.adapters.s4d import state_space
from compressm.compression.planning.calibration import collect
from compressm.compression.planning.probes import probes
from compressm.control import DiagonalSystem
from compressm.control.coordinates import Coordinates
from compressm.errors import ModelError, NumericalError

WITH_REAL_MODES = ("zoh", "shared", "lin", "standalone")  # their two real states follow one eigenvalue, or two equal ones
every = pytest.mark.parametrize("kind", ALL)
CONVENTIONS = pytest.mark.parametrize("convention", ["real", "complex"])


@every
def test_reads_the_system_behind_the_layer(kind):
    layer, adapter = made(kind)
    assert relative(described(adapter.read(layer), kind), response(layer)) < 1e-12


@every
@CONVENTIONS
@pytest.mark.parametrize("rank", [2, 6])
def test_the_edited_layer_is_the_reduced_system(kind, convention, rank):
    layer, adapter = made(kind)
    reduction = adapter.analyse(layer, "", convention, None).reduce(rank)
    edit = adapter.edit(layer, reduction)
    edited = apply(layer, edit)
    system = adapter.bases(reduction)[0]
    assert adapter.rank(edited) == rank == edit.rank_after == reduction.order
    assert relative(response(edited), described(system, kind)) < 1e-10
    assert relative(described(adapter.read(edited), kind), described(system, kind)) < 1e-10
    blank = adapter.blank(layer, rank)
    assert {k: (t.shape, t.dtype) for k, t in blank.items()} == {k: (t.shape, t.dtype) for k, t in edit.tensors.items()}
    assert set(blank) == set(adapter.parameters(layer))
    if rank == 6:
        assert relative(response(edited), response(layer)) < 1e-12


def gradients(layer: nn.Module, x: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
    names = dict(layer.named_parameters())
    grads = torch.autograd.grad((torch.tanh(signal_of(layer, x)) * w).sum(), list(names.values()), allow_unused=True)
    return dict(zip(names, grads, strict=True))


@every
@CONVENTIONS
@pytest.mark.parametrize("exact", ["identity", "unheard"])
def test_transported_gradients_are_true_where_the_cut_is_exact(kind, convention, exact):
    """Full rank, or states that are never heard: the reduced layer is the same function, with other parameters."""
    layer, adapter = made(kind)
    rank = 6 if exact == "identity" else 4
    with torch.no_grad():
        C = layer.get_parameter(next(name for name, _ in layer.named_parameters() if name.split(".")[-1] == "C"))
        if kind in S4DS:
            C[:, rank:] = 0
        else:
            C.view(H, -1, 6)[..., rank:] = 0
    edit = adapter.edit(layer, adapter.analyse(layer, "", convention, None).reduce(rank))
    small = apply(layer, edit)
    x, w = torch.randn(2, 2, 33, H, dtype=torch.float64)
    assert relative(signal_of(small, x), signal_of(layer, x)) < 1e-9
    given, oracle = gradients(layer, x, w), gradients(small, x, w)
    carried = edit.first_moments({key: given[key] for key in edit.tensors})
    merged = exact == "unheard" and convention == "real" and kind in WITH_REAL_MODES
    for name in edit.tensors:
        if name.split(".")[-1] in ("B", "C") or not merged:
            assert relative(carried[name], oracle[name]) < 1e-5, name


def parts(tensor: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def whole(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(numbers.view(*like.shape, 2)) if like.is_complex() else numbers.view_as(like)


@pytest.mark.parametrize("kind", ["zoh", "bidir", "shared", "lin"])
@CONVENTIONS
def test_second_moments_are_expected_squares_of_carried_gradients(kind, convention):
    """Independent entries of variance v: E[(J^T g)^2] = (J^T)^2 v, by enumerating unit gradients of B and C."""
    layer, adapter = made(kind)
    edit = adapter.edit(layer, adapter.analyse(layer, "", convention, None).reduce(3))
    zero = {key: torch.zeros_like(layer.get_parameter(key)) for key in edit.tensors}
    matrices = [key for key in edit.tensors if key.split(".")[-1] in ("B", "C")]
    v = {key: torch.zeros_like(value) for key, value in zero.items()}
    oracle = {key: torch.zeros_like(parts(edit.tensors[key])) for key in matrices}
    for key in matrices:
        parts_of_v = torch.rand_like(parts(zero[key]))
        v[key] = whole(parts_of_v, zero[key])
        for index in range(len(parts_of_v)):
            unit = {name: value.clone() for name, value in zero.items()}
            unit[key] = whole(torch.eye(len(parts_of_v), dtype=torch.float64)[index], zero[key])
            moved = edit.first_moments(unit)
            for name in matrices:
                oracle[name] += parts_of_v[index] * parts(moved[name]) ** 2
    carried = edit.second_moments(v)
    for name, expected in oracle.items():
        moving = expected > 1e-12 * expected.max()  # real modes have no imaginary gradient
        assert relative(parts(carried[name])[moving], expected[moving]) < 1e-9, name
    everything = edit.second_moments({key: value + 1 + (1j if value.is_complex() else 0) for key, value in zero.items()})
    for name, value in everything.items():
        assert bool((parts(value) >= 0).all()), name
        assert bool((parts(value) > 0).any()), name


@every
@pytest.mark.parametrize("rank", [3, 6])
def test_averages_follow(kind, rank):
    layer, adapter = made(kind)
    edit = adapter.edit(layer, adapter.analyse(layer, "", "real", None).reduce(rank))
    same = edit.values({key: layer.get_parameter(key).detach() for key in edit.tensors})
    for name, tensor in edit.tensors.items():
        assert relative(same[name], tensor) < 1e-7, name
    if rank == 6:  # every copy near the layer keeps its function
        other = copy.deepcopy(layer)
        with torch.no_grad():
            for key in edit.tensors:
                other.get_parameter(key).mul_(1.01)
        edited = copy.deepcopy(edit)
        edited.tensors.update(edit.values({key: other.get_parameter(key).detach() for key in edit.tensors}))
        assert relative(response(apply(other, edited)), response(other)) < 1e-9
    broken = {key: torch.full_like(tensor, math.nan) for key, tensor in layer.named_parameters() if key in edit.tensors}
    with pytest.raises(NumericalError, match="averaged copy holds NaN or infinite"):
        edit.values(broken)


class Model(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kind = ALL[kind](), kind
        self.head = nn.Linear(H, 2, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(signal_of(self.layer, x)).mean(1))


@pytest.mark.parametrize("kind", ["bilinear", "bidir", "shared", "published", "lin", "standalone"])
def test_shrinks_in_training(kind):
    model = Model(kind)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, target = torch.randn(8, 12, H, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(3), schedule=compressm.At([4]), calibration=[x], ema=average,
    )  # fmt: skip
    losses = []
    for _ in range(12):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        compressor.step()
        losses.append(loss.item())
    adapter = find_layers(model)["layer"][1]
    assert adapter.rank(model.layer) == adapter.rank(average.module.layer) == 3
    assert losses[-1] < losses[3]
    for key in adapter.parameters(model.layer):
        parameter = model.layer.get_parameter(key)
        state = optimizer.state[parameter]
        assert parameter.dtype == ALL[kind]().get_parameter(key).dtype == state["exp_avg"].dtype
        assert state["step"] == 12
        assert state["exp_avg_sq"].shape == parameter.shape
    if kind == "standalone":
        assert model.layer.n == 6


def test_moments_of_complex_parameters_are_carried_whole():
    """Both parts of complex moments arrive: the same as by the edit itself, for Adam's and for Adamax's."""
    for optimizer_class, square in ((torch.optim.Adam, "exp_avg_sq"), (torch.optim.Adamax, "exp_inf")):
        layer, adapter = made("zoh")
        optimizer = optimizer_class(layer.parameters())
        x = torch.randn(4, 20, H, dtype=torch.float64)
        signal(layer, x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {key: dict(optimizer.state[layer.get_parameter(key)]) for key in adapter.parameters(layer)}
        edit = adapter.edit(layer, adapter.analyse(layer, "", "real", None).reduce(3))
        compressm.compress(layer, compressm.FixedRank(3), optimizer=optimizer)
        first = edit.first_moments({key: state["exp_avg"] for key, state in before.items()})
        squares = {key: state[square] for key, state in before.items()}
        if square == "exp_inf":
            squares = {key: whole(parts(value) ** 2, value) for key, value in squares.items()}
        second = edit.second_moments(squares)
        for key in before:
            state = optimizer.state[layer.get_parameter(key)]
            got = parts(state[square]) ** (2 if square == "exp_inf" else 1)
            torch.testing.assert_close(state["exp_avg"], first[key])
            torch.testing.assert_close(got, parts(second[key]))
        assert bool(optimizer.state[layer.Lambda]["exp_avg"].imag.abs().max() > 0)


def states_of(system: DiagonalSystem, x: torch.Tensor) -> torch.Tensor:
    """(batch, L, 2N) real states [Re; Im], step by step."""
    at = Coordinates.of(system, "real")
    state, found = torch.zeros(len(x), at.size, dtype=torch.float64), []
    for t in range(x.shape[1]):
        state = state @ at.A.T + x[:, t] @ at.B.T
        found.append(state)
    return torch.stack(found, 1)


def moment(states: torch.Tensor) -> torch.Tensor:
    flat = states.flatten(0, 1)
    return flat.T @ flat / len(flat)


def test_data_gramians_of_both_directions():
    layer, adapter = made("bidir")
    x = torch.randn(3, 11, H, dtype=torch.float64)
    found = collect(layer, {"": (layer, adapter)}, [x], rows_per_state=None)[""]
    system = adapter.read(layer)
    assert relative(found.P, (moment(states_of(system, x)) + moment(states_of(system, x.flip(1)))) / 2) < 1e-10
    (v,) = probes([layer(x)], 0)  # the gradient at the output of a model that is this layer alone
    expected = torch.zeros_like(found.Q)
    for C, g in zip(system.C.chunk(2), (v.flip(1), v), strict=True):
        dual = DiagonalSystem(system.log_lam.conj(), C.mH, system.B.mH)
        expected += moment(states_of(dual, g))
    assert relative(found.Q, expected) < 1e-10


@pytest.mark.parametrize("kind", S4DS)
def test_data_gramians_of_every_channel(kind):
    model = Model(kind)
    layer, adapter = model.layer, find_layers(model)["layer"][1]
    x = torch.randn(3, 11, H, dtype=torch.float64)
    before = model(x)
    found = collect(model, {"layer": (layer, adapter)}, [x], rows_per_state=None)["layer"]
    y = state_space(layer, x.mT.contiguous(), None).requires_grad_()
    out = torch.tanh(layer.output_linear(layer.dropout(layer.activation(y))).mT).mean(1)
    out = model.head(out)
    assert relative(out, before) < 1e-12
    (g,) = torch.autograd.grad(out, y, probes([out], 0))
    for h, system in enumerate(adapter.read(layer).unbatched()):
        assert relative(found.P[h], moment(states_of(system, x[..., h : h + 1]))) < 1e-10
        dual = DiagonalSystem(system.log_lam.conj(), system.C.mH, system.B.mH)
        assert relative(found.Q[h], moment(states_of(dual, g[:, h, :, None].flip(1)))) < 1e-10


def gain(response: torch.Tensor) -> float:
    """The H-infinity norm of (steps, H, H), from below, on a grid."""
    return float(torch.linalg.matrix_norm(torch.fft.fft(response, n=4096, dim=0), 2).max())


@pytest.mark.parametrize("kind", ["pairs", "bidir", "lin", "inv"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_of_the_layer_is_within_twice_the_sum_that_is_cut(kind, rank):
    torch.manual_seed(rank)
    layer, adapter = made(kind)
    with torch.no_grad():
        layer.get_parameter("log_step" if kind in S5S else "kernel.log_dt").add_(3)  # forgets within the window below
    analysis = adapter.analyse(layer, "", "real", None)
    reduction = analysis.reduce(rank)
    small = apply(layer, adapter.edit(layer, reduction))
    steps = 200
    x = torch.zeros(H, 2 * steps, H, dtype=torch.float64)
    x[torch.arange(H), steps, torch.arange(H)] = 1
    error = (signal(layer, x) - signal(small, x)).detach().permute(1, 2, 0)
    assert analysis.bounded
    assert gain(error) <= 2 * float(analysis.hsv[reduction.real_order :].sum()) * (1 + 1e-6)
    assert len(analysis.spectrum_after(reduction)) == (2 * rank)


@pytest.mark.parametrize(("kind", "key"), [("zoh", "Lambda"), ("lin", "kernel.log_A_real"), ("published", "seq.B")])
def test_values_that_are_not_finite_are_named(kind, key):
    layer, adapter = made(kind)
    with torch.no_grad():
        layer.get_parameter(key).view(-1)[1] = math.nan
    with pytest.raises(NumericalError, match=rf"layer 'a' \(\w+\): parameter {key} holds 1 NaN or infinite"):
        adapter.read(layer, "a")


@pytest.mark.parametrize(("kind", "key", "value"), [("zoh", "Lambda", 0.1 + 1j), ("lin", "kernel.log_A_real", -800.0)])
def test_eigenvalues_on_the_unit_circle_are_named(kind, key, value):
    layer, adapter = made(kind)
    with torch.no_grad():
        layer.get_parameter(key)[..., 2] = value
    with pytest.raises(NumericalError, match=rf"parameter {key}\[.*2\] means \|lambda\| >= 1"):
        adapter.read(layer, "a")


@pytest.mark.parametrize("options", [{"liquid": True}, {"degree": 2}, {"bcInit": "factorized"}])
def test_what_is_not_a_diagonal_system_is_refused(options):
    with pytest.raises(ModelError, match=f"{next(iter(options))}=.* is not supported"):
        compressm.inspect(S5Wrapper(H, 6, **options))


def test_one_sequence_at_a_time_and_steps_of_a_call():
    layer = S5SSM(H, 6)
    x = torch.randn(20, H, dtype=torch.float64)
    report = compressm.compress(layer, compressm.FixedRank(3), calibration=[x], forward=lambda model, batch: model(batch))
    assert report.ranks == {"": 3}
    with pytest.raises(ModelError, match="step_scale"):
        compressm.compress(layer, compressm.FixedRank(2), calibration=[x], forward=lambda model, batch: model(batch, 2.0))


@pytest.mark.parametrize("kind", ["shared", "standalone"])
def test_files_of_reduced_layers_are_read_into_full_ones(kind, tmp_path):
    model, fresh, x = Model(kind), Model(kind), torch.randn(3, 9, H, dtype=torch.float64)
    compressm.compress(model, compressm.FixedRank(3))
    compressm.load(compressm.save(tmp_path / "a", model), fresh)
    assert torch.equal(fresh(x), model(x))
    if kind == "standalone":
        assert fresh.layer.n == 6


@pytest.mark.parametrize("kind", ["bidir", "lin"])
def test_the_paper_s_recipe_and_bounds_and_stability_schedules(kind):
    """What asks an adapter for more: sliced moments of the complex convention, a bound, which states are kept."""
    for options in (
        {"recipe": "paper", "policy": compressm.FixedRank(3), "schedule": compressm.At([2])},
        {"policy": compressm.ErrorBound(0.3), "schedule": compressm.At([2])},
        {"policy": compressm.FixedRank(3), "schedule": compressm.WhenStable(20, check=0.05, force=0.3)},
    ):
        model, x = Model(kind), torch.randn(4, 12, H, dtype=torch.float64)
        optimizer = torch.optim.Adam(model.parameters())
        compressor = compressm.Compressor(model, optimizer, **options)
        for _ in range(8):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            compressor.step()
        (report,) = compressor.history
        adapter = find_layers(model)["layer"][1]
        assert report.ranks["layer"] == adapter.rank(model.layer) <= 6
        if isinstance(options["policy"], compressm.ErrorBound):
            assert report.layers[0].error_bound <= 0.3 * report.layers[0].spectrum[0]
    channels = made("lin")[1].analyse(ALL["lin"](), "", "real", None).reduce(2)
    kept = channels.kept(6)
    assert len(kept) == 2
    assert kept.tolist() == sorted(kept.tolist())


def test_inspection_says_what_to_expect_of_single_channels():
    assert "expect modest gains" in str(compressm.inspect(ALL["lin"]()))
    assert "expect" not in str(compressm.inspect(ALL["zoh"]()))


@every
def test_state_bytes_are_those_of_the_state(kind):
    layer, adapter = made(kind)
    per_mode = 16 * (H if kind in S4DS else 2 if "bidir" in kind else 1)
    assert adapter.state_bytes(layer, 4) == 4 * per_mode
    assert adapter.slowest(layer) < 1
