"""A network's frozen weights in 4 or 8 bits under LoRA: the same run as with the numbers that those bits stand for."""

import shutil
import sys

import diffusers
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from shared import CPU, random_lora, relative_error, run, weights
from torch import nn

from ddpo_fast import assemble as assembling
from ddpo_fast import kernels
from ddpo_fast import train as trainer
from ddpo_fast.assemble import assemble, find, load_policy
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.networks.lora import block_names
from ddpo_fast.networks.merged_lora import lora_weights
from ddpo_fast.networks.quantized import KINDS, Nf4Linear, QuantizedLinear
from ddpo_fast.networks.scored_lora import score, unscore
from ddpo_fast.pipelines.folders import find_model, open_pipeline
from ddpo_fast.planning import plan as planning
from ddpo_fast.planning.counts import MIB, LiveBytes
from ddpo_fast.planning.plan import make_plan, phases_mib
from ddpo_fast.policy import Policy
from ddpo_fast.records.fingerprints import of_model
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.timing import StageTimer

TRIED = ["sd3", "flux", "qwen_image", "sana", "unet"]


@pytest.fixture
def made(flow_options, options):
    """Command lines of short runs on a family's pipeline, or on a UNet's."""

    def make(name: str, folder: str = "run", **changed) -> list[str]:
        if name == "unet":
            few = dict(train__num_minibatches=1, sample__num_samples=4, sample__batch_size=4, train__micro_batch=5, eval__num_samples=2)
            return options(folder, **few | {"lora__targets": '["attention"]'} | changed)
        return flow_options(name, folder, **changed)

    return make


def layers(network: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}


def made_whole(network: nn.Module) -> nn.Module:
    """Gives every quantised layer of a network a linear layer of the same numbers in its place."""
    for name, layer in layers(network).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=network.dtype)
        plain.weight, plain.bias = nn.Parameter(layer.whole(network.dtype), requires_grad=False), layer.bias
        place, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(place), leaf, plain)
    return network


