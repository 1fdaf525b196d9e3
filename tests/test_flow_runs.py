"""Whole runs on flow transformers with what a run may ask for beyond its defaults: cache, estimators, whole networks, cards, pictures."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline
from families import CALL, FAMILIES
from shared import First, first_gradient, joined, relative_error, run

from ddpo_fast import evaluation as evaluating
from ddpo_fast import sample
from ddpo_fast.kernels.reference import guide, normal_noise
from ddpo_fast.records import kohya, report
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.schedule import FIRST_NOISE_STEP

ROUNDING = 1e-4
"""Of fp32, in a gradient: measured are 2e-6."""


@pytest.mark.parametrize("name", FAMILIES)
def test_score_accumulation_gives_the_gradient_of_ppo(flow_options, name):
    """Of samples that train on different steps; with rescaled guidance, too (Qwen-Image, Lumina2). HiDream's experts are refused."""
    targets = "[attention]" if name == "hidream" else "[attention, feed_forward, modulation]"
    changed = {"train__timestep_fraction": 0.67, "lora__targets": targets}
    expected = first_gradient(flow_options(name, **changed), torch.float32, ratio=1e-3)
    scored = first_gradient(flow_options(name, train__estimator="score_accumulation", **changed), torch.float32, ratio=1e-3)
    assert relative_error(scored.gradient, expected.gradient) < ROUNDING


@pytest.mark.parametrize("name, device_mib", [("sd3", 0.07), ("flux", 0.02), ("qwen_image", 0.07), ("z_image", 0.07)])
def test_the_cache_changes_nothing(flow_options, name, device_mib):
    """Bit for bit where every transition has a slot; to rounding where some are computed again, in other batches."""

    def first(**cache) -> First:
        return first_gradient(flow_options(name, lora__scope="last:0.5", **cache), torch.float32, ratio=1e-3)

    expected, whole, part = first(cache__mode="off"), first(cache__mode="on"), first(cache__mode="on", cache__device_mib=device_mib)
    hits = [run.run.gradients.metrics()["cache_hit_fraction"] for run in (expected, whole, part)]
    assert hits[:2] == [0, 1] and 0 < hits[2] < 1
    assert torch.equal(joined(whole.gradient), joined(expected.gradient))
    assert relative_error(part.gradient, expected.gradient) < ROUNDING


@pytest.mark.parametrize("name", ["sd3", "flux", "chroma", "qwen_image", "z_image"])
def test_checkpoints_and_separate_lora_give_the_same_gradient(flow_options, name):
    def gradient(**changed) -> dict[str, torch.Tensor]:
        return first_gradient(flow_options(name, **changed), torch.float32, ratio=1e-3).gradient

    merged = gradient(lora__forward="merged")
    assert torch.equal(joined(gradient(lora__forward="merged", train__gradient_checkpointing="true")), joined(merged))
    assert 0 < relative_error(gradient(lora__forward="separate"), merged) < ROUNDING


@pytest.mark.parametrize("name", ["sd3", "qwen_image", "z_image"])
def test_gradient_of_rwr_is_that_of_flow_matching(flow_options, name):
    """Against x_t = (1 - s) x0 + s e and the velocity e - x0, written out anew, at levels of the pipeline's own 1000 steps."""
    credit = torch.tensor([0.1, 0.5, 1.0, 2.4])
    changed = {"train__algorithm": "rwr", "algorithm__num_timesteps": 2}
    first = first_gradient(flow_options(name, **changed), torch.float32, credit=credit, ratio=0.0)
    run, policy, rollout = first.run, first.run.policy, first.rollout
    recording = run.objective.recording(rollout.schedule)
    texts, rows = policy.texts(recording, rollout.prompts)
    (update,), total = run.updates(rollout.schedule, 1), 0.0
    assert len(recording.times) == 1000 and len(update.rows) == 8
    for i, level in zip(update.rows.tolist(), update.steps.tolist()):
        x0, sigma = rollout.latents[i, -1], recording.sigmas[level].item()
        step = torch.tensor([FIRST_NOISE_STEP + level])
        noise = normal_noise(run.config.run.seed, rollout.sample_ids[i : i + 1], step, x0.numel()).view(x0.shape)
        x_t = ((1 - sigma) * x0 + sigma * noise).repeat(recording.num_outputs, *[1] * x0.dim())
        out = policy.predict(x_t, recording.times[level].expand(len(x_t)), texts.conditions(rows[i : i + 1]))
        velocity = recording.sign * guide(out, 1, recording.output_scale)[0]
        total = total + credit[i] * (velocity - (noise - x0)).square().mean() / len(update.rows)
    policy.network.zero_grad()
    run.engine.backward(run.engine.loss_scale * total, last=True)
    expected = {key: parameter.grad for key, parameter in policy.network.named_parameters() if parameter.grad is not None}
    assert relative_error(first.gradient, expected) < ROUNDING


