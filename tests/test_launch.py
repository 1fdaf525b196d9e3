"""Runs as users start them: real processes, the deepspeed launcher, 1 and 2 gloo ranks, kill -9."""

import re
import signal
import subprocess
import sys
import time

import bounds
import pytest
import torch
from ranks import sgd
from runs import BY_PROMPT, ENVIRONMENT, LIMIT_S, ROOT, TIMES, deepspeed
from shared import joined, weights

from ddpo_fast import train as trainer
from ddpo_fast.records.metrics import read_metrics


@pytest.mark.rounding
def test_ranks_and_zero_stages_give_one_gradient(launch_options, ranks, tmp_path):
    """Same noise, same minibatches, same gradient (one update by SGD with rate 1, unclipped) on 1 and 2 ranks, at every ZeRO stage."""
    (tmp_path / "reward.py").write_text(BY_PROMPT)
    extra = (
        "--train.micro_batch=3", f"--reward.name={tmp_path}/reward.py:by_prompt", "--run.iterations=1", "--train.num_minibatches=1",
        "--train.learning_rate=1", "--train.max_grad_norm=1e9", "--train.clip_range=1e3",
    )  # fmt: skip
    with sgd():
        trainer.main(launch_options("alone", *extra))
    codes, text = ranks.run(*(launch_options(stage, *extra, f"--zero.stage={stage}") for stage in "012"), changed="sgd")
    assert codes == [0, 0], text
    expected, (_, row), bound = joined(weights(tmp_path / "alone")), read_metrics(tmp_path / "alone"), bounds.of_run(tmp_path / "alone")
    for stage in "012":
        gradient, (_, other) = joined(weights(tmp_path / stage)), read_metrics(tmp_path / stage)
        assert (gradient - expected).norm() <= bound.gradient * row["grad_norm"] and row["grad_norm"] > 1e-2, stage
        assert other["reward_mean"] == row["reward_mean"] and row["reward_std"] > 0, stage
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=bound.gradient), stage
        assert other["ratio_error"] <= bound.ratio and other["transitions"] == 40, stage


