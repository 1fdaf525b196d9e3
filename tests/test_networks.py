"""What is done to a network, tried on the one of every family of flow transformers: where LoRA goes, merged, scored, attention."""

import copy
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial

import bounds
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from families import CALL, FAMILIES
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from shared import CPU
from test_merged_lora import structure
from test_score_accumulation import started
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ddpo_fast.networks.attention_backends import BACKENDS, attention_calls, resolve, set_attention
from ddpo_fast.networks.experts import ExpertsWithGradient, give_experts_gradients
from ddpo_fast.networks.initial_lora import start_from
from ddpo_fast.networks.lora import LORA_TARGETS, block_names, lora_layers, set_trainable
from ddpo_fast.networks.merged_lora import merge, unmerge
from ddpo_fast.networks.scored_lora import score, unscore

FP32 = torch.finfo(torch.float32).eps
"""What one rounding may do where a family computes a part in fp32, whatever its weights are: SANA's attention, rotations."""
PROMPTS = ["a cat", "a very big dog that runs and runs and runs over a green meadow"]  # Z-Image and Lumina2 have masks if lengths differ


@dataclass
class Family:
    """A family's network and how its pipeline calls it at a step."""

    name: str
    pipe: DiffusionPipeline
    calls: list[tuple[tuple, dict]]
    """Positional and named arguments; two calls where guidance is made of two."""

    @property
    def network(self) -> nn.Module:
        """A copy, without LoRA, frozen."""
        return copy.deepcopy(self.pipe.transformer)

    def output(self, network: nn.Module) -> Tensor:
        """What the calls return of all rows, (calls, R, ...), in the network's dtype."""
        dtype = next(network.parameters()).dtype
        cast = lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf  # noqa: E731
        results = []
        for args, kwargs in tree_map(cast, self.calls):
            result = network(*args, **kwargs)[0]
            results.append(torch.stack(list(result)) if isinstance(result, list) else result)
        return torch.stack(results)


