"""Whether ten short runs are another commit's, bit for bit: `make same REF=main`, before and after code is moved.

REF is installed into a folder of its own. Both commits make the same runs at the same time, on random tiny models. Then every metric
except times, memory and rates is compared, and every weight. The exit code is 1 where something differs.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from runs import DEEPSPEED, ENVIRONMENT, LIMIT_S, ROOT, TIMES, ports
from safetensors.torch import load_file

REWARD = "def redness(images, prompts):\n    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))\n"
COMMON = {
    "sample.num_samples": 8, "sample.num_steps": 5, "sample.batch_size": 4, "eval.num_samples": 4, "run.iterations": 2,
    "train.num_minibatches": 2, "train.micro_batch": 6, "train.learning_rate": 1e-3, "lora.rank": 2, "prompts.limit": 4,
    "prompts.samples_per_prompt": 2, "baseline.min_count": 2, "eval.every": 1, "model.path": "{folder}/sd",
    "reward.name": "{folder}/reward.py:redness", "sample.guidance_scale": 3.0, "train.clip_range": 3e-4, "lora.alpha": 16.0,
    "lora.targets": "[attention,feed_forward,convolution,projection]",
}  # fmt: skip
ONE_UPDATE = {"train.num_minibatches": 1}
RUNS: dict[str, list[dict]] = {
    "ddpo_is": [{"train.inner_epochs": 2}],
    "ddpo_sf": [{"train.algorithm": "ddpo_sf", **ONE_UPDATE}],
    "rwr": [{"train.algorithm": "rwr", "algorithm.population": "prompt"}],
    "rwr_sparse": [{"train.algorithm": "rwr_sparse", "algorithm.percentile": 0.5}],
    "kl": [{"train.kl_coefficient": 0.1}],
    "cache": [{"cache.mode": "on", "lora.scope": "mid_up", "train.inner_epochs": 2}],
    "score_accumulation": [{"train.estimator": "score_accumulation", **ONE_UPDATE}],
    "sdxl": [{"model.path": "{folder}/sdxl/sdxl"}],
    "zero_2": [{"zero.stage": 2}],
    "resume": [{"run.iterations": 1, "train.inner_epochs": 2}, {"run.iterations": 3, "run.resume": True}],
}
"""Command lines by a run's name, each one's changes of COMMON; a run that is resumed has several."""
RANKS = {"zero_2": 2}
RENAMED = {
    f"algorithm.{name}": f"rwr.{name}" for name in ("population", "percentile", "inverse_temperature", "guidance_scale", "num_timesteps")
}
"""An option's name here and its former name, which a commit before the renaming is given."""


def command_lines(folder: Path, side: str, name: str) -> list[list[str]]:
    lines = []
    for changed in RUNS[name]:
        values = COMMON | changed | {"run.dir": f"{{folder}}/{side}/{name}"}
        lines.append([f"--{key}={str(value).format(folder=folder)}" for key, value in values.items()])
    return lines


def as_known(argv: list[str], parse: Callable[[list[str]], object]) -> list[str]:
    """The command line with former names of options, where this side's trainer does not know today's."""
    known = []
    for argument in argv:
        option, value = argument.removeprefix("--").split("=", 1)
        if option in RENAMED:
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
                parse([argument])
            option = RENAMED[option] if "no such option" in said.getvalue() else option
        known.append(f"--{option}={value}")
    return known


def make_runs(folder: Path, side: str, root: Path) -> None:
    """Makes this side's runs, in a process of its own, and says which package it has."""
    import ddpo_fast
    from ddpo_fast import kernels, train

    for package in (ddpo_fast, kernels):
        print(f"{side}: {package.__file__}", flush=True)
        if not Path(package.__file__).is_relative_to(root):
            sys.exit(f"error: {side} would run {package.__file__}, which is not in {root}")
    for name in RUNS:
        lines = [as_known(line, train.parse_or_exit) for line in command_lines(folder, side, name)]
        for line in lines:
            if name in RANKS:
                command = [*DEEPSPEED, str(next(ports)), "--num_gpus", str(RANKS[name]), str(root / "ddpo_fast" / "train.py"), *line]
                subprocess.run(command, cwd=folder, check=True, timeout=LIMIT_S)
            else:
                train.main(line)
        print(f"{side}: {name}", file=sys.__stderr__, flush=True)


def install(ref: str, folder: Path) -> Path:
    """REF's packages alone, for the Python that runs this."""
    tree, installed = folder / "tree", folder / "installed"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", ref], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "x"], cwd=tree, input=archive, check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(installed)]
    subprocess.run([*pip, str(tree)], check=True)
    return installed


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs between two run directories: every metric but times, memory and rates, and every weight."""
    rows, other_rows = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (ours, theirs))
    if len(rows) != len(other_rows):
        return [f"{len(other_rows)} rows are {len(rows)}"]
    found = []
    for row, other in zip(rows, other_rows):
        keys = [key for key in row | other if not TIMES.search(key)]
        missing = object()
        changed = [key for key in keys if row.get(key, missing) != other.get(key, missing)]
        found += [f"iteration {row['iteration']}: {key} {other.get(key, 'missing')} is {row.get(key, 'missing')}" for key in changed]
    weights, other_weights = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (ours, theirs))
    for name in weights | other_weights:
        if name not in weights or name not in other_weights:
            found.append(f"{name} is on one side only")
        elif weights[name].dtype != other_weights[name].dtype or not torch.equal(weights[name], other_weights[name]):
            found.append(f"{name} differs")
    return found


def compare(ref: str, folder: Path) -> int:
    if subprocess.run(["git", "rev-parse", "--quiet", "--verify", f"{ref}^{{commit}}"], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"error: REF={ref}: valid is a commit, branch or tag of this repository")
    from tiny import make_pipeline, make_sdxl

    make_pipeline(folder / "sd")
    make_sdxl(folder / "sdxl")
    (folder / "reward.py").write_text(REWARD)
    sides = {"ref": install(ref, folder), "here": ROOT}
    started = {}
    for side, root in sides.items():
        environment = ENVIRONMENT | {"PYTHONPATH": str(root)}
        command = [sys.executable, __file__, side, str(root), str(folder)]
        log = (folder / f"{side}.log").open("w")
        started[side] = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    failed = [side for side, process in started.items() if process.wait()]
    for side in failed:
        print((folder / f"{side}.log").read_text()[-5000:], f"error: the runs of {side} failed", sep="\n")
    if failed:
        return 1
    for side in sides:
        print(*(line for line in (folder / f"{side}.log").read_text().splitlines() if line.startswith(f"{side}: /")), sep="\n")
    found = {name: differences(folder / "here" / name, folder / "ref" / name) for name in RUNS}
    for name, what in found.items():
        print(f"{name:20} {'the same' if not what else f'{len(what)} differences; ' + '; '.join(what[:3])}")
    return int(any(found.values()))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        make_runs(Path(sys.argv[3]), sys.argv[1], Path(sys.argv[2]))
    elif len(sys.argv) == 2 and sys.argv[1]:
        with tempfile.TemporaryDirectory() as temporary:
            sys.exit(compare(sys.argv[1], Path(os.path.realpath(temporary))))
    else:
        sys.exit("error: valid is make same REF=commit")
