"""A UNet run from the tensors of its frozen first part: the straight call is the reference, to the bit. UNets of several kinds."""

from functools import partial

import bounds
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._pytree import tree_leaves

from ddpo_fast.networks.lora import LORA_TARGETS, set_trainable
from ddpo_fast.networks.merged_lora import merge, unmerge
from ddpo_fast.networks.split import Split

CROSS, PLAIN, UP_CROSS, UP_PLAIN = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
BASE = dict(sample_size=8, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=2, layers_per_block=1)
KINDS = {
    "sd": dict(
        block_out_channels=(4, 8, 8, 8), down_block_types=(CROSS, CROSS, CROSS, PLAIN), up_block_types=(UP_PLAIN, *[UP_CROSS] * 3),
    ),
    "sd2": dict(
        block_out_channels=(4, 8, 8), down_block_types=(CROSS, CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS),
        layers_per_block=(2, 1, 1), use_linear_projection=True, attention_head_dim=(1, 2, 2), sample_size=(6, 7),
    ),
    "sdxl": dict(
        block_out_channels=(4, 8, 8), down_block_types=(PLAIN, CROSS, CROSS), up_block_types=(UP_CROSS, UP_CROSS, UP_PLAIN),
        transformer_layers_per_block=(1, 2, 2), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    ),
    "classes": dict(
        block_out_channels=(4, 8), down_block_types=(PLAIN, CROSS), up_block_types=(UP_CROSS, UP_PLAIN), num_class_embeds=3,
    ),
    "no_mid": dict(
        block_out_channels=(4, 8), down_block_types=(PLAIN, CROSS), up_block_types=(UP_CROSS, UP_PLAIN), mid_block_type=None,
    ),
}  # fmt: skip
SCOPES = ["mid_up", "mid_block", "down_blocks.1", "up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3"]


def random_lora(unet: nn.Module) -> None:
    """LoRA starts at B = 0, where half of the gradient is 0."""
    torch.manual_seed(1)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def make_unet(kind: str, scope: str, tiny=None, cls=UNet2DConditionModel) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = cls.from_pretrained(tiny, subfolder="unet") if kind == "tiny" else cls(**BASE | KINDS[kind])
    unet.requires_grad_(False).eval()
    set_trainable(unet, scope, list(LORA_TARGETS), rank=2, alpha=3.0)
    if scope != "none":
        random_lora(unet)
    return unet


def rows_of(unet: nn.Module, num_rows: int) -> dict:
    """Arguments of a call on rows that all differ, the same every time."""
    generator, config = torch.Generator().manual_seed(2), unet.config
    size = config.sample_size if isinstance(config.sample_size, list | tuple) else (config.sample_size,) * 2

    def random(*shape):
        return torch.randn(num_rows, *shape, generator=generator)

    arguments = dict(sample=random(4, *size), timestep=torch.arange(num_rows) * 90 + 7)
    arguments["encoder_hidden_states"] = random(3, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        arguments["added_cond_kwargs"] = {"text_embeds": random(10), "time_ids": 8 * random(6).abs()}
    if config.num_class_embeds:
        arguments["class_labels"] = torch.arange(num_rows) % 3
    return arguments


def call(unet: nn.Module, num_rows: int = 2, **changes) -> torch.Tensor:
    return unet(**rows_of(unet, num_rows) | changes, return_dict=False)[0]


def split(unet: nn.Module) -> Split:
    return Split(unet, partial(call, unet))


def differentiate(unet: nn.Module, num_rows: int, **changes) -> list[torch.Tensor]:
    """The output and the gradient of every trained parameter."""
    unet.zero_grad()
    y = call(unet, num_rows, **changes)
    torch.manual_seed(3)
    y.backward(torch.randn_like(y))
    return [y.detach(), *(p.grad for p in unet.parameters() if p.requires_grad)]


def same_bits(results, expected) -> bool:
    """Gradients that there are none of (a LoRA behind a frozen one gets some, a LoRA that is not called does not) are None in both."""
    assert len(results) == len(expected)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(results, expected))


class Calls:
    """Names of the modules whose forward runs inside of the context."""

    def __init__(self, unet: nn.Module):
        self.unet = unet

    def __enter__(self) -> set[str]:
        names = set()
        self.hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: names.add(name)) for name, module in self.unet.named_modules()
        ]
        return names

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def stage_names(unet: nn.Module) -> list[str]:
    """In the order of a call."""
    down, up = ([f"{kind}_blocks.{n}" for n in range(len(unet.down_blocks))] for kind in ("down", "up"))
    return ["conv_in", *down, *(["mid_block"] if unet.mid_block is not None else []), *up]


