"""`make same` sees what differs; the runs themselves are made by that command."""

import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT
from safetensors.torch import save_file
from same import RUNS, command_lines, differences

from ddpo_fast.config.command_line import parse

ROW = {"iteration": 1, "loss": 0.5, "approx_kl": None, "time_total_s": 3.0, "peak_memory_mib": 70.0, "images_per_s": 2.0}


@pytest.fixture
def side(tmp_path):
    def write(name, row=ROW, dtype=torch.float32, change=0.0):
        (tmp_path / name / "lora").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        save_file({"a": torch.tensor([1 + change, 2]).to(dtype)}, tmp_path / name / "lora" / "pytorch_lora_weights.safetensors")
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"row": ROW | {"time_total_s": 4.0, "peak_memory_mib": 80.0, "images_per_s": 1.0}}, []),
        ({"row": ROW | {"loss": 0.5000000000000001}}, ["iteration 1: loss 0.5000000000000001 is 0.5"]),
        ({"row": ROW | {"approx_kl": 0.0}}, ["iteration 1: approx_kl 0.0 is None"]),
        ({"row": {key: value for key, value in ROW.items() if key != "loss"}}, ["iteration 1: loss missing is 0.5"]),
        ({"change": 2.0**-23}, ["a differs"]),
        ({"dtype": torch.float64}, ["a differs"]),
    ],
)
def test_what_differs(side, changed, expected):
    assert differences(side("here"), side("ref", **changed)) == expected


def test_the_runs_are_command_lines_of_today(tmp_path):
    for name in RUNS:
        for line in command_lines(tmp_path, "here", name):
            parse([*(a for a in line if not a.startswith(("--model.path", "--reward.name", "--run.resume")))])


@pytest.mark.parametrize("arguments, message", [([], "valid is make same REF=commit"), (["no-such"], "REF=no-such: valid is a commit")])
def test_a_ref_that_is_none_is_one_line(arguments, message):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "same.py"), *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
