"""ZeRO 0-3, offload, 8-bit state and gradient checkpointing against the plain run in one process; the user's own DeepSpeed JSON.

Every rank makes and trains on its own part of an iteration's samples, so that a rank whose gradient was not synchronised would show: the
plain run trains on their union. Adam divides a gradient by its size, so that a weight whose true gradient is 0 (a bias before a
GroupNorm) is moved by rounding alone; with optimizer.eps=1e-4, the runs' own eps here, by next to nothing.
"""

import base64
import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import bounds
import pytest
import torch
from runs import BY_PROMPT, ENVIRONMENT, LIMIT_S, ROOT, deepspeed, ports, printed, write_job
from safetensors.torch import load_file
from shared import CPU, command_line, conditions, joined, latent_shape, policy_of, run, run_dir

from ddpo_fast import assemble, kernels
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed import deepspeed_options
from ddpo_fast.distributed.engine import Engine, init_distributed
from ddpo_fast.distributed.optimizer import check_optimizer
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.records.fingerprints import of_model
from ddpo_fast.records.metrics import read_metrics

TRAINED = {"lora": "mid_up", "full": "none"}


@pytest.fixture(scope="module")
def make(tiny_model, tmp_path_factory):
    """Command lines of runs of two iterations with two updates each, of some micro-batches, by how they are run."""
    folder = tmp_path_factory.mktemp("zero")
    (folder / "reward.py").write_text(BY_PROMPT)
    # by default ZeRO 3 would leave almost all of a model this small whole
    (folder / "partition.json").write_text(json.dumps({"zero_optimization": {"stage": "auto", "stage3_param_persistence_threshold": 0}}))

    def argv(name: str, trained="lora", optimizer="adamw", stage=0, checkpointing=False, offload="none", **changed) -> list[str]:
        values = {
            "model.path": tiny_model, "run.dir": folder / name, "reward.name": f"{folder}/reward.py:by_prompt",
            "sample.num_samples": 4, "sample.num_steps": 2, "sample.batch_size": 4, "eval.num_samples": 4, "eval.every": 100,
            "run.iterations": 2, "run.checkpoint_every": 100, "train.num_minibatches": 1, "train.inner_epochs": 2, "train.micro_batch": 2,
            "train.learning_rate": 3e-4, "optimizer.eps": 1e-4, "lora.targets": '["attention", "convolution"]', "cache.mode": "off",
            "prompts.limit": 4, "prompts.samples_per_prompt": 1, "baseline.min_count": 8, "baseline.buffer_size": 8,
            "lora.scope": TRAINED[trained], "optimizer.name": optimizer, "zero.stage": stage, "zero.offload": offload,
            "train.gradient_checkpointing": str(checkpointing).lower(), "deepspeed.config": folder / "partition.json",
        }  # fmt: skip
        return command_line(values, changed)

    return argv


def tolerance(argv: list[str]) -> float:
    """How far rounding may take a run's weights, in 2-norm."""
    bound = bounds.of_run(run_dir(argv))
    return bound.weights(len(weights(argv)), bound.gradient)


def weights(argv: list[str]) -> torch.Tensor:
    """All that the run has trained and exported."""
    folder = run_dir(argv)
    (file,) = [*folder.glob("lora/*.safetensors"), *folder.glob("unet/*.safetensors")]
    tensors = load_file(file)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    return joined(tensors)


@pytest.fixture(scope="module")
def plain(make):
    """What each of the runs comes to in one process, at stage 0: weights by (trained, optimizer)."""
    results = {}
    for trained, optimizer in product(TRAINED, ("adamw", "adamw_8bit")):
        argv = make(f"plain-{trained}-{optimizer}", trained, optimizer)
        run(argv)
        results[trained, optimizer] = weights(argv)
    return results


