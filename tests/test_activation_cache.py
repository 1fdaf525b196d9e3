"""The activation cache: a run with it is the run without it, to the bit; what is held where; faults. Slots by themselves, too.

A row's bits depend on how many rows are computed with it, and Adam makes much of little (see bounds.py). So the runs that are compared
have equally many rows in every call of the UNet, or compute what the cache keeps `row_by_row`.
"""

import math
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import bounds
import numpy as np
import psutil
import pytest
import torch
from shared import CPU, REDNESS, command_line, recorded, run, untimed, weights
from tiny import make_pipeline
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ddpo_fast import assemble as assembling
from ddpo_fast import memory, rollout
from ddpo_fast import train as trainer
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.engine import Engine
from ddpo_fast.kernels import reference
from ddpo_fast.planning.counts import MIB, flop_counter
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import EVALUATIONS
from ddpo_fast.records.checkpoint import list_checkpoints
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.updates import activation_cache
from ddpo_fast.updates.activation_cache import DEVICE, HOST, ActivationCache, budgets_mib
from ddpo_fast.updates.transitions import Update, micro_batches

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Plans without timing this machine."""
    monkeypatch.setattr(activation_cache, "matmul_flops", lambda dtype, device: 1e12)


@pytest.fixture
def options(tiny_model, tmp_path):
    """Command lines of short runs: keyword arguments with __ for the dot. An iteration is 4 samples of 2 steps, 8 transitions."""
    (tmp_path / "reward.py").write_text(REDNESS)

    def make(name="run", **changed) -> list[str]:
        values = {
            "model.path": tiny_model, "run.dir": tmp_path / name, "reward.name": f"{tmp_path}/reward.py:redness",
            "sample.num_samples": 4, "sample.num_steps": 2, "sample.batch_size": 4, "eval.num_samples": 1, "eval.every": 100,
            "run.iterations": 3, "run.checkpoint_every": 100, "train.num_minibatches": 2, "train.micro_batch": 4, "train.inner_epochs": 4,
            "lora.rank": 2, "lora.targets": '["attention", "convolution"]', "lora.scope": "mid_up",
            "train.learning_rate": 1e-3, "prompts.limit": 4, "prompts.samples_per_prompt": 1,
            "baseline.min_count": 8, "baseline.buffer_size": 8, "cache.mode": "on",
        }  # fmt: skip
        return command_line(values, changed)

    return make


@pytest.fixture
def made(monkeypatch) -> list:
    """The caches of the runs so far."""
    caches, open_cache = [], activation_cache.open_cache
    monkeypatch.setattr(activation_cache, "open_cache", lambda *args: caches.append(open_cache(*args)) or caches[-1])
    return caches


def result(argv: list[str]) -> tuple[list[dict], list[float], dict[str, torch.Tensor]]:
    """A run's metrics, its hit fractions apart, and its weights."""
    folder = run(argv)
    rows = untimed(read_metrics(folder))
    return rows, [row.pop("cache_hit_fraction") for row in rows][1:], weights(folder)


def assert_same_run(one, other) -> None:
    assert one[0] == other[0] and one[0][-1]["grad_norm"] > 0
    assert one[2].keys() == other[2].keys() and all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())


def slot_mib(scope: str, guidance_scale: float) -> float:
    """Of the tiny UNet's kept tensors in fp32: of conv_in, the first block and its skip, the last frozen block."""
    sizes = {"mid_up": (16 * 8 * 8, 16 * 4 * 4, 16 * 8 * 8, 32 * 4 * 4), "up_blocks.1": (16 * 8 * 8, 16 * 8 * 8, 32 * 8 * 8)}[scope]
    return (1 if guidance_scale == 1 else 2) * 4 * sum(sizes) / MIB


SLOT_MIB = slot_mib("mid_up", 3.0)


