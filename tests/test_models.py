"""Which models can be opened: v-prediction, single files as Stable Diffusion was first published, what is refused and why."""

import json
import re
import shutil
from pathlib import Path

import bounds
import pytest
import torch
from counted import architecture
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from shared import REDNESS, command_line, conditions, kept, policy_of
from tiny import make_pipeline, make_sdxl

from ddpo_fast import train as trainer
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.kernels.reference import normal_noise
from ddpo_fast.pipelines.folders import find_model, open_pipeline
from ddpo_fast.planning.plan import sized
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.schedule import Levels, Schedule

EPS = torch.finfo(torch.float32).eps


def options(folder: Path, path: Path, **changed) -> list[str]:
    """A short run's command line: keyword arguments with __ for the dot."""
    (folder / "reward.py").write_text(REDNESS)
    values = {
        "model.path": path, "run.dir": folder / "run", "reward.name": f"{folder}/reward.py:redness", "sample.num_samples": 4,
        "sample.num_steps": 3, "sample.batch_size": 4, "eval.num_samples": 2, "run.iterations": 1, "train.num_minibatches": 1,
        "lora.rank": 2, "prompts.limit": 4, "prompts.samples_per_prompt": 1,
    }  # fmt: skip
    return command_line(values, changed)


@pytest.mark.rounding
def test_v_prediction(tmp_path):
    """A run; and diffusers' DDIM with the saved LoRA makes the trained policy's own transitions, given its noise."""
    path = make_pipeline(tmp_path / "v", prediction_type="v_prediction")
    trainer.main(options(tmp_path, path, train__micro_batch=4))
    row = read_metrics(tmp_path / "run")[1]
    assert row["ratio_error"] <= bounds.of_run(tmp_path / "run").ratio and row["grad_norm"] > 0

    made = assemble(parse(options(tmp_path, path, run__dir=tmp_path / "other", sample__guidance_scale=1)))
    for parameter in made.policy.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rollout = kept(made, ["a", "b"], 7)
    made.policy.export(made.directory.path)
    pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None, requires_safety_checker=False)
    pipe.load_lora_weights(made.directory.path / "lora")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(3)
    embeds = pipe.encode_prompt(["a", "b"], "cpu", 1, False)[0]
    for k, t in enumerate(scheduler.timesteps):
        x = rollout.latents[:, k]
        noise = normal_noise(0, torch.tensor([7, 8]), torch.tensor([k, k]), x[0].numel()).view(x.shape).float()
        with torch.no_grad():
            out = pipe.unet(x, t, encoder_hidden_states=embeds).sample
        y = scheduler.step(out, t, x, eta=1.0, variance_noise=noise).prev_sample
        # the network's output; the scheduler's fp32 product of t factors 1 - beta, in a_t and, less 1, in s
        size = (bounds.network_rounding(pipe.unet) + 3 * 0.2 * EPS * t.item() ** 0.5) * rollout.latents[:, k : k + 2].std().item() + 4 * EPS
        assert (rollout.latents[:, k + 1] - y).abs().max() <= bounds.SIGMAS * size


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "down_blocks": "down", "resnets": "block", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample", "mid_block.block.0": "mid.block_1", "mid_block.block.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def renamed(name: str, parts: dict[str, str]) -> str:
    for new, old in parts.items():
        name = name.replace(new, old)
    return name


def unet_first_published(unet) -> dict[str, torch.Tensor]:
    """Of one layer a down block, two an up block."""
    weights = {}
    for name, tensor in unet.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "mid_block":
            kind, index, rest = rest.split(".", 2)
            place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
        elif part in ("down_blocks", "up_blocks"):
            level, kind, index, rest = rest.split(".", 3)
            has_attention = "CrossAttn" in type(getattr(unet, part)[int(level)]).__name__
            if part == "down_blocks":
                place = f"input_blocks.{2 * int(level) + 1 + (kind == 'downsamplers')}.{int(kind == 'attentions')}"
            else:
                position = {"resnets": 0, "attentions": 1, "upsamplers": 1 + has_attention}[kind]
                place = f"output_blocks.{2 * int(level) + (1 if kind == 'upsamplers' else int(index))}.{position}"
        else:
            weights[renamed(name, UNET)] = tensor
            continue
        rest = renamed(rest, RESNET if kind == "resnets" else {"conv": "op"} if kind == "downsamplers" else {})
        weights[f"{place}.{rest}"] = tensor
    return weights


