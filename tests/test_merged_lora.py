"""LoRA merged into its layers' weights: peft's own layers are the reference; weights that change by every way there is."""

import copy
import math
from pathlib import Path

import bounds
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from shared import CPU, conditions, joined, latent_shape, policy_of, run, weights
from torch import nn

from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.engine import Engine, init_distributed
from ddpo_fast.kernels import select
from ddpo_fast.networks import merged_lora
from ddpo_fast.networks.fused_unet import fuse, unfuse
from ddpo_fast.networks.merged_lora import MergedConv2d, MergedLinear, merge, unmerge
from ddpo_fast.policy import Policy
from ddpo_fast.records.metrics import read_metrics

LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (7, 6)),
    "linear_3d": (lambda: nn.Linear(6, 10, bias=False), (2, 5, 6)),
    "conv": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 7, 5)),
    "conv_stride_2": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 8)),
    "conv_odd": (lambda: nn.Conv2d(6, 10, (1, 3), stride=(2, 1), padding=(0, 2), bias=False), (2, 6, 7, 8)),
    "conv_1x1": (lambda: nn.Conv2d(6, 10, 1), (2, 6, 7, 5)),
}


def layer_rounding(kind: str, dtype: torch.dtype) -> float:
    """How far a layer's output and gradients may be off: three sums, of as many terms as it has inputs, outputs and rows; see bounds.py."""
    make, shape = LAYERS[kind]
    layer = make()
    outputs, inputs = len(layer.weight), layer.weight[0].numel()
    rows = layer(torch.zeros(shape)).numel() // outputs
    return bounds.SIGMAS * 0.2 * torch.finfo(dtype).eps * math.sqrt(inputs + outputs + rows)


