"""Whole runs on a random tiny model, in this process: the gradient, invariances, other models, faults."""

import json
import math
import re
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import bounds
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from shared import conditions, first_gradient, latent_shape, relative_error, run, sampled, textbook_log_prob, untimed, weights
from tiny import make_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_fast import assemble as assembling
from ddpo_fast import rollout
from ddpo_fast import train as trainer
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.engine import Engine
from ddpo_fast.dtypes import DTYPES
from ddpo_fast.kernels import reference
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import Prompts
from ddpo_fast.records import run_directory
from ddpo_fast.records.checkpoint import list_checkpoints
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.scoring.scorer import open_reward
from ddpo_fast.scoring.server import RewardServer
from ddpo_fast.timing import StageTimer

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.parametrize("algorithm", ["ddpo_is", "ddpo_sf"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_gradient_is_that_of_the_textbook_loop(options, algorithm, guidance_scale):
    """Against the paper's loop: whole minibatch, one timestep at a time, formulas written out anew from the cumulative alphas."""
    argv = options(train__num_minibatches=1, train__algorithm=algorithm, sample__guidance_scale=guidance_scale)
    first = first_gradient(argv)
    prompts, rollout, advantages, timesteps = first.prompts, first.rollout, first.credit, first.rollout.schedule.times
    pipe = first.run.policy.pipe
    pipe.unet.zero_grad()
    for step, t in enumerate(timesteps.tolist()):
        x_t, next_x = rollout.latents[:, step], rollout.latents[:, step + 1]
        log_prob = textbook_log_prob(pipe, prompts, x_t, next_x, (t, t - 200), guidance_scale)
        ratio = (log_prob - rollout.log_probs[:, step].double()).exp()
        (-(advantages * ratio).mean() / len(timesteps)).backward()
    expected = {n: p.grad for n, p in pipe.unet.named_parameters() if p.grad is not None}
    assert relative_error(first.gradient, expected) <= 1e-6


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_does_not_depend_on_micro_batch(options, dtype):
    short = dict(sample__num_steps=3)
    expected = first_gradient(options(**short), dtype)
    for micro_batch in (1, 7, 1000):
        gradient = first_gradient(options(**short, train__micro_batch=micro_batch), dtype).gradient
        assert relative_error(gradient, expected.gradient) <= bounds.of(expected.run.config, dtype).gradient, micro_batch


@pytest.mark.rounding
def test_samples_do_not_depend_on_batch_size(options):
    """But for rounding. The reward is the difference of two means of pixels."""
    folders = [run(options(f"b{b}", sample__batch_size=b, run__iterations=1)) for b in (3, 8)]
    one, other = (read_metrics(folder)[1]["reward_mean"] for folder in folders)
    assert one == pytest.approx(other, rel=0, abs=bounds.of_run(folders[0]).reward)


def test_same_command_same_run(options):
    a, b = run(options("a")), run(options("b"))
    assert untimed(read_metrics(a)) == untimed(read_metrics(b))
    assert all(torch.equal(tensor, weights(b)[name]) for name, tensor in weights(a).items())


def test_resume_equals_uninterrupted(options):
    short = dict(sample__num_steps=3, train__inner_epochs=2)
    whole = run(options("whole", run__iterations=3, **short))
    half = options("half", run__iterations=1, **short)
    run(half)
    trainer.main([a for a in half if a.startswith("--run.dir")] + ["--resume", "--run.iterations=3"])
    parts = [Path(a.split("=")[1]) for a in half if a.startswith("--run.dir")][0]
    drop = ("eval_reward_mean", "eval_reward_std", "eval_samples", "eval_diversity")  # the short run ended with an evaluation
    strip = [[{k: v for k, v in row.items() if k not in drop} for row in untimed(read_metrics(d))] for d in (whole, parts)]
    assert strip[0] == strip[1] and len(strip[0]) == 4
    assert all(torch.equal(tensor, weights(parts)[name]) for name, tensor in weights(whole).items())


def test_run_directory_is_the_contract(options, reports):
    folder = run(options(eval__every=1))
    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == [0, 1, 2] and [row["samples"] for row in rows] == [0, 8, 16]
    assert all(list(row) == list(rows[0]) for row in rows) and list(rows[0]) == list(run_directory.METRICS)
    heldout = [f"heldout_{key}" for key in ("reward_mean", "reward_std", "samples", "diversity")]
    assert [key for key, value in rows[1].items() if value is None] == [*heldout, "kl_to_reference"]
    assert all(row["ratio_error"] <= bounds.of_run(folder).ratio for row in rows[1:])
    assert sorted(p.name for p in (folder / "images").iterdir()) == [f"iteration_{i:05d}.png" for i in range(3)]
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["1", "2"]
    assert list((folder / "tensorboard").iterdir())
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 8 and page.count("data:image/jpeg;base64,") == 2
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    assert json.loads((folder / "environment.json").read_text())["devices"] == 1
    again = parse([f"--config={folder / 'config.yaml'}", f"--run.dir={folder}-again"])
    assert again.model.dtype == "fp32" and again.lora.rank == 2 and not again.run.resume


def test_a_report_that_cannot_be_made_does_not_end_the_run(options, monkeypatch, caplog):
    monkeypatch.setattr(run_directory, "write_report", lambda folder: 1 / 0)
    monkeypatch.setattr(run_directory, "write_card", lambda folder, part="": {}["key"])
    folder = run(options(run__iterations=1))
    assert weights(folder) and not (folder / "report.html").exists()
    messages = [record.message for record in caplog.records if "could not be written" in record.message]
    expected = [
        "the model card of iteration 0 could not be written (KeyError: 'key'); the run goes on",
        "the report of iteration 0 could not be written (ZeroDivisionError: division by zero); the run goes on",
        "the model card of best/ of iteration 1 could not be written (KeyError: 'key'); the run goes on",
        "the model card of iteration 1 could not be written (KeyError: 'key'); the run goes on",
        "the report of iteration 1 could not be written (ZeroDivisionError: division by zero); the run goes on",
    ]
    assert messages == expected


def test_readme_snippet_loads_the_trained_policy_in_plain_diffusers(options, tiny_model, monkeypatch, tmp_path):
    made = assemble(parse(options(lora__alpha=3.0)))
    latents, t = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([481, 481])  # both branches of guidance
    given = conditions(made.policy, ["a", "b"])
    with torch.no_grad():
        untrained = made.policy.predict(latents, t, given)  # LoRA starts at 0
        for parameter in made.policy.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        expected = made.policy.predict(latents, t, given)
    made.policy.export(Path(made.config.run.dir))
    snippet = re.search(r"```python\n(from diffusers.*?)```", README.read_text(), re.S)[1]
    for shown, here in (("ddpo_fast/embedded/model", tiny_model), ("runs/NAME", made.config.run.dir), ("lion.png", tmp_path / "lion.png")):
        assert shown in snippet
        snippet = snippet.replace(shown, str(here))
    names = {}
    exec(snippet, names)
    with torch.no_grad():
        loaded = names["pipe"].unet(latents, t, encoder_hidden_states=given.leaves[0]).sample
    assert (tmp_path / "lion.png").stat().st_size > 0
    assert (expected - untrained).abs().max() > 1e-2
    bounds.assert_same_output(loaded, expected, made.policy.network)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_models_train_without_a_change(options, tmp_path, prediction_type):
    other = make_pipeline(tmp_path / "m", channels=(24, 48), latent_size=12, latent_channels=3, prediction_type=prediction_type, width=24)
    folder = run(options(model__path=other, sample__num_steps=7))
    rows = read_metrics(folder)
    assert all(row["ratio_error"] <= bounds.of_run(folder).ratio for row in rows[1:]) and len(rows) == 3


def test_full_fine_tuning(options, tiny_model):
    folder = run(options(lora__scope="none"))
    trained, base = (UNet2DConditionModel.from_pretrained(path, subfolder="unet") for path in (folder, tiny_model))
    changed = [not torch.equal(a, b) for a, b in zip(trained.parameters(), base.parameters())]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_has_the_gradient_of_fp32(options, rewards_file, monkeypatch, dtype, stage):
    """Loss scaling cancels: the norm, the clipping and the optimizer see the true gradient. Guidance would multiply the rounding."""
    monkeypatch.setattr(Engine, "FP16_LOSS_SCALE", 2.0**8)  # a tiny model's gradients are large
    norms = []
    for name in ("fp32", dtype):
        # in a second update rounding decides who is clipped
        one_update = dict(run__iterations=1, train__num_minibatches=1, sample__guidance_scale=1, reward__name=f"{rewards_file}:by_place")
        folder = run(options(f"{name}-{stage}", model__dtype=name, zero__stage=stage, **one_update))
        row = read_metrics(folder)[1]
        assert row["skipped_updates"] == 0
        norms.append(row["grad_norm"])
    bound = bounds.of_run(folder, DTYPES[dtype]).grad_norm(row["transitions"])
    assert norms[1] == pytest.approx(norms[0], rel=bound) and bound < 0.5  # a scale that stays is a factor of 2 at least


@pytest.mark.parametrize("scope", ["mid_up", "up_blocks.0", "mid_block,down_blocks.1"])
def test_lora_scope(options, scope):
    folder = run(options(lora__scope=scope, run__iterations=1))
    blocks = {".".join(name.split(".")[1:3]).removesuffix(".attentions") for name in weights(folder)}
    blocks = {"mid_block" if block.startswith("mid_block") else block for block in blocks}
    assert blocks == ({"mid_block", "up_blocks.0", "up_blocks.1"} if scope == "mid_up" else set(scope.split(",")))


def test_half_of_the_steps(options):
    rows = read_metrics(run(options(train__timestep_fraction=0.4, train__inner_epochs=2)))
    assert [row["transitions"] for row in rows[1:]] == [8 * 2 * 2] * 2


def test_a_mismatch_of_rollout_and_update_is_named(options, monkeypatch, caplog):
    """Latents rounded to bf16 after their log-prob was taken: the fault of other trainers (PAPER: trap 3)."""
    generate = rollout.generate

    def rounding(*args):
        made, images = generate(*args)
        made.latents = made.latents.bfloat16().float()
        return made, images

    monkeypatch.setattr(rollout, "generate", rounding)
    rows = read_metrics(run(options(run__iterations=1)))
    assert rows[1]["ratio_error"] > 1e-3
    assert f"worst at step {rows[1]['ratio_error_step']}, t=" in caplog.text


def test_integer_rewards_are_rewards(options, rewards_file):
    rows = read_metrics(run(options(reward__name=f"{rewards_file}:integers")))
    assert rows[1]["reward_std"] > 1 and rows[1]["grad_norm"] > 0


def test_bad_rewards_are_left_out_and_counted(options, rewards_file, caplog):
    """Call 1 evaluates, 2-3 and 4-5 are the iterations' two batches; the third raises, later ones have a NaN."""
    rows = read_metrics(run(options(reward__name=f"{rewards_file}:sometimes_bad", sample__batch_size=4)))
    assert [row["bad_rewards"] for row in rows] == [0, 4, 6]
    assert all(math.isfinite(row["reward_mean"]) and math.isfinite(row["loss"]) for row in rows[1:])
    assert re.search(r"raised RuntimeError: the third call \(.*, line \d+, in sometimes_bad\); its 4 samples are left out", caplog.text)


def test_a_reward_that_never_works_ends_the_run_at_once(options, rewards_file, caplog):
    reason = r"on the prompts of eval.prompts: the reward function raised KeyError: 'always' \(.*, line \d+, in raising\)$"
    with pytest.raises(SystemExit, match=f"error: the reward gave no finite number for any picture of the untrained model {reason}"):
        run(options(reward__name=f"{rewards_file}:raising"))
    assert "raised KeyError: 'always'" in caplog.text and f'File "{rewards_file}"' in caplog.text


def test_an_iteration_without_any_reward_ends_the_run(options, rewards_file):
    with pytest.raises(SystemExit, match="error: iteration 1: 8 of 8 samples got no finite reward"):
        run(options(reward__name=f"{rewards_file}:bad_after_start"))


@pytest.mark.parametrize("estimator", ["ppo", pytest.param("score_accumulation", marks=pytest.mark.slow)])
def test_too_many_bad_rewards_stop_the_run_where_it_can_go_on(options, rewards_file, tmp_path, capsys, estimator):
    """The checkpoint is the state before the update that was not made, though none was due; resumed, the run is as if nothing had been."""
    flag = tmp_path / "flag"
    argv = dict(
        reward__name=f"{rewards_file}:bad_in_iteration_3", reward__kwargs=json.dumps({"while_there_is": str(flag)}),
        run__iterations=3, run__checkpoint_every=3, eval__every=10, train__num_minibatches=1, train__estimator=estimator,
        reward__max_bad_fraction=0.6, sample__num_steps=2,
    )  # fmt: skip
    whole = run(options("whole", **argv))
    flag.touch()
    with pytest.raises(SystemExit) as stopped:
        run(options("parts", **argv))
    line = stopped.value.code
    assert line.startswith("error: iteration 3: 5 of 8 samples got no finite reward, and reward.max_bad_fraction=0.6: ")
    assert line.endswith("not finite; mend the reward, then --resume continues from the newest checkpoint")
    parts = tmp_path / "parts"
    assert [path.name for path in list_checkpoints(parts)] == ["0", "2"] and len(read_metrics(parts)) == 3
    flag.unlink()
    trainer.main([f"--run.dir={parts}", "--resume"])
    assert untimed(read_metrics(parts)) == untimed(read_metrics(whole))
    assert all(torch.equal(tensor, weights(parts)[name]) for name, tensor in weights(whole).items())


def test_a_batch_is_scored_while_the_next_one_is_denoised(options, monkeypatch):
    """The first batch's reward waits for the second batch's denoising."""
    generate, denoising, numbers = rollout.generate, threading.Event(), []

    def noting(*args):
        numbers.append(len(numbers))
        if len(numbers) > 1:
            denoising.set()
        return generate(*args)

    made = assemble(parse(options(sample__batch_size=4)))

    def reward(images, prompts, metadata):
        assert denoising.wait(300)
        return torch.full((4,), float(images.mean()), dtype=torch.float64)

    monkeypatch.setattr(rollout, "generate", noting)
    _, rewards, _ = sampled(replace(made, task=replace(made.task, reward=reward)), ["a"] * 8)
    assert rewards[:4].unique().numel() == rewards[4:].unique().numel() == 1 and rewards[0] != rewards[4]


def test_scoring_in_the_background_changes_no_bit(options, monkeypatch):
    class Waiting(rollout.Scorer):
        def add(self, *batch):
            super().add(*batch)
            self.rewards()

    behind = run(options("behind", sample__batch_size=3, run__iterations=1))
    monkeypatch.setattr(rollout, "Scorer", Waiting)
    waiting = run(options("waiting", sample__batch_size=3, run__iterations=1))
    assert untimed(read_metrics(behind)) == untimed(read_metrics(waiting))
    assert all(torch.equal(tensor, weights(waiting)[name]) for name, tensor in weights(behind).items())


def test_time_reward_is_what_the_loop_waited(options, monkeypatch):
    """The reward sleeps once the loop waits for it, so that the time does not depend on the machine's speed."""
    waiting, rewards, timer = threading.Event(), rollout.Scorer.rewards, StageTimer(torch.device("cpu"))

    def reward(images, prompts, metadata):
        assert waiting.wait(300)
        time.sleep(0.3)
        return images.mean((1, 2, 3)).double()

    monkeypatch.setattr(rollout.Scorer, "rewards", lambda scorer: waiting.set() or rewards(scorer))
    made = assemble(parse(options()))
    made = replace(made, task=replace(made.task, reward=reward))
    with timer("total"):
        rollout.collect(made, made.schedule(1), 0, Prompts(["a"] * 8), timer, "sample")
    assert 0.3 <= timer.seconds["reward"] and timer.seconds["sample"] + timer.seconds["reward"] <= timer.seconds["total"]


def test_a_run_with_an_isolated_reward_is_the_same_run(options):
    here, isolated = (run(options(name, reward__isolate=name == "isolated", run__iterations=1)) for name in ("here", "isolated"))
    assert untimed(read_metrics(here)) == untimed(read_metrics(isolated))
    assert all(torch.equal(tensor, weights(isolated)[name]) for name, tensor in weights(here).items())


def test_a_run_with_a_remote_reward_is_the_same_run_and_keeps_its_token(options, monkeypatch, caplog):
    token = "correct-horse-battery-staple"
    monkeypatch.setenv("DDPO_REWARD_TOKEN", token)
    with RewardServer(open_reward("jpeg_compressibility", {}, 60.0, isolate=False), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        remote, here = (run(options(name[:4], reward__name=name, run__iterations=1)) for name in (address, "jpeg_compressibility"))
        server.shutdown()
    assert untimed(read_metrics(remote)) == untimed(read_metrics(here))
    assert address in (remote / "config.yaml").read_text() and not caplog.records
    assert not [path for path in remote.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_update_that_is_not_finite_is_skipped_and_counted(options, monkeypatch, stage):
    ppo_loss, calls = reference.ppo_loss, []

    def sometimes_nan(noise_pred, *rest):
        calls.append(1)  # calls 1 and 2 are the two micro-batches of the first update
        return ppo_loss(noise_pred * torch.nan if len(calls) == 2 else noise_pred, *rest)

    monkeypatch.setattr(reference, "ppo_loss", sometimes_nan)
    folder = run(options(zero__stage=stage, train__micro_batch=10, run__iterations=1))
    assert len(calls) == 4 and read_metrics(folder)[1]["skipped_updates"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_a_gradient_that_is_never_finite_ends_the_run(options, monkeypatch):
    ppo_loss = reference.ppo_loss
    monkeypatch.setattr(reference, "ppo_loss", lambda *args: [x * torch.nan for x in ppo_loss(*args)])
    with pytest.raises(FloatingPointError, match="iteration 1: no update had a finite gradient"):
        run(options())


def test_fp16_overflow_lowers_the_loss_scale(options):
    engine = assemble(parse(options(model__dtype="fp16"))).engine
    parameters = engine.parameters
    before = [p.detach().clone() for p in parameters]
    for value in (torch.inf, 1.0):
        engine.backward(sum(p.sum() for p in parameters) * value, last=True)
        norm = engine.step()
        same = all(torch.equal(p, b) for p, b in zip(parameters, before))
        assert math.isfinite(norm) != same and same == (value == torch.inf)
        assert engine.loss_scale == 2.0**15


def test_metrics_survive_a_line_cut_short(options):
    folder = run(options(run__iterations=1))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 2})[:-4])
    assert [row["iteration"] for row in read_metrics(folder)] == [0, 1]


@pytest.mark.rounding
def test_pictures_are_decoded_in_parts(options, monkeypatch):
    """To rounding the same, and never more than asked for. Pictures are half of what the decoder gives, which is about 1."""
    made, sizes = assemble(parse(options())), []
    policy, recording = made.policy, made.denoising.recording
    latents = torch.randn(5, *recording.shape, generator=torch.Generator().manual_seed(0))
    whole, decode = policy.decode(latents, recording), policy.pipe.vae.decode
    monkeypatch.setattr(policy.pipe.vae, "decode", lambda part, **kwargs: sizes.append(len(part)) or decode(part, **kwargs))
    policy.decode_batch = 2
    bound = bounds.SIGMAS * bounds.network_rounding(policy.pipe.vae.decoder) / 2
    assert (policy.decode(latents, recording) - whole).abs().max() <= bound
    assert sizes == [2, 2, 1] and whole.std() > 0


def test_the_text_encoder_is_on_the_device_while_prompts_are_new(options, monkeypatch):
    """There when it is called, also where a recording that is new is proved; each stay has a way there and one back."""
    policy, moves, called = assemble(parse(options())).policy, [], []
    encoder = policy.pipe.text_encoder
    monkeypatch.setattr(encoder, "to", lambda device: moves.append(str(device)) or encoder)
    encoder.register_forward_pre_hook(lambda *_: called.append(len(moves) % 2))
    assert policy.offload_text_encoder
    latent_shape(policy)  # records without guidance, for which it encodes, too
    assert moves == ["cpu", "cpu"]
    (first,), (again,) = (conditions(policy, prompts).leaves for prompts in (["new", "other"], ["other", "new"]))
    assert moves == ["cpu", "cpu"] * 2 and torch.equal(again, first.flip(0))
    assert called and all(called)


def test_evaluation_is_the_same_every_time(options):
    """Learning rate 1e-30: nothing changes, so neither may the evaluation."""
    rows = read_metrics(run(options(train__learning_rate=1e-30, eval__every=1)))
    assert np.ptp([row["eval_reward_mean"] for row in rows]) == 0


def test_pictures_that_are_not_finite_get_no_reward(options, monkeypatch):
    """An overflow looks like a black picture to a JPEG encoder: the best reward there is."""
    decode, ddim_step = Policy.decode, reference.ddim_step

    def overflowing(noise_pred, latents, coefficients, steps, seed, sample_ids, *rest):
        next_latents, *others = ddim_step(noise_pred, latents, coefficients, steps, seed, sample_ids, *rest)
        if len(sample_ids) > 2 and steps[0] == 3:
            next_latents[2] = torch.inf
        return next_latents, *others

    def black(policy, *args):
        images = decode(policy, *args)
        if len(images) > 2:
            images[1] = torch.nan
        return images

    monkeypatch.setattr(reference, "ddim_step", overflowing)
    monkeypatch.setattr(Policy, "decode", black)
    folder = run(options(reward__name="jpeg_compressibility", run__iterations=1))
    row = read_metrics(folder)[1]
    assert (
        (row["bad_rewards"], row["skipped_updates"]) == (2, 0)
        and row["ratio_error"] <= bounds.of_run(folder).ratio
        and math.isfinite(row["loss"])
        and row["grad_norm"] > 0
    )
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_fp16_that_always_overflows_ends_the_run(options, tmp_path, monkeypatch):
    ppo_loss = reference.ppo_loss
    monkeypatch.setattr(reference, "ppo_loss", lambda *args: [x * torch.nan for x in ppo_loss(*args)])
    monkeypatch.setattr(Engine, "FP16_LOSS_SCALE", 2.0**4)  # five updates, in three iterations
    with pytest.raises(FloatingPointError, match="overflow even without loss scaling"):
        run(options("run", model__dtype="fp16", run__iterations=4, run__checkpoint_every=100, eval__every=100, sample__num_steps=2))
    assert [row["skipped_updates"] for row in read_metrics(tmp_path / "run")] == [None, 2, 2]


def test_resume_of_a_finished_run_publishes_what_a_kill_left_out(options, reports):
    argv = options(run__iterations=1)
    folder = run(argv)
    shutil.rmtree(folder / "lora")
    (folder / "report.html").unlink()
    trainer.main([f"--run.dir={folder}", "--resume"])
    assert weights(folder) and (folder / "report.html").stat().st_size > 0


def test_a_run_killed_before_its_first_checkpoint_starts_anew(options):
    argv = options(run__iterations=1)
    folder = run(argv)
    shutil.rmtree(folder / "checkpoints")
    assert [row["iteration"] for row in read_metrics(run(argv))] == [0, 1]


def test_resume_refuses_another_learning_rate(options, capsys):
    folder = run(options(run__iterations=1))
    with pytest.raises(SystemExit, match="2"):
        trainer.main([f"--run.dir={folder}", "--resume", "--train.learning_rate=0.5"])
    assert "train.learning_rate=0.5: the run in run.dir=" in capsys.readouterr().err


def test_old_checkpoints_go_and_a_partial_one_is_no_checkpoint(options):
    folder = run(options(run__iterations=4, run__keep_checkpoints=1))
    (folder / "checkpoints" / ".9.partial").mkdir()
    assert [path.name for path in list_checkpoints(folder)] == ["4"]


def test_a_reward_may_change_its_pictures(options, tmp_path):
    """In place: what is recorded are the pictures as they were."""
    grids = []
    for body in ("", "    images.mul_(0)\n"):
        (tmp_path / "changing.py").write_text(f"def f(images, prompts):\n    reward = images.mean((1, 2, 3))\n{body}    return reward\n")
        folder = run(options(f"run{len(grids)}", reward__name=f"{tmp_path}/changing.py:f", run__iterations=1))
        grids.append((folder / "images" / "iteration_00000.png").read_bytes())
    assert grids[0] == grids[1]


@pytest.mark.parametrize(
    "algorithm, guidance_scale, fused_blocks",
    [("ddpo_is", 3.0, True), pytest.param("ddpo_sf", 1.0, False, marks=pytest.mark.rounding)],
)
def test_fused_kernels_train_as_the_reference_does(options, tmp_path, monkeypatch, algorithm, guidance_scale, fused_blocks):
    """On either backend. The UNet's blocks are slow in Triton's interpreter: once is enough, and one iteration, whose end is evaluated."""
    if not fused_blocks:
        monkeypatch.setattr(assembling, "fuse", lambda unet, ops: None)
    model = make_pipeline(tmp_path / "m", channels=(8, 8), latent_size=4, groups=2)  # larger groups: gradients that rounding leaves alone
    short = dict(
        train__algorithm=algorithm, train__num_minibatches=1, train__timestep_fraction=0.5, sample__guidance_scale=guidance_scale,
        sample__num_steps=2, sample__num_samples=2, eval__num_samples=1, eval__every=10, model__path=model,
        run__iterations=1 if fused_blocks else 2,
    )  # fmt: skip
    folders = [run(options(b, kernels__backend=b, **short)) for b in ("reference", "triton")]
    (expected, fused), bound = [untimed(read_metrics(folder)) for folder in folders], bounds.of_run(folders[0])
    learned = bound.learned(expected[1]["reward_std"])
    for a, b in zip(expected, fused, strict=True):
        assert {key for key in a if a[key] is None} == {key for key in b if b[key] is None}
        for key in a.keys() - {"ratio_error", "ratio_error_step"}:  # of several errors of rounding the largest
            moved = a["iteration"] - (not key.startswith("eval_"))  # how often Adam has moved the weights
            relative = bounds.turned(learned) if moved > 0 else learned
            assert b[key] is None or b[key] == pytest.approx(a[key], rel=relative, abs=bound.picture + bound.ratio), key
    assert all(row["ratio_error"] <= bound.ratio for row in fused[1:]) and fused[-1]["grad_norm"] > 0


class CountOps(TorchDispatchMode):
    """The names of the operations that run outside of the UNet; views, which launch nothing, do not count."""

    def __init__(self, policy, engine):
        super().__init__()
        self.names, self.outside = [], True
        self.forward, self.backward = policy.forward, engine.backward
        policy.forward, engine.backward = self.call_unet, self.call_backward

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.outside and not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def enter_unet(self, grad):
        self.outside = False

    def call_unet(self, *args, **kwargs):
        self.outside = False
        outputs = self.forward(*args, **kwargs)
        self.outside = True
        if outputs[0].requires_grad:
            outputs[0].register_hook(self.enter_unet)
        return outputs

    def call_backward(self, loss, last):
        self.backward(loss, last)
        self.outside = True


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_number_of_operations_around_the_unet(options, monkeypatch, guidance_scale, dtype):
    """At most 3 a denoising step and 6 a micro-batch, none of which waits for the device. (Unfused: 51 and 104.)"""
    monkeypatch.setattr(assembling, "fuse", lambda unet, ops: None)  # the UNet is not what is counted

    def operations(num_steps, micro_batch):
        made = assemble(
            parse(
                options(
                    kernels__backend="triton", sample__num_steps=num_steps, train__micro_batch=micro_batch, model__dtype=dtype,
                    sample__guidance_scale=guidance_scale, sample__num_samples=2, train__num_minibatches=1, lora__targets='["attention"]',
                    cache__mode="off",
                )
            )
        )  # fmt: skip
        schedule = made.schedule(1)
        updates = made.updates(schedule, 1)
        made.gradients.begin(updates, 2, schedule)
        made.gradients.begin_batch(slice(2))
        with CountOps(made.policy, made.engine) as mode:
            samples, _ = rollout.generate(made.policy, made.ops, schedule, 0, torch.arange(2), ["a", "b"], made.gradients)
            sampling, mode.names = mode.names, []
            trainer.update(made, updates, samples, torch.tensor([1.0, -1.0]), 1)
        return Counter(sampling), Counter(mode.names)

    (short, one), (long, _), (_, two) = operations(2, 8), operations(3, 8), operations(2, 2)
    per_step, per_micro_batch = long - short, two - one
    assert 1 <= per_step.total() <= 3, per_step
    assert 2 <= per_micro_batch.total() <= 6, per_micro_batch
    assert {"ddpo_fast.ddim_step.default"} <= set(per_step)
    assert {"ddpo_fast.ppo_loss.default", "ddpo_fast.ppo_loss_backward.default"} <= set(per_micro_batch)
    waits = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
    assert not [name for name in per_step + per_micro_batch if any(wait in name for wait in waits)]


def test_triton_where_it_cannot_run_is_refused(options, monkeypatch):
    monkeypatch.setattr("ddpo_fast.kernels.launch.interpreted", lambda: False)
    with pytest.raises(ValueError, match="kernels.backend=triton: valid on a GPU.*this run is on cpu"):
        assemble(parse(options(kernels__backend="triton")))