def vae_first_published(vae) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in vae.state_dict().items():
        if ".attentions." in name:
            name, tensor = renamed(name, VAE_ATTENTION), tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        name = renamed(name, VAE)
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{len(vae.decoder.up_blocks) - 1 - int(found[1])}", name)
        weights[name] = tensor
    return weights


def open_clip_first_published(encoder) -> dict[str, torch.Tensor]:
    state, weights = encoder.state_dict(), {}
    weights["text_projection"] = state.pop("text_projection.weight").T
    for name, tensor in state.items():
        old = renamed(name.removeprefix("text_model."), OPEN_CLIP)
        if ".q_proj." in name:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            weights[old.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            weights[old] = tensor
    return weights


def first_published(pipe) -> dict[str, torch.Tensor]:
    """A pipeline's weights under the names that Stable Diffusion's were first published with."""
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_first_published(pipe.unet).items()}
    weights |= {f"first_stage_model.{name}": tensor for name, tensor in vae_first_published(pipe.vae).items()}
    is_sdxl = "text_encoder_2" in pipe.components
    prefix = "conditioner.embedders.0.transformer.text_model." if is_sdxl else "cond_stage_model.transformer.text_model."
    weights |= {f"{prefix}{name}": tensor for name, tensor in pipe.text_encoder.state_dict().items()}
    if is_sdxl:
        second = open_clip_first_published(pipe.text_encoder_2)
        weights |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    return {name: tensor.contiguous() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def single_files(tmp_path_factory) -> dict[str, tuple[Path, Path, Path]]:
    """By kind: the pipeline's folder, the file of its weights, and a folder with its configs and tokenizers but no weights."""
    folder, found = tmp_path_factory.mktemp("single"), {}
    for kind, path in (("sd", make_pipeline(folder / "sd")), ("sdxl", make_sdxl(folder / "xl"))):
        save_file(first_published(DiffusionPipeline.from_pretrained(path)), folder / f"{kind}.safetensors")
        configs = folder / f"{kind}-configs"
        shutil.copytree(path, configs, ignore=shutil.ignore_patterns("*.safetensors"))
        found[kind] = path, folder / f"{kind}.safetensors", configs
    return found


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_single_file_is_the_pipeline(single_files, kind):
    """Every weight of every part, the same pictures, and no network."""
    path, file, configs = single_files[kind]
    one, other = policy_of(path, scope="none"), policy_of(file, "fp32", str(configs), scope="none")
    parts = [name for name, part in one.pipe.components.items() if isinstance(part, torch.nn.Module)]
    assert len(parts) == (4 if kind == "sdxl" else 3)
    for name in parts:
        expected, found = (getattr(policy.pipe, name).state_dict() for policy in (one, other))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected), name
    assert all(map(torch.equal, conditions(one, ["ab"]).leaves, conditions(other, ["ab"]).leaves))
    assert torch.equal(one.example_call(2), other.example_call(2))


def test_a_run_from_a_single_file(single_files, tmp_path):
    _, file, configs = single_files["sd"]
    trainer.main(options(tmp_path, file, model__config=configs, train__micro_batch=4))
    row = read_metrics(tmp_path / "run")[1]
    assert row["ratio_error"] <= bounds.of_run(tmp_path / "run").ratio and row["grad_norm"] > 0


def test_the_plan_of_a_single_file_counts_its_configs(single_files, tmp_path, capsys, monkeypatch):
    path, file, configs = single_files["sdxl"]
    seen = []

    def count(arch, *args, **kwargs):
        seen.append(arch)
        raise ValueError("counted")

    monkeypatch.setattr("ddpo_fast.planning.plan.count_model", count)
    assert error_of([*options(tmp_path, file, model__config=configs), "--plan=H200"], capsys) == "error: counted\n"
    arch = architecture(str(path))
    assert seen == [arch | {"unet": sized(arch, None, None)}] and "text_encoder_2" in seen[0]


