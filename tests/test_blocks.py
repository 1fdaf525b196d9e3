"""The UNet's fused blocks: GroupNorm+SiLU and GEGLU in Triton's interpreter against fp64, and a UNet with them in and out again."""

import contextlib
import copy
import functools

import bounds
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_kernels import torch_warns_of_itself
from torch import nn

from ddpo_fast.kernels import geglu as geglu_module
from ddpo_fast.kernels import group_norm_silu as group_norm_module
from ddpo_fast.kernels import reference, select
from ddpo_fast.kernels.launch import interpreted, record_launches
from ddpo_fast.networks.fused_unet import fuse, unfuse

geglu, group_norm_silu = geglu_module.geglu, group_norm_module.group_norm_silu
DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "every other row", "transposed", "expanded")
examples = functools.partial(settings, derandomize=True, deadline=None)


@contextlib.contextmanager
def poisoned():
    """Memory that an operation allocates is NaN at first, so that an element never written is noticed."""

    def fill(allocate, *args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, functools.partial(fill, getattr(torch, name)))
        yield


def draw(shape, dtype, layout="contiguous", offset=0.0, seed=0) -> torch.Tensor:
    """Random values in a layout; of an expanded tensor all rows are the same memory."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return (torch.randn(shape, generator=generator) + offset).to(DEVICE, dtype)

    first, *inner = shape
    match layout:
        case "sliced":
            return make(*shape[:-1], shape[-1] + 3)[..., 1 : shape[-1] + 1]
        case "every other row":
            return make(2 * first, *inner)[::2]
        case "transposed":
            return make(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        case "expanded":
            return make(1, *inner).expand(shape)
        case "channels_last" if len(shape) == 4:
            return make(*shape).contiguous(memory_format=torch.channels_last)
    return make(*shape)


def differentiate(operation, upstream, *inputs) -> list[torch.Tensor]:
    """The output, and every input's gradient for an upstream gradient."""
    inputs = [tensor if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    y = operation(*inputs)
    assert y.dtype == inputs[0].dtype
    y.backward(upstream.to(y.dtype))
    return [y.detach(), *(tensor.grad for tensor in inputs if tensor is not None)]


def assert_as_accurate_as_torch(operation, specification, upstream, *inputs, condition=0.0) -> None:
    """Against fp64: at most twice the error of plain PyTorch in the same dtype, or one rounding of the largest element.

    Parameter gradients are sums in fp32, which round by the size of their terms, however these cancel; and the mean that xhat is
    taken from is an fp32 number, which has `condition` standard deviations.
    """
    terms = upstream.double().abs().sum((0, 2, 3)).max().item() if upstream.dim() == 4 else 0.0
    wide = [tensor if tensor is None else tensor.double() for tensor in inputs]
    exact = differentiate(specification, upstream, *wide)
    plain = differentiate(specification, upstream, *inputs)
    with poisoned():
        ours = differentiate(operation, upstream, *inputs)
    for name, e, p, o in zip(("y", "dx", "dweight", "dbias"), exact, plain, ours, strict=False):
        assert o.dtype == p.dtype and o.shape == p.shape
        error, plain_error = ((tensor.double() - e).abs().max().item() for tensor in (o, p))
        largest = e.abs().max().item()
        rounding = torch.finfo(o.dtype).eps * largest
        if name in ("dweight", "dbias"):
            rounding += torch.finfo(torch.float32).eps * terms
        rounding += torch.finfo(torch.float32).eps * condition * max(largest, terms if name == "dweight" else 0.0)
        assert error <= 2 * plain_error + rounding, (name, error, plain_error)


def check_group_norm(shape, num_groups, dtype, layout, silu=True, weight=True, bias=True, affine_dtype=None, offset=0.5):
    affine = [draw(shape[1:2], affine_dtype or dtype, seed=seed) + 0.5 if there else None for seed, there in ((1, weight), (2, bias))]
    x = draw(shape, dtype, layout, offset)
    groups = x.double().reshape(shape[0], num_groups, -1)
    condition = (groups.mean(-1).abs() / (groups.var(-1, correction=0) + 1e-5).sqrt()).max().item()
    assert_as_accurate_as_torch(
        lambda x, w, b: group_norm_silu(x, num_groups, w, b, 1e-5, silu),
        lambda x, w, b: reference.group_norm_silu(x, num_groups, w, b, 1e-5, silu),
        draw(shape, dtype, seed=3), x, *affine, condition=condition,
    )  # fmt: skip


def check_geglu(shape, dtype, layout):
    upstream = draw((*shape[:-1], shape[-1] // 2), dtype, seed=3)
    assert_as_accurate_as_torch(geglu, reference.geglu, upstream, draw(shape, dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape, num_groups",
    [
        ((1, 1, 1, 1), 1),  # one element
        ((3, 4, 1, 1), 4),  # one element a group
        ((1, 6, 1, 1), 3),  # one pixel
        ((2, 3, 5, 7), 3),  # one channel a group, odd sizes
        ((2, 5, 9, 3), 1),  # one group
        ((1, 320, 2, 2), 32),  # ten channels a group
        ((1, 960, 1, 3), 32),
        ((1, 2560, 1, 1), 32),
        ((1, 4, 23, 24), 2),  # several pixel chunks
        ((2, 2, 33, 19), 1),
    ],
)
def test_group_norm_silu_is_as_accurate_as_torch(shape, num_groups, layout):
    for dtype in DTYPES if layout in ("contiguous", "channels_last") else (torch.float16,):  # the others are copied first
        check_group_norm(shape, num_groups, dtype, layout)


@examples(max_examples=30)
@given(st.data())
def test_group_norm_silu_of_any_shape(data):
    num_groups, per_group = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    size = st.integers(1, 13)
    check_group_norm(
        (data.draw(st.integers(1, 3)), num_groups * per_group, data.draw(size), data.draw(size)),
        num_groups,
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.sampled_from(LAYOUTS)),
        **{name: data.draw(st.booleans()) for name in ("silu", "weight", "bias")},
        affine_dtype=data.draw(st.sampled_from((None, torch.float32, torch.float16))),
        offset=data.draw(st.sampled_from((0.0, 1.0, -30.0))),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_large_mean_loses_no_more_than_torch_does(memory_format):
    x = (draw((2, 8, 24, 24), torch.float32) + 1e4).contiguous(memory_format=memory_format)
    exact, plain = (torch.group_norm(tensor, 4) for tensor in (x.double(), x))
    y = group_norm_silu(x, 4, None, None, 1e-5, silu=False)
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3  # 1e-3 = one rounding of x, in standard deviations


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2), (7, 2), (1, 6), (5, 34), (2, 3, 10), (2, 3, 5, 16), (1, 2, 530), (6, 1280)])
def test_geglu_is_as_accurate_as_torch(shape, layout):
    for dtype in DTYPES if layout == "contiguous" else (torch.float16,):
        check_geglu(shape, dtype, layout)


@examples(max_examples=30)
@given(st.data())
def test_geglu_of_any_shape(data):
    shape = (*data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)), 2 * data.draw(st.integers(1, 70)))
    check_geglu(shape, data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS)))


