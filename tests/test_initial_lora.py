"""lora.init: the model that a run starts from is the one that plain diffusers has with the same file; what does not fit is one line."""

import re
import shutil
from pathlib import Path

import bounds
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from shared import conditions, policy_of, run

from ddpo_fast import sample
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.networks.initial_lora import start_from
from ddpo_fast.places import LORA_FILE, is_lora
from ddpo_fast.policy import Policy
from ddpo_fast.records import kohya
from ddpo_fast.records.metrics import read_metrics

MID_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def make_policy(model: Path, **lora) -> Policy:
    return policy_of(model, **{"rank": 4, "alpha": 3.0} | lora)


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory) -> tuple[Path, Policy]:
    """The directory of a run with a LoRA on every kind of layer, also in kohya's format, and the policy that it is of."""
    folder, policy = tmp_path_factory.mktemp("run"), make_policy(tiny_model)
    torch.manual_seed(0)
    for parameter in policy.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    policy.export(folder)
    kohya.main([str(folder), "--output", str(folder / "kohya.safetensors")])
    return folder, policy


@pytest.fixture(scope="module")
def pipe(tiny_model) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)


def noise(unet, embeds) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return unet(latents, torch.tensor([481, 21]), encoder_hidden_states=embeds).sample


def of_diffusers(pipe, file: Path, embeds) -> torch.Tensor:
    """What plain diffusers predicts with a LoRA."""
    untrained = noise(pipe.unet, embeds)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    loaded = noise(pipe.unet, embeds)
    pipe.unload_lora_weights()
    assert (loaded - untrained).abs().max() > 1e-3
    return loaded


def kohya_of_its_own(tensors: dict) -> dict:
    """As sd-scripts may leave it: half precision, an alpha for each layer, not every layer, less rank in some."""
    layers = sorted({name.split(".")[0] for name in tensors})[::2]
    made = {}
    for number, layer in enumerate(layers):
        rank = 1 + number % 3
        made[f"{layer}.lora_down.weight"] = tensors[f"{layer}.lora_down.weight"][:rank].half().contiguous()
        made[f"{layer}.lora_up.weight"] = tensors[f"{layer}.lora_up.weight"][:, :rank].half().contiguous()
        made[f"{layer}.alpha"] = torch.tensor(0.5 + number % 5)
    return made


def older(tensors: dict) -> dict:
    """The names that diffusers gave attention's LoRA in 2023."""
    names = {"to_q.lora_A": "processor.to_q_lora.down", "to_q.lora_B": "processor.to_q_lora.up"}
    return {re.sub("|".join(names), lambda m: names[m[0]], name): t for name, t in tensors.items() if ".to_q." in name}


def fused(model: Path, file: Path, embeds) -> torch.Tensor:
    """What a UNet predicts whose weights have grown by alpha / r up down, by the definition of kohya's format."""
    tensors, policy = load_file(file), make_policy(model, scope="none")
    with torch.no_grad():
        for name, module in policy.network.named_modules():
            layer = f"lora_unet_{name.replace('.', '_')}"
            if f"{layer}.alpha" in tensors:
                down, up, alpha = (tensors[f"{layer}.{part}"].float() for part in ("lora_down.weight", "lora_up.weight", "alpha"))
                module.weight += (alpha / len(down) * up.flatten(1) @ down.flatten(1)).view_as(module.weight)
    return noise(policy.network, embeds)