def test_another_vae_with_a_single_file(single_files, tmp_path):
    path, file, configs = single_files["sdxl"]
    torch.manual_seed(3)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(path, subfolder="vae"))
    vae.save_pretrained(tmp_path / "vae")
    policy = policy_of(file, "fp32", str(configs), str(tmp_path / "vae"), scope="none")
    assert all(torch.equal(a, b) for a, b in zip(policy.pipe.vae.state_dict().values(), vae.state_dict().values(), strict=True))


def error_of(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit, match="2"):
        trainer.main(argv)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    "path, config, message",
    [
        ("{file}", None, "model.config=None: valid is with model.path=FILE.safetensors a folder with model_index.json, or a hub id"),
        ("{folder}", "{configs}", "a pipeline of the same layout; else null"),
        ("{tmp}/m.ckpt", "{configs}", "m.ckpt: valid is .* not a .ckpt, a pickle, which runs code when it is loaded"),
        ("{tmp}/none.safetensors", "{configs}", "none.safetensors: valid is a folder"),
        ("none/none.safetensors", "{configs}", "none.safetensors: valid is a folder"),
        (
            "{tmp}/lora.safetensors",
            "{configs}",
            r"lora.safetensors: it holds no model.diffusion_model.\*; valid is a whole checkpoint, of a ",
        ),
        ("{tmp}/broken.safetensors", "{configs}", "model.path=.*broken.safetensors: .*[Hh]eader"),
        ("{tmp}/unet.safetensors", "{configs}", r"model.path=.*unet.safetensors: it holds no first_stage_model.\*"),
        (
            "{file}",
            "{other}",
            r"model.path=.*sd.safetensors: it holds no conditioner.embedders.0.\*; .* of a StableDiffusionXLPipeline as model.config",
        ),
        ("{file}", "{tmp}/wide", "model.path=.*sd.safetensors: .*shape"),
    ],
)
def test_a_file_that_cannot_be_opened_is_one_line(single_files, tmp_path, capsys, path, config, message):
    folder, file, configs = single_files["sd"]
    unet = unet_first_published(DiffusionPipeline.from_pretrained(folder).unet)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}, tmp_path / "unet.safetensors")
    save_file({"unet.a": torch.ones(1)}, tmp_path / "lora.safetensors")
    shutil.copytree(configs, tmp_path / "wide")
    change(tmp_path / "wide" / "unet" / "config.json", block_out_channels=[16, 64])
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "m.ckpt").write_bytes(b"x")
    places = {"file": file, "folder": folder, "configs": configs, "tmp": tmp_path, "other": single_files["sdxl"][2]}
    changed = {} if config is None else {"model__config": config.format(**places)}
    assert re.search(message, error_of(options(tmp_path, path.format(**places), **changed), capsys))


