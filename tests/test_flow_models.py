"""Folders of flow transformers: found by their class's signature, tried before weights are read, opened; or refused in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from families import CALL, FAMILIES, OTHERS
from shared import CPU

from ddpo_fast.assemble import begin
from ddpo_fast.config.command_line import parse
from ddpo_fast.pipelines import families
from ddpo_fast.pipelines.folders import Model, find_model, open_pipeline
from ddpo_fast.pipelines.recorder import Recorder
from ddpo_fast.pipelines.skeleton import lightened, on_meta
from ddpo_fast.pipelines.template import Asked, Recording

OWN = {"height", "width", "guidance_scale", "true_cfg_scale", "negative_prompt"}
ARGUMENTS = {name: {key: value for key, value in given.items() if key not in OWN} for name, given in CALL.items()}
"""Of each family's call: model.arguments."""


def asked_of(name: str) -> Asked:
    given = CALL[name]
    return Asked(3, given.get("true_cfg_scale", given.get("guidance_scale")), given["height"], given["width"])


def found(folder: Path, name: str, **options) -> Model:
    return find_model(str(folder), arguments=ARGUMENTS[name], **options)


def shapes(recording: Recording) -> tuple:
    """What of a template does not depend on the networks' weights."""

    def shape(leaf):
        return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else list(map(shape, leaf)) if isinstance(leaf, list) else leaf

    template = recording.template
    return recording.digest, recording.branches, template.spec, template.dims, template.shape, [shape(leaf) for leaf in template.leaves]


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def copied(family, tmp_path):
    """A copy of a family's folder, which a test may damage."""
    return lambda name: shutil.copytree(family(name), tmp_path / name)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_skeleton_is_recorded_as_the_pipeline_with_weights(family, name):
    model, asked, before = found(family(name), name), asked_of(name), torch.get_rng_state()
    recording = model.record(asked)
    model.check_networks(asked)
    assert torch.equal(torch.get_rng_state(), before)
    pipe, plain = open_pipeline(model, torch.float32), DiffusionPipeline.from_pretrained(family(name))
    assert type(pipe) is type(plain) and model.family is families.FAMILIES[type(pipe).__name__]
    for part in model.weights:
        ours, theirs = getattr(pipe, part).state_dict(), getattr(plain, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {part: type(made) for part, made in pipe.components.items()} == {part: type(made) for part, made in plain.components.items()}
    pipe.set_progress_bar_config(disable=True)
    assert shapes(recording) == shapes(Recorder(pipe, model.family, CPU, model.arguments).record(asked))
    assert shapes(recording) == shapes(model.record(Asked(3, asked.guidance_scale, asked.height, asked.width)))


@pytest.mark.parametrize("kind", ["tiny_model", "sdxl"])
def test_the_skeleton_of_a_unet_is_recorded_too(request, kind):
    model, asked = find_model(str(request.getfixturevalue(kind))), Asked(3, 5.0)
    pipe = open_pipeline(model, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert shapes(model.record(asked)) == shapes(Recorder(pipe, model.family, CPU).record(asked))


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_in_half_precision_times_are_rounded_as_they_will_be(family, name):
    model, asked, cpu = found(family(name), name), asked_of(name), CPU
    skeleton, pipe = model.skeleton(torch.bfloat16), open_pipeline(model, torch.bfloat16)
    assert {part.dtype for part in (skeleton.transformer, skeleton.vae, pipe.transformer, pipe.vae)} == {torch.bfloat16}
    pipe.set_progress_bar_config(disable=True)
    half, opened = (Recorder(made, model.family, cpu, model.arguments).record(asked) for made in (skeleton, pipe))
    assert shapes(half) == shapes(opened) and half.digest != model.record(asked).digest


def test_a_vae_that_overflows_in_fp16_stays_in_fp32(family, copied):
    path = copied("sd3")
    assert open_pipeline(found(path, "sd3"), torch.float16).vae.dtype == torch.float32
    change(path / "vae" / "config.json", force_upcast=False)
    pipe = open_pipeline(found(path, "sd3"), torch.float16)
    assert {part.dtype for part in (pipe.vae, pipe.transformer, pipe.text_encoder)} == {torch.float16}


def test_light_text_encoders_take_no_memory_and_know_their_tokens():
    config = {"hidden_size": 3584, "vocab_size": 150_000, "num_hidden_layers": 3, "num_attention_heads": 28, "head_dim": 128}
    encoder = lightened(on_meta(transformers.Qwen3ForCausalLM, config))
    assert sum(weight.untyped_storage().nbytes() for weight in encoder.parameters()) < 1000
    tokens = torch.tensor([[5, 6, 7], [5, 149_999, 7]])
    out = encoder(tokens, output_hidden_states=True)
    assert out.logits.shape == (2, 3, 150_000) and [state.shape for state in out.hidden_states] == 4 * [(2, 3, 3584)]
    for state in out.hidden_states:
        assert state.isfinite().all() and torch.equal(state[0, 0], state[1, 0]) and not torch.equal(state[0, 1], state[1, 1])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers with NumPy 2
def test_sana_keeps_its_own_sampler(copied):
    path = copied("sana")
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(path / "scheduler")
    change(path / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    model = found(path, "sana")
    assert type(open_pipeline(model, torch.float32).scheduler) is DPMSolverMultistepScheduler
    sigmas = model.record(asked_of("sana")).sigmas
    assert len(sigmas) == 4 and (sigmas.diff() < 0).all() and sigmas[-1] == 0


def test_a_model_goes_without_parts(family, copied):
    """As an option says, or as model_index.json does."""
    nothing, path, asked = {"text_encoder_3": None, "tokenizer_3": None}, copied("sd3"), asked_of("sd3")
    model = found(family("sd3"), "sd3", parts=nothing)
    model.check_networks(asked)
    pipe, plain = open_pipeline(model, torch.float32), DiffusionPipeline.from_pretrained(family("sd3"), **nothing)
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None and "text_encoder_3" not in model.weights
    plain.set_progress_bar_config(disable=True)
    assert shapes(model.record(asked)) == shapes(Recorder(plain, model.family, CPU, model.arguments).record(asked))
    change(path / "model_index.json", **dict.fromkeys(nothing, [None, None]))
    shutil.rmtree(path / "text_encoder_3")
    assert shapes(found(path, "sd3").record(asked)) == shapes(model.record(asked))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sd3", {"parts": {"text_encoder_3": "t5"}}, r'model.parts={"text_encoder_3": "t5"}: valid is null for some of .*text_encoder_3'),
        ("sd3", {"parts": {"unet": None}}, r'model.parts={"unet": null}: valid is null for some of '),
        ("sd3", {"parts": {"vae": None}}, r'model.parts={"vae": null}: valid is null for some of '),
        ("flux", {"parts": {"text_encoder_2": None}}, "model.path=.*: a FluxPipeline cannot be called with these parts: "),
        ("sd3", {"arguments": {"steps": 3}}, r'model.arguments={"steps": 3}: steps is none; valid are prompt_2, .*max_sequence_length'),
        ("sd3", {"arguments": {"height": 3}}, "model.arguments=.*: height is none; valid are "),
        ("qwen_image", {"arguments": {"true_cfg_scale": 3}}, "model.arguments=.*: true_cfg_scale is none; valid are "),
        ("sd3", {"vae": "{folder}/vae/diffusion_pytorch_model.safetensors"}, "model.vae=.*: a file is a VAE of Stable Diffusion"),
        ("flux2_klein", {"vae": "{sd3}/vae"}, "model.vae=.*: config.json is a AutoencoderKL's; valid is AutoencoderKLFlux2's"),
        ("sd3", {"config": "{folder}"}, "model.config=.*: it holds a StableDiffusion3Pipeline; valid for a single file is a pipeline of"),
        ("sd3", {"variant": "fp16"}, "model.variant=fp16: no part of .* has weights of that variant; valid is null"),
    ],
)
def test_options_that_do_not_fit_a_model_are_one_line(family, name, options, message):
    places = {"folder": family(name), "sd3": family("sd3")}
    options = {key: value.format(**places) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        find_model(str(family(name)), **options).check_networks(asked_of(name))


def test_another_vae_of_its_class_is_taken(family, copied):
    path = copied("sd3")
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    model = found(path, "sd3", vae=str(family("chroma") / "vae"))
    model.check_networks(asked_of("sd3"))
    assert open_pipeline(model, torch.float32).vae.config.scaling_factor == 1.5


@pytest.mark.parametrize(
    "name, reason",
    [
        ("cogview4", "a prompt's text depends on the prompts beside it"),
        ("wan", "it draws videos"),
        ("pixart", "its network predicts a variance, too, and diffusers has no LoRA for it"),
    ],
)
def test_other_families_are_refused_with_the_reason(family, name, reason):
    assert name in OTHERS
    with pytest.raises(ValueError, match=f"^model.path=[^\n]*: it holds a {type_name(family(name))}: {reason}[^\n]*; valid is one of "):
        find_model(str(family(name)))


def type_name(folder: Path) -> str:
    return json.loads((folder / "model_index.json").read_text())["_class_name"]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("HunyuanDiTPipeline", ": its network predicts a variance"),
        ("HunyuanVideoPipeline", ": it draws videos"),
        ("FluxInpaintPipeline", ": it is given a picture"),
        ("FluxControlNetPipeline", ": it is given a picture"),
        ("QwenImageEditPipeline", ": it is given a picture"),
        ("WanImageToVideoPipeline", ": it is given a picture"),
        ("SanaSprintPipeline", ": it is distilled to a few steps"),
        ("KolorsPipeline", ""),
        (None, ""),
        (["a", "b"], ""),
    ],
)
def test_classes_that_are_refused(name, reason):
    with pytest.raises(ValueError, match=f"^it holds a {re.escape(str(name))}{reason}[^\n]*; valid is one of StableDiffusionPipeline, "):
        families.find_family({"_class_name": name})


