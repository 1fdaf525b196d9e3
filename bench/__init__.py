"""Benchmarks: the time, memory and reward of this trainer, measured beside what one would use instead.

    peers       ours, TRL's DDPOTrainer and the textbook loop on the same work, taking turns; what a peer cannot do (`limits`)
    waterfall   starts from the textbook loop and adds one technique a row; shows quality beside speed
    cache       the update with the activation cache and without, for LoRA in different blocks
    throughput  the stages of an iteration; how cost grows with batch, steps, micro-batch, inner epochs and ranks
    reward      reward per device-hour of two or more settings, with several seeds
    algorithms  the paper's comparison: four algorithms, three rewards, the same number of queries for each, held-out prompts
    predict     an iteration's time on N devices, from costs measured on this one
    soak        a long run with a bad reward: it has to finish, without memory growth, and count every bad reward
    kernels     every fused operation by itself; kernel_resources: the GPU resources it uses, compiled ahead of time
    gpu         parts of these in the minutes for which there is a GPU machine; wheels: packages for one without a network
    compare     a run against the last one on the same kind of machine; headline: the tables and pictures of README and docs

The `contenders` are timed. Each is a separate process, which `harness` starts, checks for correctness and gives turns. They do the work
that `models` describes. The contender `textbook` is the oracle. `rows` are written to results/, which has a LOG.md of what was learnt.
"""

import logging
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: the folder that commands are started in."""

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # otherwise it warns that torchvision is missing, which is not used
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns of a 4-bit kernel, which is not used, either