def test_geglu_of_one_row_without_a_batch():
    assert_as_accurate_as_torch(geglu, reference.geglu, draw((5,), torch.float32, seed=1), draw((10,), torch.float32))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's numpy
def test_extreme_activations_stay_finite():
    """Where exp(-z) overflows, SiLU and its gradient are 0; where it vanishes, z and 1."""
    x = torch.tensor([-1e3, 1e3], device=DEVICE).repeat(4, 1).view(1, 1, 4, 2)
    weight, upstream = torch.full((1,), 300.0, device=DEVICE), torch.ones_like(x)
    y, *gradients = differentiate(lambda x, w: group_norm_silu(x, 1, w, None, 1e-5), upstream, x, weight)
    torch.testing.assert_close(y, torch.tensor([-0.0, 300.0], device=DEVICE).expand_as(y))
    assert all(gradient.isfinite().all() for gradient in gradients)
    value, gate = torch.tensor([2.0, 3.0, 4.0], device=DEVICE), torch.tensor([-1e3, 0.0, 1e3], device=DEVICE)
    y, gradient = differentiate(geglu, torch.ones(3, device=DEVICE), torch.cat([value, gate]))
    torch.testing.assert_close(y, value * gate.clamp(min=0))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(64, 6, 3, 5), (4, 2, 23, 23)])  # the latter of several tiles
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_is_the_same_bits_alone_and_in_a_batch(shape, layout):
    x, upstream = draw(shape, torch.float16, layout), draw(shape, torch.float16, seed=1)
    weight, bias = (draw(shape[1:2], torch.float32, seed=seed) for seed in (2, 3))

    def run(x, upstream):
        return differentiate(lambda x: group_norm_silu(x, 2, weight, bias, 1e-5), upstream, x)

    together = run(x, upstream)
    for i in (0, len(x) - 1):
        for alone in (x[i : i + 1], x[i : i + 1].clone()):
            for a, t in zip(run(alone, upstream[i : i + 1]), together, strict=True):
                assert torch.equal(a[0], t[i])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_and_the_gradient_have_the_input_s_memory_format(layout):
    x = draw((2, 4, 3, 5), torch.float32, layout).requires_grad_()
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    y = group_norm_silu(x, 2, None, None, 1e-5)
    y.sum().backward()
    assert y.is_contiguous(memory_format=expected)
    if layout in ("contiguous", "channels_last"):
        assert x.grad.is_contiguous(memory_format=expected)


