"""Predicts the time of an iteration on 1 to 64 devices from costs measured on one. On a CPU a device is one thread.

    python -m bench.predict [any option of ddpo_fast/train.py]            # the table
    python -m bench.predict --check [any option of ddpo_fast/train.py]    # then really runs 1 and 2 ranks, and compares

Costs come from the trainer's own functions, called at several sizes: a time is a t_call + b t_row + ..., fitted by least squares.
The model leaves out that ranks slow each other down, by sharing memory or by uneven work.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bench import ROOT
from bench.harness import RANK_VARIABLES, free_port
from ddpo_fast import train as trainer
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse_or_exit
from ddpo_fast.config.options import Config
from ddpo_fast.files import write_text
from ddpo_fast.gpus import GPUS
from ddpo_fast.planning.scaling import Costs, iteration_terms, scaling, scaling_text
from ddpo_fast.planning.work import Calls, Work
from ddpo_fast.records import checkpoint
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.records.report import write_report
from ddpo_fast.records.run_directory import METRICS
from ddpo_fast.rollout import generate
from ddpo_fast.run import Run
from ddpo_fast.scoring.scorer import score_or_nan
from ddpo_fast.terminal import user_error
from ddpo_fast.timing import StageTimer
from ddpo_fast.updates.activation_cache import NO_CACHE
from ddpo_fast.updates.replay import Replay
from ddpo_fast.updates.transitions import Rollout

NUM_STEPS = 4
"""Denoising steps of a calibration. They are enough that drawing the first noise hardly counts."""
REPEATS = 3
SMALLEST_MESSAGE = 1 << 22
"""Bytes. With smaller messages, latency would hide the bandwidth."""
NVLINK_LATENCY_S = 10e-6
"""An estimate, used if there is only one GPU."""


@dataclass(frozen=True)
class Check:
    """Seconds of an iteration on a number of ranks."""

    num_ranks: int
    predicted_s: float
    measured_s: float


def fit(design: list[list[float]], seconds: list[float]) -> list[float]:
    """Non-negative least squares of the relative error: costs x >= 0 with design x = seconds. Shapes (n, k), (n,) and (k,)."""
    a, used = torch.tensor(design, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None], list(range(len(design[0])))
    while used:
        x = torch.linalg.lstsq(a[:, used], torch.ones(len(a), 1, dtype=torch.float64), driver="gelsd").solution[:, 0]
        if (x >= 0).all():
            break
        used.pop(int(x.argmin()))
    costs = dict(zip(used, x.tolist())) if used else {}
    return [costs.get(column, 0.0) for column in range(len(design[0]))]


def calibrate(config: Config) -> tuple[Work, Costs]:
    """Measures one rank's costs in this process, on a CPU with one thread. Raises ValueError as `assemble` does."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    run = assemble(config)
    config, policy = run.config, run.policy
    work, steps = Work.of(config, run.calls), min(NUM_STEPS, config.sample.num_steps)
    short = config.replace(sample__num_steps=steps, sample__window=None, train__timestep_fraction=1.0)
    calls = Calls.of(short, policy.record, policy.pipe.scheduler)
    gradients = Replay(policy, run.engine, run.objective, NO_CACHE, run.room, config.train.micro_batch)
    run = replace(run, config=short, denoising=policy.denoising(short.sample), calls=calls, gradients=gradients)
    rollout, costs = _sampling_costs(run, min(work.batch_size, work.num_samples))
    costs |= _update_costs(run, rollout, min(work.micro_batch, work.num_samples // work.num_minibatches * work.trained_steps))
    gradient_bytes = 4 * sum(parameter.numel() for parameter in run.engine.parameters)
    bandwidth, latency_s = measure_link(gradient_bytes)
    serial_s = _serial_seconds(run) / config.run.checkpoint_every
    return work, Costs(**costs, gradient_bytes=gradient_bytes, bandwidth=bandwidth, latency_s=latency_s, serial_s=serial_s)


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    """The time of the shortest of several calls, without the first call."""
    timer, times = StageTimer(device), []
    for repeat in range(1 + REPEATS):
        with timer(str(repeat)):
            call()
        times.append(timer.seconds[str(repeat)])
    return min(times[1:])


def _sampling_costs(run: Run, largest: int) -> tuple[Rollout, dict[str, float]]:
    config, policy, schedule = run.config, run.policy, run.schedule(1)
    steps, rows, design, seconds = schedule.num_steps, run.calls.rows, [], []
    for size in sorted({largest, max(1, largest // 2), max(1, largest // 8)}):
        prompts = run.task.prompts[[i % len(run.task.prompts) for i in range(size)]].texts
        policy.texts(schedule.recording, prompts)  # a run does it once
        ids = torch.arange(size, device=policy.device)
        run.gradients.begin_batch(slice(size))

        def sample() -> tuple[Rollout, Tensor]:
            return generate(policy, run.ops, schedule, config.run.seed, ids, prompts, run.gradients)  # noqa: B023

        rollout, images = sample()
        decode_s = _seconds(policy.device, lambda: policy.decode(rollout.latents[:, -1], schedule.recording))  # noqa: B023
        design.append([steps, steps * rows * size])
        seconds.append(_seconds(policy.device, sample) - decode_s)
    reward_s = _seconds(policy.device, lambda: score_or_nan(run.task.reward, images, prompts))
    call_s, row_s = fit(design, seconds)
    costs = {"sample_call_s": call_s, "sample_row_s": row_s, "decode_image_s": decode_s / size, "reward_image_s": reward_s / size}
    return rollout, costs


def _update_costs(run: Run, rollout: Rollout, largest: int) -> dict[str, float]:
    work, design, seconds = Work.of(run.config, run.calls), [], []
    steps, rows, most = work.trained_steps, work.trained_rows, math.ceil(largest / work.trained_steps)
    for samples, micro_batch, epochs in (
        (most, largest, 1),
        (most, max(1, largest // 2), 1),
        (most, max(1, largest // 8), 1),
        (max(1, most // 4), largest, 1),
        (max(1, most // 8), largest, 3),
    ):
        options = run.config.replace(sample__num_samples=samples, train__inner_epochs=epochs, train__num_minibatches=1)
        pick = torch.arange(samples, device=run.policy.device) % len(rollout.latents)
        columns = {name: column[pick] for name, column in vars(rollout).items() if isinstance(column, Tensor)}
        part = replace(rollout, prompts=[rollout.prompts[i] for i in pick.tolist()], **columns)
        advantages = torch.ones(samples, device=run.policy.device)
        varied = replace(run, config=options)
        run.gradients.micro_batch = micro_batch
        call = lambda: trainer.update(varied, varied.updates(varied.schedule(1), 1), part, advantages, 1)  # noqa: B023, E731
        design.append([epochs * math.ceil(samples * steps / micro_batch), epochs * samples * steps * rows, epochs])
        seconds.append(_seconds(run.policy.device, call))
    return dict(zip(("update_call_s", "update_row_s", "optimizer_s"), fit(design, seconds)))


def _serial_seconds(run: Run) -> float:
    """A checkpoint, the exported weights and the report of two iterations."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        write_text(run_dir / "config.yaml", run.config.to_yaml())
        rows = [dict.fromkeys(METRICS, 1.0) | {"iteration": iteration} for iteration in range(2)]
        write_text(run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

        def save() -> None:
            checkpoint.save(run_dir, time.monotonic_ns(), run.engine, {}, 0, run.config.run.keep_checkpoints)
            run.policy.export(run_dir)
            write_report(run_dir)

        return _seconds(run.policy.device, save)


def measure_link(num_bytes: int) -> tuple[float, float]:
    """Bandwidth (bytes/s) and latency (s) of an all-reduce of `num_bytes` between 2 processes. For a single GPU, from its specification."""
    if torch.cuda.device_count() == 1:
        name = torch.cuda.get_device_name()
        known = [gpu for key, gpu in GPUS.items() if all(part in name for part in key.split("-"))]
        if not known:
            raise ValueError(f"{name}: its links are not known; valid is a machine with two GPUs or a {', '.join(GPUS)}")
        return known[0].link_gb_s * 1e9, NVLINK_LATENCY_S
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_link_rank, (folder, num_bytes), nprocs=2)
        small, large = json.loads(Path(folder, "seconds.json").read_text())
    # with 2 ranks a ring all-reduce takes bytes / bandwidth + 2 latency
    return max(num_bytes, SMALLEST_MESSAGE) / (large - small), small / 2


def _link_rank(rank: int, folder: str, num_bytes: int) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    seconds = []
    for size in (1, max(num_bytes, SMALLEST_MESSAGE) // 4):
        tensor = torch.zeros(size, device=device)
        seconds.append(statistics.median(_seconds(device, lambda: dist.all_reduce(tensor)) for _ in range(5)))  # noqa: B023
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def measure(config: Config, num_ranks: int, iterations: int = 5) -> float:
    """Seconds of an iteration without its evaluation, in a run of `num_ranks` ranks: the median of all but the first."""
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES} | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        options = {"run__dir": f"{folder}/run", "run__iterations": iterations, "eval__every": 1000, "eval__num_samples": num_ranks}
        write_text(Path(folder, "recipe.yaml"), config.replace(**options).to_yaml())
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(num_ranks), "--master_port", str(free_port())]
        command = [*launcher, str(ROOT / "ddpo_fast" / "train.py"), "--config", f"{folder}/recipe.yaml"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{num_ranks} ranks: {done.stdout}{done.stderr}")
        rows = read_metrics(Path(folder, "run"))
    pairs = list(zip(rows, rows[1:]))[1:]
    return statistics.median((row["device_hours"] - last["device_hours"]) * 3600 / num_ranks - row["time_eval_s"] for last, row in pairs)


def check(config: Config, work: Work, costs: Costs) -> list[Check]:
    """Predictions beside measurements, for 1 and 2 ranks."""
    return [Check(ranks, sum(iteration_terms(work, costs, ranks).values()), measure(config, ranks)) for ranks in (1, 2)]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.predict", description=__doc__.partition("\n")[0], epilog="Other options are those of ddpo_fast/train.py.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="really run 1 and 2 ranks, and compare")
    parser.add_argument("--machine_devices", type=int, default=Costs.machine_devices, help="devices of a machine (%(default)s)")
    parser.add_argument(
        "--network_gbit_s", type=float, default=Costs.network_bandwidth * 8 / 1e9, help="network between machines (%(default)s)"
    )
    options, others = parser.parse_known_args(argv)
    config = parse_or_exit(others)
    try:
        work, costs = calibrate(config)
    except ValueError as error:
        user_error(error)
    costs = replace(costs, machine_devices=options.machine_devices, network_bandwidth=options.network_gbit_s * 1e9 / 8)
    print("one rank: " + ", ".join(f"{name} {value:.4g}" for name, value in vars(costs).items()))
    print(scaling_text(scaling(work, costs)), flush=True)
    if options.check:
        print(f"{'ranks':>5}{'predicted s':>13}{'measured s':>12}{'ratio':>8}")
        for row in check(config, work, costs):
            print(f"{row.num_ranks:>5}{row.predicted_s:>13.3f}{row.measured_s:>12.3f}{row.predicted_s / row.measured_s:>8.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
