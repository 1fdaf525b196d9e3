"""What a run needs, before anything of it is started: memory by kind, operations, seconds.

Shape letters: N devices (ranks), S denoising steps, G network rows a sample (2 with guidance), P trained weights.
"""

import bisect
import os
import time
from dataclasses import dataclass, replace

import torch

from ddpo_fast import dtypes
from ddpo_fast.algorithms import Regression
from ddpo_fast.config.conflicts import possible
from ddpo_fast.distributed.deepspeed_options import BUCKET_ELEMENTS
from ddpo_fast.distributed.optimizer import state_bytes
from ddpo_fast.gpus import GPUS, HERE, parse_devices
from ddpo_fast.memory import free_mib, num_kept_prompts
from ddpo_fast.pipelines.ddim import ddim_scheduler
from ddpo_fast.pipelines.families import FAMILIES
from ddpo_fast.pipelines.folders import Model
from ddpo_fast.pipelines.model_parts import latent_size
from ddpo_fast.pipelines.recorder import PROBES
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.planning.architectures import architecture, assumed, planned_model
from ddpo_fast.planning.counts import MIB, ModelCounts, count_flow, count_model
from ddpo_fast.planning.work import Calls, Work, check_calls, check_guidance, check_steps, merges_lora, shares_guidance
from ddpo_fast.prompts import Prompts, evaluation_sets, load_prompts
from ddpo_fast.terminal import user_error

USABLE = 0.9
"""Share of a device's memory that is planned for; its context, workspaces and the allocator's gaps get the rest. An estimate."""
FRACTIONS = {"cuda": (0.35, 0.30), "cpu": (0.55, 0.48)}
"""Share of the matrix product's speed that sampling and the update reach: on a GPU an estimate, on a CPU bench.throughput's."""
WORTH = 0.03
"""The share of a network call before its first trained layer from which on cache.mode=auto keeps that part."""
RESIDENT = (
    "frozen weights",
    "prompt embeddings",
    "trained weights",
    "gathered weights",
    "optimizer state",
    "rollout",
    "activation cache",
    "sample gradients",
)
"""Kinds of memory that every phase holds."""


@dataclass(frozen=True)
class Device:
    """What a rank runs on."""

    name: str
    memory_mib: float
    matmul_flops: float
    """Matrix product in the compute dtype, FLOP/s."""
    fractions: tuple[float, float]
    """Share of it that sampling and the update reach."""
    source: str
    """Where these numbers are from."""


@dataclass(frozen=True)
class Plan:
    """A run before it is started; memory is one rank's, in MiB, operations are those of an iteration of all ranks."""

    device: Device
    num_devices: int
    work: Work
    counts: ModelCounts
    memory: dict[str, float]
    flop: dict[str, float]
    seconds: dict[str, float]
    advice: list[str]
    """What to lower, if it does not fit."""
    assumed: list[str]
    """What is counted without having been read."""

    @property
    def samples_per_hour(self) -> float:
        return 3600 * self.work.num_samples / sum(self.seconds.values())