@pytest.fixture(scope="module", params=FAMILIES)
def recorded(request, family) -> Family:
    pipe, calls, given = DiffusionPipeline.from_pretrained(family(request.param)), [], dict(CALL[request.param])
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False).eval()
    hook = pipe.transformer.register_forward_pre_hook(lambda network, *arguments: calls.append(arguments), with_kwargs=True)
    given |= {key: [given[key]] * len(PROMPTS) for key in ("negative_prompt",) if key in given}
    pipe(prompt=list(PROMPTS), num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent", **given)
    hook.remove()
    return Family(request.param, pipe, calls[: len(calls) // 2])  # those of the first step


def with_random_lora(network: nn.Module, targets: list[str], scope: str = "all") -> nn.Module:
    set_trainable(network, scope, targets, 2, 3.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def gradient(network: nn.Module, loss: Tensor) -> Tensor:
    """Of all trained weights; a layer whose output nothing reads, at the end of the text's stream, has 0."""
    gradients = torch.autograd.grad(loss, trained(network), retain_graph=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in gradients])


def upstream(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)


def off(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape and expected.norm() > 0
    return ((result - expected).norm() / expected.norm()).item()


COUNTS = {  # layers of attention, feed_forward and modulation in the tiny network
    "sd3": (39, 14, 8), "flux": (25, 14, 7), "flux2_klein": (20, 8, 0), "chroma": (22, 12, 0), "qwen_image": (32, 16, 8),
    "sana": (32, 8, 0), "z_image": (24, 18, 5), "lumina2": (24, 18, 5), "auraflow": (24, 18, 6), "hidream": (12, 33, 2),
}  # fmt: skip


def test_every_layer_of_a_block_has_one_target(recorded):
    """But depthwise convolutions, SANA's, have none."""
    network = recorded.network
    found = lora_layers(network, "all", list(LORA_TARGETS))
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    inside = [name for name in layers if name.startswith(tuple(f"{block}." for block in block_names(network)))]
    assert found == [name for name in inside if not name.endswith("conv_depth")]
    kinds = Counter(target for name in found for target, pattern in LORA_TARGETS.items() if re.search(pattern, name))
    assert tuple(kinds[target] for target in ("attention", "feed_forward", "modulation")) == COUNTS[recorded.name]
    assert kinds.total() == len(found)


def test_a_network_with_lora_is_the_pipeline_s_own_to_the_bit(recorded):
    """HiDream's experts, too, which are ours then. Only LoRA's weights are trained, in fp32."""
    network = recorded.network.bfloat16()
    with torch.no_grad():
        expected = recorded.output(network)
        set_trainable(network, "last:0.5", ["attention"], 2, 3.0)
        assert torch.equal(recorded.output(network), expected) and expected.isfinite().all()
    assert {parameter.dtype for parameter in trained(network)} == {torch.float32}
    assert {parameter.dtype for parameter in network.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    blocks = block_names(network)
    last = tuple(f"{block}." for block in blocks[-round(len(blocks) / 2) :])
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name and name.startswith(last) for name in names)


def test_the_gradient_is_the_output_s_slope(recorded):
    """Of the whole network: no part of it is computed without a gradient. The difference quotient is along the gradient."""
    network = recorded.network
    set_trainable(network, "none", [], 2, 3.0)
    network.double()
    loss = lambda: (recorded.output(network) * weights).sum()  # noqa: E731
    weights = upstream(recorded.output(network))
    found = gradient(network, loss())
    step = 1e-4
    with torch.no_grad():
        sides = []
        for factor in (step, -2 * step):
            for parameter, part in zip(trained(network), found.split([p.numel() for p in trained(network)])):
                parameter.add_(factor * part.view_as(parameter) / found.norm())
            sides.append(loss())
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(found.norm().item(), rel=1e-2)


def test_merged_is_separate(recorded):
    network = with_random_lora(recorded.network, list(LORA_TARGETS)).double()
    before, output = structure(network), recorded.output(network)
    expected = gradient(network, (output * upstream(output)).sum())
    layers = merge(network)
    assert len(layers) == sum(COUNTS[recorded.name])
    merged = recorded.output(network)
    assert off(merged, output) <= FP32 and off(gradient(network, (merged * upstream(output)).sum()), expected) <= FP32
    unmerge(network)
    assert structure(network) == before


def test_each_sample_s_gradient_is_that_of_a_backward_of_its_own(recorded):
    """All kinds of layers but routed experts, merged or not. Row r is of sample r % 2; guidance has two rows a call, two calls, or none."""
    targets = ["attention", "modulation"] if recorded.name == "hidream" else list(LORA_TARGETS)
    network = with_random_lora(recorded.network, targets).double()
    output = recorded.output(network)
    weights, samples = upstream(output), [slice(sample, None, len(PROMPTS)) for sample in range(len(PROMPTS))]
    expected = [gradient(network, (output * weights)[:, rows].sum()) for rows in samples]
    names = {parameter: name for name, parameter in network.named_parameters()}
    order = [names[parameter] for parameter in trained(network)]
    for merged in (False, True):
        if merged:
            merge(network)
        scores = started(network, len(PROMPTS))
        assert off(scores.predict(0, lambda rows: recorded.output(network)), output) <= FP32
        scores.out.backward(weights)
        totals = scores.totals
        for choice, exact in zip(torch.eye(len(PROMPTS)).double(), expected):
            scores.totals = [total.clone() for total in totals]
            found = {names[parameter]: part for parameter, part in scores.combine(choice)}
            assert off(torch.cat([found[name].flatten() for name in order]), exact) <= FP32
        unscore(network)


def test_a_saved_lora_is_loaded_by_diffusers_and_begins_a_run(recorded, tmp_path):
    given, begun = with_random_lora(recorded.network, ["attention", "modulation"]), recorded.network
    recorded.pipe.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(given),
        transformer_lora_adapter_metadata=given.peft_config["default"].to_dict(),
    )  # fmt: skip
    pipe = copy.copy(recorded.pipe)
    pipe.transformer = recorded.network
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        expected = recorded.output(given)
        assert torch.equal(recorded.output(pipe.transformer), expected)
    set_trainable(begun, "all", list(LORA_TARGETS), 3, 3.0)
    pipe.transformer = begun
    line = start_from(pipe, str(tmp_path), "all")
    assert f"{len(get_peft_model_state_dict(given)) // 2} of the {sum(COUNTS[recorded.name])} layers" in line and "rank 2 of 3" in line
    bounds.assert_same_output(recorded.output(begun).detach(), expected, begun)


@pytest.mark.parametrize(
    "recorded, name",
    [("z_image", "all_final_layer.2-1.adaLN_modulation.1"), ("hidream", "final_layer.adaLN_modulation.1")], indirect=["recorded"],
)  # fmt: skip
def test_a_lora_of_a_layer_outside_the_blocks_does_not_begin_a_run(recorded, name, tmp_path):
    """Though lora.targets has a name for such a layer, no lora.scope has it."""
    pipe = copy.copy(recorded.pipe)
    pipe.transformer = with_random_lora(recorded.network, list(LORA_TARGETS))
    rows, columns = pipe.transformer.get_submodule(name).weight.shape
    halves = {"lora_A": torch.ones(2, columns), "lora_B": torch.ones(rows, 2)}
    save_file({f"transformer.{name}.{half}.weight": tensor for half, tensor in halves.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"^lora.init=.* has {re.escape(name)}, which is never trained here; valid is "):
        start_from(pipe, str(tmp_path / "lora.safetensors"), "all")


MASKED = ("chroma", "qwen_image", "sana", "z_image", "lumina2")


def attention_state(network: nn.Module) -> list:
    processors = [module.processor for module in network.modules() if hasattr(module, "processor")]
    return [(id(processor), type(processor), dict(vars(processor))) for processor in processors]


def test_attention_back_ends(recorded, monkeypatch):
    """Those that a CPU has: of the same result with the masks that there are, undone without a trace."""
    network, plain = with_random_lora(recorded.network, ["attention"]).double(), recorded.network
    before, active = attention_state(network), _AttentionBackendRegistry.get_active_backend()
    expected = recorded.output(network)
    slope = gradient(network, (expected * upstream(expected)).sum())
    calls, used = attention_calls(lambda: recorded.output(network)), []
    masked = any(call.masked for call in calls)
    assert masked == (recorded.name in MASKED)
    for backend in ("math", "flash"):
        own = _AttentionBackendRegistry._backends[BACKENDS[backend]]
        counted = lambda *args, own=own, name=backend, **kwargs: (used.append(name), own(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setitem(_AttentionBackendRegistry._backends, BACKENDS[backend], counted)
        chosen = partial(resolve, backend, plain, lambda: recorded.output(plain), 4, torch.float32, CPU)
        if backend == "flash" and masked:
            with pytest.raises(ValueError, match=r"attention.backend=flash: .* with a mask, float32: .*; valid is auto or sdpa"):
                chosen()
            continue
        assert chosen() == (backend, "")
        set_attention(network, backend)
        used.clear()
        output = recorded.output(network)
        assert used == [backend] * calls.total()
        assert off(output, expected) <= FP32 and off(gradient(network, (output * upstream(output)).sum()), slope) <= FP32
        set_attention(network, "sdpa")
        assert attention_state(network) == before and _AttentionBackendRegistry.get_active_backend() == active


def test_experts_have_the_gradient_of_diffusers_own_training():
    """Which the inference of a network that is not in training mode lacks. There the same bits come out."""
    torch.manual_seed(0)
    experts = MOEFeedForwardSwiGLU(16, 32, num_routed_experts=4, num_activated_experts=2).eval()
    x = torch.randn(3, 5, 16, requires_grad=True)
    inference = experts(x)
    inputs = [x, *experts.parameters()]
    experts.train()
    trained_output = experts(x)
    expected = torch.autograd.grad(trained_output, inputs, upstream(trained_output))
    give_experts_gradients(nn.Sequential(experts.eval()))
    assert type(experts) is ExpertsWithGradient
    output = experts(x)
    assert torch.equal(output, inference)
    for result, exact in zip(torch.autograd.grad(output, inputs, upstream(output)), expected, strict=True):
        torch.testing.assert_close(result, exact)


@pytest.mark.parametrize("recorded", ["hidream"], indirect=True)
def test_routed_experts_have_no_gradient_of_each_sample(recorded):
    network = with_random_lora(recorded.network, ["feed_forward"])
    before = structure(network)
    with pytest.raises(ValueError, match=r"^train.estimator=score_accumulation: .*\.experts\.0\.w1 is an expert, .*; valid is ppo, or "):
        score(network)
    assert structure(network) == before
    assert len(merge(network)) == COUNTS["hidream"][1]


@pytest.mark.parametrize("recorded", ["flux"], indirect=True)
@pytest.mark.parametrize(
    "scope, chosen",
    [
        ("transformer_blocks.1", ["transformer_blocks.1"]),
        ("single_transformer_blocks.0-1", ["single_transformer_blocks.0", "single_transformer_blocks.1"]),
        ("single_transformer_blocks.2,transformer_blocks.0", ["transformer_blocks.0", "single_transformer_blocks.2"]),
        ("last:0.4", ["single_transformer_blocks.1", "single_transformer_blocks.2"]),
        ("last:0.01", ["single_transformer_blocks.2"]),
        ("last:1", "all"), ("mid_up", None), ("up_blocks.1", None), ("transformer_blocks.2", None), ("transformer_blocks.1-2", None),
        ("single_transformer_blocks.1-0", None), ("transformer_blocks.0-99999999999999", None),
    ],
)  # fmt: skip
def test_scopes(recorded, scope, chosen):
    network, words = recorded.network, "transformer_blocks.0 to .1, single_transformer_blocks.0 to .2"
    if chosen is None:
        with pytest.raises(ValueError, match=f"^lora.scope={scope}: this network has no {scope}; its blocks are {words}$"):
            lora_layers(network, scope, ["attention"])
        return
    found = dict.fromkeys(re.match(r"\w+\.\d+", name)[0] for name in lora_layers(network, scope, ["attention"]))
    assert list(found) == (block_names(network) if chosen == "all" else chosen)


@pytest.mark.parametrize("recorded", ["sana"], indirect=True)
def test_blocks_without_layers_of_the_targets_are_refused(recorded):
    with pytest.raises(ValueError, match="^lora.scope=last:0.5: transformer_blocks.2 to .3 have no layers of lora.targets=.'modulation'.$"):
        lora_layers(recorded.network, "last:0.5", ["modulation"])
