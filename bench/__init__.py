"""What this trainer is worth in time, memory and reward, measured beside what one would use instead.

    peers       ours, TRL's DDPOTrainer and the textbook loop on the same work, taking turns; what a peer cannot do (`limits`)
    waterfall   from the textbook loop one technique a row, its quality beside its speed
    cache       the update with the activation cache and without, by where LoRA is
    throughput  the stages of an iteration; how cost grows with batch, steps, micro-batch, inner epochs and ranks
    reward      reward per device-hour of two or more settings, with several seeds
    algorithms  the paper's comparison: four algorithms, three rewards, as many queries each, held-out prompts
    predict     an iteration's time on N devices, from costs measured on this one
    soak        a long run with a bad reward: finishes, memory flat, every bad reward counted
    kernels     every fused operation by itself; kernel_resources: what it takes of a GPU, compiled ahead of time
    gpu         parts of these in the minutes that a GPU machine is there; wheels: what it lacks without a network
    compare     a run against the last one on the same kind of machine; headline: the tables and pictures of README and docs

`contenders` are what is timed, each a process of its own that `harness` starts, gates for correctness and gives its turn. They do the
work of `models`; `textbook` is the oracle among them. `rows` are written to results/, which has a LOG.md of what was learnt.
"""

import logging
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: the folder that commands are started in."""

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torchvision is missing, which nothing here uses
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a 4-bit kernel that cannot be downloaded, likewise