FORMS = {
    "ours": lambda folder, tensors, kohya: folder,
    "diffusers without metadata": lambda folder, tensors, kohya: tensors,
    "diffusers of 2023": lambda folder, tensors, kohya: older(tensors),
    "kohya": lambda folder, tensors, kohya: kohya,
    "kohya of its own": lambda folder, tensors, kohya: kohya_of_its_own(kohya),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_model_that_diffusers_has(form, exported, tiny_model, pipe, tmp_path):
    folder, policy = exported
    content = FORMS[form](folder, load_file(folder / "lora" / LORA_FILE), load_file(folder / "kohya.safetensors"))
    init = file = content
    if isinstance(content, dict):
        init = file = tmp_path / "any name.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
    else:
        file = folder / "lora" / LORA_FILE
    started = make_policy(tiny_model, rank=5, alpha=2.0)
    said = start_from(started.pipe, str(init), "all")
    (embeds,) = conditions(started, ["a", "b"]).leaves
    expected = fused(tiny_model, file, embeds) if "its own" in form else of_diffusers(pipe, file, embeds)
    bounds.assert_same_output(noise(started.network, embeds), expected, started.network)
    assert re.search(r"lora.init=.*: \d+ of the \d+ layers that are trained, rank [1-4]( to [1-4])? of 5$", said)
    assert is_lora(str(init)) and not is_lora(str(tiny_model))


def test_with_the_same_options_it_is_the_very_same_lora(exported, tiny_model, pipe, tmp_path):
    folder, policy = exported
    for init in (folder, folder / "lora", folder / "lora" / LORA_FILE):
        started = make_policy(tiny_model)
        start_from(started.pipe, str(init), "all")
        assert all(torch.equal(a, b) for a, b in zip(started.trainable_parameters(), policy.trainable_parameters(), strict=True))
    policy.network.save_lora_adapter(tmp_path)  # names without unet.
    started = make_policy(tiny_model)
    start_from(started.pipe, str(tmp_path), "all")
    assert all(torch.equal(a, b) for a, b in zip(started.trainable_parameters(), policy.trainable_parameters(), strict=True))


def test_layers_that_it_lacks_start_as_usual(exported, tiny_model, tmp_path):
    tensors = {name: tensor for name, tensor in load_file(exported[0] / "lora" / LORA_FILE).items() if MID_Q in name}
    save_file(tensors, tmp_path / "one.safetensors")
    fresh, started = (torch.manual_seed(0) and make_policy(tiny_model) for _ in range(2))
    assert " 1 of the " in start_from(started.pipe, str(tmp_path / "one.safetensors"), "all")
    for (name, a), (_, b) in zip(fresh.network.named_parameters(), started.network.named_parameters(), strict=True):
        assert torch.equal(a, b) != (f"{MID_Q}.lora_" in name)


def changed(add=None, drop="!", rename=lambda name: name):
    return lambda tensors: {rename(n): t for n, t in tensors.items() if drop not in n} | (add or {})


BAD = {
    "text encoder": (changed({"text_encoder.x.lora_A.weight": torch.ones(1, 1)}), {}, "it also has layers of the text_encoder, which"),
    "DoRA": (changed({f"unet.{MID_Q}.lora_magnitude_vector": torch.ones(1)}), {}, "lora_magnitude_vector is of another kind"),
    "LoHa": (lambda t: {"lora_unet_x.hada_w1_a": torch.ones(1)}, {}, "lora_unet_x.hada_w1_a is of another kind than LoRA's A and B"),
    "difference": (lambda t: {"lora_unet_x.diff": torch.ones(1)}, {}, "lora_unet_x.diff is of another kind than LoRA's A and B"),
    "rank": (changed(), {"rank": 3}, "lora.rank=3: lora.init=.* has rank 4; valid is 4 or more"),
    "targets": (changed(), {"targets": ["attention"]}, r"lora.targets=\['attention'\]: .*conv.*; valid is \['attention', 'feed_forward', "),
    "scope": (changed(), {"scope": "mid_up"}, "lora.scope=mid_up: .* has down_blocks.0.*; valid is a scope with that block, such as all"),
    "conv_in": (
        changed({"unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(16, 1, 1, 1)}), {},
        "has conv_in, which is never trained here",
    ),
    "other names": (changed(rename=lambda name: name.replace("mid_block", "mid")), {}, "the model has no layer for mid.attentions"),
    "other shapes": (changed({f"unet.{MID_Q}.lora_A.weight": torch.ones(4, 7)}), {}, r"is \(4, 7\), for a layer of \(32, 32\): it is of "),
    "half of a layer": (changed(drop=f"{MID_Q}.lora_B"), {}, "it has no layers, or one without A or B"),
    "bias": (changed({f"unet.{MID_Q}.lora_B.bias": torch.ones(32)}), {}, "the model has no layer for .*lora_B.bias"),
    "left over": (lambda t: {"lora_unet_x.alpha": torch.tensor(1.0)}, {}, "keys have not been correctly renamed: lora_unet_x.alpha"),
    "empty": (lambda t: {}, {}, "it has no layers"),
}  # fmt: skip


@pytest.mark.parametrize("change, options_, message", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_one_line(change, options_, message, exported, tiny_model, tmp_path):
    file = tmp_path / "bad.safetensors"
    save_file(change(load_file(exported[0] / "lora" / LORA_FILE)), file)
    policy = make_policy(tiny_model, **options_)
    with pytest.raises(ValueError) as raised:
        start_from(policy.pipe, str(file), options_.get("scope", "all"))
    assert re.match("(lora.init=.*bad.safetensors: it cannot be loaded: |)?.*" + message, str(raised.value)) and "\n" not in str(
        raised.value
    )


def test_mistakes_before_anything_is_loaded(exported, tiny_model, tmp_path):
    folder, _ = exported
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 100)
    for argv, message in (
        (["--lora.init=nowhere.safetensors"], "lora.init=.*nowhere.safetensors: valid is the directory of a run, a folder with"),
        ([f"--lora.init={tiny_model}"], "lora.init=.*: valid is the directory of a run"),
        ([f"--lora.init={tmp_path}/damaged.safetensors"], "lora.init=.*: valid is the directory of a run"),
        ([f"--lora.init={folder}", "--lora.scope=none"], "lora.init=.*: valid is null, when lora.scope is none: there is no LoRA to start"),
        (
            [f"--model.path={folder}"],
            "model.path=.*: valid is a whole model; this is a LoRA: lora.init starts from it, beside the model.path",
        ),
        ([f"--model.path={folder}/lora"], "model.path=.*: valid is a whole model; this is a LoRA"),
        ([f"--model.path={folder}/kohya.safetensors"], "model.path=.*: valid is a whole model; this is a LoRA"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(argv)


def test_a_run_starts_where_the_fused_model_does_and_resumes_without_the_file(exported, pipe, options, tmp_path):
    folder, _ = exported
    init = Path(shutil.copy(folder / "kohya.safetensors", tmp_path / "init.safetensors"))
    pipe.load_lora_weights(tmp_path, weight_name="init.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    lora = {"lora__rank": 4, "run__iterations": 1, "train__kl_coefficient": 1.0}
    whole = run(options("fused_run", model__path=tmp_path / "fused", **lora))
    started = run(options("started", lora__init=init, **lora))
    rows = [read_metrics(directory) for directory in (whole, started)]
    assert rows[1][0]["eval_reward_mean"] == pytest.approx(rows[0][0]["eval_reward_mean"], rel=0, abs=bounds.of_run(whole).reward)
    assert rows[0][1]["kl_to_reference"] < 0.1 * rows[1][1]["kl_to_reference"]  # the reference is the bare model
    before = [
        sample.before_and_after(started, sample.read_config(started, more), ["a"], [0])[0].int() for more in ([], ["--lora.init=null"])
    ]
    assert (before[0] - before[1]).abs().max() > 3
    init.unlink()
    trainer.main([f"--run.dir={started}", "--resume", "--run.iterations=2"])
    assert len(read_metrics(started)) == 3 and "init.safetensors" in (started / "lora" / "README.md").read_text()