def saved(operation, *args) -> list[torch.Tensor]:
    tensors = []

    def keep(tensor):
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        operation(*args)
    return tensors


@pytest.mark.parametrize("trainable", [True, False])
def test_group_norm_silu_saves_its_input_and_the_moments(trainable):
    x = draw((2, 6, 3, 5), torch.float16).requires_grad_()
    weight, bias = (nn.Parameter(draw((6,), torch.float16, seed=i), requires_grad=trainable) for i in (1, 2))
    tensors = saved(group_norm_silu, x, 3, weight, bias, 1e-5)
    assert [tensor.data_ptr() for tensor in tensors[:3]] == [tensor.data_ptr() for tensor in (x, weight, bias)]  # no copies
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in tensors[3:]] == [((2, 3), torch.float32)] * 2
    assert not saved(group_norm_silu, x.detach(), 3, weight.detach(), bias.detach(), 1e-5)
    with torch.no_grad():
        assert not saved(group_norm_silu, x, 3, weight, bias, 1e-5)


def test_geglu_saves_its_input():
    x = draw((3, 8), torch.float16).requires_grad_()
    assert [tensor.data_ptr() for tensor in saved(geglu, x)] == [x.data_ptr()]
    assert not saved(geglu, x.detach())


@pytest.mark.parametrize(
    "needed, kernels",
    [
        ("x", ["sums", "merge_bwd", "bwd"]),
        ("weight", ["sums"]),
        ("bias", ["sums"]),
        ("x weight bias", ["sums", "merge_bwd", "bwd"]),
    ],
)
def test_only_gradients_that_are_wanted_are_computed(needed, kernels, monkeypatch):
    asked, backward = [], group_norm_module._backward
    monkeypatch.setattr(group_norm_module, "_backward", lambda *args: asked.append(args[-3:]) or backward(*args))
    tensors = dict(x=draw((2, 6, 3, 5), torch.float32), weight=draw((6,), torch.float32), bias=draw((6,), torch.float32))
    for name in needed.split():
        tensors[name].requires_grad_()
    with record_launches() as launches:
        y = group_norm_silu(tensors["x"], 3, tensors["weight"], tensors["bias"], 1e-5)
        forward = len(launches)
        y.backward(torch.ones_like(y))
    assert forward == 3
    assert [launch.kernel.__name__ for launch in launches[3:]] == [f"_group_norm_silu_{name}_kernel" for name in kernels]
    assert asked == [tuple(name in needed.split() for name in tensors)]
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == needed.split()


def test_geglu_is_one_launch_each_way():
    x = draw((3, 8), torch.float32).requires_grad_()
    with record_launches() as launches:
        geglu(x).sum().backward()
    assert [launch.kernel.__name__ for launch in launches] == ["_geglu_fwd_kernel", "_geglu_bwd_kernel"]


