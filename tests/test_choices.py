"""Every file of samplers/ and algorithms/, by being there: what its folder's interface says, and a short run by its name.

(Rewards: test_rewards.py.)
"""

import dataclasses
import math
import subprocess
import sys

import bounds
import pytest
import torch
from diffusers import DDIMScheduler
from shared import first_gradient, relative_error, run, untimed, weights
from tiny import SD_BETAS

from ddpo_fast import algorithms, samplers
from ddpo_fast.algorithms import PolicyGradient, Regression
from ddpo_fast.config import command_line as parsing
from ddpo_fast.config.command_line import parse
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.schedule import Levels, Schedule

SHORT = dict(sample__num_samples=4, sample__num_steps=3, eval__num_samples=2, run__iterations=1, train__num_minibatches=1)
ETAS = (0.1, 0.5, 1.0)


PREDICTIONS = {
    "diffusion": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow",),
    "any": ("epsilon", "v_prediction", "sample", "flow"),
}
"""By the process that a sampler is for."""
ON_UNETS = tuple(name for name in samplers.CHOICES if samplers.find(name).PROCESS != "flow")


def levels(prediction_type: str = "epsilon", num_steps: int = 7) -> Levels:
    """Those of a process, from almost only noise to almost none."""
    if prediction_type == "flow":
        return Levels.of_flow(torch.arange(num_steps), torch.linspace(0.97, 0.02, num_steps + 1, dtype=torch.float64))
    return Levels.of_steps(DDIMScheduler(**SD_BETAS, clip_sample=False, prediction_type=prediction_type), num_steps)


of_every_sampler = pytest.mark.parametrize(
    "name, prediction_type", [(name, kind) for name in samplers.CHOICES for kind in PREDICTIONS[samplers.find(name).PROCESS]]
)


@pytest.mark.parametrize("eta", ETAS)
@of_every_sampler
def test_a_sampler_keeps_the_variance_of_its_levels(name, prediction_type, eta):
    """Or all of it but for an error of second order, so that it does with many steps: one of half the length has a quarter."""
    chosen, excess = samplers.find(name), []
    for num_steps in (50, 100):
        at = levels(prediction_type, num_steps)
        h, s = chosen.noise(at, eta)
        assert h.shape == s.shape == at.a.shape and h.isfinite().all() and (s >= 0).all() and bool((s > 0).any()) == chosen.STOCHASTIC
        excess.append(((h**2 + s**2) / at.next_b**2 - 1)[num_steps // 4 : num_steps // 2].abs().max())
    assert excess[1] < 1e-12 or 3.5 < excess[0] / excess[1] < 4.5


@of_every_sampler
def test_a_network_that_knows_the_picture_is_led_to_it(name, prediction_type):
    """Whatever noise is drawn, x is a x0 + b e with the e that the step has made: the last one is the picture and the rest of the noise."""
    at, generator = levels(prediction_type), torch.Generator().manual_seed(0)
    table = Schedule.of(at, name, 1.0, dtype=torch.float64).coefficients
    x0, e = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    h, s = samplers.find(name).noise(at, 1.0)
    x = at.a[0] * x0 + at.b[0] * e
    for k, (c_x, c_out, std, _) in enumerate(table):
        z = torch.randn(500, generator=generator, dtype=torch.float64)
        x = c_x * x + c_out * (at.p[k] * x0 + at.q[k] * e) + std * z
        e = (h[k] * e + s[k] * z) / at.next_b[k]
        torch.testing.assert_close(x, at.next_a[k] * x0 + at.next_b[k] * e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", samplers.CHOICES)
def test_a_sampler_says_what_eta_may_be(name):
    chosen = samplers.find(name)
    assert all(chosen.takes(eta) for eta in ETAS) and isinstance(chosen.VALID_ETA, str)
    for eta in (-1.0, math.nan, 1e9):
        if not chosen.takes(eta):
            with pytest.raises(ValueError, match=f"sample.eta={eta}: valid is"):
                Schedule.of(levels(PREDICTIONS[chosen.PROCESS][0]), name, eta)


@pytest.mark.parametrize("name", ON_UNETS)
def test_a_run_by_the_sampler_s_name(options, name):
    """Trained on where it has a density; and evaluated with in any case, where the pictures are the same every time."""
    if samplers.find(name).STOCHASTIC:
        folder = run(options("trained", sample__sampler=name, **SHORT))
        row = read_metrics(folder)[1]
        assert row["ratio_error"] <= bounds.of_run(folder).ratio and row["grad_norm"] > 0
    rows = read_metrics(run(options("evaluated", eval__sampler=name, train__learning_rate=1e-30, eval__every=1, **SHORT)))
    assert rows[0]["eval_reward_mean"] == rows[1]["eval_reward_mean"]


@pytest.mark.parametrize("name", algorithms.CHOICES)
def test_a_run_by_the_algorithm_s_name_and_again(options, name):
    """Its options are in config.yaml, from which the run is the same again."""
    folder = run(options("once", train__algorithm=name, **SHORT))
    config = parse([f"--config={folder}/config.yaml", f"--run.dir={folder}-again"])
    assert type(config.algorithm) is algorithms.find(name) and config.train.algorithm == name
    again = run([f"--config={folder}/config.yaml", f"--run.dir={folder}-again"])
    assert untimed(read_metrics(folder)) == untimed(read_metrics(again))
    assert all(torch.equal(tensor, weights(again)[key]) for key, tensor in weights(folder).items())
    assert read_metrics(folder)[1]["grad_norm"] > 0 and math.isfinite(read_metrics(folder)[1]["loss"])


@pytest.mark.parametrize("name", [name for name in algorithms.CHOICES if issubclass(algorithms.find(name), PolicyGradient)])
def test_at_ratio_1_a_policy_gradient_is_the_advantage_times_the_score(options, name):
    """The same for all of them, whatever their rule: that of ddpo_sf, -A d log p."""
    found, expected = (first_gradient(options(train__algorithm=chosen, **SHORT)) for chosen in (name, "ddpo_sf"))
    assert relative_error(found.gradient, expected.gradient) <= bounds.of(expected.run.config, torch.float64).gradient


@pytest.mark.parametrize("name", [name for name in algorithms.CHOICES if issubclass(algorithms.find(name), Regression)])
def test_weights_of_a_regression_do_not_fall_with_the_reward(name):
    """And do not depend on a constant in all rewards, as no two rewards of people are on one scale."""
    rewards = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    found = algorithms.find(name)().weigh(rewards, rewards)
    assert found.shape == rewards.shape and found.isfinite().all() and (found.diff() >= 0).all() and found[-1] > found[0]
    torch.testing.assert_close(algorithms.find(name)().weigh(rewards + 100, rewards + 100), found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", algorithms.CHOICES)
def test_help_has_the_options_of_the_algorithm_that_is_chosen(name):
    text = parsing._parser(name, "{}").format_help()
    shown = {line.split()[0] for line in text.splitlines() if line.strip().startswith("--algorithm.")}
    assert shown == {f"--algorithm.{field.name}" for field in dataclasses.fields(algorithms.find(name))}
    for choice in (*algorithms.CHOICES, *samplers.CHOICES):
        assert f"{choice}: " in " ".join(text.split())


@pytest.mark.parametrize("module", [f"{folder.__name__}.{name}" for folder in (samplers, algorithms) for name in folder.CHOICES])
def test_a_choice_costs_no_import_of_torch(module):
    """So that a wrong option is answered at once."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