def compute_row_by_row(module) -> None:
    """A module's call becomes one of each row, so that a row's bits do not depend on which others are computed with it."""
    forward = module.forward

    def each_row(*args, **kwargs):
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        outputs = []
        for row in range(len(tensors[0])):
            some, named = tree_map_only(torch.Tensor, lambda x: x[row : row + 1].clone(), (args, kwargs))  # noqa: B023
            leaves, structure = tree_flatten(forward(*some, **named))
            outputs.append(leaves)
        first = [next(n for n, other in enumerate(leaves) if other is leaf) for leaf in leaves]  # one tensor may be there twice
        whole = [torch.cat(rows) for rows in zip(*outputs)]
        return tree_unflatten([whole[n] for n in first], structure)

    module.forward = each_row


@pytest.fixture
def row_by_row(monkeypatch):
    """Every stage before the first trained one, and the embedding of time that they are given."""
    make_engine = assembling._engine

    def make(config, policy, deepspeed):
        engine, unet = make_engine(config, policy, deepspeed), policy.network
        compute_row_by_row(unet.time_embedding)
        for stage in (unet.conv_in, *unet.down_blocks, unet.mid_block, *unet.up_blocks):
            if any(parameter.requires_grad for parameter in stage.parameters()):
                break
            compute_row_by_row(stage)
        return engine

    monkeypatch.setattr(assembling, "_engine", make)


RUNS = [  # slots on the device; the others are on the host
    ("mid_up", 3.0, "merged", 1e6),
    ("mid_up", 1.0, "separate", 3.5),
    ("up_blocks.1", 3.0, "separate", 3.5),
    ("up_blocks.1", 1.0, "merged", 1e6),
]


@pytest.mark.parametrize("scope, guidance_scale, forward, on_device", RUNS)
def test_a_cached_run_is_the_run_without(options, made, scope, guidance_scale, forward, on_device):
    """Three iterations of four inner epochs; micro-batches have as many rows as the rollout's batch."""
    same = dict(lora__scope=scope, sample__guidance_scale=guidance_scale, lora__forward=forward)
    off = result(options("off", cache__mode="off", **same))
    on = result(options("on", cache__device_mib=on_device * slot_mib(scope, guidance_scale), cache__host_mib=1e6, **same))
    assert_same_run(on, off)
    assert made[-1].slot_bytes == slot_mib(scope, guidance_scale) * MIB
    assert made[-1].num_slots == ([3, 5] if on_device == 3.5 else [8, 0])
    assert off[1] == [0, 0, 0] and on[1] == [1, 1, 1]


@pytest.mark.parametrize("scope, guidance_scale, budgets", [("mid_up", 1.0, [(3.9, 2.2), (0, 0)]), ("up_blocks.1", 3.0, [(0, 3.5)])])
def test_a_mix_with_recomputation_is_the_run_without(options, made, row_by_row, scope, guidance_scale, budgets):
    """Of 8 transitions some are on the device, some on the host, and the rest nowhere."""
    same = dict(lora__scope=scope, sample__guidance_scale=guidance_scale, model__share_guidance=False)
    off = result(options("off", cache__mode="off", **same))
    for slots in budgets:
        mib = [number * slot_mib(scope, guidance_scale) for number in slots]
        on = result(options(f"{slots}", cache__device_mib=mib[0], cache__host_mib=mib[1], **same))
        assert_same_run(on, off)
        cache, held = made[-1], [math.floor(number) for number in slots]
        assert cache.num_slots == held and on[1] == [sum(held) / 8] * 3
        assert all(store.nbytes <= budget * MIB for store, budget in zip(cache.stores, mib))


@pytest.mark.parametrize("micro_batch", [1, 7, 1000])
def test_any_micro_batch_reads_what_it_needs(options, made, row_by_row, micro_batch):
    """Of 10 transitions a minibatch, so that micro-batches differ in size; on the device, on the host and recomputed."""
    same = dict(
        train__micro_batch=micro_batch, sample__num_steps=5, train__inner_epochs=2, run__iterations=1, sample__batch_size=3,
        sample__guidance_scale=3.0, model__share_guidance=False, train__num_minibatches=1 if micro_batch == 1000 else 2,
    )  # fmt: skip
    off = result(options("off", cache__mode="off", **same))
    mix = result(options("mix", cache__device_mib=6 * SLOT_MIB, cache__host_mib=7 * SLOT_MIB, **same))
    assert made[-1].num_slots == [6, 7]
    assert_same_run(mix, off)
    assert mix[1] == [13 / 20]


