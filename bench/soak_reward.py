"""The reward of bench.soak: the mean of red. It raises in one call of ten, sometimes hangs, and sometimes gives NaN for a picture."""

import json
import random
import time
from pathlib import Path

import torch

_random = random.Random(0)


def flaky(images: torch.Tensor, prompts: list[str], log: str, hang_s: float) -> torch.Tensor:
    """Works without faults for the prompt `evaluation`. For each call, writes a line to `log`: what it did, and for how many pictures there
    is no reward."""
    fault = "none" if "evaluation" in prompts else _random.choices(("raises", "hangs", "nan", "none"), (10, 2, 10, 78))[0]
    rewards = images[:, 0].mean((1, 2)).double()
    bad = {"raises": len(rewards), "hangs": len(rewards), "nan": 1, "none": 0}[fault]
    with Path(log).open("a") as file:
        file.write(json.dumps({"fault": fault, "bad": bad}) + "\n")
    if fault == "raises":
        raise RuntimeError("one of ten")
    if fault == "hangs":
        time.sleep(hang_s)
    if fault == "nan":
        rewards[0] = torch.nan
    return rewards
