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
import io, json, sys, time
from contextlib import redirect_stderr
from compressm.__main__ import main
answers = []
for line in json.loads(sys.argv[1]):
    err = io.StringIO()
    sys.argv = ["compressm", *line.split()]
    start = time.process_time()
    try:
        with redirect_stderr(err):
            main()
    except SystemExit as end:
        answers.append([err.getvalue(), end.code, time.process_time() - start, "torch" in sys.modules])
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
    "train digits --device gpu": "device: got 'gpu', expected cpu, cuda, cuda:1",
    "train digits --data-dir /nowhere": "--data-dir /nowhere: no such folder",
    "train digits --batch-size 1348": "batch_size: got 1348, expected at most 1347, the number of training examples",
    "train smnist --batch-size 60001": "batch_size: got 60001, expected at most 60000",
    "train tones --batch-size 17000": "batch_size: got 17000, expected at most 16384",
    "train tones --set sequences=20": "batch_size: got 32, expected at most 20",
    "train digits --out /etc/passwd": "--out /etc/passwd: /etc/passwd is no folder, expected a folder that can be written",
    "train digits --resume --out /etc/passwd/a/b": "--out /etc/passwd/a/b: /etc/passwd is no folder, expected",
    f"train digits --out {'x' * 300}": f"--out {'x' * 300}: File name too long, expected a folder that can be written",
    f"train digits --data-dir {'x' * 300}": f"--data-dir {'x' * 300}: no such folder",
    f"report {'x' * 300}": f"{'x' * 300}: no such file",
    "compare sysid --set batch_size=5000": "batch_size: got 5000, expected at most 4096",
    "compare sysid --out /etc/passwd": "--out /etc/passwd: /etc/passwd is no folder, expected a folder that can be written",
    "compare sysid --methods compressed,smal": "runs: got 'smal' (did you mean 'small'?)",
    "compare sysid --seeds 0": "--seeds, --tune-seeds: got 0 and 2, expected at least 1 each",
    "compare sysid --tune rate=1,2": "--tune: got 'rate=1,2', expected multiples of the learning rate",
    "compare sysid --tune lr=1": "--tune lr: got [1.0], expected at least two positive multiples",
    "compare sysid --budget soon": "--budget: got 'soon', expected a time such as 90s",
    "report /nowhere": "/nowhere: no such file, expected the report.json that compressm train writes",
    "report /": "/report.json: no such file, expected the report.json",
    "inspect /nowhere": "/nowhere: no such file, expected a checkpoint",
    "inspect /etc/passwd": "/etc/passwd: not readable as safetensors",
    "compress /nowhere --states 4 --data / --out /new": "/nowhere: no such folder, expected one that save_pretrained wrote",
    "compress / --states 4 --data / --out /new": "/: has no config.json",
    "compress / --states 0 --data / --out /new": "--states: got 0, expected 1 or more",
    "compress / --states 6 --multiple-of 4 --data / --out /new": "--states 6: expected a multiple of 4",
    "bench selectivescan": "op: got 'selectivescan' (did you mean 'selective_scan'?)",
    "bench ssd --states a,b": "--states: got 'a,b', expected positive integers",
    "bench ssd --batch 0": "--batch: got 0, expected a positive integer",
    "bench ssd --size length": "--size: got 'length', expected NAME=NUMBER",
    "bench ssd --dtype float8": "dtype: got 'float8', expected one of float32",
    "bench ssd --pass sideways": "pass: got 'sideways', expected one of forward",
    "bench ssd --rounds 0": "--rounds: got 0, expected 1 to 100000",
    "bench ssd --width 4": "--width: has no meaning for ssd, expected --batch, --length, --size heads=, --d-model",
    "bench lru --size heads=4": "--size heads=: has no meaning for lru, expected --batch, --length, --d-model, --states",
    "bench causal_conv1d --states 4": "--states: has no meaning for causal_conv1d, which keeps no states",
    "bench balanced_truncation --states 8": "--states: got 8, expected at least the rank that is kept",
    "bench ssd --json /etc/passwd/a": "--json /etc/passwd/a: /etc/passwd is no folder, expected a file in a folder",
    "bench ssd --json /": "--json /: is a folder, expected a file in a folder that can be written",
}


def test_a_wrong_setting_is_answered_without_torch():
    done = subprocess.run([sys.executable, "-c", COMMAND, json.dumps(list(WRONG))], capture_output=True, text=True, check=True)
    for (line, words), (error, code, seconds, loaded) in zip(WRONG.items(), json.loads(done.stdout), strict=True):
        assert error.startswith(f"compressm: {words}"), line
        assert (error.count("\n"), code) == (1, 2), line
        assert seconds < 1.0, line
        assert not loaded, line


def test_an_unfinished_command_and_a_folder_in_use_are_named_without_torch(tmp_path):
    (tmp_path / "command.json").write_text('{"preset": "digits"}')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "full.safetensors").touch()
    lines = [
        f"train digits --out {tmp_path}", f"compress {tmp_path} --states 4 --data / --out {tmp_path}",
        f"compress {tmp_path} --states 4 --data {tmp_path}/none --out {tmp_path}/new",
        f"compress {tmp_path} --states 4 --data / --out {tmp_path}/config.json/new",
        f"report {tmp_path}", f"inspect {tmp_path}",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", COMMAND, json.dumps(lines)], capture_output=True, text=True, check=True)
    words = (
        "holds an unfinished digits command", "exists already, expected a new", "none: no such file or folder",
        "config.json is no folder", "is unfinished. Continue it with", "is a folder, with full.safetensors in it,",
    )  # fmt: skip
    for (error, _, _, loaded), word in zip(json.loads(done.stdout), words, strict=True):
        assert word in error
        assert not loaded


@pytest.mark.parametrize(
    ("what", "registry"), [("dataset", DATASETS), ("model", MODELS), ("objective", OBJECTIVES), ("runs", METHODS)]
)
def test_the_names_are_those_of_the_registries(what, registry):
    assert sorted(declared.names(what)) == sorted(registry)


def test_the_number_of_examples_is_that_of_the_data():
    assert DATASETS["digits"].examples == len(DATASETS["digits"](None).load(None).train_y)


def test_the_keys_are_those_of_the_settings_with_their_types_and_ranges():
    keys = declared.settings()
    assert keys.keys() == _known_keys()
    for key, field in Settings.model_fields.items():
        (kind,) = keys[key]
        read = kind.model_fields[key]
        assert (read.annotation, read.metadata, read.default) == (field.annotation, field.metadata, field.default), key