@pytest.mark.slow  # Triton's interpreter: half a minute
def test_fused_kernels_read_what_they_wrote(options, tmp_path, made):
    model = make_pipeline(tmp_path / "m", channels=(8, 8), latent_size=4, groups=2)
    same = dict(
        model__path=model, kernels__backend="triton", lora__scope="up_blocks.1", sample__guidance_scale=1.0, sample__num_samples=2,
        sample__batch_size=2, train__micro_batch=2, train__num_minibatches=1, train__inner_epochs=1, train__timestep_fraction=0.5,
        run__iterations=1,
    )  # fmt: skip
    off, on = (result(options(mode, cache__mode=mode, **same)) for mode in ("off", "on"))
    assert_same_run(on, off)
    assert on[1] == [1] and made[-1].num_slots == [2, 0]


def test_two_ranks_with_and_without(options, ranks, tmp_path):
    """At ZeRO 0 and 2."""
    names = [(stage, mode) for stage in (0, 2) for mode in ("off", "on")]
    same = dict(sample__num_samples=8, eval__num_samples=2, run__iterations=1, train__inner_epochs=2)
    runs = [options(f"{mode}{stage}", cache__mode=mode, zero__stage=stage, **same) for stage, mode in names]
    codes, text = ranks.run(*runs, changed="unmeasured")
    assert codes == [0, 0], text
    assert text.count("activation cache of each rank: 0.0215 MiB a transition; 8 on the device") == 2
    for stage in (0, 2):
        off, on = (tmp_path / f"{mode}{stage}" for mode in ("off", "on"))
        rows = [untimed(read_metrics(folder)) for folder in (off, on)]
        assert [[row.pop("cache_hit_fraction") for row in one] for one in rows] == [[None, 0], [None, 1]]
        assert rows[0] == rows[1]
        assert all(torch.equal(tensor, weights(off)[name]) for name, tensor in weights(on).items())


@pytest.mark.parametrize("budgets", [(100, 0), (5.5, 4.5)])
def test_only_what_is_trained_on_has_a_slot_and_the_most_used_have(options, made, monkeypatch, budgets):
    """Half of 4 steps, drawn anew every epoch: in the second iteration, too, whose transitions are others."""
    update, checked = trainer.update, []

    def checking(run, updates, rollout, credit, iteration):
        cache = run.gradients.cache
        uses = Counter(pair for one in run.updates(rollout.schedule, iteration) for pair in zip(one.rows.tolist(), one.steps.tolist()))
        held = {pair for pair in np.ndindex(cache.slots.shape) if cache.slots[pair] >= 0}
        numbers = [cache.slots[pair] for pair in held]
        assert held <= set(uses) and len(held) == min(len(uses), math.floor(budgets[0]) + math.floor(budgets[1])) == len(set(numbers))
        assert min(uses[pair] for pair in held) >= max((uses[pair] for pair in set(uses) - held), default=0)
        assert max(numbers) < sum(cache.num_slots)
        row = update(run, updates, rollout, credit, iteration)
        assert cache.reads == sum(uses.values()) == row["transitions"] == 16
        assert cache.hits == sum(uses[pair] for pair in held)
        checked.append((len(uses), cache.hits / cache.reads))
        return row

    monkeypatch.setattr(trainer, "update", checking)
    _, fractions, _ = result(
        options(
            sample__num_steps=4, train__timestep_fraction=0.5, train__inner_epochs=2, cache__device_mib=budgets[0] * SLOT_MIB,
            cache__host_mib=budgets[1] * SLOT_MIB,
        )
    )  # fmt: skip
    assert len(checked) == 3 and all(8 < distinct < 16 for distinct, _ in checked)
    assert fractions == [fraction for _, fraction in checked]
    assert (min(fractions) == 1) if sum(budgets) > 16 else all(9 / 16 < fraction < 1 for fraction in fractions)