def stage_of(name: str) -> str:
    """up_blocks.1.resnets.0 is inside of up_blocks.1."""
    return ".".join(name.split(".")[: 2 if "blocks." in name and name.startswith(("down", "up")) else 1])


def prefix_names(it: Split) -> list[str]:
    names = {module: name for name, module in it.network.named_modules()}
    return [names[stage] for stage in it.prefix]


def structure(unet) -> list:
    return [(name, id(module), type(module), sorted(vars(module))) for name, module in unet.named_modules()]


def num_blocks(kind: str) -> int:
    return len(KINDS[kind]["block_out_channels"]) if kind in KINDS else 2


CASES = [(kind, scope) for kind in ("tiny", *KINDS) for scope in SCOPES[: 3 + num_blocks(kind)] if (kind, scope) != ("no_mid", "mid_block")]


@pytest.mark.parametrize("kind, scope", CASES)
def test_a_replay_is_the_straight_call(tiny_model, kind, scope):
    """Latents are NaN in the replay, so nothing of the prefix can have been computed again."""
    unet = make_unet(kind, scope, tiny_model)
    with Calls(unet) as all_called:
        expected = differentiate(unet, 3)
    assert sum(grad is not None and grad.norm() > 0 for grad in expected[1:]) >= 8
    it = split(unet)
    with torch.no_grad(), it.recording() as kept, Calls(unet) as called:
        assert torch.equal(call(unet, 3), expected[0])
    assert called == all_called and len(kept) == len({n for places in it.wanted.values() for n in places.values()}) > 0
    stages = stage_names(unet)
    first = next(n for n, s in enumerate(stages) if any(p.requires_grad for p in unet.get_submodule(s).parameters()))
    assert prefix_names(it) == stages[:first]

    nan = torch.full_like(rows_of(unet, 3)["sample"], torch.nan)
    with it.replaying(kept), Calls(unet) as called:
        replayed = differentiate(unet, 3, sample=nan)
    assert same_bits(replayed, expected)
    assert called == {name for name in all_called if stage_of(name) not in stages[:first]}

    with Calls(unet) as called:
        alone = it.run_prefix(lambda: call(unet, 3))
    assert same_bits(alone, kept) and not any(tensor.requires_grad for tensor in alone)
    assert not {stage_of(name) for name in called} & {*stages[first:], "conv_norm_out", "conv_out"}
    assert {stage_of(name) for name in called} >= set(stages[:first])
    with torch.no_grad():
        assert torch.equal(call(unet, 3), expected[0])


def test_kept_are_only_the_tensors_that_the_rest_takes():
    """The last up block takes the first skips alone; a block's result is kept once, though it is among the skips, too."""
    for scope, expected in (
        ("up_blocks.3", [("up_blocks.2", 0), ("conv_in", 0), ("down_blocks.0", 1)]),
        ("up_blocks.2", [("up_blocks.1", 0), ("down_blocks.0", 0), ("down_blocks.1", 1), ("conv_in", 0), ("down_blocks.0", 1)]),
    ):
        unet, made = make_unet("sd", scope), {}
        it, names = split(unet), {module: name for name, module in unet.named_modules()}

        def note(stage, args, out, made=made, names=names):
            for n, tensor in enumerate(tree_leaves(out)):
                made.setdefault(id(tensor), (names[stage], n))

        for stage in it.blocks:
            stage.register_forward_hook(note)
        with torch.no_grad(), it.recording() as kept:
            call(unet)
        assert [made[id(tensor)] for tensor in kept] == expected


@pytest.mark.rounding
def test_rows_may_be_chosen_among_those_recorded():
    """As the cache does: other rows, in another order, of several calls."""
    unet = make_unet("sdxl", "mid_up")
    it, rows = split(unet), torch.tensor([3, 0, 3])
    with torch.no_grad(), it.recording() as kept:
        everything = call(unet, 4)
    arguments = rows_of(unet, 4)
    added = {name: tensor[rows] for name, tensor in arguments.pop("added_cond_kwargs").items()}
    with torch.no_grad(), it.replaying([tensor[rows] for tensor in kept]):
        some = unet(**{name: tensor[rows] for name, tensor in arguments.items()}, added_cond_kwargs=added, return_dict=False)[0]
    bounds.assert_same_output(some, everything[rows], unet)