@pytest.mark.parametrize("name", ["sd3", "flux2_klein", "chroma", "auraflow", "lumina2", "z_image"])
def test_a_class_without_an_entry_is_called_as_its_pipeline_calls_it(family, name, monkeypatch):
    """If that is asked for: here of families whose entry says no more than names."""
    listed = found(family(name), name).record(asked_of(name))
    monkeypatch.delitem(families.FAMILIES, type_name(family(name)))
    with pytest.raises(ValueError, match="it holds a [^\n]*; valid is one of StableDiffusionPipeline, "):
        found(family(name), name)
    model = found(family(name), name, unlisted=True)
    model.check_networks(asked_of(name))
    recording = model.record(asked_of(name))
    assert (recording.digest, recording.branches, shapes(recording)) == (listed.digest, listed.branches, shapes(listed))


def test_a_class_without_an_entry_may_cut_its_texts_without_an_argument_for_their_length(family, monkeypatch):
    """As Krea 2's does: what its text encoder gives begins with the tokens of a template."""
    monkeypatch.delitem(families.FAMILIES, type_name(family("sd3")))
    model = found(family("sd3"), "sd3", unlisted=True)
    monkeypatch.delitem(model.recorder().arguments, "max_sequence_length", raising=False)
    monkeypatch.setattr(model.recorder().pipe, "prompt_template_encode_start_idx", 34, raising=False)
    recorder, recording = model.recorder(), model.record(asked_of("sd3"))
    assert len(recorder.texts_of("a bird", recording)) == recording.num_branches


