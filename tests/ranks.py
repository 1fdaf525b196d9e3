"""A process that `runs.Ranks` starts, by `deepspeed ranks.py FOLDER`: it runs command lines of the trainer one after the other.

FOLDER/N.json is the Nth job: {"runs": [argv, ...], "changed": a name of CHANGES or null}. Of rank R, N.R.out is what the job printed and
N.R.code its exit code. The process ends where there is a file `end` and no further job.
"""

import contextlib
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ddpo_fast import train as trainer
from ddpo_fast.kernels import reference
from ddpo_fast.policy import Policy
from ddpo_fast.records import run_directory
from ddpo_fast.updates import activation_cache


@contextlib.contextmanager
def sgd() -> Iterator[None]:
    """Plain SGD in AdamW's place, so that a change of weights is a gradient.

    LoRA's weights start from small noise: from its own start, B = 0, half of the gradient is 0.
    """

    def make(parameters, lr, **_):
        torch.manual_seed(1)
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        return torch.optim.SGD(parameters, lr=lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", make)
        patch.setattr(Policy, "check_output", lambda policy: None)  # which those weights change
        yield


@contextlib.contextmanager
def nan_once() -> Iterator[None]:
    """A loss that is NaN in the job's first call, on the last rank only."""
    ppo_loss, calls = reference.ppo_loss, itertools.count()

    def loss(noise_pred, *rest):
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        return ppo_loss(noise_pred * torch.nan if last and next(calls) == 0 else noise_pred, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ppo_loss", loss)
        yield


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Plans that do not time this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_cache, "matmul_flops", lambda dtype, device: 1e12)
        yield


CHANGES: dict[str | None, Callable[[], contextlib.AbstractContextManager]] = {
    None: contextlib.nullcontext,
    "sgd": sgd,
    "nan_once": nan_once,
    "unmeasured": unmeasured,
}


def do(job: dict) -> int:
    """The exit code of the first command line that does not end with 0."""
    try:
        with CHANGES[job["changed"]]():
            for argv in job["runs"]:
                trainer.main(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(folder: Path, rank: int) -> None:
    run_directory.write_report = lambda run_dir: None  # a dozen plots, 40 % of so short a run
    for number in itertools.count():
        path = folder / f"{number}.json"
        while not path.exists():
            if (folder / "end").exists():
                return
            time.sleep(0.02)
        with (folder / f"{number}.{rank}.out").open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            code = do(json.loads(path.read_text()))
            sys.stdout.flush()
            sys.stderr.flush()
        partial = folder / f"{number}.{rank}.partial"
        partial.write_text(str(code))
        partial.rename(partial.with_suffix(".code"))


if __name__ == "__main__":
    main(Path(sys.argv[-1]), int(os.environ["RANK"]))
