"""Where an iteration's time goes, and how far its stages are."""

import time
from contextlib import contextmanager

import torch
from tqdm import tqdm


def progress_bar(stage: str, total: int, unit: str, shown: bool) -> tqdm:
    """A bar for one stage of an iteration, below the run's own."""
    return tqdm(total=total, desc=f"  {stage}", unit=unit, leave=False, disable=not shown, dynamic_ncols=True)


class StageTimer:
    """Wall seconds by stage; a stage ends when the device has done its work."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        start = self._now()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
