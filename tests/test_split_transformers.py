"""A flow transformer run from the tensors of its frozen first part, and with gradient checkpointing: the straight call is the reference,
to the bit. Every family."""

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, partialmethod

import bounds
import pytest
import torch
from diffusers import DiffusionPipeline
from families import CALL, FAMILIES
from shared import CPU
from test_networks import trained, with_random_lora
from test_split import Calls, same_bits, structure
from torch import Tensor, nn

from ddpo_fast.networks.gradient_checkpointing import checkpoint_gradients
from ddpo_fast.networks.lora import block_names
from ddpo_fast.networks.merged_lora import merge
from ddpo_fast.networks.split import Split, resized
from ddpo_fast.pipelines import families
from ddpo_fast.pipelines.recorder import Recorder
from ddpo_fast.pipelines.template import Asked, Recording, Texts

PROMPTS = ["a cat", "a very big dog that runs and runs and runs over a green meadow"]  # Z-Image and Lumina2 have masks if lengths differ


@dataclass
class Flow:
    """A family's network, frozen and without LoRA, and how its pipeline calls it."""

    name: str
    own_network: nn.Module
    recording: Recording
    texts: Texts

    @property
    def network(self) -> nn.Module:
        """A copy."""
        return copy.deepcopy(self.own_network)

    def call(self, network: nn.Module, num_rows: int = 3, rows: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        """The network's output for rows that all differ, the same every time; or for some of them."""
        rows = torch.arange(num_rows) if rows is None else rows
        generator, recording = torch.Generator().manual_seed(0), self.recording
        if x is None:
            x = torch.randn(3, *recording.shape, generator=generator)[rows]
        texts = self.texts.gather(rows % (recording.num_branches - 1 + len(PROMPTS)))
        return recording.template.call(network, x, recording.times[rows % len(recording.times)], texts)


@pytest.fixture(scope="module", params=FAMILIES)
def flow(request, family) -> Flow:
    pipe, arguments = DiffusionPipeline.from_pretrained(family(request.param)), dict(CALL[request.param])
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False).eval()
    kind = families.FAMILIES[type(pipe).__name__]
    arguments.pop("negative_prompt", None)
    asked = Asked(3, *(arguments.pop(name) for name in (kind.guidance, "height", "width")))
    recorder = Recorder(pipe, kind, CPU, arguments)
    recording = recorder.record(asked)
    *unconditional, first = recorder.texts_of(PROMPTS[0], recording)
    texts = Texts.of(recording, [*unconditional, first, recorder.texts_of(PROMPTS[1], recording)[-1]], CPU)
    return Flow(request.param, pipe.transformer, recording, texts)


KEPT = {  # tokens and width that a boundary keeps of a row: of the image and of the text; Z-Image's are filled up to multiples of 32
    "sd3": (16 + 40, 32), "flux": (16 + 16, 32), "flux2_klein": (16 + 64, 32), "chroma": (16 + 16, 32), "qwen_image": (16 + 128, 32),
    "sana": (256, 32), "z_image": (32 + 96, 32), "lumina2": (16 + 64, 24), "auraflow": (16 + 24, 32), "hidream": (64 + 3 * 16, 32),
}  # fmt: skip
BEFORE = {"z_image": 2, "lumina2": 2}
"""The blocks of refiners; a boundary is behind them."""


def differentiate(flow: Flow, network: nn.Module, around=nullcontext, **changes) -> list[Tensor | None]:
    """The output and the gradient of every trained parameter; `around` the forward pass."""
    with around():
        y = flow.call(network, **changes)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    return [y.detach(), *torch.autograd.grad(y, trained(network), upstream, allow_unused=True)]