@pytest.mark.parametrize("slots", [8, 5])
def test_an_update_from_the_cache_does_not_call_the_prefix(options, monkeypatch, slots):
    """Four inner epochs on 8 transitions in micro-batches of 8; a rollout calls every stage twice."""
    counts, phases = Counter(), ["start"]

    def count(module, name, phase):
        function = getattr(module, name)

        def counted(*args):
            phases.append(phase)
            try:
                return function(*args)
            finally:
                phases.pop()

        monkeypatch.setattr(module, name, counted)

    count(trainer, "update", "update")
    count(rollout, "generate", "rollout")
    make_engine = assembling._engine

    def hooked(config, policy, deepspeed):
        for name in ("conv_in", "down_blocks.0", "down_blocks.1", "mid_block"):
            policy.network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: counts.update([(phases[-1], name)]))
        return make_engine(config, policy, deepspeed)

    monkeypatch.setattr(assembling, "_engine", hooked)
    run(options(run__iterations=1, train__num_minibatches=1, train__micro_batch=8, cache__device_mib=slots * SLOT_MIB))
    assert counts["rollout", "conv_in"] == counts["rollout", "mid_block"] == 3 * 2  # the two evaluations' as well
    assert counts["update", "mid_block"] == 4
    for name in ("conv_in", "down_blocks.0", "down_blocks.1"):
        assert counts["update", name] == (4 - 4 * (slots == 8))


def test_a_sample_that_is_not_finite_spoils_no_other(options, made, monkeypatch, row_by_row):
    """From its second step on sample 1 is NaN, and so is what the cache has got of it; sample 3 gets an infinite picture only."""
    ddim_step, decode, training = reference.ddim_step, Policy.decode, []

    def overflowing(noise_pred, latents, coefficients, steps, seed, sample_ids, *rest):
        next_latents, log_prob, unet_input = ddim_step(noise_pred, latents, coefficients, steps, seed, sample_ids, *rest)
        training[:] = [sample_ids[0] < EVALUATIONS["eval"].first_id]
        if training[0] and steps[0] == 1:
            next_latents[1], unet_input[1 :: len(latents)] = torch.nan, torch.nan
        return next_latents, log_prob, unet_input

    def bad_picture(policy, x, recording):
        images = decode(policy, x, recording)
        if training[0]:
            images[3] = torch.inf
        return images

    monkeypatch.setattr(reference, "ddim_step", overflowing)
    monkeypatch.setattr(Policy, "decode", bad_picture)
    same = dict(sample__num_steps=4, model__share_guidance=False, run__iterations=2, train__inner_epochs=2)
    off, on = (result(options(mode, cache__mode=mode, **same)) for mode in ("off", "on"))
    cache = made[-1]
    assert (cache.slots[[1, 3]] == -1).all() and (cache.slots[[0, 2]] >= 0).all()
    kept = [segment.physical(cache.stores[DEVICE]) for segment in cache.segments]
    assert all(tensor.isnan().any() for tensor in kept)
    assert_same_run(on, off)
    bound = bounds.of(parse(options(**same))).ratio
    assert on[1] == [0.5, 0.5] and [row["bad_rewards"] for row in on[0]] == [0, 2, 4]
    assert all(row["skipped_updates"] == 0 and math.isfinite(row["loss"]) and row["ratio_error"] <= bound for row in on[0][1:])


def test_killed_in_an_inner_epoch_and_resumed_is_the_uninterrupted_run(options, monkeypatch):
    same = dict(cache__device_mib=3 * SLOT_MIB, cache__host_mib=2 * SLOT_MIB, run__checkpoint_every=1, train__inner_epochs=2)
    whole = result(options("whole", **same))
    step, steps = Engine.step, []

    def killed(engine):
        steps.append(1)
        if len(steps) == 4 + 3:  # the second inner epoch of the second iteration
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", killed)
    argv = options("parts", **same)
    with pytest.raises(KeyboardInterrupt):
        trainer.main(argv)
    folder = next(a for a in argv if a.startswith("--run.dir="))
    assert list_checkpoints(Path(folder.split("=")[1]))[-1].name == "1"
    parts = result([folder, "--resume"])
    assert_same_run(parts, whole)
    assert parts[1] == whole[1] == [5 / 8] * 3 and len(steps) == 4 + 3 + 8


