"""The time of an iteration on N devices, from what one rank's work was measured to cost.

Shape letters: N devices (ranks), S denoising steps, P trained weights.
"""

import math
from dataclasses import dataclass

from ddpo_fast.planning.work import Work


@dataclass(frozen=True)
class Costs:
    """What one rank's work was measured to cost, in seconds; the links in bytes and bytes a second."""

    sample_call_s: float
    """A network call in sampling, whatever its rows, and what each row adds; the denoising step included."""
    sample_row_s: float
    decode_image_s: float
    reward_image_s: float
    update_call_s: float
    """A micro-batch forward and backward, whatever its rows, and what each row adds."""
    update_row_s: float
    optimizer_s: float
    """An update's own: minibatch, clipping, optimizer step."""
    gradient_bytes: float
    """All-reduced an update: 4 P. ZeRO sends as much, gradients one way and weights the other."""
    bandwidth: float
    """Bytes a second that a rank sends and receives."""
    latency_s: float
    """Of one message."""
    serial_s: float
    """Rank 0's work of an iteration that others wait for: checkpoint, weights, report."""
    machine_devices: int = 8
    """Devices of one machine; more than that are joined by the network."""
    network_bandwidth: float = 12.5e9
    """Bytes a second between two machines, by default 100 Gbit/s: the ring crosses it once each way."""


SATURATED = {
    "sampling calls": "sampling batches too small",
    "update calls": "update micro-batches too small",
    "optimizer": "optimizer step",
    "rank 0": "rank 0's serial work",
}
"""What it means that a term of `iteration_terms` grew; a term that is not here is its own name."""


def iteration_terms(work: Work, costs: Costs, num_devices: int) -> dict[str, float]:
    """Seconds of an iteration on N ranks by term; their sum is its time.

    Calls are whole: ceil(samples / batch_size) S in sampling, ceil(transitions / micro_batch) an update. A ring all-reduce of b bytes
    takes 2 (N - 1) / N b / bandwidth + 2 (N - 1) latency, at the bandwidth of its slowest link: the network's beyond one machine.
    """
    samples, others = work.share(num_devices), num_devices - 1
    transitions = work.update_transitions(num_devices)
    num_updates, batches = work.num_minibatches * work.inner_epochs, math.ceil(samples / work.batch_size)
    sample_calls, sample_rows = batches * work.num_steps, samples * work.num_steps * work.rows
    update_calls = num_updates * math.ceil(transitions / work.micro_batch)
    if work.score_accumulation:  # a call of either kind where a step trains on a part of a batch
        update_calls = batches * work.population
        sample_calls -= 0 if work.trained_steps < work.population else update_calls
        sample_rows -= transitions * work.rows
    bandwidth = costs.bandwidth if num_devices <= costs.machine_devices else min(costs.bandwidth, costs.network_bandwidth)
    all_reduce = 2 * others * (costs.gradient_bytes / num_devices / bandwidth + costs.latency_s)
    gather = others * (8 * samples / bandwidth + costs.latency_s)
    return {
        "sampling calls": sample_calls * costs.sample_call_s,
        "sampling rows": sample_rows * costs.sample_row_s,
        "decode": samples * costs.decode_image_s,
        "reward": samples * costs.reward_image_s,
        "update calls": update_calls * costs.update_call_s,
        "update rows": num_updates * transitions * work.trained_rows * costs.update_row_s,
        "optimizer": num_updates * costs.optimizer_s / (num_devices if work.zero_stage else 1),
        "all-reduce": num_updates * all_reduce,
        "gather": gather + 4 * others * costs.latency_s,  # rewards; two small all-reduces of statistics
        "rank 0": costs.serial_s,
    }


@dataclass(frozen=True)
class Scaling:
    """The prediction for one number of devices."""

    num_devices: int
    seconds: float
    """Of an iteration."""
    images_per_s: float
    efficiency: float
    """t(1) / (N t(N))."""
    shares: dict[str, float]
    """Of `seconds`, by term."""
    saturated_by: str
    """What cost the most efficiency since N = 1; nothing at N = 1."""


def scaling(work: Work, costs: Costs, max_devices: int = 64) -> list[Scaling]:
    """The predictions for every number of devices up to `max_devices` that the samples divide over."""
    rows, first = [], iteration_terms(work, costs, 1)
    for num_devices in range(1, max_devices + 1):
        if work.num_samples % (num_devices * work.num_minibatches):
            continue
        terms = iteration_terms(work, costs, num_devices)
        seconds = sum(terms.values())
        growth = {name: num_devices * value - first[name] for name, value in terms.items()}  # device-seconds more than on one
        worst = max(growth, key=growth.get)
        rows.append(
            Scaling(
                num_devices,
                seconds,
                work.num_samples / seconds,
                sum(first.values()) / (num_devices * seconds),
                {name: value / seconds for name, value in terms.items()},
                SATURATED.get(worst, worst) if growth[worst] > 0 else "",
            )
        )
    return rows


def saturation(rows: list[Scaling]) -> Scaling | None:
    """The first row below 80 % efficiency."""
    return next((row for row in rows if row.efficiency < 0.8), None)


def scaling_text(rows: list[Scaling]) -> str:
    """The predictions as a table, ending with what saturates first."""
    names = list(rows[0].shares)
    lines = [f"{'N':>3}{'s':>10}{'images/s':>10}{'efficiency':>12}" + "".join(f"{name:>16}" for name in names)]
    for row in rows:
        shares = "".join(f"{row.shares[name]:>16.1%}" for name in names)
        lines.append(f"{row.num_devices:>3}{row.seconds:>10.3f}{row.images_per_s:>10.3f}{row.efficiency:>12.0%}{shares}")
    end = saturation(rows)
    if end is None:
        lines.append(f"80 % efficiency holds up to {rows[-1].num_devices} devices, as far as these samples divide")
    else:
        lines.append(f"below 80 % efficiency from {end.num_devices} devices on: {end.saturated_by}")
    return "\n".join(lines)
