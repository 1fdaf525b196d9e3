"""What is planned against what is: counts by hand, real runs under the same modes, closed forms, 2 real ranks."""

import dataclasses
import json
import math
import re
import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from counted import architecture, count_model
from diffusers import DDIMScheduler
from shared import CPU, conditions, latent_shape, policy_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import predict
from ddpo_fast import assemble
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import LoraConfig, OptimizerConfig
from ddpo_fast.distributed.optimizer import make_optimizer
from ddpo_fast.dtypes import DTYPES
from ddpo_fast.gpus import GPUS, parse_devices
from ddpo_fast.pipelines.folders import find_model
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.planning import plan as plan_module
from ddpo_fast.planning.architectures import ARCHITECTURES
from ddpo_fast.planning.counts import MIB, Call, LiveBytes, ModelCounts, flop_counter
from ddpo_fast.planning.plan import (
    advise,
    fit_sizes,
    host_mib,
    iteration_flop,
    make_plan,
    memory_mib,
    phases_mib,
    plan_text,
    state_bytes,
    with_cache,
)  # fmt: skip
from ddpo_fast.planning.scaling import Costs, iteration_terms, saturation, scaling
from ddpo_fast.planning.work import Work
from ddpo_fast.policy import Policy
from ddpo_fast.schedule import Levels, Schedule
from ddpo_fast.updates.transitions import Update

SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
ATTENTION = SimpleNamespace(scope="all", targets=["attention"], rank=4, alpha=4.0)
WORK = Work(
    num_samples=64, batch_size=8, num_steps=10, rows=2, num_minibatches=2, inner_epochs=1, micro_batch=16, trained_steps=10,
    optimizer="adamw", zero_stage=0,
)  # fmt: skip
COSTS = Costs(
    sample_call_s=0.0, sample_row_s=1e-3, decode_image_s=2e-3, reward_image_s=1e-4, update_call_s=0.0, update_row_s=3e-3, optimizer_s=0.0,
    gradient_bytes=0.0, bandwidth=math.inf, latency_s=0.0, serial_s=0.0,
)  # fmt: skip
COUNTS = ModelCounts(
    weight_bytes={"unet": 100 * MIB}, trained_shapes=((1024, 1024),), gathered_bytes=20 * MIB, num_latents=MIB // 4, embed_bytes=0,
    image_bytes=MIB,
    forward=Call(1.0, 0, MIB), update=Call(3.0, 10 * MIB, 20 * MIB), saved_row_bytes=15 * MIB, decode=Call(2.0, 0, 30 * MIB),
    prefix_flop=0.5, kept_row_bytes=MIB // 2, cached_update=Call(2.5, 8 * MIB, 12 * MIB),
)  # fmt: skip


@pytest.fixture(autouse=True)
def each_model_once(monkeypatch):
    monkeypatch.setattr(plan_module, "count_model", count_model)


@pytest.fixture(scope="module")
def sd15():
    return count_model(architecture(SD15), torch.float32, ATTENTION, on_gpu=False, fused=False)


@pytest.fixture(scope="module")
def sd15_saving():
    """With shared guidance, which changes the forward, and gradient checkpointing, which does not."""
    return count_model(architecture(SD15), torch.float32, ATTENTION, on_gpu=False, fused=False, shared=True, checkpointing=True)


def real(tiny_model, dtype: str, scope: str, merged: bool = False) -> Policy:
    policy = policy_of(tiny_model, dtype, scope=scope, targets=["attention"], rank=4, alpha=4.0)
    if merged:
        policy.merge_lora()
    for parameter in policy.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    return policy


def predict_noise(policy: Policy, num_rows: int) -> torch.Tensor:
    x = torch.randn(num_rows, *latent_shape(policy)).to(policy.dtype)
    return policy.predict(x, torch.full((num_rows,), 500), conditions(policy, ["a"] * num_rows))


def test_parameters_by_hand_and_as_loaded(tiny_model):
    """LoRA on attention of width 32 and text of width 16: 6 layers 32 -> 32 and 2 of 16 -> 32 in each of 1 + 1 + 2 transformers."""
    counts = count_model(architecture(str(tiny_model)), torch.float16, ATTENTION, on_gpu=True, fused=True)
    assert counts.num_trainable == 4 * 4 * (6 * (32 + 32) + 2 * (16 + 32))
    policy = real(tiny_model, "fp16", "all")
    assert counts.num_trainable == sum(p.numel() for p in policy.trainable_parameters())
    for name, network in (("unet", policy.network), ("vae", policy.pipe.vae), ("text_encoder", policy.pipe.text_encoder)):
        assert counts.weight_bytes[name] == sum(p.nbytes for p in network.parameters() if not p.requires_grad) > 0
    assert (counts.num_latents, counts.embed_bytes, counts.image_bytes) == (4 * 8 * 8, 8 * 16 * 2, 4 * 3 * 16 * 16)


