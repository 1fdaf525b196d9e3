"""Runs on flow transformers: each family's tiny pipeline goes through the same rollout and the same updates as a UNet."""

import json
import math

import pytest
import torch
from diffusers import DiffusionPipeline
from families import FAMILIES
from shared import CPU, first_gradient, relative_error, run, untimed, weights

from ddpo_fast import kernels
from ddpo_fast.assemble import assemble, find, load_policy
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.kernels.reference import guide
from ddpo_fast.records.metrics import read_metrics


def cps_log_prob(out, x, next_x, sigma: float, next_sigma: float, eta: float):
    """log p of a step of Flow-CPS (arXiv:2509.05952), written out anew: x' = (1 - s') x0 + s' (cos e + sin z)."""
    x0, noise = x - sigma * out, x + (1 - sigma) * out
    mean = (1 - next_sigma) * x0 + next_sigma * math.cos(eta * math.pi / 2) * noise
    density = torch.distributions.Normal(mean, next_sigma * math.sin(eta * math.pi / 2))
    return density.log_prob(next_x).mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_is_that_of_the_textbook_loop(flow_options, name):
    """Against a loop over transitions, one at a time; micro-batches mix samples, prompts and steps. Gemma has no fp64."""
    dtype, error = (torch.float32, 1e-3) if name in ("sana", "lumina2") else (torch.float64, 1e-5)
    first = first_gradient(flow_options(name), dtype, ratio=error)
    policy, rollout, recording = first.run.policy, first.rollout, first.rollout.schedule.recording
    texts, rows = policy.texts(recording, rollout.prompts)
    total, trained = 0.0, rollout.schedule.trained
    assert list(trained) == [0, 1, 2], "the last step ends at the picture"
    for i in range(len(rollout.prompts)):
        for k in trained:
            x, next_x = rollout.latents[i, k : k + 1], rollout.latents[i, k + 1 : k + 2]
            given = x.repeat(recording.num_outputs, *[1] * (x.dim() - 1))
            out = policy.predict(given, recording.times[k].expand(len(given)), texts.conditions(rows[i : i + 1]))
            out = recording.sign * guide(out, 1, recording.output_scale)
            log_prob = cps_log_prob(out, x, next_x, *recording.sigmas[k : k + 2].tolist(), 0.8)
            total = total - first.credit[i] * log_prob / (len(rollout.prompts) * len(trained))
    policy.network.zero_grad()
    first.run.engine.backward(first.run.engine.loss_scale * total, last=True)
    expected = {name: parameter.grad for name, parameter in policy.network.named_parameters() if parameter.grad is not None}
    assert relative_error(first.gradient, expected) < error


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_resumes_and_its_lora_loads_in_plain_diffusers(flow_options, family, name, tmp_path):
    """Two iterations in one go and in two give the same weights; with them a plain pipeline's network gives the policy's own bits."""
    whole = run(flow_options(name))
    run(flow_options(name, "parts", run__iterations=1))
    parts = run([f"--run.dir={tmp_path / 'parts'}", "--resume", "--run.iterations=2"])
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True))
    rows = untimed(read_metrics(whole))
    assert rows[-1] == untimed(read_metrics(parts))[-1] and all(row["ratio_error"] < 1e-3 for row in rows[1:])
    config = parse(flow_options(name, "again", lora__forward="separate", model__dtype="fp32", kernels__backend="reference"))
    _, policy = load_policy(config, find(config), Ranks(), CPU, kernels.select("reference", CPU))
    policy.load_exported(whole)
    pipe = DiffusionPipeline.from_pretrained(family(name))
    pipe.load_lora_weights(whole / "lora")
    recording = next(iter(policy._recordings.values()))
    texts, rows = policy.texts(recording, ["a"])
    given = texts.conditions(rows)
    x, times = torch.randn(recording.num_outputs, *recording.shape), recording.times[1].expand(recording.num_outputs)
    with torch.no_grad():
        loaded, trained = given.call(pipe.transformer, x, times), policy.predict(x, times, given)
        policy.network.disable_adapters()
        assert torch.equal(loaded, trained) and not torch.equal(policy.predict(x, times, given), trained)


def test_a_window_may_end_with_a_step_that_has_no_density(flow_options):
    """Two steps in a row of four: at the last place only one of them is trained. Its rows are averaged over what there is."""
    made = assemble(parse(flow_options("sd3", sample__window='{"size":2}')))
    population = [made.schedule(iteration).trained.tolist() for iteration in range(1, 20)]
    assert {tuple(steps) for steps in population} == {(0, 1), (1, 2), (2,)}
    sizes = {len(made.updates(made.schedule(iteration), iteration)[0].rows) for iteration in range(1, 20)}
    assert sizes == {8, 4}


def test_a_window_without_a_density_is_refused(flow_options):
    with pytest.raises(
        ValueError, match=r"^sample.window=.*: its last place has no step with a density under cps; valid is {size: 1, among: 3} or fewer"
    ):
        assemble(parse(flow_options("sd3", sample__window='{"size":1}')))
    with pytest.raises(ValueError, match="^sample.num_steps=1: no step has a density under cps; valid is more"):
        assemble(parse(flow_options("sd3", sample__num_steps=1)))


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize(
    "changed",
    [{}, {"train__estimator": "score_accumulation"}, {"lora__scope": "none", "train__learning_rate": 1e-5}],
    ids=["lora", "score_accumulation", "whole"],
)
def test_a_run_in_bf16(flow_options, name, changed):
    """Rounding may change the ratio: half of the digits are missing, times the sharpest step's factor."""
    folder = run(flow_options(name, model__dtype="bf16", run__iterations=1, **changed))
    (row,) = read_metrics(folder)[1:]
    assert math.isfinite(row["reward_mean"]) and row["grad_norm"] > 0 and row["bad_rewards"] == 0


def test_evaluation_is_the_ode_s_unless_asked_otherwise(flow_options):
    argv = [option for option in flow_options("sd3") if not option.startswith("--eval.sampler")]
    made = assemble(parse(argv))
    assert made.config.eval.sampler == made.evaluating.sampler == "ode"


def test_a_negative_prompt_of_the_user_s_own(flow_options):
    """A text stands for each prompt's; the unconditional branch is another one with it."""

    def unconditional(name: str, **arguments) -> list:
        argv = flow_options(name)
        (given,) = [option for option in argv if option.startswith("--model.arguments=")]
        argv[argv.index(given)] = f"--model.arguments={json.dumps(json.loads(given.partition('=')[2]) | arguments)}"
        (rows,) = next(iter(assemble(parse(argv)).policy._unconditional.values()))
        return rows

    for name in ("sd3", "qwen_image"):
        own, other = unconditional(name), unconditional(name, negative_prompt="blue")
        assert any(not torch.equal(a, b) for a, b in zip(own, other) if isinstance(a, torch.Tensor))
