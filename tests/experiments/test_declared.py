"""What can be set is known before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from compressm.experiments import declared
from compressm.experiments.methods import METHODS
from compressm.experiments.settings import _known_keys
from compressm.experiments.tasks.datasets import DATASETS
from compressm.experiments.tasks.models import MODELS
from compressm.experiments.tasks.objectives import OBJECTIVES
from compressm.experiments.tasks.settings import Settings

COMMAND = """
import contextlib, io, json, sys, time
from compressm.__main__ import main
answers = []
for line in json.loads(sys.argv[1]):
    err = io.StringIO()
    sys.argv = ["compressm", *line.split()]
    start = time.process_time()
    with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main()
    answers.append([err.getvalue(), time.process_time() - start, "torch" in sys.modules])
print(json.dumps(answers))
"""
WRONG = {
    "train digitz": "preset: got 'digitz' (did you mean 'digits'?)",
    "train digits --set lrr=3": "--set: unknown key 'lrr' (did you mean 'lr'?), expected one of attempts, autocast",
    "train digits --set tau=much": "tau: got 'much': Input should be a valid number",
    "train digits --steps 0": "steps: got 0: Input should be greater than or equal to 1",
    "train digits --set runs=compressed,fulll": "runs: got 'fulll' (did you mean 'full'?)",
    "train digits --set model=transformer": "model: got 'transformer', expected one of ",
    "train digits --set tau": "--set: got 'tau', expected key=value",
    "compare sysid --methods compressed,smal": "runs: got 'smal' (did you mean 'small'?)",
    "inspect nowhere.safetensors": "nowhere.safetensors: no such file, expected a checkpoint",
    "inspect /": "/: a folder, expected a checkpoint",
    "compress nowhere --states 4 --data texts --out out": "nowhere: no such folder, expected one that save_pretrained wrote",
    "compress / --states 4 --data nowhere --out out": "--data nowhere: no such file or folder",
    "bench selective_scn": "op: got 'selective_scn' (did you mean 'selective_scan'?), expected one of ",
}


def test_a_wrong_setting_is_answered_without_torch():
    done = subprocess.run([sys.executable, "-c", COMMAND, json.dumps(list(WRONG))], capture_output=True, text=True, check=True)
    for (line, words), (error, seconds, loaded) in zip(WRONG.items(), json.loads(done.stdout), strict=True):
        assert error.startswith(f"compressm: {words}"), line
        assert seconds < 1.0, line
        assert not loaded, line


@pytest.mark.parametrize(
    ("what", "registry"), [("dataset", DATASETS), ("model", MODELS), ("objective", OBJECTIVES), ("runs", METHODS)]
)
def test_the_names_are_those_of_the_registries(what, registry):
    assert sorted(declared.names(what)) == sorted(registry)


def test_the_keys_are_those_of_the_settings_with_their_types_and_ranges():
    keys = declared.settings()
    assert keys.keys() == _known_keys()
    for key, field in Settings.model_fields.items():
        (kind,) = keys[key]
        read = kind.model_fields[key]
        assert (read.annotation, read.metadata, read.default) == (field.annotation, field.metadata, field.default), key