@pytest.mark.parametrize("embed_bytes, num", [(77 * 768 * 2, 7), ((77 * 2048 + 1280) * 2, 100_000)], ids=["SD 1.5", "SDXL"])
def test_embeddings_of_many_prompts_are_bounded_and_on_the_host_of_a_gpu(tmp_path, monkeypatch, embed_bytes, num):
    """A text without a prompt and one to try the network with are kept, too."""
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i % (num - 2)}\n" for i in range(num)))
    monkeypatch.setattr(plan_module, "count_run", lambda *args: dataclasses.replace(COUNTS, embed_bytes=embed_bytes))
    plan = make_plan(parse(["--plan=H200", f"--prompts.file={tmp_path}/prompts.txt"]))
    kept = min(num - 1, 512 * MIB // embed_bytes) + 1
    assert plan.work.prompts == (0, kept) and plan.memory["prompt embeddings"] == 0
    assert f"prompt embeddings         0  {kept:,} texts, {kept * embed_bytes / MIB:,.0f} on the host\n" in plan_text(plan)


@pytest.mark.parametrize("guidance_scale, evaluation", [(3.0, 3.0), (3.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("heldout", [[], ["z", "a b"]], ids=["", "heldout"])
@pytest.mark.parametrize("algorithm", ["ddpo_is", "rwr"])
def test_embeddings_that_a_run_keeps_are_those_of_the_plan(tiny_model, heldout, guidance_scale, evaluation, algorithm):
    """A text for each guidance scale. A regression here trains without guidance."""
    argv = [f"--model.path={tiny_model}", "--prompts.list=[a, b, a c]", "--eval.prompts=[a, d]", f"--train.algorithm={algorithm}", "--plan"]
    argv += [f"--eval.heldout={json.dumps(heldout)}"] if heldout else []
    argv += [f"--sample.guidance_scale={guidance_scale}", f"--eval.guidance_scale={evaluation}"]
    argv += ["--algorithm.guidance_scale=1"] if algorithm == "rwr" else []
    plan, policy = make_plan(parse(argv)), Policy(find_model(str(tiny_model)), "fp32", CPU, LoraConfig())
    policy.record(Asked(10, guidance_scale))
    for prompts, scale in ((["a", "b", "a c"], guidance_scale), (["a", "d", *heldout], evaluation), (["a", "b", "a c"], 1.0)):
        if scale != 1.0 or prompts[1] == "d" or algorithm == "rwr" or guidance_scale == 1:
            conditions(policy, prompts, scale)
    kept = [row.untyped_storage().nbytes() for rows in (*policy._texts.values(), *sum(policy._unconditional.values(), [])) for row in rows]
    assert plan.memory["prompt embeddings"] * MIB == sum(kept) == plan.work.prompts[0] * plan.counts.embed_bytes > 0


def test_full_fine_tuning_trains_fp32_masters(tiny_model):
    lora = SimpleNamespace(scope="none", targets=[], rank=1, alpha=1.0)
    counts = count_model(architecture(str(tiny_model)), torch.float16, lora, on_gpu=False, fused=False)
    policy = real(tiny_model, "fp16", "none")
    assert counts.weight_bytes["unet"] == 0
    assert sorted(counts.trained_shapes) == sorted(tuple(p.shape) for p in policy.trainable_parameters())
    assert counts.update.fixed_bytes >= 2 * counts.num_trainable * 0.9  # autocast's fp16 copies live from forward to backward


@pytest.mark.parametrize(
    "dtype, scope, merged",
    [("fp32", "all", False), ("fp32", "all", True), ("bf16", "all", False), ("bf16", "all", True), ("bf16", "none", False),
     ("fp32", "mid_up", True)],
)  # fmt: skip
def test_bytes_and_operations_are_those_of_a_real_run(tiny_model, dtype, scope, merged):
    lora = SimpleNamespace(scope=scope, targets=["attention"], rank=4, alpha=4.0)
    counts = count_model(architecture(str(tiny_model)), DTYPES[dtype], lora, on_gpu=False, fused=False, merged=merged)
    policy, rows = real(tiny_model, dtype, scope, merged), 5
    conditions(policy, ["a"])  # encoded before anything is counted
    assert counts.weight_bytes["merged"] == sum(layer.merged_weight.nbytes for layer in policy.merged_layers)
    parameters = {p.untyped_storage().data_ptr() for p in (*policy.network.parameters(), *policy.network.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def update() -> None:
        predict_noise(policy, rows).float().square().mean().backward()

    with torch.no_grad(), LiveBytes() as live:
        predict_noise(policy, rows)
    assert counts.forward.mib(rows) == pytest.approx(live.peak / MIB, rel=0.02)
    with LiveBytes() as live:
        update()
    assert counts.update.mib(rows) == pytest.approx(live.peak / MIB, rel=0.02)
    with flop_counter() as flops:
        update()
    assert flops.get_total_flops() == rows * counts.update.row_flop
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predict_noise(policy, rows)
    if scope != "none":  # there autocast's copies of the weights are saved too
        assert rows * counts.saved_row_bytes == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:  # attention as plain matrix products
        predict_noise(policy, rows)
    assert flops.get_total_flops() == rows * counts.forward.row_flop


def test_live_bytes_by_hand():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()  # no new storage
        c = a + 1
        assert (live.now, live.peak) == (8000, 8000)
        del a, b
        assert (live.now, live.peak) == (4000, 8000)
        c = c + 1
        assert (live.now, live.peak, len(c)) == (4000, 8000, 1000)


def test_fused_kernels_save_less_and_a_gpus_autocast_more(tiny_model):
    def saved(on_gpu: bool, fused: bool) -> float:
        return count_model(architecture(str(tiny_model)), torch.float16, ATTENTION, on_gpu=on_gpu, fused=fused).saved_row_bytes

    assert saved(on_gpu=True, fused=False) > max(saved(on_gpu=True, fused=True), saved(on_gpu=False, fused=False))


def test_stable_diffusion_15(sd15):
    assert sd15.weight_bytes == {"unet": 4 * 859_520_964, "vae": 4 * 83_653_863, "text_encoder": 4 * 123_060_480, "merged": 0}
    assert sd15.num_trainable == 797_184 and sd15.num_latents == 16384
    assert sd15.forward.row_flop == pytest.approx(0.803e12, rel=0.01)
    assert sd15.update.row_flop / sd15.forward.row_flop == pytest.approx(2.21, rel=0.01)
    assert sd15.decode.row_flop == pytest.approx(2.5e12, rel=0.02)
    assert sd15.saved_row_bytes == pytest.approx(2 * 799e6, rel=0.01)  # 799 MB in fp16


@pytest.mark.slow
def test_sdxl():
    counts = count_model(architecture(SDXL), torch.float32, ATTENTION, on_gpu=False, fused=False)
    assert counts.weight_bytes["unet"] == 4 * 2_567_463_684
    assert counts.forward.row_flop == pytest.approx(6.76e12, rel=0.01)
    assert counts.update.row_flop / counts.forward.row_flop == pytest.approx(2.14, rel=0.01)
    assert counts.saved_row_bytes == pytest.approx(2 * 5.59e9, rel=0.02)


@pytest.mark.parametrize("path", [path for path, parts in ARCHITECTURES.items() if "scheduler" in parts])
def test_known_schedulers_make_a_schedule(path):
    schedule = Schedule.of(Levels.of_steps(DDIMScheduler(**ARCHITECTURES[path]["scheduler"]), 50), "ddim", 1.0)
    assert schedule.times[0] == 981 and schedule.times[-1] == 1


def test_a_folder_without_configs_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^model\.path=.*No such file[^\n]*$"):
        architecture(str(tmp_path))


def test_optimizer_state():
    shapes = [(10, 100), (50, 100), (5000,), (70, 3, 5, 5)]
    assert state_bytes("adamw", shapes) == 8 * (1000 + 5000 + 5000 + 5250)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = make_optimizer(OptimizerConfig(name="adamw_8bit"), parameters, 1e-3, on_host=False)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    real_bytes = sum(
        state[name].nbytes for state in optimizer.state.values() for name in ("state1", "state2", "absmax1", "absmax2") if name in state
    )
    assert [optimizer.state[p]["state1"].dtype for p in parameters] == [torch.float32, torch.uint8, torch.float32, torch.uint8]
    assert state_bytes("adamw_8bit", shapes) == real_bytes
    for name in typing.get_args(typing.get_type_hints(OptimizerConfig)["name"]):
        assert 0 < state_bytes(name, [(50, 100)]) <= 40000
    for num_shards in (1, 4):  # one flat shard of 8-bit state with a scale of each moment for every 256, one of fp32
        large = state_bytes("paged_adamw_8bit", [(1000, 2560), (2560,)], num_shards)
        assert large == (2560 * 8 + 2 * 4 * 10_000) // num_shards
        assert state_bytes("adamw_8bit", [(1000, 2560), (2560,)], num_shards) == large + 2 * 2_560_000 // num_shards
    with pytest.raises(ValueError, match="optimizer.name=sgd: valid is"):
        state_bytes("sgd", [(1,)])


def test_memory_of_a_rank_by_hand():
    """1 MiB a latent, so 11 MiB a trajectory (and its 10 log-probs); 4 MiB of trained weights."""
    memory = memory_mib(COUNTS, WORK, 1)
    rollout = 64 * (11 + 40 / MIB)
    assert memory == pytest.approx(
        {"frozen weights": 100, "prompt embeddings": 0, "trained weights": 4, "gathered weights": 0, "optimizer state": 8,
         "rollout": rollout,
         "activation cache": 0, "sample gradients": 0, "gradients": 4, "encoding": 0, "sampling": rollout, "decode": 240,
         "update": 10 + 32 * 20}
    )  # fmt: skip
    phases = phases_mib(memory)
    assert phases == pytest.approx(
        {"encoding": 112 + rollout, "sampling": 112 + 2 * rollout, "decode": 112 + rollout + 240, "update": 112 + rollout + 4 + 650}
    )
    sharded = {
        stage: memory_mib(COUNTS, dataclasses.replace(WORK, zero_stage=stage), 4) for stage in (0, 1, 2, 3)
    }  # with the bucket that gradients are reduced in, and ZeRO's copy of the weights
    assert [sharded[stage]["optimizer state"] for stage in (0, 1, 2, 3)] == [8, 3, 3, 3]
    assert [sharded[stage]["gradients"] for stage in (0, 1, 2, 3)] == [8, 8, 5, 5]
    weights = ("frozen weights", "trained weights", "gathered weights")
    assert [[sharded[stage][kind] for kind in weights] for stage in (2, 3)] == [[100, 4, 0], [25, 1, 20]]
    for stage, offload, on_device, on_host in ((1, "optimizer", 104 + 8, 4), (3, "optimizer", 46 + 4, 4), (3, "all", 20 + 4, 4 + 26)):
        work = dataclasses.replace(WORK, zero_stage=stage, offload=offload)
        memory = memory_mib(COUNTS, work, 4)
        assert sum(memory[kind] for kind in (*weights, "optimizer state", "gradients")) == on_device
        assert host_mib(COUNTS, work, 4) == on_host
    assert sharded[0]["rollout"] == pytest.approx(rollout / 4)


@pytest.mark.parametrize(
    "options, latents",
    [("", 11), ('--sample.window={"size":3}', 4), ("--train.timestep_fraction=0.5", 11), ("--train.algorithm=rwr", 1),
     ("--train.algorithm=rwr --algorithm.num_timesteps=20", 1), ("--train.estimator=score_accumulation --train.num_minibatches=1", 0)],
)  # fmt: skip
def test_latents_that_a_rollout_keeps(options, latents):
    """Of the steps that are trained on, the first one's beginning too; of a regression the final ones."""
    work = Work.of(parse(options.split()))
    assert work.kept_latents == latents
    assert memory_mib(COUNTS, work, 1)["rollout"] == pytest.approx(work.num_samples * (latents + 4 * max(0, latents - 1) / MIB))
    embeds = memory_mib(dataclasses.replace(COUNTS, embed_bytes=MIB), work, 1)["rollout"] - memory_mib(COUNTS, work, 1)["rollout"]
    assert embeds == pytest.approx(work.num_samples / work.samples_per_prompt + 1) and work.samples_per_prompt == 4


def test_text_encoders_are_beside_all_else_while_they_encode(monkeypatch):
    counts = dataclasses.replace(COUNTS, embed_bytes=1, weight_bytes={"unet": 100 * MIB, "text_encoder": 9000 * MIB})
    monkeypatch.setattr(plan_module, "count_model", lambda *args, **options: counts)
    for device, offload, fits in (("H100", True, True), ("RTX-3080", True, False), ("H100", False, True)):
        plan = make_plan(parse([f"--model.path={SD15}", f"--plan={device}", f"--model.offload_text_encoder={str(offload).lower()}"]))
        resident = plan.memory["frozen weights"]
        assert (plan.memory["encoding"], resident) == ((9000, 100) if offload else (0, 9100))
        assert any(line.startswith("encoding new prompts does not fit: ") for line in plan.advice) != fits
        assert phases_mib(plan.memory)["encoding"] >= 9100
    plan = make_plan(parse([f"--model.path={SD15}", "--plan=RTX-3080", "--model.encode_on_host=true", "--sample.num_steps=5"]))
    assert plan.advice == [] and (plan.memory["encoding"], plan.memory["frozen weights"]) == (0, 100)


def test_the_host_holds_what_a_rank_reads(monkeypatch):
    """A network that is quantised or partitioned is never whole there."""
    counts = dataclasses.replace(COUNTS, embed_bytes=1, weight_bytes={"unet": 100 * MIB, "text_encoder": 30 * MIB})
    monkeypatch.setattr(plan_module, "count_model", lambda *args, **options: counts)
    for changed, expected in (([], 130), (["--model.quantize=int8"], 30), (["--zero.stage=3"], 30), (["--zero.stage=2"], 130)):
        text = plan_text(make_plan(parse([f"--model.path={SD15}", "--plan=H100", *changed])))
        assert f"\n  at the start {expected} MiB of the host for each rank, which reads the model\n" in text


def test_decoding_in_parts():
    """8 pictures of 1 MiB, decoded 2 at a time at 30 each: the parts and the whole are there together."""
    memory = memory_mib(COUNTS, dataclasses.replace(WORK, decode_batch=2), 1)
    assert memory["decode"] == 2 * 30 + 2 * 8 and memory_mib(COUNTS, WORK, 1)["decode"] == 8 * 30


def test_operations_of_an_iteration():
    work = dataclasses.replace(WORK, inner_epochs=3, trained_steps=5)
    assert iteration_flop(COUNTS, work, 1) == {"sampling": 64 * 10 * 2 * 1, "decode": 64 * 2, "update": 64 * 5 * 3 * 2 * 3}
    for trained in (10, 5):  # of 10 steps
        work = dataclasses.replace(WORK, num_minibatches=1, trained_steps=trained, score_accumulation=True)
        assert iteration_flop(COUNTS, work, 1) == {"sampling": 64 * 2 * (trained * 3 + (10 - trained) * 1), "decode": 64 * 2, "update": 0}


def test_the_cache_by_hand():
    """A transition is two rows of half a MiB: the 640 of a rank take as many MiB."""

    def held(counts=COUNTS, mode="on", on_gpu=False, **budgets):
        config = parse([]).replace(cache__mode=mode, **{f"cache__{name}": budget for name, budget in budgets.items()})
        return with_cache(WORK, config, counts, 1000, 1, on_gpu).held

    assert held() == ((1000 - 112) // 2, 0)
    assert held(on_gpu=True) == ((1000 - 112) // 2, 640 - (1000 - 112) // 2)  # its host takes what it leaves
    assert held(device_mib=100.5, host_mib=300) == held(device_mib=100.5, host_mib=300, on_gpu=True) == (100, 300)
    assert held(device_mib=600, host_mib=300) == (600, 40)
    assert held(device_mib=0.9, host_mib=None) == (0, 0)
    assert held(dataclasses.replace(COUNTS, prefix_flop=0.0)) == held(mode="off") == (0, 0)
    half = dataclasses.replace(WORK, trained_steps=5, inner_epochs=2)
    assert half.trained_transitions(1) == 480 and half.trained_transitions(4) == 120
    work = dataclasses.replace(WORK, held=(160, 320), inner_epochs=4)
    assert iteration_flop(COUNTS, work, 1)["update"] == 64 * 10 * 4 * 2 * (3 - 0.75 * 0.5)
    memory = memory_mib(COUNTS, work, 1)
    assert memory["activation cache"] == 160
    assert memory["update"] == 8 + 32 * 12 + 3 * 32 * 0.5  # three copies: what is read, as it arrived, and the next micro-batch's
    assert memory_mib(COUNTS, dataclasses.replace(work, held=(160, 0)), 1)["update"] == 8 + 32 * 12 + 32 * 0.5


def test_gradient_checkpointing_is_counted_as_it_runs(tiny_model, sd15, sd15_saving):
    """The peak of a real call and of the counted one; of SD 1.5 a row saves its blocks' inputs, and most of the forward is run twice."""
    policy = real(tiny_model, "fp32", "all")
    policy.checkpoint_gradients()
    conditions(policy, ["a"])  # encoded before anything is counted
    arch, rows = architecture(str(tiny_model)), 16
    counts = count_model(arch, torch.float32, ATTENTION, on_gpu=False, fused=False, checkpointing=True)
    with LiveBytes() as live:
        predict_noise(policy, rows).square().mean().backward()
    with flop_counter() as flops:
        predict_noise(policy, rows).square().mean().backward()
    assert counts.update.fixed_bytes + rows * counts.update.row_bytes == pytest.approx(live.peak, rel=0.05)
    assert rows * counts.update.row_flop == pytest.approx(flops.get_total_flops(), rel=1e-3)
    assert sd15_saving.saved_row_bytes < 0.2 * sd15.saved_row_bytes and sd15_saving.update.row_bytes < 0.3 * sd15.update.row_bytes
    again = sd15_saving.update.row_flop / sd15_saving.forward.row_flop - sd15.update.row_flop / sd15.forward.row_flop
    assert 0.7 < again <= 1


def test_gradient_checkpointing_is_counted_with_a_gpus_autocast(tiny_model):
    plain, checkpointed = (
        count_model(architecture(str(tiny_model)), torch.float16, ATTENTION, on_gpu=True, fused=True, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert checkpointed.saved_row_bytes < 0.8 * plain.saved_row_bytes
    assert checkpointed.update.row_flop > plain.update.row_flop and checkpointed.forward == plain.forward


@pytest.mark.parametrize(
    "changes, memory, expected",
    [
        ({}, 1e6, (64, 320)),  # all there is: 64 samples, 32 x 10 transitions of a minibatch
        ({"sample__num_samples": 128}, 1e6, (128, 640)),
        ({}, 3000, (62, 46)),
        ({"train__micro_batch": 3}, 3000, (62, 3)),
        ({"cache__mode": "on"}, 3000, (41, 49)),  # the kept tensors are accounted for, and an update with them needs less
        ({"train__estimator": "score_accumulation", "train__num_minibatches": 1}, 1000, (13, 640)),
        ({}, 50, (1, 1)),
    ],
)
def test_the_largest_sizes_that_fit(changes, memory, expected):
    """They fit, one more would not, and a given number stays."""
    sizes = "--sample.batch_size=auto --train.micro_batch=auto --train.num_minibatches=2 --sample.num_samples=64 --sample.decode_batch=128"
    options = f"{sizes} --cache.mode=off"
    config = fit_sizes(parse(options.split()).replace(**changes), COUNTS, memory, 1, on_gpu=False)
    assert (config.sample.batch_size, config.train.micro_batch) == expected
    if memory == 3000:
        work = with_cache(Work.of(config), config, COUNTS, memory, 1, on_gpu=False)
        assert advise(COUNTS, work, 1, 0.9 * memory) == []
        assert advise(COUNTS, dataclasses.replace(work, batch_size=expected[0] + 1), 1, 0.9 * memory)
        assert advise(COUNTS, dataclasses.replace(work, micro_batch=expected[1] + 1), 1, 0.9 * memory) or expected[1] == 3


def test_a_run_with_sizes_left_to_the_plan(tiny_model, tmp_path):
    """On this machine a tiny model's whole minibatch fits; config.yaml says what was used."""
    options = f"--model.path={tiny_model} --run.dir={tmp_path}/run --sample.batch_size=auto --train.micro_batch=auto"
    trainer.main([*options.split(), "--run.iterations=1", "--sample.num_samples=8", "--sample.num_steps=2", "--eval.num_samples=1"])
    config = parse(["--config", f"{tmp_path}/run/config.yaml", "--run.dir=other"])
    assert (config.sample.batch_size, config.train.micro_batch) == (8, 4)


@pytest.mark.parametrize(
    "scope, prefix, update, cached, kept",
    [("mid_up", 0.249, 1.466, 1.217, 13.3), ("up_blocks.2,up_blocks.3", 0.439, 1.244, 0.805, 13.8)],
)
def test_sd15_with_and_without_the_cache(scope, prefix, update, cached, kept):
    """TFLOP and MB of a row in fp16: down, mid, up are 31.0, 1.5, 67.4 % of 0.803 TF, the up blocks 25.8, 151.5, 166.8, 197.6 GF."""
    lora = SimpleNamespace(scope=scope, targets=["attention"], rank=4, alpha=4.0)
    counts = count_model(architecture(SD15), torch.float16, lora, on_gpu=True, fused=True)
    tera = [flop / 1e12 for flop in (counts.prefix_flop, counts.update.row_flop, counts.cached_update.row_flop)]
    assert tera == pytest.approx([prefix, update, cached], abs=1e-3)
    assert counts.cached_update.row_flop == pytest.approx(counts.update.row_flop - counts.prefix_flop, rel=1e-4)  # both embed the time
    assert counts.kept_row_bytes / 1e6 == pytest.approx(kept, abs=0.05)


def test_what_shared_guidance_saves_of_sd15(sd15, sd15_saving):
    """Half of conv_in, the first residual block, and of the first transformer up to its cross-attention: 2.5 % of every forward."""
    assert 1 - sd15_saving.forward.row_flop / sd15.forward.row_flop == pytest.approx(0.025, abs=0.003)


def test_memory_of_score_accumulation_by_hand():
    """A gradient of 4 MiB for each of 16 samples a rank, no trajectory, the update's bytes of its 16 rows in sampling."""
    work = dataclasses.replace(WORK, num_minibatches=1, score_accumulation=True)
    memory = memory_mib(COUNTS, work, 4)
    assert memory == pytest.approx(
        {"frozen weights": 100, "prompt embeddings": 0, "trained weights": 4, "gathered weights": 0, "optimizer state": 8,
         "rollout": 0, "activation cache": 0, "sample gradients": 64,
         "gradients": 8, "encoding": 0, "sampling": 10 + 16 * 20, "decode": 240, "update": 4}
    )  # fmt: skip
    phases = phases_mib(memory)
    resident = 176 + memory["rollout"]
    assert phases == pytest.approx({"encoding": resident, "sampling": resident + 330, "decode": resident + 240, "update": resident + 12})
    parts = memory_mib(COUNTS, dataclasses.replace(work, trained_steps=5), 4)
    assert parts["sampling"] == memory["sampling"] + 8 * 4


@pytest.mark.parametrize("forward", ["merged", "separate"])
def test_bytes_and_operations_of_score_accumulation_are_those_of_a_real_run(tiny_model, forward):
    options = (
        f"--model.path={tiny_model} --train.estimator=score_accumulation --train.num_minibatches=1 --lora.forward={forward} --lora.rank=4 "
        "--model.share_guidance=false"
    )
    config, num_samples = parse(options.split()), 8
    made = assemble.assemble(config)
    policy, gradients, rows = made.policy, made.gradients, 2 * num_samples
    counts = count_model(architecture(str(tiny_model)), torch.float32, config.lora, on_gpu=False, fused=False, merged=forward == "merged")
    inputs = torch.randn(rows, *latent_shape(policy)), torch.full((rows,), 500), conditions(policy, ["a"] * rows)

    def step() -> None:
        gradients.predict(0, lambda rows: policy.predict(*(part[rows] for part in inputs)))
        gradients.out.square().mean().backward()
        gradients.out = None

    gradients.begin([Update(0, 0, np.arange(num_samples), np.zeros(num_samples, int))], num_samples, made.schedule(1))
    gradients.begin_batch(slice(num_samples))
    assert sum(total.nbytes for total in gradients.totals) == 4 * num_samples * counts.num_trainable
    step()
    with LiveBytes() as live:
        step()
    assert counts.update.mib(rows) == pytest.approx(live.peak / MIB, rel=0.03)
    with flop_counter() as flops:
        step()
    assert flops.get_total_flops() == pytest.approx(rows * counts.update.row_flop, rel=0.01)


def test_calls_of_score_accumulation():
    costs = dataclasses.replace(COSTS, sample_call_s=1.0, update_call_s=1.0)
    for trained, sampling in ((10, 0), (5, 80)):
        terms = iteration_terms(dataclasses.replace(WORK, num_minibatches=1, trained_steps=trained, score_accumulation=True), costs, 1)
        assert (terms["sampling calls"], terms["update calls"]) == (sampling, 80)
        assert terms["update rows"] == pytest.approx(64 * trained * 2 * 3e-3)
        assert terms["sampling rows"] == pytest.approx(64 * (10 - trained) * 2 * 1e-3)


@pytest.mark.parametrize(
    "option, field, budget", [("sample.batch_size", "batch_size", 960.0), ("train.micro_batch", "micro_batch", 1200.0)]
)
def test_advice_is_the_largest_value_that_fits(option, field, budget):
    work = dataclasses.replace(WORK, num_samples=32, batch_size=32, micro_batch=64)
    lines = [line for line in advise(COUNTS, work, 1, budget) if line.startswith(option)]
    value = int(lines[0].split("; ")[1].split()[0])
    assert lines == [f"{option}={getattr(work, field)} does not fit; {value} does"] and 1 <= value < getattr(work, field)
    for tried, fits in ((value, True), (value + 1, False)):
        again = advise(COUNTS, dataclasses.replace(work, **{field: tried}), 1, budget)
        assert fits == (not any(line.startswith(option) for line in again))


def test_no_advice_where_it_fits_and_none_that_would_not_help():
    assert advise(COUNTS, WORK, 1, 1e6) == []
    assert advise(COUNTS, WORK, 1, 50.0) == [
        "sampling and decode does not fit even with sample.batch_size=1: docs/distribution.md has what takes less memory",
        "update does not fit even with train.micro_batch=1: docs/distribution.md has what takes less memory",
    ]
    encoders = [dataclasses.replace(COUNTS, encoder_bytes=size) for size in (0, 2**30)]
    assert ["model.encode_on_host=true helps" in " ".join(advise(counts, WORK, 1, 50.0)) for counts in encoders] == [False, True]


def test_beyond_one_machine_the_network_is_the_slowest_link():
    costs = dataclasses.replace(COSTS, gradient_bytes=1e9, bandwidth=1e11, machine_devices=4, network_bandwidth=1e9)
    inside, across = (iteration_terms(WORK, costs, num_devices)["all-reduce"] for num_devices in (4, 8))
    assert inside == pytest.approx(2 * 2 * 3 / 4 * 1e9 / 1e11) and across == pytest.approx(2 * 2 * 7 / 8 * 1e9 / 1e9)


def test_without_overhead_scaling_is_perfect():
    rows = scaling(WORK, COSTS)
    assert [row.num_devices for row in rows] == [1, 2, 4, 8, 16, 32]
    one = 64 * (20 * 1e-3 + 2e-3 + 1e-4) + 64 * 20 * 3e-3
    for row in rows:
        assert row.seconds == pytest.approx(one / row.num_devices) and row.efficiency == pytest.approx(1)
        assert row.images_per_s == pytest.approx(64 / one * row.num_devices) and sum(row.shares.values()) == pytest.approx(1)
    assert saturation(rows) is None


def test_all_reduce_in_a_ring():
    costs = dataclasses.replace(COSTS, gradient_bytes=1e9, bandwidth=1e9, latency_s=1e-3)
    terms = iteration_terms(WORK, costs, 4)
    assert terms["all-reduce"] == pytest.approx(2 * (2 * 3 / 4 * 1e9 / 1e9 + 2 * 3 * 1e-3))
    assert terms["gather"] == pytest.approx(3 * (8 * 16 / 1e9 + 1e-3) + 2 * 2 * 3 * 1e-3)
    assert saturation(scaling(WORK, costs)).saturated_by == "all-reduce"
    assert iteration_terms(WORK, costs, 1)["all-reduce"] == iteration_terms(WORK, costs, 1)["gather"] == 0


@pytest.mark.parametrize(
    "cost, expected",
    [
        ("sample_call_s", "sampling batches too small"),
        ("update_call_s", "update micro-batches too small"),
        ("optimizer_s", "optimizer step"),
        ("serial_s", "rank 0's serial work"),
    ],
)
def test_what_saturates_is_named(cost, expected):
    end = saturation(scaling(WORK, dataclasses.replace(COSTS, **{cost: 1.0})))
    assert end is not None and end.saturated_by == expected and end.efficiency < 0.8


def test_serial_work_is_amdahls_law():
    costs = dataclasses.replace(COSTS, serial_s=1.0)
    parallel = sum(iteration_terms(WORK, COSTS, 1).values())
    for row in scaling(WORK, costs):
        assert row.efficiency == pytest.approx((parallel + 1) / (parallel + row.num_devices))


def test_calls_are_whole():
    costs = dataclasses.replace(COSTS, sample_call_s=1.0, update_call_s=1.0)
    for num_devices in (1, 2, 4, 8, 16, 32):
        samples = 64 // num_devices
        terms = iteration_terms(WORK, costs, num_devices)
        assert terms["sampling calls"] == 10 * math.ceil(samples / 8)
        assert terms["update calls"] == 2 * math.ceil(samples // 2 * 10 / 16)
    sharded = dataclasses.replace(WORK, zero_stage=1)
    assert iteration_terms(sharded, dataclasses.replace(COSTS, optimizer_s=1.0), 4)["optimizer"] == pytest.approx(0.5)


def test_samples_must_divide():
    with pytest.raises(ValueError, match="sample.num_samples=64: valid is a multiple of 6 with 3 ranks"):
        iteration_terms(WORK, COSTS, 3)


def test_fit_finds_the_costs():
    design = [[1.0, 8.0], [1.0, 4.0], [2.0, 4.0], [4.0, 1.0]]
    assert predict.fit(design, [3 * a + 2 * b for a, b in design]) == pytest.approx([3, 2])
    assert predict.fit(design, [8.0, 4.0, 3.9, 0.9])[0] == 0 < predict.fit(design, [8.0, 4.0, 3.9, 0.9])[1]


@pytest.mark.parametrize("text, expected", [("H200", (1, "H200")), ("8xh100", (8, "H100")), ("here", (1, "here")), ("0xH200", None)])
def test_names_of_devices(text, expected):
    assert parse_devices(text) == expected
    assert all(parse_devices(f"3x{name}") == (3, name) for name in GPUS)


def test_plan_of_score_accumulation(nothing_starts, tiny_model, capsys):
    options = ["--plan", "--train.num_minibatches=1", "--sample.batch_size=4", "--train.estimator=score_accumulation"]
    trainer.main(["--model.path", str(tiny_model), *options])
    out = capsys.readouterr().out
    assert "sample gradients" in out and re.search(r"rollout +0  embeddings of \d+ texts\n", out)
    assert "the combined gradient; no network call" in out
    assert "update                   0.00 TFLOP        0.0 s" in out and out.endswith("it fits\n")


@pytest.mark.parametrize("argument, plan", [("--plan", "here"), ("--plan=8xH200", "8xH200"), ("--run.plan=L4", "L4")])
def test_plan_on_the_command_line(argument, plan):
    assert parse([argument]).run.plan == plan
    assert parse([]).run.plan is None


@pytest.fixture
def nothing_starts(monkeypatch, tmp_path):
    for module, name in ((trainer, "assemble"), (assemble, "init_distributed"), (assemble, "Policy")):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def test_plan_of_this_machine(nothing_starts, tiny_model, capsys):
    trainer.main(["--model.path", str(tiny_model), "--plan", "--train.num_minibatches=2", "--sample.batch_size=4"])
    out = capsys.readouterr().out
    assert "batches of 4, 2 network rows each sample" in out and "samples an hour" in out and out.endswith("it fits\n")


def test_only_rank_0_prints_the_plan(nothing_starts, tiny_model, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    trainer.main(["--model.path", str(tiny_model), "--plan=H200"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "options, message",
    [
        (["--plan=H201"], "error: run.plan=H201: valid is here, or one of B200, H200, "),
        (["--plan=7xH200"], "error: sample.num_samples=48: valid is a multiple of 28 with 7 ranks"),
        (["--plan=H200", "--lora.scope=up_blocks.9"], "error: lora.scope=up_blocks.9: this network has no up_blocks.9"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(nothing_starts, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options)
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.slow
def test_two_ranks_take_as_long_as_predicted(tiny_model):
    config = parse(
        [f"--model.path={tiny_model}", "--sample.num_samples=32", "--sample.batch_size=16", "--train.num_minibatches=2",
         "--train.micro_batch=16", "--lora.rank=2", "--prompts.limit=4", "--prompts.samples_per_prompt=1"]
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        work, costs = predict.calibrate(config)
    finally:
        torch.set_num_threads(threads)
    for row in predict.check(config, work, costs):
        assert row.predicted_s == pytest.approx(row.measured_s, rel=0.25), row