BAD = [  # options, what the line must say
    (dict(lora__scope="none"), "cache.mode=on: valid is auto or off, when lora.scope is none: nothing is frozen"),
    (dict(cache__mode="sometimes"), "cache.mode=sometimes: expected Literal['auto', 'on', 'off']"),
    (dict(cache__device_mib=-1), "cache.device_mib=-1.0: valid is a number of MiB >= 0"),
    (dict(cache__device_mib=".nan"), "cache.device_mib=nan: valid is a number of MiB >= 0"),
    (dict(cache__host_mib=-0.5), "cache.host_mib=-0.5: valid is a number of MiB >= 0"),
    (dict(cache__host_mib=".inf"), "cache.host_mib=inf: valid is a number of MiB >= 0"),
    (dict(cache__host_mib="much"), "cache.host_mib=much: expected float"),
]


@pytest.mark.parametrize("changed, message", BAD, ids=lambda value: None if isinstance(value, dict) else value.split(":")[0])
def test_a_wrong_option_is_one_line(options, capsys, changed, message):
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options(**changed))
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", error) and message in error


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_unet_that_cannot_be_split_is_one_line(options, capsys, monkeypatch, mode):
    call = Policy.example_call
    monkeypatch.setattr(Policy, "example_call", lambda *args: call(*args) + call(*args))
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options(cache__mode=mode))
    assert capsys.readouterr().err == f"error: cache.mode={mode}: this network calls a block twice; valid is off\n"


@pytest.mark.parametrize(
    "mode, scope, splits", [("auto", "mid_up", True), ("auto", "all", False), ("on", "all", True), ("off", "mid_up", False)]
)
def test_auto_leaves_out_what_is_not_worth_it(options, mode, scope, splits):
    """With LoRA in every block what is frozen before the first is conv_in, 0.7 % of this UNet."""
    made = assemble(parse(options(cache__mode=mode, lora__scope=scope, model__share_guidance=False)))
    assert (made.gradients.cache is not activation_cache.NO_CACHE) == splits
    assert bool([module for module in made.policy.network.modules() if hasattr(module, "split")]) == splits


def test_a_slot_has_room_for_the_longest_prompt(options, monkeypatch):
    asked, call = [], Policy.example_call
    monkeypatch.setattr(Policy, "example_call", lambda *args, **named: asked.append(named) or call(*args, **named))
    assemble(parse(options(prompts__list='["a cat", "a dog that runs", "two dogs"]')))
    assert {"prompt": "a dog that runs"} in asked


def test_budgets_that_are_not_given_are_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000 * MIB))
    monkeypatch.setattr(memory, "CGROUP", Path("nowhere"))
    for variable in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert budgets_mib(None, None, CPU) == (500, 0)
    assert budgets_mib(3.5, 7.0, CPU) == (3.5, 7) and budgets_mib(0.0, 0.0, CPU) == (0, 0)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert budgets_mib(None, None, CPU) == (125, 0)


@pytest.mark.parametrize("limit, free", [("max", 1000), (str(700 * MIB), 600), (str(50 * MIB), 0), (str(9000 * MIB), 1000)])
def test_a_container_has_what_its_limit_leaves(monkeypatch, tmp_path, limit, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000 * MIB))
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{100 * MIB}\n")
    assert memory.free_host_mib() == free


class Recorded:
    """What a cache needs of a `Split`; the tensors of a call are those that it is given."""

    def __init__(self):
        self.kept, self.replayed = [], None

    def run_prefix(self, call):
        return call()

    @contextmanager
    def recording(self):
        self.kept.clear()
        yield self.kept

    @contextmanager
    def replaying(self, kept):
        self.replayed = kept
        yield


SHAPES = [(3, 5, 7), (16, 4, 4), (6,), (2, 9)]
NUM_SAMPLES, NUM_STEPS = 5, 3