def test_the_backward_pass_ends_where_the_rest_begins():
    unet = make_unet("classes", "up_blocks.0")
    it, grads = split(unet), []
    for replay in (False, True):
        latents = rows_of(unet, 2)["sample"].requires_grad_()
        with it.recording() as kept:
            call(unet)
        assert not any(tensor.requires_grad for tensor in kept)  # frozen, and so nothing is saved for a backward pass
        if replay:
            with it.replaying(kept):
                differentiate(unet, 2, sample=latents)
        else:
            differentiate(unet, 2, sample=latents)
        grads.append(latents.grad)
    assert grads[0].norm() > 0 and grads[1] is None


def test_merged_lora_replays_with_its_new_weights():
    unet = make_unet("sd", "mid_up")
    merge(unet)
    it = split(unet)
    with torch.no_grad(), it.recording() as kept:
        before = call(unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    expected = differentiate(unet, 2)
    with it.replaying(kept):
        assert same_bits(differentiate(unet, 2), expected)
    assert (expected[0] - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize("trained", ["time_embedding.linear_1", "conv_in", "conv_out"])
def test_a_trained_layer_outside_the_blocks_leaves_no_prefix(tiny_model, trained):
    unet = make_unet("tiny", "up_blocks.1", tiny_model)
    unet.get_submodule(trained).weight.requires_grad_(True)
    expected = differentiate(unet, 2)
    it = split(unet)
    assert not it.wanted and not it.prefix
    assert same_bits(differentiate(unet, 2), expected)


@pytest.mark.parametrize("scope, prefix", [("none", []), ("all", ["conv_in"])])
def test_training_everything_leaves_next_to_nothing(tiny_model, scope, prefix):
    """LoRA is in blocks: with every block trained conv_in is left."""
    unet = make_unet("tiny", scope, tiny_model)
    assert prefix_names(split(unet)) == prefix


class Net(nn.Module):
    """What `Split` knows of a UNet, with something `between` its blocks, and `behind` them. The up block is trained, and what is named."""

    def __init__(self, between=lambda h, skip, x: (h, skip), behind=lambda y, skip: y, num_calls=1, trained=("up_blocks",)):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.mid_block, self.conv_out = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.down_blocks, self.up_blocks = nn.ModuleList([nn.Conv2d(4, 4, 1)]), nn.ModuleList([nn.Bilinear(4, 4, 4)])
        self.between, self.behind, self.num_calls = between, behind, num_calls
        for name, child in self.named_children():
            child.requires_grad_(name in trained)

    def forward(self, x):
        skip = self.conv_in(x)
        h = self.down_blocks[0](skip)
        for _ in range(self.num_calls):
            h = self.mid_block(h)
        return self.behind(self.conv_out(self.up_blocks[0](*self.between(h, skip, x))), skip)


class TwoWays(Net):
    """Beside its down block a UNet that has its mid block: both are given what conv_in returns."""

    def forward(self, x):
        skip = self.conv_in(x)
        return self.conv_out(self.up_blocks[0](self.down_blocks[0](skip) + self.mid_block(skip), skip))


def call_net(net: Net, num_rows: int) -> torch.Tensor:
    return net(torch.randn(num_rows, 4, 4, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "between, number",
    [
        (lambda h, skip, x: (h, skip), 2),
        (lambda h, skip, x: (h, h), 1),
        (lambda h, skip, x: (h, x.cos()), 1),
        (lambda h, skip, x: (1.25 * h, skip), 2),
        (lambda h, skip, x: (h, skip + h), 2),
        (lambda h, skip, x: (h.nan_to_num(), skip), 2),
        (lambda h, skip, x: (h, skip.flatten(2).view_as(skip)), 2),
        (lambda h, skip, x: (torch.cat([h, skip], 1)[:, :4], x), 1),
    ],
)
def test_kept_is_what_a_block_is_given_whatever_was_made_of_it(between, number):
    """A network may also look at its own arguments again, which a replay has."""
    net = Net(between)
    with torch.no_grad():
        expected = call_net(net, 3)
        it = Split(net, partial(call_net, net))
        with it.recording() as kept:
            call_net(net, 3)
        assert len(kept) == number
        with it.replaying(kept), Calls(net) as called:
            assert torch.equal(call_net(net, 3), expected)
    assert called == {"", "up_blocks.0", "conv_out"}


@pytest.mark.parametrize(
    "net, prefix",
    [
        (Net(behind=lambda y, skip: y + skip), None),  # no block is given what is used there
        (Net(lambda h, skip, x: (h + skip, skip), trained=["mid_block", "up_blocks"]), None),
        (Net(lambda h, skip, x: (h + skip, skip)), ["conv_in", "down_blocks.0", "mid_block"]),
        (TwoWays(trained=["mid_block"]), ["conv_in"]),
    ],
)
def test_the_prefix_ends_before_its_outputs_are_mixed_with_the_rest_s(net, prefix):
    """Such a mixture, kept, would be one of old weights."""
    with torch.no_grad():
        expected = call_net(net, 3)
    if prefix is not None:
        assert prefix_names(Split(net, partial(call_net, net))) == prefix
        return
    before = structure(net)
    with pytest.raises(ValueError, match="^this network uses what its first blocks return in a way that does not let it be split$"):
        Split(net, partial(call_net, net))
    with torch.no_grad():
        assert structure(net) == before and torch.equal(call_net(net, 3), expected)


def test_a_network_that_calls_a_block_twice_is_refused():
    net = Net(num_calls=2)
    with pytest.raises(ValueError, match="calls a block twice"):
        Split(net, partial(call_net, net))


class SelfGuidedUNet(UNet2DConditionModel):
    """Runs itself with the prompt and without."""

    def forward(self, sample, timestep, encoder_hidden_states, **kwargs):
        forward = super().forward
        strong, weak = (forward(sample, timestep, embeds, **kwargs)[0] for embeds in (encoder_hidden_states, 0 * encoder_hidden_states))
        return (2 * strong - weak,)


def test_a_unet_that_calls_itself_twice_is_refused():
    with pytest.raises(ValueError, match="calls a block twice"):
        split(make_unet("classes", "up_blocks.1", cls=SelfGuidedUNet))


class ControlledUNet(UNet2DConditionModel):
    """Adds to what the blocks return, between them, in the way that diffusers has for ControlNet."""

    def forward(self, *args, **kwargs):
        return super().forward(
            *args, down_block_additional_residuals=[torch.tensor(0.1)] * 4, mid_block_additional_residual=torch.tensor(0.1), **kwargs
        )


def test_a_unet_that_adds_between_its_blocks_is_split():
    unet = make_unet("classes", "up_blocks.1", cls=ControlledUNet)
    expected = differentiate(unet, 2)
    it = split(unet)
    with it.replaying(it.run_prefix(partial(call, unet))):
        assert len(it.prefix) == 5 and same_bits(differentiate(unet, 2), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_undo_leaves_nothing_behind(merged):
    unet = make_unet("sdxl", "mid_up")
    expected, keys, before = differentiate(unet, 2), list(unet.state_dict()), structure(unet)
    if merged:
        merge(unet)
    it = split(unet)
    assert list(unet.state_dict()) == keys
    assert [type(stage).__name__ for stage in it.blocks] == [
        "Conv2d",
        PLAIN,
        CROSS,
        CROSS,
        "UNetMidBlock2DCrossAttn",
        UP_CROSS,
        UP_CROSS,
        UP_PLAIN,
    ]
    assert all(isinstance(stage, type(stage).__bases__[1]) for stage in it.blocks)
    it.undo()
    unmerge(unet)
    assert structure(unet) == before
    assert same_bits(differentiate(unet, 2), expected)
    split(unet).undo()
    assert structure(unet) == before


def test_two_unets_of_a_class_are_split_each_for_itself():
    one, two = make_unet("classes", "mid_up"), make_unet("classes", "up_blocks.1")
    first, second = split(one), split(two)
    expected = differentiate(two, 2)
    with torch.no_grad(), first.recording() as kept:
        call(two)
    assert kept == []
    assert len(first.prefix) == 3 and len(second.prefix) == 5
    first.undo()
    assert same_bits(differentiate(two, 2), expected)


def test_after_an_exception_a_call_is_an_ordinary_one(tiny_model):
    unet = make_unet("tiny", "mid_up", tiny_model)
    it = split(unet)
    with torch.no_grad():
        expected = call(unet)
        with it.recording() as kept:
            call(unet)

        def fail():
            call(unet)
            raise KeyError("inside")

        for enter in (it.recording, lambda: it.replaying(kept)):
            with pytest.raises(KeyError, match="inside"), enter():
                fail()
            assert it.handler is None and torch.equal(call(unet), expected)

        class Broken(Exception):
            pass

        def broken(module, args):
            raise Broken

        hook = unet.down_blocks[1].register_forward_pre_hook(broken)
        with pytest.raises(Broken):
            it.run_prefix(lambda: call(unet))
        hook.remove()
        assert it.handler is None and torch.equal(call(unet), expected)
        assert same_bits(it.run_prefix(lambda: call(unet)), kept) and it.handler is None