@torch_warns_of_itself
@pytest.mark.parametrize("layout, affine", [("contiguous", True), ("channels_last", True), ("transposed", False)])
def test_opcheck_of_group_norm_silu(layout, affine):
    ops, x = torch.ops.ddpo_fast, draw((2, 6, 3, 5), torch.float32, layout)
    weight, bias = (draw((6,), torch.float32, seed=i) if affine else None for i in (1, 2))
    _, mean, rstd = ops.group_norm_silu(x, 3, weight, bias, 1e-5, True)
    wanted = [tensor if tensor is None else tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(ops.group_norm_silu.default, (wanted[0], 3, *wanted[1:], 1e-5, True))
    for needed in ((True, affine, affine), (False, affine, False)):
        torch.library.opcheck(ops.group_norm_silu_backward.default, (torch.ones_like(x), x, weight, bias, mean, rstd, True, *needed))


@torch_warns_of_itself
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck_of_geglu(layout):
    x = draw((2, 3, 8), torch.float32, layout)
    torch.library.opcheck(torch.ops.ddpo_fast.geglu.default, (x.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.ddpo_fast.geglu_backward.default, (torch.ones_like(x[..., :4]), x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_whole_they_give_the_same(layout):
    def block(x, weight, bias):
        y = group_norm_silu(x * 2, 2, weight, bias, 1e-5)
        return geglu(y.flatten(2).transpose(1, 2)) + geglu(y.mean((2, 3)))[:, None]

    inputs = [draw((2, 4, 3, 5), torch.float32, layout), draw((4,), torch.float32, seed=1), draw((4,), torch.float32, seed=2)]
    upstream = draw((2, 15, 2), torch.float32, seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(differentiate(compiled, upstream, *inputs), differentiate(block, upstream, *inputs), strict=True):
        assert torch.equal(ours, eager)


def x_with(**changes) -> dict:
    vector = torch.ones(6, device=DEVICE)
    return dict(x=torch.ones(2, 6, 3, 5, device=DEVICE), num_groups=3, weight=vector, bias=vector, eps=1e-5) | changes


@pytest.mark.parametrize("operation", [group_norm_silu, reference.group_norm_silu])
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=torch.ones(2, 6, 3)), "x: shape .2, 6, 3."),
        (dict(x=torch.ones(0, 6, 3, 5)), "x: shape .0, 6, 3, 5."),
        (dict(x=torch.ones(2, 6, 0, 5)), "x: shape"),
        (dict(x=torch.ones(2, 6, 3, 5, dtype=torch.int32)), "x: dtype torch.int32"),
        (dict(num_groups=4), "num_groups=4: valid is a divisor .* 6"),
        (dict(num_groups=0), "num_groups=0"),
        (dict(weight=torch.ones(5)), "weight: shape .5,."),
        (dict(weight=torch.ones(6, 1)), "weight: shape .6, 1."),
        (dict(bias=torch.ones(7)), "bias: shape .7,."),
        (dict(weight=torch.ones(6, dtype=torch.int64)), "weight: dtype torch.int64"),
        (dict(bias=torch.ones(6, dtype=torch.bool)), "bias: dtype torch.bool"),
        (dict(weight=torch.ones(6, device="meta")), "weight: on meta, but x is on"),
        (dict(bias=torch.ones(6, device="meta")), "bias: on meta, but x is on"),
    ],
)
def test_group_norm_silu_names_the_wrong_argument(operation, changes, message):
    with pytest.raises(ValueError, match=message):
        operation(**x_with(**changes))


@pytest.mark.parametrize("operation", [geglu, reference.geglu])
@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(3, 5), "x: shape .3, 5."),
        (torch.ones(0, 4), "x: shape .0, 4."),
        (torch.ones(3, 0), "x: shape .3, 0."),
        (torch.ones(()), "x: shape"),
        (torch.ones(3, 4, dtype=torch.int32), "x: dtype torch.int32"),
    ],
)
def test_geglu_names_the_wrong_argument(operation, x, message):
    with pytest.raises(ValueError, match=message):
        operation(x)


def test_only_the_specification_takes_fp64():
    with pytest.raises(ValueError, match="x: dtype torch.float64"):
        group_norm_silu(**x_with(x=torch.ones(2, 6, 3, 5, dtype=torch.float64)))
    with pytest.raises(ValueError, match="weight: dtype torch.float64"):
        group_norm_silu(**x_with(weight=torch.ones(6, dtype=torch.float64)))
    with pytest.raises(ValueError, match="x: dtype torch.float64"):
        geglu(torch.ones(3, 4, dtype=torch.float64))