def test_kill_and_resume_is_the_uninterrupted_run(launch_options, tmp_path):
    extra = ("--run.iterations=6", "--train.inner_epochs=2", "--baseline.min_count=2", "--eval.every=2")
    trainer = [sys.executable, str(ROOT / "ddpo_fast" / "train.py")]
    subprocess.run([*trainer, *launch_options("whole", *extra)], env=ENVIRONMENT, check=True, capture_output=True, timeout=LIMIT_S)
    victim = subprocess.Popen(
        [*trainer, *launch_options("killed", *extra)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + LIMIT_S
    while not list((tmp_path / "killed" / "checkpoints").glob("2")):
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)  # into the third iteration
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert len(read_metrics(tmp_path / "killed")) < 7
    resumed = [*trainer, f"--run.dir={tmp_path / 'killed'}", "--resume"]
    done = subprocess.run(resumed, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0 and "resumed after iteration" in done.stdout, done.stderr
    strip = [
        [{k: v for k, v in row.items() if not TIMES.search(k)} for row in read_metrics(tmp_path / name)] for name in ("whole", "killed")
    ]
    assert strip[0] == strip[1] and len(strip[0]) == 7
    assert torch.equal(joined(weights(tmp_path / "whole")), joined(weights(tmp_path / "killed")))


def test_a_reward_that_fails_on_one_of_two_ranks(launch_options, ranks, tmp_path):
    """Every rank knows of it: the run stops on both, with one line and the state before the update."""
    failing = "import os\ndef f(images, prompts):\n    global calls\n    calls += 1\n    if os.environ['RANK'] == '1' and calls == 3:\n"
    (tmp_path / "failing.py").write_text(f"calls = 0\n{failing}        os._exit(1)\n    return images.mean((1, 2, 3))\n")
    extra = (f"--reward.name={tmp_path / 'failing.py'}:f", "--reward.isolate=true", "--eval.every=10", "--run.iterations=3")
    argv = launch_options("run", *extra, "--reward.max_bad_fraction=0.4", "--run.checkpoint_every=10")
    slow = "import runpy, time\nfrom ddpo_fast.records.metrics import MetricsWriter\nclose = MetricsWriter.close\n"
    slow += "MetricsWriter.close = lambda writer: (time.sleep(3), close(writer))\n"  # as wandb's may be: the other rank must wait for it
    (tmp_path / "slow.py").write_text(f'{slow}runpy.run_path({str(ROOT / "ddpo_fast/train.py")!r}, run_name="__main__")\n')
    done = deepspeed(2, tmp_path / "slow.py", argv)
    text = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in text and "SIGTERM" not in text, text
    assert text.count("error: iteration 2: 4 of 8 samples got no finite reward, and reward.max_bad_fraction=0.4") == 1
    assert "WARNING: the reward's process ended with status 1; its 4 samples are left out" in text
    codes, text = ranks.run([f"--run.dir={tmp_path / 'run'}", "--resume"])
    assert codes == [0, 0] and "resumed after iteration 1" in text and len(read_metrics(tmp_path / "run")) == 4


def test_two_ranks_resume_with_sharded_optimizer(launch_options, ranks, tmp_path, capsys):
    """In 8 bits: blocks of 256 that reach over weights, so they stay with the number of ranks (others: test_resume.py)."""
    extra = ("--zero.stage=2", "--optimizer.name=adamw_8bit")
    resumed = [f"--run.dir={tmp_path / 'parts'}", "--resume"]
    codes, text = ranks.run(
        launch_options("whole", *extra, "--run.iterations=3"),
        launch_options("parts", *extra, "--run.iterations=2"),
        [*resumed, "--run.iterations=3"],
    )
    assert codes == [0, 0], text
    assert torch.equal(joined(weights(tmp_path / "whole")), joined(weights(tmp_path / "parts")))
    with pytest.raises(SystemExit) as ended:
        trainer.main([*resumed, "--run.iterations=4"])
    assert ended.value.code == 2 and "error: zero.stage=2: the optimizer's state is sharded over 2 ranks" in capsys.readouterr().err


REWARD = """
import multiprocessing
from kernels import get_kernel  # Hugging Face's package, if it is there
from tests import theirs        # beside this file

def f(images, prompts):
    scores = images[:, 0].mean((1, 2)).tolist()
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            scores = pool.map(same, scores)
    return scores

def same(score):
    return score
"""


@pytest.fixture
def packages(tmp_path):
    """A reward that brings packages of names that the checkout has, too, and starts processes; the variable that lets it be found."""
    (tmp_path / "my_reward.py").write_text(REWARD)
    for folder, name in (("site/kernels", "get_kernel"), ("tests", "theirs")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").write_text(f"{name} = True")
    return {"PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.parametrize(
    "form, cwd",
    [
        ("deepspeed", "checkout"), ("file", "elsewhere"), ("module", "checkout"), ("module", "elsewhere"),
        *(pytest.param(form, cwd, marks=pytest.mark.slow) for form, cwd in (("deepspeed", "elsewhere"), ("file", "checkout"))),
    ],
)  # fmt: skip
def test_every_way_to_start(launch_options, tmp_path, form, cwd, packages, monkeypatch):
    """With a reward that wants packages of the checkout's names, and starts processes that import its file."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", packages["PYTHONPATH"])
    folder = ROOT if cwd == "checkout" else tmp_path
    script = "ddpo_fast/train.py" if cwd == "checkout" else str(ROOT / "ddpo_fast" / "train.py")
    argv = launch_options("run", "--run.iterations=1", f"--reward.name={tmp_path / 'my_reward.py'}:f", "--reward.timeout_s=200")
    if form == "deepspeed":
        done = deepspeed(1, script, argv, cwd=folder)
    else:
        command = [sys.executable, script] if form == "file" else [sys.executable, "-m", "ddpo_fast.train"]
        done = subprocess.run([*command, *argv], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reward on the fixed evaluation set after iteration 1:" in done.stdout and (tmp_path / "run" / "report.html").exists()
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "launch" not in line and "runner" not in line]
    assert not [line for line in ours if re.search(r"warn", line, re.I)], ours


@pytest.mark.parametrize("form", ["file", "module"])
def test_a_checkout_that_is_not_installed_says_so(tmp_path, form):
    """Neither a copy of the package runs another's code, nor with another's kernels."""
    (tmp_path / "ddpo_fast").mkdir()
    for name in ("__init__.py", "train.py"):
        (tmp_path / "ddpo_fast" / name).write_text((ROOT / "ddpo_fast" / name).read_text())
    start = ["ddpo_fast/train.py"] if form == "file" else ["-m", "ddpo_fast.train"]
    for python in ([sys.executable], [sys.executable, "-S"]):  # -S: without what is installed
        done = subprocess.run([*python, *start], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S)
        expected = f"error: this Python has not installed ddpo_fast from this folder: pip install -e {tmp_path}\n"
        assert (done.returncode, done.stderr) == (2, expected)


def test_a_bad_option_costs_one_line_and_little_time(tmp_path):
    """Little, because it is answered before torch, diffusers and DeepSpeed are imported."""
    script = str(ROOT / "ddpo_fast" / "train.py")
    command = [sys.executable, "-X", "importtime", script, "--sample.eta", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2 and done.stdout == ""
    imported, said = [], []
    for line in done.stderr.splitlines():
        imported.append(line.split("|")[-1].strip()) if line.startswith("import time:") else said.append(line)
    assert re.fullmatch(r"error: sample\.eta=0\.0: valid is .*", "\n".join(said))
    assert "ddpo_fast.config.command_line" in imported and not {"torch", "diffusers", "deepspeed"} & set(imported)


def test_a_bad_option_on_two_ranks_is_said_once(tmp_path):
    """By rank 0, though it starts last, and the launcher ends all ranks once one has ended."""
    start = f'runpy.run_path({str(ROOT / "ddpo_fast/train.py")!r}, run_name="__main__")'
    late = f'import os, runpy, time\ntime.sleep(3 * (os.environ["RANK"] == "0"))\n{start}\n'
    (tmp_path / "late.py").write_text(late)
    done = deepspeed(2, tmp_path / "late.py", ["--train.micro_batch", "0"])
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: train.micro_batch=0: valid is auto, or a whole number >= 1") == 1


def test_samples_that_do_not_divide_over_the_ranks_are_refused(launch_options, ranks):
    codes, text = ranks.run(launch_options("run", "--sample.num_samples=6"))
    assert codes == [2, 2] and "error: sample.num_samples=6: valid is a multiple of 4 with 2 ranks" in text