@pytest.mark.parametrize(
    "kind, part, tensor",
    [
        ("sd", "text_encoder", "final_layer_norm.weight"),
        ("sdxl", "text_encoder", "encoder.layers.0.mlp.fc1.bias"),
        ("sdxl", "text_encoder_2", "text_projection.weight"),
    ],
)
def test_a_text_encoder_that_lacks_a_weight_is_refused(single_files, tmp_path, capsys, kind, part, tensor):
    """transformers itself would draw it at random."""
    model = shutil.copytree(single_files[kind][0], tmp_path / "model")
    tensors = load_file(model / part / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith(tensor)]
    save_file({key: tensors[key] for key in tensors if key != name}, model / part / "model.safetensors", metadata={"format": "pt"})
    error = error_of(options(tmp_path, model), capsys)
    assert re.fullmatch(rf"error: model.path={model}: {part}/\*.safetensors lack [\w.]*{tensor}\n", error)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "sampler, scheduler, unet, message",
    [
        ("LCMScheduler", {}, {}, "its scheduler is a LCMScheduler, whose steps are not DDIM's"),
        ("FlowMatchEulerDiscreteScheduler", {}, {}, "its scheduler is a FlowMatchEulerDiscreteScheduler"),
        ("DDIMScheduler", {}, {"time_cond_proj_dim": 256}, r"its UNet is given the guidance scale \(time_cond_proj_dim=256\)"),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, {}, r"is that of a model distilled to a few steps \(turbo\)"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {}, r"is that of a model distilled to a few steps \(turbo\)"),
    ],
)
def test_distilled_models_are_refused_before_weights_are_read(tmp_path, capsys, monkeypatch, sampler, scheduler, unet, message):
    """In a run and in a plan, of a folder; and of what a hub would give."""
    path = make_pipeline(tmp_path / "m")
    change(path / "model_index.json", scheduler=["diffusers", sampler])
    change(path / "scheduler" / "scheduler_config.json", _class_name=sampler, **scheduler)
    change(path / "unet" / "config.json", **unet)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    for more in ([], ["--plan=H200"]):
        assert re.search(message, error_of([*options(tmp_path, path), *more], capsys))
    with pytest.raises(ValueError, match=message):
        policy_of(path)


