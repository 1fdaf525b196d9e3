"""A long run with a bad reward, 200 iterations of a small random model: it has to finish, keep its memory and count every bad reward.

    python -m bench.soak [--iterations 200]

The reward (`soak_reward`) raises in one call of ten, sometimes hangs until it is given up, and sometimes gives NaN. The output is the
numbers of bad rewards given and counted, and the growth of the trainer's resident memory: the slope of a straight line through the second
half. The exit code is 1 if a count differs or memory grows by more than 64 KiB an iteration.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

from bench import ROOT
from bench.models import random_pipeline
from ddpo_fast.records.metrics import read_metrics

MOST_KIB = 64
HANG_S, TIMEOUT_S = 3.0, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    iterations = parser.parse_args().iterations
    model = random_pipeline("tiny_small")
    with tempfile.TemporaryDirectory() as folder:
        run_dir, log = Path(folder, "run"), Path(folder, "rewards.jsonl")
        command = [
            sys.executable, "-m", "ddpo_fast.train", f"--model.path={model}", f"--run.dir={run_dir}", f"--run.iterations={iterations}",
            "--reward.name=bench.soak_reward:flaky", f"--reward.kwargs={json.dumps({'log': str(log), 'hang_s': HANG_S})}",
            f"--reward.timeout_s={TIMEOUT_S}", "--reward.max_bad_fraction=0.9",
            "--sample.num_samples=16", "--sample.batch_size=2", "--sample.num_steps=2",
            "--train.num_minibatches=2", "--lora.rank=2", "--prompts.samples_per_prompt=1", "--eval.num_samples=2",
            '--eval.prompts=["evaluation"]', "--eval.every=50", "--run.checkpoint_every=10",
        ]  # fmt: skip
        start = time.monotonic()
        with Path(folder, "output").open("w") as output:
            trainer = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            memory_kib = _watch(trainer, run_dir)
        if trainer.returncode:
            sys.exit(Path(folder, "output").read_text()[-2000:] + f"\nthe run ended with {trainer.returncode}")
        calls = [json.loads(line) for line in log.read_text().splitlines()]
        given, counted = sum(call["bad"] for call in calls), read_metrics(run_dir)[-1]["bad_rewards"]
        rows = len(read_metrics(run_dir))
    second_half = {iteration: kib for iteration, kib in memory_kib.items() if iteration >= iterations // 2}
    slope = np.polyfit(list(second_half), list(second_half.values()), 1)[0]
    print(
        f"{rows - 1} iterations in {time.monotonic() - start:.0f} s; calls: {dict(Counter(call['fault'] for call in calls))}\n"
        f"bad rewards: {given} given, {counted} counted\n"
        f"memory: {max(memory_kib.values()) / 1024:.0f} MiB, {slope:+.1f} KiB an iteration over the second half"
    )
    sys.exit(int(given != counted or rows != iterations + 1 or slope > MOST_KIB))


def _watch(trainer: subprocess.Popen, run_dir: Path) -> dict[int, float]:
    """Resident KiB of a trainer and its children, by the iteration that it last reported. Returns when it has ended."""
    memory = {}
    while trainer.poll() is None:
        rows = read_metrics(run_dir)
        try:
            processes = [process := psutil.Process(trainer.pid), *process.children(recursive=True)]
            resident = sum(process.memory_info().rss for process in processes) / 1024
        except psutil.NoSuchProcess:
            continue
        if rows:
            memory[rows[-1]["iteration"]] = resident
        time.sleep(0.2)
    return memory


if __name__ == "__main__":
    main()