def check(plain, cases: dict[tuple, list[str]]) -> None:
    """Weights of each case, whose key starts (trained, optimizer), are the plain run's.

    8-bit: a shard has other blocks, so other codes. Either run is as far from fp32 AdamW as 8 bits take it, one of them is measured, and
    by the triangle the two are at most twice that from each other, in norm.
    """
    for key, argv in cases.items():
        expected, exact = plain[key[:2]], plain[key[0], "adamw"]
        difference = weights(argv) - expected
        if key[1] == "adamw":
            assert difference.norm() <= tolerance(argv), (key, difference.norm().item(), tolerance(argv))
        else:
            quantisation = (expected - exact).norm()
            assert 0 < quantisation and difference.norm() <= 2 * quantisation, (key, difference.norm().item(), quantisation.item())


def launch(num_ranks: int, runs: list[list[str]], folder: Path) -> None:
    """One start of the launcher for all runs."""
    write_job(folder, 0, runs)
    (folder / "end").touch()
    done = deepspeed(num_ranks, ROOT / "tests" / "ranks.py", [str(folder)], timeout=2 * LIMIT_S)
    text = done.stdout + done.stderr + printed(folder, 0)
    assert [(folder / f"0.{rank}.code").read_text() for rank in range(num_ranks)] == ["0"] * num_ranks, text[-5000:]
    assert "out of memory" not in text and "Traceback" not in text


def test_the_plain_runs_move_the_weights_more_than_the_tolerance(make, plain, tiny_model):
    before = joined(policy_of(tiny_model, scope="none").network.state_dict())
    assert (plain["full", "adamw"] - before).norm() > 4 * tolerance(make("plain-full-adamw", "full"))
    lora = make("plain-lora-adamw")
    assert bounds.moved(run_dir(lora)) > 4 * tolerance(lora)


def test_two_ranks(make, plain, ranks):
    """A representative part of the matrix below."""
    parts = [
        ("lora", "adamw", 3, True, "none"), ("full", "adamw", 3, False, "all"), ("full", "adamw_8bit", 1, True, "none"),
        ("full", "adamw", 2, False, "optimizer"),
    ]  # fmt: skip
    cases = {part: make("two-" + "-".join(map(str, part)), *part) for part in parts}
    codes, text = ranks.run(*cases.values())
    assert codes == [0, 0] and "out of memory" not in text and "Traceback" not in text, text
    check(plain, cases)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_whole_matrix(make, plain, tmp_path, num_ranks):
    """4 stages x {LoRA, full} x {AdamW, 8-bit} x checkpointing, and every way to offload, without checkpointing."""
    parts = [(*part, "none") for part in product(TRAINED, ("adamw", "adamw_8bit"), range(4), (False, True))]
    offloads = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
    parts += [(trained, "adamw", stage, False, offload) for trained in TRAINED for stage, offload in offloads]
    cases = {part: make(f"matrix{num_ranks}-" + "-".join(map(str, part)), *part) for part in parts}
    launch(num_ranks, list(cases.values()), tmp_path)
    check(plain, cases)


@pytest.mark.slow
def test_four_ranks(make, plain, tmp_path):
    parts = [("full", "adamw", 3, True, "none"), ("lora", "adamw", 2, False, "none"), ("full", "adamw_8bit", 3, False, "none")]
    cases = {part: make("four-" + "-".join(map(str, part)), *part) for part in parts}
    launch(4, list(cases.values()), tmp_path)
    check(plain, cases)