@pytest.mark.parametrize(
    "sampler, scheduler",
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_what_is_not_distilled_is_not_refused(tmp_path, sampler, scheduler):
    path = make_pipeline(tmp_path / "m")
    change(path / "model_index.json", scheduler=["diffusers", sampler])
    change(path / "scheduler" / "scheduler_config.json", _class_name=sampler, **scheduler)
    find_model(str(path))


@pytest.fixture(scope="module")
def both_kinds(single_files) -> dict[str, Path]:
    return {kind: paths[0] for kind, paths in single_files.items()}


@pytest.mark.parametrize(
    "kind, sampler, saved",
    [
        ("sd", "DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
        ("sd", "PNDMScheduler", {"steps_offset": 0}),
        ("sd", "DDIMScheduler", {"set_alpha_to_one": True}),
        ("sdxl", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "linspace", "set_alpha_to_one": None}),
        ("sdxl", "SASolverScheduler", {"timestep_spacing": "linspace"}),
        ("sdxl", "DDPMScheduler", {"steps_offset": 0}),
    ],
)
def test_any_sampler_gives_the_ddim_steps_and_says_so(both_kinds, tmp_path, kind, sampler, saved):
    """As after `pipe.scheduler = ...from_config(pipe.scheduler.config)` and `save_pretrained`, whose keys it has."""
    path = shutil.copytree(both_kinds[kind], tmp_path / "m")
    change(path / "model_index.json", scheduler=["diffusers", sampler])
    change(path / "scheduler" / "scheduler_config.json", _class_name=sampler, **saved)
    model, own = find_model(str(path)), DDIMScheduler.from_pretrained(both_kinds[kind] / "scheduler")
    (note,), pipe = model.notes, open_pipeline(model, torch.float32)
    tables = [Schedule.of(Levels.of_steps(scheduler, 10), "ddim", 1.0).coefficients for scheduler in (pipe.scheduler, own)]
    key = next(iter(saved))
    assert torch.equal(*tables) and note.startswith(f"model.path={path}: the steps are DDIM's with ") and f"{key}={saved[key]}" in note


def test_a_run_says_which_steps_it_takes(both_kinds, tmp_path, capsys):
    path = shutil.copytree(both_kinds["sd"], tmp_path / "m")
    change(path / "scheduler" / "scheduler_config.json", timestep_spacing="linspace")
    assemble(parse(options(tmp_path, path)))
    expected = "the steps are DDIM's with timestep_spacing=leading; its scheduler_config.json has timestep_spacing=linspace"
    assert capsys.readouterr().out == f"model.path={path}: {expected}\n"


def test_levels_of_noise_that_are_no_betas_are_refused(both_kinds, tmp_path):
    path = shutil.copytree(both_kinds["sdxl"], tmp_path / "m")
    change(path / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    change(path / "scheduler" / "scheduler_config.json", timestep_type="continuous")
    with pytest.raises(ValueError, match=f"model.path={path}: its scheduler has timestep_type=continuous"):
        find_model(str(path))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_names_of_older_files(single_files, tmp_path, kind):
    """A text encoder's without text_model., as before transformers 4; all inside state_dict; EMA's beside them; position_ids."""
    path, file, configs = single_files[kind]
    tensors = {
        f"state_dict.{name.replace('.transformer.text_model.', '.transformer.')}": tensor for name, tensor in load_file(file).items()
    }
    assert not any(".text_model." in name for name in tensors)
    prefix = next(name for name in tensors if name.endswith("embeddings.position_embedding.weight")).rsplit(".", 2)[0]
    tensors |= {f"{prefix}.position_ids": torch.arange(8)[None], "state_dict.model_ema.decay": torch.ones(())}
    save_file(tensors, tmp_path / "old.safetensors")
    one, other = (
        open_pipeline(find_model(*where), torch.float32) for where in ((str(path),), (str(tmp_path / "old.safetensors"), str(configs)))
    )
    for name, part in one.components.items():
        if isinstance(part, torch.nn.Module):
            expected, found = part.state_dict(), getattr(other, name).state_dict()
            assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected), name


def test_a_text_encoder_of_open_clip(single_files, tmp_path):
    """As Stable Diffusion 2 has it, with a layer more than its config, whose last one is not used."""
    path, file, configs = single_files["sd"]
    encoder = open_pipeline(find_model(str(path)), torch.float32).text_encoder
    state = {f"text_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    encoder.state_dict = lambda: {**state, "text_projection.weight": torch.eye(16)}
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("cond_stage_model.")}
    tensors |= {f"cond_stage_model.model.{name}": tensor.contiguous() for name, tensor in open_clip_first_published(encoder).items()}
    save_file(tensors, tmp_path / "v2.safetensors")
    found = open_pipeline(find_model(str(tmp_path / "v2.safetensors"), str(configs)), torch.float32).text_encoder.state_dict()
    assert len(found) == len(state) and all(torch.equal(found[name.removeprefix("text_model.")], state[name]) for name in state)


@pytest.mark.parametrize("layout", ["diffusers", "diffusers before 0.18", "bare", "first_stage_model."])
def test_a_vae_in_a_single_file(single_files, tmp_path, layout):
    """With a folder, whose VAE's config it has; beside what is no part of it."""
    path, file, configs = single_files["sd"]
    torch.manual_seed(3)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(path, subfolder="vae"))
    tensors = vae.state_dict() if "diffusers" in layout else vae_first_published(vae)
    if "0.18" in layout:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = {renamed(name, old): tensor for name, tensor in tensors.items()}
    prefix = layout if layout.endswith(".") else ""
    save_file(
        {f"{prefix}{name}": t.contiguous() for name, t in tensors.items()} | {"loss.logvar": torch.ones(1)}, tmp_path / "vae.safetensors"
    )
    for where in ((str(path), None), (str(file), str(configs))):
        found = open_pipeline(find_model(*where, vae=str(tmp_path / "vae.safetensors")), torch.float32).vae.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize(
    "change, message", [(lambda t: t.clear(), r"it holds no decoder.\*"), (lambda t: t.pop("decoder.conv_in.weight"), "lack")]
)
def test_a_file_that_is_no_vae_is_one_line(single_files, tmp_path, change, message):
    path = single_files["sd"][0]
    tensors = load_file(path / "vae" / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors | {"x": torch.ones(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=f"^model.vae={tmp_path}/vae.safetensors: [^\n]*{message}[^\n]*$"):
        open_pipeline(find_model(str(path), vae=str(tmp_path / "vae.safetensors")), torch.float32)


def test_a_vae_in_a_folder_that_lacks_a_weight_is_named_by_its_option(single_files, tmp_path):
    path = single_files["sd"][0]
    folder = shutil.copytree(path / "vae", tmp_path / "vae")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"^model.vae={folder}: the weights of its AutoencoderKL lack decoder.conv_in.weight$"):
        open_pipeline(find_model(str(path), vae=str(folder)), torch.float32)