def random_bits(num_rows: int, dtype: torch.dtype, channels_last: bool, seed: int) -> list[torch.Tensor]:
    """Of every shape; any bits, NaNs of every kind among them."""
    generator, tensors = torch.Generator().manual_seed(seed), []
    for shape in SHAPES:
        memory_format = torch.channels_last if channels_last and len(shape) == 3 else torch.contiguous_format
        tensor = torch.empty(num_rows, *shape, dtype=dtype).contiguous(memory_format=memory_format)
        physical = tensor.permute(0, 2, 3, 1) if memory_format == torch.channels_last else tensor
        physical.view(torch.uint8).copy_(torch.randint(0, 256, physical.view(torch.uint8).shape, generator=generator))
        tensors.append(tensor)
    return tensors


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


class Slots:
    """A cache on a device that has seen a whole rollout, in batches of 3 samples and 2, and what it was given."""

    def __init__(self, device: str, slots: tuple[float, float], dtype=torch.float32, channels_last=False, num_rows=2):
        self.device, self.num_rows = torch.device(device), num_rows

        def example(count: int) -> list[torch.Tensor]:
            return [tensor.to(device) for tensor in random_bits(count, dtype, channels_last, seed=0)]

        self.split = Recorded()
        bytes_of_a_slot = ActivationCache(self.split, example, num_rows, self.device, 0, 0).slot_bytes
        self.cache = ActivationCache(self.split, example, num_rows, self.device, *(n * bytes_of_a_slot / MIB for n in slots))
        every = np.divmod(np.arange(NUM_SAMPLES * NUM_STEPS), NUM_STEPS)
        self.cache.begin(NUM_SAMPLES, NUM_STEPS, [Update(0, 0, *every)])
        self.truth = [
            [tensor.to(device) for tensor in random_bits(num_rows * NUM_SAMPLES, dtype, channels_last, seed=k)] for k in range(NUM_STEPS)
        ]
        for rows in (slice(0, 3), slice(3, 5)):
            for k in range(NUM_STEPS):
                with self.cache.filling(rows, k):
                    if device == "cuda":
                        torch.cuda._sleep(10**7)  # what is to be kept comes late: a copy that does not wait for it is seen
                    chosen = torch.cat([torch.arange(rows.start, rows.stop) + branch * NUM_SAMPLES for branch in range(num_rows)])
                    self.split.kept.extend(self.select(k, chosen))

    def select(self, k: int, rows: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.index_select(0, rows.to(self.device)).contiguous(memory_format=layout(tensor)) for tensor in self.truth[k]]

    def expected(self, part) -> list[torch.Tensor]:
        """All transitions' first branch, then all their second."""
        places = [(k, row + branch * NUM_SAMPLES) for branch in range(self.num_rows) for row, k in zip(*part.pairs)]
        parts = [self.select(k, torch.tensor([row])) for k, row in places]
        return [torch.cat(tensors).contiguous(memory_format=layout(tensors[0])) for tensors in zip(*parts)]

    def parts(self, size: int) -> list:
        rows, steps = np.divmod(np.random.default_rng(0).permutation(NUM_SAMPLES * NUM_STEPS), NUM_STEPS)
        return list(
            micro_batches(
                Update(0, 0, rows, steps),
                size,
                0,
                recorded(self.num_rows),
                np.arange(NUM_SAMPLES),
                torch.arange(NUM_STEPS, device=self.device),
            )
        )

    def read(self, part, next_part=None) -> list[torch.Tensor]:
        expected = self.expected(part)
        with self.cache.reading(part, next_part, lambda rows: [tensor[rows] for tensor in expected]):
            return self.split.replayed