@pytest.mark.parametrize("name", ["sd3", "qwen_image", "z_image"])
def test_divergence_window_and_evaluation_of_another_size(flow_options, monkeypatch, name):
    seen, collect = [], evaluating.collect
    monkeypatch.setattr(evaluating, "collect", lambda *args: seen.append(collect(*args)) or seen[-1])
    changed = {"train__kl_coefficient": 0.1, "train__num_minibatches": 2, "sample__window": '{"size": 2, "among": 3}'}
    changed |= {"eval__height": 96, "eval__width": 48, "eval__guidance_scale": 2.0, "eval__num_steps": 3, "eval__every": 2}
    rows = read_metrics(run(flow_options(name, **changed)))
    assert [images.shape for _, _, images in seen] == [(2, 3, 96, 48)] * 2
    assert [row["transitions"] for row in rows[1:]] == [8, 8] and all(row["ratio_error"] < 1e-3 for row in rows[1:])
    assert all(row["kl_to_reference"] > 0 for row in rows[1:])


@pytest.mark.parametrize("name, scope", [("sd3", "all"), ("qwen_image", "all"), ("qwen_image", "none")])
def test_pictures_card_and_weights_of_a_run(flow_options, family, monkeypatch, capsys, name, scope):
    """`ddpo-fast sample` draws the run's own evaluation, and the card's code, in plain diffusers, calls the pipeline as the run does."""
    seen, collect = [], evaluating.collect
    monkeypatch.setattr(evaluating, "collect", lambda *args: seen.append(collect(*args)) or seen[-1])
    changed = {"lora__scope": scope, "train__learning_rate": 1e-2, "run__iterations": 1, "eval__prompts": "[a, b]"}
    folder = run(flow_options(name, **changed))
    before, after = (images for _, _, images in seen)
    drawn = sample.before_and_after(folder, sample.read_config(folder, []), ["a", "b"], [0, 1])
    assert torch.equal(drawn[0], before) and torch.equal(drawn[1], after) and not torch.equal(before, after)

    calls, part = [], "transformer" if scope == "none" else "lora"
    code = re.search(r"```python\n(.*?)```", (folder / part / "README.md").read_text(), re.S)[1]
    given = {"num_inference_steps": 4} | CALL[name] | ({"max_sequence_length": 128} if name == "qwen_image" else {})
    kind = type(DiffusionPipeline.from_pretrained(family(name)))
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, **kwargs: calls.append(kwargs) or call(self, **kwargs))
    variables = {}
    exec(code, variables)
    assert calls == [{"prompt": "a prompt"} | given] and variables["image"].size == (64, 64)

    trained, plain = (pipe.transformer.state_dict() for pipe in (variables["pipe"], DiffusionPipeline.from_pretrained(family(name))))
    assert any("lora" in key for key in trained) if scope == "all" else any(not torch.equal(trained[key], plain[key]) for key in plain)
    if (name, scope) == ("sd3", "all"):
        kohya.main([str(folder)])
        assert (folder / "run.safetensors").exists() and "ddpo-fast kohya" in (folder / "lora" / "README.md").read_text()
        return
    with pytest.raises(SystemExit, match="2"):
        kohya.main([str(folder)])
    said = "its transformer/ is the result" if scope == "none" else "it is a LoRA of a QwenImageTransformer2DModel, for which"
    assert said in capsys.readouterr().err


def test_report_and_pictures_of_a_run_beside_a_unet_s(flow_options, options, tmp_path, capsys):
    """As the commands make them: nothing of a UNet or of DDIM is said of the flow model."""
    flow, unet = run(flow_options("sd3", run__iterations=1)), run(options("unet", run__iterations=1))
    capsys.readouterr()
    for argv in ([str(flow)], [str(flow), str(unet), f"--output={tmp_path / 'both.html'}"]):
        report.main(argv)
    sample.main([str(flow), "a lion"])
    grid = flow / "samples" / "grid.png"
    assert capsys.readouterr().out.split() == [str(flow / "report.html"), str(tmp_path / "both.html"), str(grid)]
    assert {path.stem for path in grid.parent.iterdir()} == {"grid", "000_a_lion_seed0_before", "000_a_lion_seed0_after"}
    page, both = (
        re.sub(r'src="[^"]*"|<style>.*?</style>', "", path.read_text(), flags=re.S)
        for path in (flow / "report.html", tmp_path / "both.html")
    )
    assert "SD3Transformer2DModel" in page and "sampler: ode" in page and not re.search("unet|ddim", page, re.I)
    assert re.search(r"<td>sample.sampler</td><td>cps</td><td>ddim</td>", both) and both.count("Same prompts, same noise") == 2