@pytest.mark.slow
def test_two_nodes(make, plain, tmp_path):
    """What `deepspeed --hostfile` starts on each of two machines, started here twice on this one."""
    cases = {("full", "adamw", stage): make(f"nodes-{stage}", "full", stage=stage) for stage in (0, 3)}
    write_job(tmp_path, 0, list(cases.values()))
    (tmp_path / "end").touch()
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0], "127.0.0.1": [0]}).encode()).decode()
    command = [
        sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1",
        f"--master_port={next(ports)}",
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [*command, f"--node_rank={rank}", str(ROOT / "tests" / "ranks.py"), str(tmp_path)],
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    logs = [node.communicate(timeout=LIMIT_S)[0] for node in nodes]
    text = printed(tmp_path, 0)
    assert [node.returncode for node in nodes] == [0, 0] and "Traceback" not in text, "\n".join([*logs, text])[-5000:]
    assert text.count("2 x cpu") == 2  # both runs, each of two ranks
    check(plain, cases)


def test_resume_at_stage_3_is_the_uninterrupted_run(make):
    whole, parts = (make(name, "full", "adamw_8bit", 3) for name in ("whole", "parts"))
    trainer.main(whole)
    trainer.main([*parts, "--run.iterations=1"])
    trainer.main([*parts, "--run.iterations=2", "--resume"])
    assert torch.equal(weights(whole), weights(parts))


@pytest.mark.parametrize("options", [dict(), dict(model__dtype="bf16"), dict(cache__mode="on"), dict(sample__guidance_scale=1)])
def test_checkpointing_changes_no_bit(make, options, request):
    """fp32 with merged LoRA, autocast without it, from the activation cache, with and without guidance's branches sharing layers."""
    name = request.node.callspec.id
    runs = [make(f"{name}-{checkpointing}", checkpointing=checkpointing, **options) for checkpointing in (False, True)]
    for argv in runs:
        run(argv)
    assert torch.equal(*map(weights, runs))


def test_at_stage_3_a_network_is_partitioned_as_it_is_read(make):
    """No weight of it is whole but in a call, which gives the bits of a whole network; its fingerprint is that of whole weights."""
    init_distributed(60)
    found = []
    for stage in (0, 3):
        config = parse(make(f"read-{stage}", stage=stage, lora__forward="separate", model__dtype="fp32"))
        policy = assemble.load_policy(config, assemble.find(config), Ranks(), CPU, kernels.select("reference", CPU))[1]
        frozen = [p for p in policy.network.parameters() if not p.requires_grad]
        assert all((p.numel() == 0) == (stage == 3) for p in frozen) and len(frozen) > 50
        found.append((policy.example_call(2), of_model(policy.pipe, "unet", True)))
        assert all((p.numel() == 0) == (stage == 3) for p in frozen)
    (ours, made_of), (partitioned, same) = found
    assert torch.equal(ours, partitioned) and made_of == same


def test_half_precision_at_stage_3_has_fp32_masters_and_skips_what_is_not_finite(tiny_model):
    init_distributed(60)
    policy = policy_of(tiny_model, "fp16", scope="none")
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3)
    engine = Engine(policy.network, optimizer, zero_stage=3, max_grad_norm=1.0, dtype=torch.float16)
    policy.attach(engine.module, partitioned=True)
    assert {p.ds_tensor.dtype for p in engine.parameters} == {torch.float32}

    def step(factor: float) -> tuple[float, torch.Tensor]:
        latents, given = torch.ones(2, *latent_shape(policy)).half(), conditions(policy, ["a", "b"])
        noise_pred = policy.predict(latents, torch.full((2,), 5), given)
        engine.backward(noise_pred.float().square().mean() * engine.loss_scale * factor, last=True)
        norm = engine.step()
        with engine.gathered():
            return norm, torch.cat([p.detach().flatten().clone() for p in engine.parameters])

    norm, first = step(1.0)
    bad_norm, same = step(math.inf)
    next_norm, other = step(1.0)
    assert 0 < norm < math.inf and not math.isfinite(bad_norm) and 0 < next_norm < math.inf
    assert torch.equal(first, same) and not torch.equal(same, other)
    assert engine.loss_scale == Engine.FP16_LOSS_SCALE / 2