def loaded(argv: list[str]) -> Policy:
    config = parse(argv)
    return load_policy(config, find(config), Ranks(), CPU, kernels.select("reference", CPU))[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 48), (10, 7), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_bitsandbytes_own(kind, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().to(dtype)
    weight[0] = 0  # which has no largest
    layer = KINDS[kind](nn.Linear(shape[1], shape[0]))
    sizes = layer.weight.nbytes, layer.scales.nbytes
    layer.take(weight)
    assert sizes == (layer.weight.nbytes, layer.scales.nbytes)
    if kind == "nf4":
        assert torch.equal(layer.whole(dtype), dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", blocksize=64)))
    else:
        codes, largest, _ = int8_vectorwise_quant(weight.half())
        ours = layer.weight.view(torch.int8).view(shape)
        assert (ours.int() - codes).abs().max() <= 1 and torch.equal(layer.scales.view(torch.float32)[1:], largest[1:] / 127)
        assert ((layer.whole(torch.float32) - weight).abs() <= layer.scales.view(torch.float32)[:, None] / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", TRIED)
def test_a_network_is_read_quantised(family, tiny_model, name):
    """The linear layers in its blocks have the codes of its weights; all else is as without, tables that are not saved included."""
    path = str(tiny_model if name == "unet" else family(name))
    part = find_model(path).family.network
    found, plain = (getattr(open_pipeline(find_model(path, quantize=how), torch.bfloat16), part) for how in ("nf4", "none"))
    inside = [name for name, module in plain.named_modules() if type(module) is nn.Linear and name.startswith(tuple(block_names(plain)))]
    assert list(layers(found)) == inside and found.dtype == plain.dtype == torch.bfloat16
    stored = load_file(next((tiny_model if name == "unet" else family(name)).joinpath(part).glob("*.safetensors")))
    for name, layer in layers(found).items():
        assert torch.equal(layer.whole(torch.float32), dequantize_4bit(*quantize_4bit(stored[f"{name}.weight"], quant_type="nf4"))), name
    others, expected = found.state_dict(), plain.state_dict()
    for name in [name for name in others if name.removesuffix(".weight").removesuffix(".scales") not in layers(found)]:
        assert torch.equal(others[name], expected[name]) and others[name].dtype == expected[name].dtype
    for (name, ours), (other, theirs) in zip(found.named_buffers(), plain.named_buffers(), strict=True):
        assert name == other and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_numbers_that_the_codes_stand_for(made, name, kind):
    """The output to the bit and the gradient to rounding: the same sums in every layer. So with each sample's gradient apart."""
    policy = loaded(made(name, model__quantize=kind, model__dtype="fp32"))
    random_lora(policy)
    recording = next(iter(policy._recordings.values()))
    texts, rows = policy.texts(recording, ["a"])
    given, count = texts.conditions(rows), recording.num_outputs
    x, times = torch.randn(count, *recording.shape, generator=torch.Generator().manual_seed(0)), recording.times[1].expand(count)

    def called() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy.network.zero_grad()
        out = policy.predict(x, times, given)
        out.square().mean().backward()
        return out.detach(), {name: p.grad for name, p in policy.network.named_parameters() if p.grad is not None and p.grad.any()}

    ours, (found, gradient) = layers(policy.network), called()
    sampled = score(policy.network)
    for layer in sampled:
        _, A, B = lora_weights(layer)
        layer.leaves = [torch.zeros(1, *shape, requires_grad=True) for shape in (A.shape, B.T.shape)]
        for leaf in layer.leaves:
            leaf.grad = torch.zeros_like(leaf)
    out = policy.predict(x, times, given)
    out.square().mean().backward()
    scores = {(layer, place): leaf.grad[0] for layer in sampled for place, leaf in enumerate(layer.leaves)}
    torch.testing.assert_close(out.detach(), found, rtol=1e-4, atol=1e-5)
    unscore(policy.network)
    names = {parameter: name for name, parameter in policy.network.named_parameters()}
    apart = {}
    for (layer, place), total in scores.items():
        total = total if place == 0 else layer.scaling["default"] * total.T
        if total.any():  # the last block's text has no gradient
            apart[names[lora_weights(layer)[1 + place]]] = total
    assert relative_error(apart, gradient) < 1e-4
    made_whole(policy.network)
    plain, expected = called()
    assert ours and not layers(policy.network) and torch.equal(found, plain)
    assert relative_error(gradient, expected) <= 4 * torch.finfo(torch.float32).eps * len(ours)


@pytest.mark.parametrize("name", TRIED)
def test_its_lora_loads_onto_a_plain_pipeline(made, family, tiny_model, tmp_path, name):
    """Which gives the policy's own bits if its weights are the numbers that the codes stand for."""
    policy = loaded(made(name, model__quantize="nf4", model__dtype="fp32", kernels__backend="reference"))
    random_lora(policy)
    policy.export(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tiny_model if name == "unet" else family(name))
    pipe.load_lora_weights(tmp_path / "lora")
    network, own = getattr(pipe, policy.family.network), layers(policy.network)
    for place, layer in network.named_modules():
        if place in own and type(layer) is nn.Linear or f"{place}.base_layer" in own:
            numbers = own[place] if place in own else own[f"{place}.base_layer"]
            getattr(layer, "base_layer", layer).weight.data = numbers.whole(torch.float32)
    recording = next(iter(policy._recordings.values()))
    texts, rows = policy.texts(recording, ["a"])
    x, times = torch.randn(recording.num_outputs, *recording.shape), recording.times[1].expand(recording.num_outputs)
    with torch.no_grad():
        assert torch.equal(texts.conditions(rows).call(network, x, times), policy.predict(x, times, texts.conditions(rows)))


@pytest.mark.parametrize("name, kind", [("sd3", "nf4"), ("unet", "int8")])
def test_a_run_resumes(made, name, kind):
    """Micro-batches mix samples and steps: the ratio before an update is 1 to rounding. A cache and checkpointing change no bit."""
    changed = dict(model__quantize=kind, lora__scope="last:0.5")
    whole = run(made(name, cache__mode="on", **changed))
    assert all(row["ratio_error"] < 1e-4 for row in read_metrics(whole)[1:])
    changed |= dict(cache__mode="off", train__gradient_checkpointing="true")
    run(made(name, "parts", run__iterations=1, **changed))
    parts = run([f"--run.dir={whole.parent / 'parts'}", "--resume", "--run.iterations=2"])
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True))


def test_half_precision_at_zero_2(made):
    folder = run(made("sd3", model__quantize="int8", model__dtype="bf16", zero__stage=2, run__iterations=1))
    row = read_metrics(folder)[-1]
    assert row["grad_norm"] > 0 and row["bad_rewards"] == 0


def test_a_weight_that_changes_changes_the_fingerprint(family, tmp_path):
    path = shutil.copytree(family("sd3"), tmp_path / "model")
    found = [of_model(open_pipeline(find_model(str(path), quantize=how), torch.float32), "transformer", True) for how in ("nf4", "none")]
    (file,) = (path / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["transformer_blocks.1.attn.to_q.weight"][0] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    found.append(of_model(open_pipeline(find_model(str(path), quantize="nf4"), torch.float32), "transformer", True))
    name = "model.path (the transformer weights)"
    assert len({each[name] for each in found}) == 3 and all(each.keys() == found[0].keys() for each in found)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"lora__forward": "merged"},
            r"lora.forward=merged: valid is auto or separate, with model.quantize=nf4: so few bits would",
        ),
        ({"lora__scope": "none"}, r"model.quantize=nf4: valid is none, when lora.scope is none: weights of so few bits cannot be trained"),
        ({"zero__stage": 3}, r"model.quantize=nf4: valid is none, with zero.stage=3: ZeRO 3 partitions whole weights"),
        ({"model__compile": "true"}, r"model.compile=true: valid is false, with model.quantize=nf4: torch.compile ends with an error"),
    ],
)
def test_what_does_not_go_together_is_one_line(options, changed, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse(options(model__quantize="nf4", **changed))


def test_a_library_that_does_not_run_here_is_one_line(options, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel\nfor this GPU")

    monkeypatch.setattr(assembling, "load_policy", lambda *_: pytest.fail("the model was read"))
    monkeypatch.setattr(Nf4Linear, "quantized", fails)
    line = "^model.quantize=nf4: it does not run on this cpu: RuntimeError: no kernel for this GPU; valid is none$"
    with pytest.raises(ValueError, match=line):
        assemble(parse(options(model__quantize="nf4")))


def test_what_is_missing_is_one_line(options, monkeypatch, tmp_path):
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(ValueError, match="^model.quantize=int8: valid is none with a single file as model.path, whose"):
        parse(options(model__path=tmp_path / "one.safetensors", model__config=parse(options()).model.path, model__quantize="int8"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="^model.quantize=nf4: valid is none or int8 where bitsandbytes is not installed$"):
        parse(options(model__quantize="nf4"))


def test_damaged_weights_are_one_line(family, tmp_path):
    path = shutil.copytree(family("sd3"), tmp_path / "model")
    (file,) = (path / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    for name, wrong, message in (
        ("transformer_blocks.1.attn.to_q.weight", torch.zeros(3, 3), r"a weight is \(3, 3\), not \(32, 32\)"),
        ("proj_out.weight", torch.zeros(3, 3), r"proj_out.weight is \(3, 3\), not \(16, 32\)"),
        ("proj_out.weight", None, "the weights of its SD3Transformer2DModel lack proj_out.weight"),
    ):
        save_file({key: value for key, value in (tensors | {name: wrong}).items() if value is not None}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"^model.path=\S+: .*{message}"):
            open_pipeline(find_model(str(path), quantize="int8"), torch.float32)


@pytest.fixture(scope="module")
def wide(family, tmp_path_factory):
    """Stable Diffusion 3 with a network of 10 M weights, of which a run on few rows is."""
    path = shutil.copytree(family("sd3"), tmp_path_factory.mktemp("wide") / "model")
    shutil.rmtree(path / "transformer")
    with torch.random.fork_rng():
        diffusers.SD3Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=64, num_attention_heads=4,
            joint_attention_dim=64, caption_projection_dim=256, pooled_projection_dim=64, pos_embed_max_size=16,
        ).save_pretrained(path / "transformer")  # fmt: skip
    return path


def test_an_iteration_needs_what_its_plan_says(flow_options, wide, monkeypatch):
    """All that is alive at the peak: of a run whose weights are most of it. A layer's whole weights, of one at a time, count."""
    monkeypatch.setattr(planning, "matmul_flops", lambda *_: 1e12)
    few = dict(sample__num_samples=2, sample__num_steps=3, train__micro_batch=2, train__gradient_checkpointing="true", cache__mode="off")
    argv = flow_options("sd3", model__path=wide, model__quantize="nf4", model__dtype="fp32", lora__forward="separate", **few)
    plan, made = make_plan(parse([*argv, "--plan"])), assemble(parse(argv))
    parts = [part for part in made.policy.pipe.components.values() if isinstance(part, nn.Module)]
    frozen = sum(p.nbytes for part in parts for p in part.parameters())
    with LiveBytes() as live:
        trainer.improve(made, StageTimer(CPU), 1)
    planned = max(phases_mib(plan.memory).values())
    assert planned == pytest.approx((frozen + live.peak) / MIB, rel=0.1)
    assert plan.memory["frozen weights"] > 0.5 * planned
    assert plan.counts.weight_bytes["transformer"] == sum(p.nbytes for p in made.policy.network.parameters() if not p.requires_grad)