def memory_mib(counts: ModelCounts, work: Work, num_devices: int) -> dict[str, float]:
    """Memory of one rank by kind, in MiB: `RESIDENT`, the update's gradients, and what encoding, sampling, decoding and the update add.

    ZeRO 1 to 3 shard the optimizer state, and an fp32 copy of the trained weights, over the ranks; 2 and 3 the gradients too; 3 the
    network's weights, of which a part is whole at a time. What is offloaded takes no memory here, see `host_mib`. Score
    accumulation holds a gradient for each of the rank's samples, no trajectories, and the update's activations in sampling;
    where a step trains on a part of a batch, its samples' gradients apart. Its update has the combined gradient alone.
    """
    trained, samples = 4 * counts.num_trainable, work.share(num_devices)
    weights, frozen, gathered, gradients = trained, dict(counts.weight_bytes), 0, trained
    if work.zero_stage == 3:
        kept = 0 if work.offload == "all" else 1 / num_devices
        weights, frozen[counts.network], gathered = kept * trained, kept * frozen[counts.network], counts.gathered_bytes
    if work.zero_stage >= 2:
        gradients *= 1 / num_devices if work.offload == "none" else 0
    if work.zero_stage > 0 or num_devices > 1:
        gradients += min(trained, 4 * BUCKET_ELEMENTS)
    trajectory = 4 * counts.num_latents * work.kept_latents + 4 * max(0, work.kept_latents - 1)
    batch = min(work.batch_size, samples)
    transitions = min(work.micro_batch, work.update_transitions(num_devices))
    rollout = (samples * trajectory + work.texts(num_devices) * counts.embed_bytes) / MIB
    sampled_rows = max(work.rows, work.evaluation_rows) * batch
    sampling, update = max(counts.forward.mib(sampled_rows), rollout), update_mib(counts, work, work.trained_rows * transitions)
    if work.score_accumulation:
        parts = batch * trained if work.trained_steps < work.population else 0
        sampling, update = counts.update.mib(work.rows * batch) + parts / MIB, trained / MIB
    return {
        "frozen weights": sum(frozen.values()) / MIB,
        "prompt embeddings": work.prompts[0] * counts.embed_bytes / MIB,
        "trained weights": weights / MIB,
        "gathered weights": gathered / MIB,
        "optimizer state": optimizer_mib(counts, work, num_devices) if work.offload == "none" else 0.0,
        "rollout": rollout,
        "activation cache": work.held[0] * work.rows * counts.kept_row_bytes / MIB,
        "sample gradients": work.score_accumulation * samples * trained / MIB,
        "gradients": gradients / MIB,
        "encoding": counts.encoder_bytes / MIB,
        "sampling": sampling,  # of a policy gradient: joining the batches makes a second copy
        "decode": counts.decode.mib(min(batch, work.decode_batch)) + 2 * (batch > work.decode_batch) * batch * counts.image_bytes / MIB,
        "update": update,
    }


def optimizer_mib(counts: ModelCounts, work: Work, num_devices: int) -> float:
    """The optimizer's state on one rank, and ZeRO's fp32 copy of the weights that it steps."""
    if work.zero_stage == 0:
        return state_bytes(work.optimizer, counts.trained_shapes) / MIB
    return (state_bytes(work.optimizer, counts.trained_shapes, num_devices) + 4 * counts.num_trainable / num_devices) / MIB


def host_mib(counts: ModelCounts, work: Work, num_devices: int) -> float:
    """Host memory of what one rank offloads: state, copy and gradients of its shard, and at "all" its weights."""
    if work.offload == "none":
        return 0.0
    trained = 4 * counts.num_trainable
    weights = (counts.weight_bytes[counts.network] + trained) / num_devices if work.offload == "all" else 0
    return optimizer_mib(counts, work, num_devices) + (trained / num_devices + weights) / MIB


def update_mib(counts: ModelCounts, work: Work, num_rows: int) -> float:
    """A micro-batch forward and backward. From the cache it is given the kept tensors; from the host those of the next one, too, arrive."""
    if not any(work.held):
        return counts.update.mib(num_rows)
    copies = 3 if work.held[1] else 1
    return counts.cached_update.mib(num_rows) + copies * num_rows * counts.kept_row_bytes / MIB


def phases_mib(memory: dict[str, float]) -> dict[str, float]:
    """Memory of each phase of an iteration at its peak; the largest is the rank's."""
    resident = sum(memory[kind] for kind in RESIDENT)
    phases = ("encoding", "sampling", "decode", "update")
    return {phase: resident + memory[phase] + (memory["gradients"] if phase == "update" else 0) for phase in phases}