def boundaries(flow: Flow) -> list[str]:
    """The first blocks that can be trained with something frozen before them, one behind, and the last."""
    blocks = block_names(flow.own_network)
    behind = blocks[BEFORE.get(flow.name, 1) :]
    return list(dict.fromkeys([behind[0], behind[len(behind) // 2], behind[-1]]))


def lora_in(flow: Flow, first: str) -> nn.Module:
    """The network with LoRA in a block and those behind it."""
    blocks = block_names(flow.own_network)
    return with_random_lora(flow.network, ["attention"], ",".join(blocks[blocks.index(first) :]))


def test_a_replay_is_the_straight_call(flow):
    """Output and gradient, at several boundaries. Latents are NaN in the replay, so nothing of the prefix can have been computed again."""
    for first in boundaries(flow):
        network = lora_in(flow, first)
        before, expected = structure(network), differentiate(flow, network)
        assert sum(grad is not None and grad.norm() > 0 for grad in expected[1:]) >= 4
        split = Split(network, partial(flow.call, network))
        blocks = block_names(network)
        prefix = blocks[: blocks.index(first)]
        assert {network.get_submodule(name) for name in prefix} == set(split.prefix)
        with torch.no_grad(), split.recording() as kept:
            assert torch.equal(flow.call(network), expected[0])
        tokens, width = KEPT[flow.name]
        assert sum(tensor[0].nbytes for tensor in kept) == 4 * tokens * width and all(len(tensor) == 3 for tensor in kept)

        nan = torch.full((3, *flow.recording.shape), torch.nan)
        with Calls(network) as called:
            assert same_bits(differentiate(flow, network, partial(split.replaying, kept), x=nan), expected)
        assert [name for name in blocks if name in called] == blocks[len(prefix) :]
        with Calls(network) as called:
            assert same_bits(split.run_prefix(partial(flow.call, network)), kept)
        assert [name for name in blocks if name in called] == prefix
        split.undo()
        assert structure(network) == before and same_bits(differentiate(flow, network), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("flow", ["flux"], indirect=True)
def test_the_rest_may_be_compiled(flow, monkeypatch):
    """Block by block, with a boundary between its two lists."""
    network = lora_in(flow, "single_transformer_blocks.1")
    with torch.no_grad():
        expected = flow.call(network)
    split, compiled = Split(network, partial(flow.call, network)), []
    monkeypatch.setattr(
        nn.Module, "compile", partialmethod(nn.Module.compile, backend=lambda graph, _: compiled.append(1) or graph.forward)
    )
    split.compile()
    with torch.no_grad(), split.replaying(split.run_prefix(partial(flow.call, network))):
        found = flow.call(network)
    assert torch.equal(found, expected) and compiled


@pytest.mark.parametrize("flow", ["z_image", "lumina2"], indirect=True)
def test_rows_may_be_replayed_beside_other_texts(flow):
    """The longest text of a call makes its number of tokens: fewer than were recorded, as many, more."""
    network = lora_in(flow, boundaries(flow)[-1])
    split = Split(network, partial(flow.call, network))
    prefix = lambda rows: split.run_prefix(lambda: flow.call(network, rows=torch.tensor(rows)))[0]  # noqa: E731
    every, short = prefix([0, 1, 2]), prefix([1, 0])
    assert short.shape[1] < every.shape[1]
    for rows, kept in (
        ([1, 0], every[[1, 0]]),
        ([0, 2], every[[0, 2]]),
        ([1, 2], torch.cat([resized(short[:1], every.shape[1:]), every[2:]])),
    ):
        expected = flow.call(network, rows=torch.tensor(rows))
        with split.replaying([kept]):
            found = flow.call(network, rows=torch.tensor(rows))
        bounds.assert_same_output(found, expected, network)


def test_merged_and_checkpointed_it_replays_with_its_new_weights(flow):
    """Backward runs the blocks of the rest a second time, the first of them from the kept tensors, too."""
    network = lora_in(flow, boundaries(flow)[-1])
    merge(network)
    checkpoint_gradients(network, nullcontext)
    split, counts = Split(network, partial(flow.call, network)), Counter()
    kept = split.run_prefix(partial(flow.call, network))
    with torch.no_grad():
        for parameter in trained(network):
            parameter.mul_(1.5)
    expected = differentiate(flow, network)
    for block in split.blocks:
        block.register_forward_pre_hook(lambda block, args: counts.update([block]))
    assert same_bits(differentiate(flow, network, partial(split.replaying, kept)), expected)
    assert counts == {block: 2 for block in split.blocks if block not in split.prefix}


def test_a_checkpointed_gradient_is_the_plain_one(flow):
    """All blocks are trained, and have their whole arguments again in backward, such as Chroma's mask."""
    network, counts = with_random_lora(flow.network, ["attention", "modulation"]), Counter()
    expected = differentiate(flow, network)
    checkpoint_gradients(network, nullcontext)
    blocks = {network.get_submodule(name): 2 for name in block_names(network)}
    for block in blocks:
        block.register_forward_pre_hook(lambda block, args: counts.update([block]))
    assert same_bits(differentiate(flow, network), expected) and counts == blocks


@pytest.mark.parametrize("flow, scope", [("z_image", "context_refiner.0"), ("lumina2", "noise_refiner.0")], indirect=["flow"])
def test_a_boundary_between_parallel_blocks_is_refused(flow, scope):
    """The layers are given a mixture of both refiners' outputs: what is trained is in it."""
    network = with_random_lora(flow.network, ["attention"], scope)
    before = structure(network)
    with pytest.raises(ValueError, match="uses what its first blocks return in a way that does not let it be split"):
        Split(network, partial(flow.call, network))
    assert structure(network) == before


def test_what_all_blocks_follow_leaves_no_prefix(flow):
    """A trained first block, or a trained layer outside the blocks."""
    first = "context_refiner.0" if flow.name == "lumina2" else block_names(flow.own_network)[0]
    everywhere, outside = with_random_lora(flow.network, ["attention"], first), lora_in(flow, boundaries(flow)[-1])
    next(p for name, p in outside.named_parameters() if not name.startswith(tuple(block_names(outside)))).requires_grad_(True)
    for network in (everywhere, outside):
        split = Split(network, partial(flow.call, network))
        assert not split.wanted and not split.prefix
