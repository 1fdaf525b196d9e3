"""Finds out what a contender cannot do by trying it. The error message of each attempt is the evidence.

python -m bench.limits ours|trl SDXL|ZeRO|"2 ranks"      # prints one line: what happened
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import ROOT
from bench.harness import rank_variables
from bench.models import EMBEDDED, tiny_sdxl

ATTEMPTS = ("SDXL", "ZeRO", "2 ranks")
"""An SDXL pipeline; optimizer state sharded by DeepSpeed ZeRO 2; gradients synchronised between two ranks."""
SMALL = (
    "--sample.num_samples=2",
    "--sample.batch_size=1",
    "--sample.num_steps=2",
    "--train.num_minibatches=1",
    "--prompts.samples_per_prompt=1",
)
WORKS = "works"


def attempt(contender: str, what: str) -> str:
    """One line: WORKS, or the error's type and text."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_sdxl(Path(folder, "model")) if what == "SDXL" else EMBEDDED
        num_ranks = 1 if what == "SDXL" else 2
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if torch.cuda.device_count() < num_ranks:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        processes, answers = [], [Path(folder, f"rank{rank}") for rank in range(num_ranks)]
        for own, answer in zip(rank_variables(num_ranks), answers):
            command = [sys.executable, "-m", "bench.limits", "--rank", contender, what, str(model), folder]
            with answer.open("w") as file:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment | own, stdout=file, stderr=subprocess.DEVNULL))
        deadline, said = time.monotonic() + 240, []
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline and set(said) <= {WORKS}:
            time.sleep(0.5)  # a rank that has failed leaves the others waiting
            said = [answer.read_text().strip() for answer in answers if answer.stat().st_size]
        for process in processes:
            process.kill()
            process.wait()
        said = [answer.read_text().strip() for answer in answers if answer.stat().st_size]
    said = [line.replace(str(model), "MODEL") for line in said]
    return next((line for line in said if line != WORKS), WORKS if len(said) == num_ranks else "it did not answer")


def in_rank(contender: str, what: str, model: str, folder: str) -> str:
    """The attempt itself, in one of its processes. Raises what goes wrong."""
    argv = [f"--model.path={model}", f"--run.dir={folder}/run", "--kernels.backend=reference", *SMALL]
    if contender == "ours":
        return _ours([*argv, "--zero.stage=2"] if what == "ZeRO" else argv)
    return _trl(argv, what)


def _ours(argv: list[str]) -> str:
    from bench.contenders import Ours

    ours = Ours(argv)
    ours.iterate()
    return _compare_ranks(ours.trainable().values())


def _trl(argv: list[str], what: str) -> str:
    from accelerate import PartialState
    from trl import DefaultDDPOStableDiffusionPipeline

    from bench.contenders import TRL

    if what == "SDXL":
        PartialState(cpu=not torch.cuda.is_available())  # TRL logs before it has made its own state
        pipeline = DefaultDDPOStableDiffusionPipeline(argv[0].partition("=")[2], use_lora=True)
        with torch.no_grad():
            pipeline(["cat"], num_inference_steps=2)
        return WORKS
    if what == "ZeRO":
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    trl = TRL(argv)
    trl.iterate()
    return _compare_ranks(trl.trainable().values())


def _compare_ranks(parameters) -> str:
    """Compares the ranks' weights: after different samples they are equal only if the gradients were synchronised."""
    mine = torch.cat([parameter.detach().flatten().double() for parameter in parameters])
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return WORKS
    highest, lowest = mine.clone(), mine.clone()
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    difference = (highest - lowest).abs().max().item()
    return WORKS if difference == 0 else f"gradients are not synchronised: after one update the ranks' weights differ by {difference:.2g}"


def main() -> None:
    if sys.argv[1] != "--rank":
        print(attempt(*sys.argv[1:3]))
        return
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        print(in_rank(*sys.argv[2:]), file=answer, flush=True)
    except (Exception, SystemExit) as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}"[:400], file=answer, flush=True)


if __name__ == "__main__":
    main()