@pytest.mark.parametrize(
    "user, message",
    [
        ("{", "cannot be read: "),
        ("[]", "valid is a JSON object"),
        ({"train_batch_size": 8}, "train_batch_size is decided by sample.num_samples / train.num_minibatches; leave it out"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is decided by train.micro_batch"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is decided by train.micro_batch"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is decided by train.max_grad_norm (1.0); leave it out"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is decided by zero.stage (2); leave it out"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "zero_optimization.offload_optimizer.device is decided by"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param.device is decided by zero.offload"),
        ({"zero_optimization": {"bucket": 1}}, "zero_optimization: 1 validation error"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "zero_optimization: 1 validation error"),
        ({"zero_optimization": 2}, "zero_optimization=2: valid is an object"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is decided by optimizer.name, train.learning_rate; leave it out"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is decided by train.learning_rate"),
        ({"fp16": {"enabled": True}}, "fp16 is decided by model.dtype; leave it out"),
        ({"bf16": {"enabled": True}}, "bf16 is decided by model.dtype; leave it out"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "decided by train.gradient_checkpointing; leave it out"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer=true: valid is false"),
        ({"zero_optimisation": {}}, "there is no zero_optimisation; valid is any of zero_optimization, "),
    ],
)
def test_contradictions_are_one_line_before_a_model_loads(tiny_model, tmp_path, capsys, monkeypatch, user, message):
    monkeypatch.setattr(assemble, "Policy", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "ds.json").write_text(user if isinstance(user, str) else json.dumps(user))
    with pytest.raises(SystemExit, match="2"):
        trainer.main([f"--model.path={tiny_model}", f"--deepspeed.config={tmp_path / 'ds.json'}", "--zero.stage=2"])
    error = capsys.readouterr().err
    assert error.startswith(f"error: deepspeed.config={tmp_path / 'ds.json'}: ") and error.count("\n") == 1 and message in error


def test_the_users_json_is_merged_over_ours(make, tmp_path):
    """What agrees, is switched off or is left to us is fine; the rest reaches DeepSpeed, offload's details included."""
    ours = deepspeed_options.stated(3, "all", 1.0)
    user = {
        "train_batch_size": "auto", "gradient_clipping": 1.0, "fp16": {"enabled": False}, "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": 7}, "stage3_prefetch_bucket_size": 1234},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(user))
    assert deepspeed_options.read(str(tmp_path / "ds.json"), ours) == {
        "wall_clock_breakdown": False,
        "zero_optimization": {"offload_param": {"buffer_count": 7}, "stage3_prefetch_bucket_size": 1234},
    }
    made = assemble.assemble(parse(make("merged", "full", stage=3, offload="all", deepspeed__config=tmp_path / "ds.json")))
    zero = made.engine.module._config.zero_config
    assert (zero.offload_param.buffer_count, zero.offload_param.device, zero.prefetch_bucket_size) == (7, "cpu", 1234)
    assert zero.max_live_parameters == deepspeed_options.LIVE_ELEMENTS and zero.stage == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run it")
def test_paged_state_without_a_gpu_says_why(tiny_model, capsys):
    with pytest.raises(SystemExit, match="2"):
        trainer.main([f"--model.path={tiny_model}", "--optimizer.name=paged_adamw_8bit"])
    assert "optimizer.name=paged_adamw_8bit: it pages its state between GPU and host" in capsys.readouterr().err


def test_an_8_bit_optimizer_without_its_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # which makes it one that cannot be imported
    check_optimizer("adamw")
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        with pytest.raises(ValueError, match=f"optimizer.name={name}: it needs bitsandbytes, which is not installed; valid is adamw"):
            check_optimizer(name)


def test_a_run_at_stage_3_says_what_it_trains(make, capsys):
    argv = make("said", "full", stage=3, run__iterations=1)
    folder = run(argv)
    assert f"{len(weights(argv)):,} trainable parameters" in capsys.readouterr().out
    rows = read_metrics(folder)
    assert rows[1]["ratio_error"] <= bounds.of_run(folder).ratio and rows[1]["skipped_updates"] == 0
