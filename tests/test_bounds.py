"""The bounds on rounding: rounding keeps them, mistakes do not, and none is so wide that it says nothing."""

import copy
from pathlib import Path

import bounds
import pytest
import torch
from shared import conditions, latent_shape, policy_of, run
from torch.utils._pytree import tree_map_only

import ddpo_fast.embedded
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.policy import Policy
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.rollout import generate
from ddpo_fast.updates.objectives import scaled_clip_range

pytestmark = pytest.mark.rounding
EMBEDDED = Path(ddpo_fast.embedded.__file__).parent / "model"


def rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


@pytest.fixture(scope="module")
def models(tiny_model, sdxl) -> dict[str, Path]:
    return {"tiny": tiny_model, "sdxl": sdxl, "embedded": EMBEDDED}


@pytest.mark.parametrize(
    "kind, dtype", [("tiny", torch.float32), ("sdxl", torch.float32), ("embedded", torch.float32), ("tiny", torch.bfloat16)]
)
def test_a_network_rounds_as_its_layers_say(models, kind, dtype):
    """Against fp64, and rows together against each alone, by steps; from a fiftieth of the bound to the bound."""
    policy = policy_of(models[kind], scope="none")
    exact = copy.deepcopy(policy.network).double()
    bound = bounds.network_rounding(policy.network, dtype)
    prompts = ["cat", "dog", "lion"] if kind == "embedded" else ["a", "b", "c"]
    latents = torch.randn(3, *latent_shape(policy), generator=torch.Generator().manual_seed(0))
    given = conditions(policy, prompts)
    unet = policy.network.to(dtype)  # after the policy has proved its calls, in its own dtype

    @torch.no_grad()
    def call(network, rows: slice, t: int) -> torch.Tensor:
        def in_its_dtype(*args, **kwargs):
            cast = lambda leaf: leaf.to(network.dtype) if leaf.is_floating_point() else leaf  # noqa: E731
            args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
            return network(*args, **kwargs)

        return given[rows].call(in_its_dtype, latents[rows], torch.full((len(latents[rows]),), t))

    for t in (981, 501, 1):
        together, size = call(unet, slice(3), t), rms(call(exact, slice(3), t))
        alone = torch.cat([call(unet, slice(row, row + 1), t) for row in range(3)])
        assert bound / 50 <= rms(together - call(exact, slice(3), t)) / size <= bound, t
        assert rms(together.double() - alone.double()) / size <= bound, t


@pytest.mark.parametrize("num_steps", [2, 5, 50])
@pytest.mark.parametrize("kind", ["tiny", "sdxl", "embedded"])
def test_a_tenth_of_the_clip_range_is_out_of_bounds(models, kind, num_steps):
    """From there on a run warns that rollout and update do not agree."""
    bound = bounds.of(parse([f"--model.path={models[kind]}", f"--sample.num_steps={num_steps}"]))
    assert 1e-6 < bound.ratio < 0.1 * scaled_clip_range(1e-4, bound.num_elements)
    assert bound.picture < 0.5 / 255  # so two pictures are of the same level or of neighbours
    assert bound.gradient < 2e-3


@pytest.mark.parametrize("size, kept", [("rounding", True), ("mistake", False)])
def test_an_update_that_computes_something_else_is_seen(options, monkeypatch, size, kept):
    """Outputs of the update off by rounding's size and, the mistake, by a thousandth."""
    argv = options(run__iterations=1)
    delta = {"rounding": bounds.of(parse(argv)).network, "mistake": 1e-3}[size]
    predict, generator = Policy.predict, torch.Generator().manual_seed(0)

    def off(policy, *args):
        out = predict(policy, *args)
        return out * (1 + delta * torch.randn(out.shape, generator=generator)) if torch.is_grad_enabled() else out

    monkeypatch.setattr(Policy, "predict", off)
    folder = run(argv)
    error, bound = read_metrics(folder)[1]["ratio_error"], bounds.of_run(folder).ratio
    assert (error <= bound) == kept and error > bound / 50


def test_pictures_of_other_batches_are_within_their_bound(options):
    made = assemble(parse(options()))
    ids, prompts = torch.arange(4), ["a", "b", "a", "b"]

    def pictures(rows: slice) -> torch.Tensor:
        return generate(made.policy, made.ops, made.schedule(1), 0, ids[rows], prompts[rows])[1]

    together, alone = pictures(slice(4)), torch.cat([pictures(slice(row, row + 1)) for row in range(4)])
    bound = bounds.of(made.config).picture
    assert (alone - together).abs().max() <= bound < 0.02 * together.std()
