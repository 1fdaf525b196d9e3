"""The trainer at every ZeRO stage in turn, with a loss that is NaN once, on the last rank only. Started by test_survival.py."""

import sys

import torch

from ddpo_fast.kernels import reference
from ddpo_fast.train import main

ppo_loss, calls = reference.ppo_loss, 0


def nan_once(noise_pred, *rest):
    global calls
    calls += 1
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    return ppo_loss(noise_pred * torch.nan if last and calls == 1 else noise_pred, *rest)


if __name__ == "__main__":
    reference.ppo_loss = nan_once
    folder = next(argument for argument in sys.argv if argument.startswith("--run.dir="))
    for stage in (0, 1, 2):
        calls = 0
        main([*sys.argv[1:], f"{folder}-{stage}", f"--zero.stage={stage}"])