def iteration_flop(counts: ModelCounts, work: Work, num_devices: int) -> dict[str, float]:
    """FLOP of an iteration, all ranks together, by phase."""
    rows, cached = work.num_samples * work.rows, 0.0
    if any(work.held):
        cached = sum(work.held) / work.trained_transitions(num_devices)
    sampling, trained = rows * work.num_steps * counts.forward.row_flop, work.num_samples * work.trained_rows
    update = trained * work.inner_epochs * work.trained_steps * (counts.update.row_flop - cached * counts.prefix_flop)
    if work.score_accumulation:
        sampling, update = sampling + update - rows * work.trained_steps * counts.forward.row_flop, 0.0
    return {"sampling": sampling, "decode": work.num_samples * counts.decode.row_flop, "update": update}


def advise(counts: ModelCounts, work: Work, num_devices: int, budget_mib: float) -> list[str]:
    """One line for each option that has to be lowered for the run to fit, with the largest value that does; none if it fits."""
    lines, phases = [], phases_mib(memory_mib(counts, work, num_devices))
    if counts.encoder_bytes and phases["encoding"] > budget_mib:
        lines.append("encoding new prompts does not fit: text encoders are then beside the network; model.encode_on_host=true helps")
    for option, field, ours in (
        ("sample.batch_size", "batch_size", ("sampling", "decode")),
        ("train.micro_batch", "micro_batch", ("update",)),
    ):
        if max(phases[phase] for phase in ours) <= budget_mib:
            continue
        for value in range(getattr(work, field) - 1, 0, -1):
            lower = phases_mib(memory_mib(counts, replace(work, **{field: value}), num_devices))
            if max(lower[phase] for phase in ours) <= budget_mib:
                lines.append(f"{option}={getattr(work, field)} does not fit; {value} does")
                break
        else:
            lines.append(f"{' and '.join(ours)} does not fit even with {option}=1: docs/distribution.md has what takes less memory")
    return lines


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product, measured for about a second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            product = a @ b
        product[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    seconds(1)
    repeats = max(1, round(0.2 / seconds(1)))
    return 2 * size**3 * repeats / min(seconds(repeats) for _ in range(4))


def find_device(name: str, dtype: torch.dtype, num_devices: int) -> Device:
    """A GPU of the table by its specification, or this machine's device, measured, with the memory that is free on it."""
    if name != HERE:
        gpu = GPUS[name]
        tflops = gpu.fp32_tflops if dtype == torch.float32 else gpu.fp16_tflops
        return Device(
            name,
            gpu.memory_gib * 1024,
            tflops * 1e12,
            FRACTIONS["cuda"],
            "by specification; the shares are estimates, no GPU has been measured yet",
        )
    if torch.cuda.is_available():
        properties, device = torch.cuda.get_device_properties(0), torch.device("cuda", 0)
        return Device(
            properties.name,
            free_mib(device, num_devices),
            matmul_flops(dtype, device),
            FRACTIONS["cuda"],
            "measured; the shares are estimates, no GPU has been measured yet",
        )
    device = torch.device("cpu")
    return Device(
        f"CPU ({torch.get_num_threads()} threads)",
        free_mib(device, num_devices),
        matmul_flops(dtype, device),
        FRACTIONS["cpu"],
        "measured; the shares are the embedded model's",
    )


def make_plan(config) -> Plan:
    """The plan of a config on the devices that run.plan names. Raises ValueError naming the option at fault."""
    num_devices, name = parse_devices(config.run.plan)
    if config.run.plan == HERE:
        num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = name != HERE or torch.cuda.is_available()
    Work.of(config).share(num_devices)
    model = planned_model(config.model)
    source = config.model.config or config.model.path
    family = next(known for known in FAMILIES.values() if source in known.models) if model is None else model.family
    check_guidance(config, family)
    dtype = dtypes.DTYPES[dtypes.chosen(config.model.dtype, on_gpu, family.dtype)]
    counts, calls = count_run(config, model, dtype, on_gpu), calls_on(model, config)
    device = find_device(name, dtype, num_devices)
    work = Work.of(fit_sizes(config, counts, device.memory_mib, num_devices, on_gpu, calls), calls)
    work = with_cache(work, config, counts, device.memory_mib, num_devices, on_gpu)
    kept = num_texts(config, work, num_kept_prompts(counts.embed_bytes, work.batch_size))
    work = replace(work, prompts=(0, kept) if on_gpu else (kept, 0))
    flop = iteration_flop(counts, work, num_devices)
    sampling, update = (num_devices * device.matmul_flops * fraction for fraction in device.fractions)
    as_update = ("sampling", "update") if work.score_accumulation else ("update",)
    seconds = {phase: value / (update if phase in as_update else sampling) for phase, value in flop.items()}
    advice = advise(counts, work, num_devices, USABLE * device.memory_mib)
    memory, notes = memory_mib(counts, work, num_devices), assumed(config.model, model)
    return Plan(device, num_devices, work, counts, memory, flop, seconds, advice, notes)


def print_plan(config) -> None:
    """Prints the plan of a config, on rank 0. An option at fault ends the program as a user's mistake."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(plan_text(make_plan(config)), flush=True)
        except ValueError as error:
            user_error(error)


def _prompts(config) -> Prompts:
    return load_prompts(config.prompts.name, config.prompts.file, config.prompts.limit, config.prompts.list)


def num_texts(config, work: Work, most: int) -> int:
    """Texts that a config's run keeps: for each way of calling the pipeline the prompts, `most` in all, and one without a prompt."""
    prompts, sampled = _prompts(config), Asked.of(config.sample)
    evaluated = {text for chosen in evaluation_sets(config.eval, prompts) for text in chosen.prompts.texts}
    asked = [
        (sampled, work.rows, {PROBES[0], *prompts.texts}),  # one to try the network with
        (Asked.of(config.evaluation), work.evaluation_rows, evaluated),
    ]
    if isinstance(config.algorithm, Regression):
        asked.append((replace(sampled, guidance_scale=config.training_guidance), work.trained_rows, set(prompts.texts)))
    wanted = {(way.texts, text) for way, _, texts in asked for text in texts}
    return min(len(wanted), most) + len({way.texts for way, rows, texts in asked if rows > 1 and texts})


def calls_on(model: Model | None, config) -> Calls | None:
    """How a config's pictures are made on a model; None for one that is known without a network, which is a UNet's."""
    return None if model is None else Calls.of(config, model.record, model.scheduler)


def count_run(config, model: Model | None, dtype: torch.dtype, on_gpu: bool) -> ModelCounts:
    """The counts of a config's model, see `planned_model`. Raises ValueError naming the option at fault."""
    options, sampled = config.model, Asked.of(config.sample)
    computing = {
        "fused": config.kernels.backend == "triton" or (config.kernels.backend == "auto" and on_gpu),
        "merged": merges_lora(config, dtype),
        "checkpointing": config.train.gradient_checkpointing,
        "quantize": options.quantize,
        "tiled": options.vae_tiling,
    }
    if model is not None:
        check_calls(config, model)
    if model is not None and model.family.process == "flow":
        check_steps(config, model.scheduler, model.record)
        model.check_networks(sampled)
        longest = max(_prompts(config).texts, key=len)  # some networks are given as many tokens as a prompt has
        counts = count_flow(model, sampled, longest, dtype, config.lora, **computing)
    else:
        arch = architecture(options, model)
        arch = arch | {"unet": sized(arch, config.sample.height, config.sample.width)}
        check_steps(config, ddim_scheduler(arch["scheduler"]))
        counts = count_model(arch, dtype, config.lora, on_gpu=on_gpu, shared=shares_guidance(config), **computing)
    is_streamed = options.quantize != "none" or config.zero.stage == 3
    counts = replace(counts, read_bytes=sum(counts.weight_bytes.values()) - is_streamed * counts.weight_bytes[counts.network])
    if not on_gpu:
        return counts
    on_device, decode = counts.weight_bytes, counts.decode
    if options.offload_text_encoder or options.encode_on_host:
        encoders = [part for part in on_device if part.startswith("text_encoder")]
        if not options.encode_on_host:
            counts = replace(counts, encoder_bytes=sum(on_device[part] for part in encoders))
        on_device = {part: size for part, size in on_device.items() if part not in encoders}
    if options.offload_vae:
        decode = replace(decode, fixed_bytes=decode.fixed_bytes + on_device["vae"])
        on_device = on_device | {"vae": 0}
    return replace(counts, weight_bytes=on_device, decode=decode)


def sized(arch: dict[str, dict], height: int | None, width: int | None) -> dict:
    """The UNet's config with the latents' size of pictures of so many pixels; None: its own."""
    config, downsamplings = arch["unet"], len(arch["vae"].get("block_out_channels", (64,))) - 1
    sides = [size if pixels is None else pixels >> downsamplings for size, pixels in zip(latent_size(config), (height, width))]
    return config | {"sample_size": sides}


AUTO_SIZES = {("sample", "batch_size"): ("sampling", "decode"), ("train", "micro_batch"): ("update",)}
"""Options that may be auto, and the phases whose memory they decide."""


def fit_sizes(config, counts: ModelCounts, device_mib: float, num_devices: int, on_gpu: bool, calls: Calls | None = None):
    """The config with the largest sample.batch_size and train.micro_batch that fit, where they are auto; 1 where nothing does.

    calls: as `Work.of` takes them.
    """
    auto = {key: phases for key, phases in AUTO_SIZES.items() if config[".".join(key)] == "auto"}
    config = config.replace(**{"__".join(key): 1 for key in auto})
    work = with_cache(Work.of(config, calls), config, counts, device_mib, num_devices, on_gpu)
    for (section, option), phases in auto.items():
        most = work.update_transitions(num_devices) if option == "micro_batch" else work.share(num_devices)

        def is_too_much(size: int) -> bool:
            needed = phases_mib(memory_mib(counts, replace(work, **{option: size}), num_devices))  # noqa: B023
            return max(needed[phase] for phase in phases) > USABLE * device_mib  # noqa: B023

        largest = bisect.bisect_left(range(1, most + 1), True, key=is_too_much)
        config = config.replace(**{f"{section}__{option}": max(1, largest)})
    return config


def resolve_sizes(config, model: Model, device_mib: float, num_devices: int, on_gpu: bool):
    """`fit_sizes` for ranks of which each has `device_mib` free; it takes some seconds if anything is auto.

    All ranks must be told the same, since they split the work alike.
    """
    if all(config[".".join(option)] != "auto" for option in AUTO_SIZES):
        return config
    counts = count_run(config, model, dtypes.DTYPES[config.model.dtype], on_gpu)
    return fit_sizes(config, counts, device_mib, num_devices, on_gpu, calls_on(model, config))


def with_cache(work: Work, config, counts: ModelCounts, device_mib: float, num_devices: int, on_gpu: bool) -> Work:
    """The work with the transitions that the activation cache holds, if the config wants one.

    A device without a budget is given half of what weights and optimizer leave; a GPU's host without one, all that the GPU leaves.
    Raises ValueError for a network that cannot be split, as the run does.
    """
    cache = config.cache
    if counts.split_fault is not None and cache.mode != "off" and possible("cache", config):
        raise ValueError(f"cache.mode={cache.mode}: {counts.split_fault}; valid is off")
    wanted = cache.mode == "on" or cache.mode == "auto" and counts.prefix_flop >= WORTH * counts.forward.row_flop
    if not wanted or not possible("cache", config) or not counts.prefix_flop:
        return work
    memory, budget_mib, left = memory_mib(counts, work, num_devices), cache.device_mib, work.trained_transitions(num_devices)
    if budget_mib is None:
        budget_mib = (device_mib - memory["frozen weights"] - memory["trained weights"] - memory["optimizer state"]) / 2
    slots = [int(mib * MIB) // (work.rows * counts.kept_row_bytes) for mib in (budget_mib, cache.host_mib or 0.0)]
    on_device = min(left, slots[0])
    left -= on_device
    return replace(work, held=(on_device, left if on_gpu and cache.host_mib is None else min(left, slots[1])))


def plan_text(plan: Plan) -> str:
    """The plan as a table, ending with whether it fits."""
    work, memory, device, counts = plan.work, plan.memory, plan.device, plan.counts
    samples, phases, devices = work.share(plan.num_devices), phases_mib(memory), f"{plan.num_devices} x {plan.device.name}"
    weights = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in counts.weight_bytes.items() if size)
    batch, saved = min(work.batch_size, samples), f"of which each saves {counts.saved_row_bytes / MIB:,.0f} for its backward"
    rows = work.trained_rows * min(work.micro_batch, work.update_transitions(plan.num_devices))
    kept = work.trained_transitions(plan.num_devices) if any(work.held) else 0
    notes = {
        "frozen weights": weights,
        "prompt embeddings": f"{sum(work.prompts):,} texts, {sum(work.prompts) * counts.embed_bytes / MIB:,.0f} on the host",
        "trained weights": f"{counts.num_trainable:,} in fp32",
        "gathered weights": "only with zero.stage=3",
        "optimizer state": f"{work.optimizer}, ZeRO {work.zero_stage}",
        "rollout": f"{samples} samples x {work.kept_latents} latents",
        "activation cache": f"{work.held[0]:,} transitions, {work.held[1]:,} on the host, {kept - sum(work.held):,} recomputed"
        if any(work.held)
        else "off",
        "sample gradients": "only with train.estimator=score_accumulation",
        "gradients": "in the update only",
        "encoding": "text encoders, only while they encode new prompts" if counts.encoder_bytes else "the text encoders do not move",
        "sampling": f"batches of {batch}, {work.rows} network rows each sample",
        "decode": f"batches of {min(batch, work.decode_batch)}",
        "update": f"{rows} network rows, {saved}",
    }
    if work.zero_stage == 3:
        notes["gathered weights"] = "of the network at a time, at most"
    if work.offload != "none":
        notes["optimizer state"] += f", {host_mib(counts, work, plan.num_devices):,.0f} of what is offloaded on the host"
    if work.score_accumulation:
        notes |= {
            "rollout": f"embeddings of {work.texts(plan.num_devices):,} texts",
            "sample gradients": f"{samples} samples",
            "sampling": f"batches of {batch}, {work.rows} network rows each sample, {saved}",
            "update": "the combined gradient; no network call",
        }
    lines = [f"memory of one rank of {devices}, MiB"]
    lines += [f"  {kind:<17}{memory[kind]:>10,.0f}  {note}" for kind, note in notes.items()]
    peak = max(phases, key=phases.get)
    lines += [
        f"  {'peak':<17}{phases[peak]:>10,.0f}  in {peak}, of {device.memory_mib:,.0f} (of which {USABLE:.0%} is planned for, an estimate)",
        f"  at the start {counts.read_bytes / MIB:,.0f} MiB of the host for each rank, which reads the model",
        f"an iteration on {devices}",
        *(f"  {phase:<17}{plan.flop[phase] / 1e12:>12,.2f} TFLOP {plan.seconds[phase]:>10,.1f} s" for phase in plan.flop),
        f"  {work.num_samples} samples in {sum(plan.seconds.values()):,.1f} s: {plan.samples_per_hour:,.1f} samples an hour",
        f"  estimated: {device.fractions[0]:.0%} in sampling and {device.fractions[1]:.0%} in the update of "
        f"{device.matmul_flops / 1e12:,.3g} TFLOP/s, {device.source}",
        "  left out: the reward, evaluation, checkpoints, communication",
        *(f"  {line}" for line in plan.assumed),
        *(plan.advice or ["it fits"]),
    ]
    return "\n".join(lines)