@pytest.mark.parametrize(
    "name, reason",
    [
        ("WanPipeline", ": it draws videos"),
        ("FluxInpaintPipeline", ": it is given a picture"),
        ("KolorsPipeline", "; valid with model.unlisted=true is a pipeline of diffusers that has a transformer"),
        ("NoSuchPipeline", "; valid with model.unlisted=true is a pipeline of diffusers that has a transformer"),
        ("SD3Transformer2DModel", "; valid with model.unlisted=true is a pipeline of diffusers that has a transformer"),
    ],
)
def test_classes_that_are_refused_even_so(name, reason, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"^model.path={tmp_path}: it holds a {name}{reason}[^\n]*$"):
        find_model(str(tmp_path), unlisted=True)


def edit(name: str, **changed):
    return lambda m: change(m / name, **changed)


def cut(name: str):
    return lambda m: (m / name).write_bytes((m / name).read_bytes()[:-100])


SCHEDULER = "scheduler/scheduler_config.json"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("sd3", lambda m: (m / "model_index.json").unlink(), "model_index.json cannot be read: No such file"),
        ("flux", lambda m: (m / "model_index.json").write_text("{"), "model_index.json cannot be read: "),
        ("flux", lambda m: (m / "transformer/config.json").write_text("{"), "transformer/config.json cannot be read: "),
        ("chroma", edit("model_index.json", text_encoder=["own", "T5"]), r"text_encoder=\['own', 'T5'\]; valid are classes of diffusers, "),
        ("chroma", edit("model_index.json", text_encoder=["transformers", "T5Model"]), "text_encoder=.*; valid is T5EncoderModel of trans"),
        (
            "lumina2",
            edit("model_index.json", text_encoder=["transformers", "Qwen3Model"]),
            "valid is Gemma2PreTrainedModel of transformers",
        ),
        ("z_image", edit("model_index.json", text_encoder=["diffusers", "AutoencoderKL"]), "valid is PreTrainedModel of transformers"),
        ("sana", edit("model_index.json", transformer=["diffusers", "SD3Transformer2DModel"]), "valid is SanaTransformer2DModel of diffus"),
        ("sana", edit("model_index.json", vae=[None, None]), r"vae=\[None, None\]; valid is AutoencoderDC of diffusers"),
        ("sd3", edit("model_index.json", tokenizer_2=["diffusers", "FluxPipeline"]), "tokenizer_2=.*; valid is PreTrainedTokenizerBase"),
        (
            "auraflow",
            edit("model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
            "its scheduler is a DDIMScheduler; valid is FlowM",
        ),
        ("auraflow", lambda m: (m / SCHEDULER).unlink(), f"{SCHEDULER} cannot be read: No such file"),
        ("auraflow", edit(SCHEDULER, stochastic_sampling=True), f"{SCHEDULER} has stochastic_sampling=True; valid is false"),
        ("auraflow", edit(SCHEDULER, invert_sigmas=True), f"{SCHEDULER} has invert_sigmas=True; valid is false"),
        ("auraflow", edit(SCHEDULER, num_train_timesteps="x"), f"{SCHEDULER} has num_train_timesteps=x; valid is a whole number"),
        ("auraflow", edit(SCHEDULER, shift="x"), f"{SCHEDULER}: nothing that works can be made of it"),
        ("hidream", lambda m: shutil.rmtree(m / "tokenizer_4"), "tokenizer_4/ lacks the tokenizer's files"),
        ("qwen_image", edit("tokenizer/tokenizer_config.json", extra_special_tokens=3), "tokenizer/: nothing that works can be made of it"),
        ("sd3", lambda m: (m / TRANSFORMER).unlink(), "its transformer/ has no weights; valid is diffusion_pytorch_model.safetensors"),
        ("sd3", lambda m: (m / "text_encoder_3/model.safetensors").unlink(), "its text_encoder_3/ has no weights; valid is model.safetens"),
        ("sd3", edit("text_encoder_2/config.json", max_position_embeddings=7), "tokenizer_2/tokenizer_config.json has model_max_length="),
        ("sd3", edit("text_encoder_3/config.json", vocab_size=7), "tokenizer_3/ has a token number .*; valid is below 7, the text encoder"),
        ("flux", edit("transformer/config.json", guidance_embeds=False), r"it is distilled .*guidance_embeds=false.*; valid is FLUX.1-dev"),
        ("flux2_klein", edit("model_index.json", is_distilled=True), "it is distilled .*is_distilled=true.*; valid is the base model"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(copied, name, damage, message):
    path = copied(name)
    damage(path)
    with pytest.raises(ValueError, match=f"^model.path={path}: [^\n]*{message}[^\n]*$"):
        found(path, name)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("sd3", edit("text_encoder_3/config.json", d_model=48), "transformer/config.json: .*: context_embedder takes 64 features, not 48"),
        ("flux", edit("text_encoder_2/config.json", d_model=48), "transformer/config.json: .*context_embedder takes 32 features, not 48"),
        ("qwen_image", edit("transformer/config.json", joint_attention_dim=48), "transformer/config.json: it cannot be called with what"),
        ("z_image", edit("transformer/config.json", in_channels=5), "vae/config.json: it cannot decode the transformer's latents: "),
        (
            "flux2_klein",
            edit("transformer/config.json", in_channels=20),
            "a Flux2KleinPipeline cannot be called with these parts: RuntimeError: ",
        ),
        ("lumina2", edit("transformer/config.json", in_channels=5, out_channels=4), "transformer/config.json: it cannot be called with "),
        ("hidream", edit("transformer/config.json", caption_channels=[32, 24]), "transformer/config.json: .* takes 24 features, not 16"),
        ("chroma", edit("vae/config.json", latent_channels=8), "vae/config.json: it cannot decode the transformer's latents: "),
        (
            "chroma",
            edit("vae/config.json", out_channels=1),
            r"vae/config.json: .*\(16, 16\) becomes \(1, 64, 64\), no picture of three col",
        ),
        ("chroma", edit("text_encoder/config.json", num_heads="x"), "text_encoder/config.json: nothing that works can be made of it: "),
        ("auraflow", edit("transformer/config.json", num_attention_heads=0), "transformer/config.json: nothing that works can be made of"),
    ],
)
def test_parts_that_do_not_go_together_are_one_line_before_weights_are_read(copied, name, damage, message):
    path = copied(name)
    for weights in path.rglob("*.safetensors"):
        weights.write_bytes(b"")
    damage(path)
    with pytest.raises(ValueError, match=f"^model.path={path}: [^\n]*{message}[^\n]*$"):
        found(path, name).check_networks(asked_of(name))


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_that_are_cut_off_or_lack_one_are_one_line(copied, part):
    path = copied("chroma")
    cut(f"{part}.safetensors")(path)
    with pytest.raises(ValueError, match=f"^model.path={path}: it cannot be loaded: [^\n]*$"):
        open_pipeline(found(path, "chroma"), torch.float32)


def test_steps_and_samplers_are_refused_before_weights_are_read(copied, options):
    path = copied("lumina2")
    for weights in path.rglob("*.safetensors"):
        weights.write_bytes(b"")
    size = {"sample__height": 64, "sample__width": 64}
    for changed, message in (
        ({"sample__sampler": "ddim"}, "sample.sampler=ddim: it is for diffusion models, and this is a flow model; valid is "),
        (
            {"sample__sampler": "flow_sde", "eval__sampler": "ddim"},
            "eval.sampler=ddim: it is for diffusion models, and this is a flow model",
        ),
    ):
        argv = options(model__path=path, model__arguments=json.dumps(ARGUMENTS["lumina2"]), **size, **changed)
        with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
            begin(parse(argv))