def make_unet(seed=0, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config = dict(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=2, norm_num_groups=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet = UNet2DConditionModel(**config | changes).to(DEVICE)
    for module in unet.modules():  # weights of 1 and biases of 0 would hide a mistake
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return unet


def run_unet(unet, channels_last=False) -> list[torch.Tensor]:
    """The output, and the gradients of the latents and of every trainable parameter."""
    dtype = next(unet.parameters()).dtype
    latents = draw((2, 4, 4, 4), dtype, "channels_last" if channels_last else "contiguous").requires_grad_()
    prompt = draw((2, 3, unet.config.cross_attention_dim), dtype, seed=1)
    unet.zero_grad()
    y = unet(latents, torch.tensor([7, 500], device=DEVICE), prompt).sample
    y.backward(draw(y.shape, y.dtype, seed=2))
    return [y.detach(), latents.grad, *(p.grad.clone() for p in unet.parameters() if p.requires_grad)]


def error(results, exact) -> float:
    """The largest relative error (2-norm) of a tensor; gradients that cancel to nothing, such as those of k_proj's bias, do not count."""
    floor = max(tensor.norm() for tensor in exact).item() * 1e-6
    return max(((r.double() - e).norm() / (e.norm() + floor)).item() for r, e in zip(results, exact, strict=True))


def structure(unet) -> list:
    return [(name, id(module), type(module), sorted(vars(module))) for name, module in unet.named_modules()]


TRITON = select("triton", DEVICE)
REFERENCE = select("reference", DEVICE)


@pytest.mark.rounding
@pytest.mark.parametrize("how", ["fp32", "channels_last", "bf16", "autocast"])
def test_a_fused_unet_is_the_unet_and_unfuse_undoes_it(how):
    unet = make_unet().to(torch.bfloat16 if how == "bf16" else torch.float32)
    if how == "channels_last":
        unet.to(memory_format=torch.channels_last)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if how == "autocast" else contextlib.nullcontext()
    exact = run_unet(copy.deepcopy(unet).double())
    before, keys = structure(unet), list(unet.state_dict())
    rounding = bounds.network_rounding(unet, torch.bfloat16 if how in ("bf16", "autocast") else torch.float32)
    with autocast:
        plain = run_unet(unet, how == "channels_last")
        assert fuse(unet, TRITON) == dict(group_norm_silu=17, group_norm=4, geglu=4)
        fused = run_unet(unet, how == "channels_last")
        assert list(unet.state_dict()) == keys
        assert error(fused, exact) <= 2 * error(plain, exact) + rounding
        unfuse(unet)
        assert structure(unet) == before and list(unet.state_dict()) == keys
        assert all(torch.equal(a, b) for a, b in zip(run_unet(unet, how == "channels_last"), plain, strict=True))


@pytest.mark.parametrize(
    "changes, counts",
    [
        (dict(resnet_time_scale_shift="scale_shift"), dict(group_norm_silu=1, group_norm=20, geglu=4)),
        (dict(act_fn="gelu"), dict(group_norm_silu=0, group_norm=21, geglu=4)),
        (dict(resnet_skip_time_act=True, act_fn="silu"), dict(group_norm_silu=17, group_norm=4, geglu=4)),
        (  # attention whose GroupNorm is given (B, C, L)
            dict(down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D")),
            dict(group_norm_silu=17, group_norm=4, geglu=1),
        ),
    ],
)
def test_only_a_silu_right_behind_a_group_norm_goes_along(changes, counts):
    unet = make_unet(**changes).double()
    plain, before = run_unet(unet), structure(unet)
    assert fuse(unet, REFERENCE) == counts
    torch.testing.assert_close(run_unet(unet), plain)
    unfuse(unet)
    assert structure(unet) == before


def test_fusing_twice_is_refused_and_unfusing_twice_is_nothing():
    unet = make_unet()
    before = structure(unet)
    unfuse(unet)
    assert structure(unet) == before
    fuse(unet, REFERENCE)
    with pytest.raises(ValueError, match="unet: it is fused already"):
        fuse(unet, REFERENCE)
    unfuse(unet)
    unfuse(unet)
    assert structure(unet) == before


def test_a_norm_whose_class_is_not_group_norm_is_left_alone():
    class Other(nn.GroupNorm):
        pass

    unet = make_unet()
    unet.mid_block.resnets[0].norm1.__class__ = Other
    silu = unet.mid_block.resnets[0].nonlinearity
    assert fuse(unet, REFERENCE) == dict(group_norm_silu=15, group_norm=5, geglu=4)
    assert unet.mid_block.resnets[0].nonlinearity is silu


def test_a_fused_unet_can_be_copied_and_put_in_evaluation_mode():
    unet = make_unet()
    fuse(unet, REFERENCE)
    twin = copy.deepcopy(unet).eval()
    torch.testing.assert_close(run_unet(twin), run_unet(unet))
    unfuse(twin)
    assert not any(module.training for module in twin.modules())
    assert all(module.training for module in unet.modules())


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_is_added_before_or_after(lora_first):
    unet = make_unet()
    unet.requires_grad_(False)
    lora = LoraConfig(r=2, target_modules=["to_q", "ff.net.0.proj", "conv1"], init_lora_weights=False)
    if lora_first:
        unet.add_adapter(lora)
        keys = list(unet.state_dict())
        fuse(unet, TRITON)
    else:
        fuse(unet, TRITON)
        unet.add_adapter(lora)
        keys = list(unet.state_dict())
    fused = run_unet(unet)
    assert len(fused) > 2 + 8 and list(unet.state_dict()) == keys
    unfuse(unet)
    assert list(unet.state_dict()) == keys
    exact = run_unet(copy.deepcopy(unet).double())
    assert error(fused, exact) <= 2 * error(run_unet(unet), exact) + bounds.network_rounding(unet)