def random_lora(module: nn.Module) -> None:
    """LoRA starts at B = 0, where half of the gradient is 0."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def with_lora(layer: nn.Module, dtype=torch.float32, **changes) -> nn.Module:
    """A frozen layer with LoRA of scale 1.5, as an nn.Sequential."""
    model = nn.Sequential(layer).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**dict(r=2, lora_alpha=3, target_modules=["0"]) | changes), model)
    random_lora(model)
    return model.to(dtype)


def differentiate(model, x, upstream=None) -> list[torch.Tensor]:
    """The output and the gradients of x (None if it needs none) and of every trainable parameter."""
    model.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    y = model(x)
    torch.manual_seed(3)
    y.backward(torch.randn_like(y) if upstream is None else upstream)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_same(results, expected, tolerance: float) -> None:
    for result, exact in zip(results, expected, strict=True):
        assert (result is None) == (exact is None)
        if exact is not None:
            assert result.shape == exact.shape and result.dtype == exact.dtype
            assert (result.double() - exact.double()).norm() <= tolerance * exact.double().norm()


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
@pytest.mark.rounding
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_merged_layer_is_peft_s(kind, dtype, layout, needs_x):
    (make, shape), tolerance = LAYERS[kind], layer_rounding(kind, dtype)
    model = with_lora(make(), dtype)
    x = torch.randn(shape, dtype=dtype)
    if len(shape) == 4 and layout != "contiguous":
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    x.requires_grad_(needs_x)
    expected = differentiate(model, x)
    assert len(expected) == 4 and (expected[1] is not None) == needs_x
    (layer,) = merge(model)
    assert layer.merged_weight.stride() == layer.base_layer.weight.stride()
    assert_same(differentiate(model, x), expected, tolerance)
    with torch.no_grad():
        assert_same([model(x)], expected[:1], tolerance)


@pytest.mark.parametrize("kind", ["linear_3d", "conv"])
@pytest.mark.parametrize("trained", ["", "lora_A", "lora_B"])
def test_only_gradients_that_are_wanted_are_computed(kind, trained, monkeypatch):
    make, shape = LAYERS[kind]
    model = with_lora(make())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(trained) and trained in name)
    x = torch.randn(shape, requires_grad=True)
    expected = differentiate(model, x)
    merge(model)
    if not trained:  # then it is one operation that torch differentiates
        monkeypatch.setattr(merged_lora._LinearFunction, "apply", None)
        monkeypatch.setattr(merged_lora._Conv2dFunction, "apply", None)
    assert_same(differentiate(model, x), expected, layer_rounding(kind, torch.float32))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_expanded_gradient_is_a_gradient(kind):
    make, shape = LAYERS[kind]
    model = with_lora(make(), torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    upstream = torch.ones((), dtype=torch.float64).expand_as(model(x))
    expected = differentiate(model, x, upstream)
    merge(model)
    assert_same(differentiate(model, x, upstream), expected, 10 * layer_rounding(kind, torch.float64))  # sums of equal gradients cancel


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=2, norm_num_groups=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "conv", "proj_in"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    random_lora(unet)
    return unet


class Conditioned(nn.Module):
    """A UNet as a function of the latents alone."""

    def __init__(self, unet: nn.Module, prompt: torch.Tensor):
        super().__init__()
        self.unet, self.prompt = unet, prompt

    def forward(self, latents):
        return self.unet(latents, torch.tensor([7, 500]), self.prompt).sample


def run_unet(unet) -> list[torch.Tensor]:
    torch.manual_seed(2)
    dtype = next(unet.parameters()).dtype
    latents, prompt = torch.randn(2, 4, 4, 4).to(dtype), torch.randn(2, 3, 8).to(dtype)
    return differentiate(Conditioned(unet, prompt), latents)


def structure(unet) -> list:
    return [(name, id(module), type(module), sorted(vars(module))) for name, module in unet.named_modules()]


@pytest.mark.parametrize("fused", ["never", "before", "after"])
def test_a_merged_unet_is_the_unet_and_unmerge_undoes_it(fused):
    unet = make_unet().double()
    expected, keys, before = run_unet(unet), list(unet.state_dict()), structure(unet)
    if fused == "before":
        fuse(unet, select("reference", CPU))
    layers = merge(unet)
    assert {type(layer) for layer in layers} == {MergedLinear, MergedConv2d} and len(expected) == 2 + 2 * len(layers)
    if fused == "after":
        fuse(unet, select("reference", CPU))
    bounds.assert_same_network(run_unet(unet), expected, unet)
    assert list(unet.state_dict()) == keys
    unfuse(unet)
    unmerge(unet)
    unmerge(unet)
    assert structure(unet) == before
    assert all(torch.equal(a, b) for a, b in zip(run_unet(unet)[2:], expected[2:], strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
def test_a_compiled_unet_has_the_same_gradient_without_a_break():
    unet = make_unet()
    expected = run_unet(unet)
    layers = merge(unet)
    torch._dynamo.reset()
    unet.compile(fullgraph=True, backend="aot_eager")
    bounds.assert_same_network(run_unet(unet), expected, unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(0.9)
    for layer in layers:
        layer.refresh()
    compiled = run_unet(unet)
    unmerge(unet)
    unet._compiled_call_impl = None
    bounds.assert_same_network(compiled, run_unet(unet), unet)


def change_by_init(model):
    nn.init.normal_(model[0].lora_B["default"].weight)


def change_by_data(model):
    model[0].lora_A["default"].weight.data += 1.0
    torch.autograd.graph.increment_version(model[0].lora_A["default"].weight)


def change_by_assignment(model):
    model[0].lora_A["default"].weight.data = torch.randn_like(model[0].lora_A["default"].weight)


def change_by_a_new_parameter(model):
    model[0].lora_B["default"].weight = nn.Parameter(torch.randn_like(model[0].lora_B["default"].weight))


def change_by_load_state_dict(model):
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


def change_of_the_base(model):
    with torch.no_grad():
        model[0].base_layer.weight.mul_(2)


def change_of_the_scale(model):
    model[0].scale_layer(2.0)


def change_of_the_dtype(model):
    model.double()


def change_of_the_dtype_and_back(model):
    model.to(torch.bfloat16).float()


def change_by_apply(model):
    model._apply(lambda tensor: tensor.data.mul_(2))  # in place and unseen


def change_of_the_layout(model):
    weight = model[0].base_layer.weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def change_to_no_adapter(model):
    model[0].enable_adapters(False)


def change_to_another_adapter(model):
    model[0].update_layer("other", 3, 3, config=LoraConfig(init_lora_weights=False))
    model[0].set_adapter(["default", "other"])


def change_by_peft_s_own_merge(model):
    model[0].merge()


CHANGES = [change for name, change in list(globals().items()) if name.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_the_weights_is_missed(change):
    torch.manual_seed(4)
    model = with_lora(nn.Conv2d(6, 10, 3, padding=1))
    (layer,) = merge(model)
    x = torch.randn(2, 6, 7, 5)
    before = model(x)
    change(model)
    x = x.to(layer.base_layer.weight.dtype)
    y = model(x)
    unmerge(model)
    assert_same([y], [model(x)], layer_rounding("conv", y.dtype))
    if change not in (change_of_the_dtype, change_of_the_dtype_and_back, change_of_the_layout, change_by_peft_s_own_merge):
        assert (y - before).norm() > 0.1 * before.norm()


def test_a_forgotten_refresh_is_seen_by_these_tests(monkeypatch):
    model = with_lora(nn.Linear(6, 10))
    merge(model)
    x = torch.randn(7, 6)
    before = model(x)
    monkeypatch.setattr(MergedLinear, "refresh", lambda layer: None)
    change_by_init(model)
    assert torch.equal(model(x), before)


def test_the_merged_weight_stays_where_it_is():
    """A CUDA graph reads it from the address that it was captured with."""
    model = with_lora(nn.Conv2d(6, 10, 3))
    (layer,) = merge(model)
    address, version = layer.merged_weight.data_ptr(), layer.merged_weight._version
    layer.refresh()
    assert layer.merged_weight._version == version  # nothing has changed, so nothing is done
    change_by_init(model)
    layer.refresh()
    assert layer.merged_weight.data_ptr() == address and layer.merged_weight._version > version


def test_a_backward_pass_with_weights_that_have_changed_is_refused():
    model = with_lora(nn.Linear(6, 10))
    (layer,) = merge(model)
    y = model(torch.randn(7, 6))
    layer.lora_A["default"].weight.data += 1.0
    torch.autograd.graph.increment_version(layer.lora_A["default"].weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_copy_has_weights_of_its_own():
    unet = make_unet()
    merge(unet)
    expected, twin = run_unet(unet), copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert (run_unet(twin)[0] - expected[0]).norm() > 0.1 * expected[0].norm()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(run_unet(unet), expected, strict=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "it has no LoRA"),
        (lambda: with_lora(nn.Linear(4, 4), lora_dropout=0.1), "0 cannot .* dropout"),
        (lambda: with_lora(nn.Linear(4, 4), lora_bias=True), "0 cannot .* bias"),
        (lambda: with_lora(nn.Linear(4, 4), use_dora=True), "0 cannot .* another kind"),
        (lambda: with_lora(nn.Conv2d(4, 4, 3, groups=2)), "0 cannot .* groups"),
        (lambda: with_lora(nn.Conv2d(4, 4, 3, dilation=2)), "0 cannot .* dilation"),
        (lambda: with_lora(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), "0 cannot .* padding"),
        (lambda: with_lora(nn.Embedding(4, 4)), "0 cannot .* LoRA on an nn.Linear"),
        (lambda: with_lora(nn.Linear(4, 4)).requires_grad_(True), "0 cannot .* trained too"),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_layer_that_does_not_fit_is_named_and_all_stay_as_they_were(make, message):
    model = make()
    before = structure(model)
    with pytest.raises(ValueError, match=message):
        merge(model)
    assert structure(model) == before


def test_merging_twice_or_beside_another_adapter_is_refused():
    model = with_lora(nn.Linear(4, 4))
    merge(model)
    with pytest.raises(ValueError, match="0 cannot .* unmerge it first"):
        merge(model)
    unmerge(model)
    change_to_another_adapter(model)
    with pytest.raises(ValueError, match=r"0 cannot .* adapters are \['default', 'other'\]"):
        merge(model)


def make_policy(path: Path, dtype: str) -> Policy:
    torch.manual_seed(0)
    policy = policy_of(path, dtype, rank=2, alpha=3.0)
    random_lora(policy.network)
    return policy


def predict(policy) -> torch.Tensor:
    torch.manual_seed(5)
    latents = torch.randn(2, *latent_shape(policy)).to(policy.dtype)
    return policy.predict(latents, torch.tensor([981, 21]), conditions(policy, ["a", "b"]))


@pytest.mark.rounding
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_after_a_step_or_a_load_the_next_forward_has_the_new_weights(tiny_model, tmp_path, stage):
    """ZeRO 1 and 2 write weights through .data, which no version counts."""
    init_distributed(timeout_s=60)
    policy = make_policy(tiny_model, "fp32")
    policy.merge_lora()
    num_layers = len(policy.merged_layers)
    optimizer = torch.optim.SGD(policy.trainable_parameters(), lr=3e-2)
    engine = Engine(policy.network, optimizer, zero_stage=stage, max_grad_norm=1.0, dtype=torch.float32)
    policy.attach(engine.module)

    def separately():
        unmerge(policy.network)
        policy.merged_layers = []
        with torch.no_grad():
            y = predict(policy)
        policy.merge_lora()
        return y

    with torch.no_grad():
        outputs = [predict(policy)]
    engine.save(tmp_path)
    for _ in range(2):
        engine.backward(predict(policy).square().mean(), last=True)
        engine.step()
        with torch.no_grad():
            outputs.append(predict(policy))
        change = (outputs[-1] - outputs[-2]).norm()
        assert change > 1e-2 * outputs[-2].norm()
        # of L layers' changes, which add like random ones, a single old weight leaves out one; rounding is a hundredth of that
        assert (outputs[-1] - separately()).norm() < 0.1 * change / math.sqrt(num_layers)
    with torch.no_grad():
        engine.load(tmp_path)
        assert torch.equal(predict(policy), outputs[0])


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_within_its_rounding(tiny_model, dtype):
    def differentiated(policy):
        policy.network.zero_grad()
        y = predict(policy)
        (2**8 * y.float().square().mean()).backward()  # fp16 needs a loss scale
        gradient = [p.grad for p in policy.trainable_parameters()]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradient)
        return y.detach().double(), torch.cat([g.flatten() for g in gradient]).double()

    exact, policy = differentiated(make_policy(tiny_model, "fp32")), make_policy(tiny_model, dtype)
    separate, tolerance = differentiated(policy), bounds.BACKWARD * bounds.network_rounding(policy.network, policy.dtype)
    policy.merge_lora()
    assert {layer.merged_weight.dtype for layer in policy.merged_layers} == {policy.dtype}
    for ours, peft_s, e in zip(differentiated(policy), separate, exact, strict=True):
        assert (ours - e).norm() <= tolerance * e.norm()
        assert (ours - e).norm() <= 2 * (peft_s - e).norm()


@pytest.mark.rounding
def test_two_iterations_merged_or_separate_end_in_the_same_weights(options):
    folders = [run(options(forward, lora__forward=forward, optimizer__eps=1e-4)) for forward in ("merged", "separate")]
    merged, separate = map(weights, folders)
    assert merged.keys() == separate.keys()
    a, b, directory = joined(merged), joined(separate), folders[1]
    bound, rows = bounds.of_run(directory), read_metrics(directory)
    learned = bound.learned(min(row["reward_std"] for row in rows[1:]))
    assert (a - b).norm() <= bound.weights(len(b), learned) < 0.5 * bounds.moved(directory)


@pytest.mark.parametrize(
    "changed, merged",
    [("", True), ("--model.dtype=bf16", False), ("--model.dtype=bf16 --lora.forward=merged", True), ("--lora.forward=separate", False),
     ("--lora.scope=none", False)],
)  # fmt: skip
def test_auto_merges_in_fp32(options, changed, merged):
    policy = assemble(parse([*options(), *changed.split()])).policy
    assert bool(policy.merged_layers) == merged
    assert any(isinstance(module, MergedLinear) for module in policy.network.modules()) == merged


def test_merged_without_lora_is_refused(options):
    with pytest.raises(ValueError, match="lora.forward=merged: valid is auto or separate, when lora.scope is none: there is no LoRA"):
        parse(options(lora__scope="none", lora__forward="merged"))
