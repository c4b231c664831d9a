"""inspect(model)."""

from __future__ import annotations

import json

import pytest
import torch

import compressm
from compressm.adapters import LRUAdapter
from compressm.compression.planning.inspection import TAUS
from compressm.errors import ModelError, NumericalError


def test_spectra_ranks_and_bounds(training, snapshot):
    run = training()
    before = snapshot(run.model, run.optimizer)
    found = compressm.inspect(run.model, [run.batch()[0]])
    before.check()
    assert [layer.name for layer in found.layers] == ["lrus.0", "lrus.1"]
    for layer, lru in zip(found.layers, run.model.lrus, strict=True):
        system = LRUAdapter().read(lru)
        assert (layer.kind, layer.states) == ("LRU", lru.d_state)
        assert layer.state_bytes == lru.initial_state(1).nbytes
        assert layer.slowest == pytest.approx(float(system.log_lam.exp().abs().max()))
        kinds = [(spectrum.convention, spectrum.gramians) for spectrum in layer.spectra]
        assert kinds == [("real", "data"), ("real", "data-free"), ("complex", "data-free")]
        for spectrum in layer.spectra:
            assert sorted(spectrum.hsv, reverse=True) == list(spectrum.hsv)
            assert len(spectrum.hsv) == (2 if spectrum.convention == "real" else 1) * lru.d_state
        assert layer.spectra[0].error_bounds is None
        for spectrum in layer.spectra[1:]:
            oracle = system.hankel_singular_values(spectrum.convention).tolist()
            assert spectrum.hsv == pytest.approx(oracle, rel=1e-9, abs=1e-12)
            for tau in TAUS:
                assert spectrum.error_bounds[tau] <= 2 * tau * sum(oracle) * (1 + 1e-9)


def test_ranks_are_those_of_the_policy(training):
    run = training(ranks=(14, 11))
    for recipe, index in (("default", 0), ("paper", 1)):
        ranks = {layer.name: layer.spectra[index].ranks for layer in compressm.inspect(run.model).layers}
        for tau in TAUS:
            policy, schedule = compressm.Energy(tau=tau, gate=1.0), compressm.At([1])
            plan = compressm.Compressor(run.model, None, policy=policy, schedule=schedule, recipe=recipe).plan()
            assert plan.ranks == {name: found[tau] for name, found in ranks.items()}


def test_table(training):
    found = compressm.inspect(training().model)
    lines = str(found).splitlines()
    for layer in found.layers:
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{layer.name} (LRU): {layer.states} states"))
        assert f" states, {16 * layer.states} bytes a sequence, |lambda| up to " in lines[start]
        header, rows = lines[start + 1], lines[start + 2 :]
        assert header.split() == "spectrum max min tau .01 tau .02 tau .04 tau .1 bound .02".split()
        for line, spectrum in zip(rows, layer.spectra, strict=False):
            assert line.startswith(f"{spectrum.convention}, {spectrum.gramians}")
            assert line.split()[-5:-1] == [str(spectrum.ranks[tau]) for tau in TAUS]
    assert max(map(len, lines[:-1])) <= 80
    assert "(model) (LRU)" in str(compressm.inspect(training().model.lrus[0]))


def test_to_dict_is_json(training):
    found = compressm.inspect(training().model)
    data = json.loads(json.dumps(found.to_dict()))
    spectrum = data["layers"][0]["spectra"][0]
    assert list(spectrum["ranks"]) == ["0.01", "0.02", "0.04", "0.1"]
    assert spectrum["hsv"] == list(found.layers[0].spectra[0].hsv)
    assert spectrum["error_bounds"]["0.1"] == found.layers[0].spectra[0].error_bounds[0.1]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot_writes_a_picture(training, tmp_path, suffix, magic):
    path = tmp_path / f"spectra.{suffix}"
    assert compressm.inspect(training(ranks=(4, 3, 2, 5)).model).plot(str(path)) == path
    data = path.read_bytes()
    assert data.startswith(magic)
    assert len(data) > 3000
    with pytest.raises(OSError, match="missing"):
        compressm.inspect(training().model).plot(tmp_path / "missing" / "x.png")


def test_dead_layers_are_shown_not_refused(training, tmp_path):
    run = training()
    with torch.no_grad():
        run.model.lrus[0].C_re.zero_()
        run.model.lrus[0].C_im.zero_()
    found = compressm.inspect(run.model)
    assert found.layers[0].spectra[0].hsv == (0.0,) * 16
    assert found.layers[0].spectra[0].ranks[0.02] == 8
    assert "lrus.0" in str(found)
    found.plot(tmp_path / "x.png")
    with torch.no_grad():
        run.model.lrus[0].C_re[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"layer 'lrus\.0'.*C_re"):
        compressm.inspect(run.model)
    with pytest.raises(ModelError, match="no state-space layer"):
        compressm.inspect(torch.nn.Linear(1, 1))
