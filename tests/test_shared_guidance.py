"""Guidance's branches share what precedes the first cross-attention: same result, same gradient, half the work there, no trace left."""

import copy

import bounds
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from ddpo_fast import train as trainer
from ddpo_fast.networks.lora import set_trainable
from ddpo_fast.networks.shared_guidance import SharedGuidance
from ddpo_fast.records.metrics import read_metrics

TARGETS = ["attention", "feed_forward", "convolution", "projection"]
ATTENTION_FIRST = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
ATTENTION_LATER = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))


def make_unet(**options) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
        **options,
    ).requires_grad_(False).eval()  # fmt: skip
    set_trainable(unet, "all", TARGETS, 2, 2.0)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return unet.double()


def make_call(unet, count: int = 3):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, 4, 8, 8, dtype=torch.float64, generator=generator).repeat(2, 1, 1, 1)
    embeds = torch.randn(2 * count, 5, 16, dtype=torch.float64, generator=generator)
    timesteps = torch.arange(count).repeat(2) * 100
    return lambda: unet(latents, timesteps, encoder_hidden_states=embeds, return_dict=False)[0]


def gradients(unet, call) -> torch.Tensor:
    unet.zero_grad()
    out = call()
    (out * torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in unet.parameters() if parameter.requires_grad])


@pytest.mark.rounding
@pytest.mark.parametrize(
    "options, first, last",
    [
        (ATTENTION_FIRST, "conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1"),
        (ATTENTION_FIRST | {"use_linear_projection": True}, "conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1"),
        (ATTENTION_LATER, "conv_in", "down_blocks.1.attentions.0.transformer_blocks.0.attn1"),
    ],
)
def test_output_and_gradient_are_the_same(options, first, last):
    unet = make_unet(**options)
    call, seen = make_call(unet), {}
    out, gradient = call(), gradients(unet, call)
    shared = SharedGuidance(unet, call)
    assert len(shared.modules) >= 5
    names = {name: module for name, module in unet.named_modules() if name in (first, last, "mid_block", last[:-1] + "2")}
    for name, module in names.items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: len(args[0])}))
    assert torch.equal(call(), out)  # outside of the context
    assert set(seen.values()) == {6}
    with shared:
        bounds.assert_same_output(call(), out, unet)
        assert (gradients(unet, call) - gradient).norm() <= bounds.BACKWARD * bounds.network_rounding(unet, torch.float64) * gradient.norm()
    assert seen == {first: 3, last: 3, last[:-1] + "2": 6, "mid_block": 6}


def test_undone_it_leaves_nothing_behind():
    unet = make_unet(**ATTENTION_LATER)
    call, classes, keys = make_call(unet), [type(module) for module in unet.modules()], list(unet.state_dict())
    out = call()
    shared = SharedGuidance(unet, call)
    assert list(unet.state_dict()) == keys and [type(module) for module in unet.modules()] != classes
    shared.undo()
    assert [type(module) for module in unet.modules()] == classes and torch.equal(call(), out)


def test_branches_that_differ_from_the_start_are_refused():
    unet = make_unet(**ATTENTION_LATER)
    call, plain = make_call(unet), copy.deepcopy(unet.conv_in)
    unet.conv_in.forward = lambda x: plain(x * torch.linspace(1, 2, len(x), dtype=x.dtype)[:, None, None, None])
    with pytest.raises(ValueError, match="branches of this UNet differ"):
        SharedGuidance(unet, call)
    assert not any("_Shared" in str(type(module).__mro__) for module in unet.modules())


def test_without_cross_attention_nothing_is_shared():
    unet = make_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type="UNetMidBlock2D")
    assert SharedGuidance(unet, make_call(unet)).modules == []


@pytest.mark.rounding
def test_a_run_learns_the_same(tiny_model, tmp_path):
    """To rounding: one update of the same trajectories."""
    (tmp_path / "reward.py").write_text("def redness(images, prompts):\n    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))\n")
    for shared in ("true", "false"):
        trainer.main(
            [f"--model.path={tiny_model}", f"--run.dir={tmp_path / shared}", f"--model.share_guidance={shared}", "--sample.num_samples=4",
             "--sample.num_steps=3", "--eval.num_samples=2", "--run.iterations=1", "--train.num_minibatches=1", "--lora.rank=2",
             "--prompts.limit=4", "--prompts.samples_per_prompt=1", f"--reward.name={tmp_path}/reward.py:redness"]
        )  # fmt: skip
    folder, bound = tmp_path / "false", bounds.of_run(tmp_path / "false")
    row, other = (read_metrics(tmp_path / shared)[1] for shared in ("false", "true"))
    learned = bound.learned(row["reward_std"])
    assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=learned)
    assert other["reward_mean"] == pytest.approx(row["reward_mean"], rel=0, abs=bound.reward)
    plain, shared = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("false", "true"))
    plain, shared = (torch.cat([weights[name].flatten() for name in plain]) for weights in (plain, shared))
    assert (plain - shared).norm() <= bound.weights(len(plain), learned) < 0.5 * bounds.moved(folder)