def layout(tensor: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 and not tensor.is_contiguous() else torch.contiguous_format


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [(100, 0), (0, 100), (4, 100), (4, 6)], ids=["device", "host", "both", "mix"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_slot_gives_back_what_it_got(device, slots, channels_last, dtype):
    """Values to the bit, strides and dtype, on every tier: host memory on a GPU is copied there ahead of its use."""
    for num_rows in (1, 2):
        it = Slots(device, slots, dtype, channels_last, num_rows)
        assert it.cache.num_slots == [min(15, slots[0]), min(15 - min(15, slots[0]), slots[1])]
        assert not any(start % 64 for start in (it.cache.row_bytes, *(segment.start for segment in it.cache.segments)))
        parts = it.parts(4)
        for part, next_part in zip(parts, [*parts[1:], None], strict=True):
            for tensor, expected in zip(it.read(part, next_part), it.expected(part), strict=True):
                assert tensor.dtype == expected.dtype and tensor.device == expected.device and tensor.shape == expected.shape
                assert tensor.stride() == expected.stride()
                assert torch.equal(as_bits(tensor), as_bits(expected))
        assert it.cache.reads == 15 and it.cache.hits == min(15, sum(slots))


def test_rows_may_have_more_or_fewer_tokens():
    """As texts are longer or shorter. A slot has room for as many as the example, 4; more are computed again."""
    cache = ActivationCache(Recorded(), lambda count: [torch.zeros(count, 4, 2)], 1, CPU, 100, 0)
    truth = {number: torch.randn(1, number, 2) for number in (4, 3, 5)}
    cache.begin(3, 1, [Update(0, 0, np.arange(3), np.zeros(3, int))])
    for row, tokens in enumerate(truth.values()):
        with cache.filling(slice(row, row + 1), 0):
            cache.split.kept.append(tokens)
    assert (cache.slots[:, 0] >= 0).tolist() == [True, True, False]
    for chosen, longest in (([1], 4), ([1, 0], 4), ([2, 1], 5)):
        part = SimpleNamespace(pairs=(np.array(chosen), np.zeros(len(chosen), int)), times=torch.zeros(len(chosen)))
        with cache.reading(part, None, lambda rows: [truth[5]]):
            (kept,) = cache.split.replayed
        for tokens, row in zip(kept, chosen, strict=True):
            number = list(truth)[row]
            assert len(tokens) == longest and torch.equal(tokens[:number], truth[number][0]) and not tokens[number:].any()


def test_a_row_that_is_given_may_be_one_of_each_branch():
    """As where a pipeline rescales its guidance: the network has two rows of a sample, and is given one. Sample 1 has no slot."""
    truth = torch.arange(6.0)[:, None]
    cache = ActivationCache(Recorded(), lambda count: [torch.zeros(count, 1)], 2, CPU, 100, 0)
    cache.begin(3, 1, [Update(0, 0, np.array([0, 2]), np.zeros(2, int))])
    with cache.filling(slice(0, 3), 0):
        cache.split.kept.append(truth)
    part = SimpleNamespace(pairs=(np.array([2, 1, 0]), np.zeros(3, int)), times=torch.zeros(3))
    with cache.reading(part, None, lambda rows: [truth[[1, 4]]] if rows.tolist() == [1] else None):
        (kept,) = cache.split.replayed
    assert kept.flatten().tolist() == [2, 1, 0, 5, 4, 3]


def test_a_slot_of_channels_last_is_not_that_of_contiguous():
    """So that the test above sees a layout that is lost."""
    one, other = (Slots("cpu", (100, 0), channels_last=last) for last in (False, True))
    assert [segment.order for segment in one.cache.segments] != [segment.order for segment in other.cache.segments]
    assert one.cache.slot_bytes == other.cache.slot_bytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_next_micro_batch_is_fetched_while_this_one_is_computed(monkeypatch):
    it, fetched = Slots("cuda", (0, 100)), []
    assert it.cache.stores[HOST].is_pinned() and it.cache.stores[HOST].device.type == "cpu"
    fetch = it.cache._fetch
    monkeypatch.setattr(it.cache, "_fetch", lambda part: fetched.append(id(part)) or fetch(part))
    parts = it.parts(4)
    for number, (part, next_part) in enumerate(zip(parts, [*parts[1:], None], strict=True)):
        expected = it.expected(part)
        with torch.cuda.stream(it.cache.stream):
            torch.cuda._sleep(10**8)  # copies come late: a read that does not wait for them is seen
        kept = it.read(part, next_part)
        assert fetched == [id(part) for part in parts[: number + 2]] and len(it.cache._ahead) == (next_part is not None)
        assert all(torch.equal(as_bits(a), as_bits(b)) for a, b in zip(kept, expected, strict=True))


@pytest.mark.parametrize("slots", [(0, 0), (0.99, 0.5), (1, 0), (2.5, 3.999), (14.999, 0), (15, 2), (1e4, 1e4)])
def test_memory_never_exceeds_a_budget(slots):
    """Iterations of 15, 4 and 15 transitions: a store may be larger than needed, never than allowed."""
    it = Slots("cpu", slots)
    cache, rng = it.cache, np.random.default_rng(0)
    for count in (15, 4, 9, 15):
        chosen = np.divmod(np.sort(rng.permutation(15)[:count]), NUM_STEPS)
        cache.begin(NUM_SAMPLES, NUM_STEPS, [Update(0, 0, *chosen), Update(1, 0, *chosen)])
        on_device, on_host = min(count, math.floor(slots[0])), min(count - min(count, math.floor(slots[0])), math.floor(slots[1]))
        assert cache.tiers(count) == [on_device, on_host, count - on_device - on_host]
        numbers = cache.slots[cache.slots >= 0]
        assert len(numbers) == len(set(numbers.tolist())) == on_device + on_host
        assert (numbers < cache.num_slots[DEVICE]).sum() == on_device and (numbers < sum(cache.num_slots)).all()
        for store, number, mib in zip(cache.stores, slots, cache.budgets_mib):
            assert store.nbytes <= mib * MIB and len(store) // 2 <= math.floor(number)


@pytest.mark.parametrize(
    "slots, says",
    [
        ((100, 0), "; 15 on the device (0 MiB), 0 on the host (0 MiB), 0 recomputed; an iteration's"),
        ((4, 6), "; 4 on the device (0 MiB), 6 on the host (0 MiB), 5 recomputed; an iteration's"),
        ((0.5, 3), "; 0 on the device (0 MiB), 3 on the host (0 MiB), 12 recomputed; {0:g} MiB on the device cannot hold one; an"),
        ((0.5, 0.25), ", 15 recomputed; {0:g} MiB on the device cannot hold one; {1:g} MiB on the host cannot hold one; an iteration's"),
        ((0, 0), "; 0 on the device (0 MiB), 0 on the host (0 MiB), 15 recomputed; an iteration's update is spared 0 TFLOP, about 0 s"),
    ],
)
def test_the_plan_says_what_is_held_where(slots, says):
    it = Slots("cpu", slots)
    every = np.divmod(np.arange(15), NUM_STEPS)
    it.cache.prefix_flop = 1e12
    text = it.cache.plan_text([Update(epoch, 0, *every) for epoch in range(4)], torch.float32)
    assert says.format(*it.cache.budgets_mib) in text
    assert text.startswith(f"activation cache of each rank: {it.cache.slot_bytes / MIB:.3g} MiB a transition; ")
    flop = 4 * 2 * min(15, sum(map(math.floor, slots)))  # TFLOP: epochs, rows
    seconds = flop / activation_cache.FRACTIONS["cpu"][0]  # at 1 TFLOP/s
    assert text.endswith(f"update is spared {flop:,.3g} TFLOP, about {seconds:,.2g} s") and "\n" not in text


def test_the_plan_knows_that_the_most_used_are_held():
    """Of 15 transitions 5 are read three times, 10 once, and 7 are held."""
    it, every = Slots("cpu", (3, 4)), np.divmod(np.arange(15), NUM_STEPS)
    it.cache.prefix_flop = 1e12
    text = it.cache.plan_text([Update(0, 0, *every), *2 * [Update(1, 0, *(index[:5] for index in every))]], torch.float32)
    assert f"is spared {2 * (5 * 3 + 2)} TFLOP" in text


def test_the_operations_that_are_spared_are_those_of_the_plan(options, made, monkeypatch):
    """Guidance, whose branches share a part of the prefix. The embedding of time is computed again, and the plan counts it as spared."""
    update, flop = trainer.update, []

    def counting(*args):
        with flop_counter() as counter:
            row = update(*args)
        flop.append(counter.get_total_flops())
        return row

    monkeypatch.setattr(trainer, "update", counting)
    for mode in ("off", "on"):
        run(options(mode, cache__mode=mode, run__iterations=1, train__inner_epochs=2, lora__forward="separate"))
    assert made[-1].hits == 16 and flop[0] - flop[1] == pytest.approx(16 * 2 * made[-1].prefix_flop, rel=0.01)
