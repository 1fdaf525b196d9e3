"""The recipes in configs/: their numbers beside the paper's and its port's, what their headers say, and that they start."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import bounds
import counted as known
import pytest
import torch
from conftest import LEFT_TO_THE_FAMILY
from families import CALL
from test_model_rewards import aesthetic, bert, clip, no_network, vlm  # noqa: F401
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DebertaConfig,
    DebertaModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from ddpo_fast import assemble
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import Config
from ddpo_fast.pipelines.families import FAMILIES
from ddpo_fast.planning import plan
from ddpo_fast.prompts import load_prompts
from ddpo_fast.records.metrics import read_metrics

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
LORA = [name for name in RECIPES if name.startswith(("sd15_", "sdxl_"))]
FLOW = {
    "sd35_medium": "sd3", "flux1_dev": "flux", "flux2_klein": "flux2_klein", "sana": "sana", "qwen_image": "qwen_image",
    "z_image": "z_image",
}  # fmt: skip
"""Models that recipes are for, and the tiny pipelines of their families."""
KNOWN = [model for kind in FAMILIES.values() for model in kind.models]
FLOW_RECIPES = [f"{model}_{task}" for model in FLOW for task in ("compressibility", "pickscore")]
SECONDS = {"s": 1, "min": 60, "h": 3600}
PREDICTED = re.compile(
    r"^#   (?P<devices>(?:\dx)?[\w-]+)(?: \(\d+ GB\))?(?: with (?P<options>--[^:,]*))?(?:, the reward on (?P<reward>the CPU|another GPU))?:"
    r" (?P<time>[\d.]+) (?P<unit>s|min|h) an iteration, (?P<rate>[\d,]+) samples an hour$",
    re.M,
)
"""A line of a header: what --plan says for these devices."""


def command(name: str, *more: str) -> list[str]:
    return ["--config", str(CONFIGS / f"{name}.yaml"), *more]


def header(name: str) -> str:
    """A recipe's comment, a deeper indented line joined to the one before."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return re.sub(r"\n#     ", " ", "\n".join(line for line in lines if line.startswith("#")))


# --- what they say ---


def test_there_is_one_for_each_model_and_reward():
    tasks = ("compressibility", "incompressibility", "aesthetic", "alignment")
    assert sorted(LORA) == sorted(f"{model}_{task}" for model in ("sd15", "sdxl") for task in tasks)
    embedded = {f"embedded_{kind}{task}" for kind in ("", "flow_") for task in (*tasks[:2], tasks[3])}
    assert set(RECIPES) - set(LORA) == embedded | {"sd14_paper_compressibility", *FLOW_RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_header(name):
    """Purpose, source, hardware, time and samples an hour, expected reward, and a command that runs this file."""
    text = header(name)
    assert [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if len(line) > 140] == []
    paper = "Flow-GRPO \\(arXiv:2505.05470\\)" if name in FLOW_RECIPES else r"DDPO \(arXiv:2305\.13301\) section 5\.[123]"
    assert text.startswith("# Pictures ") and re.search(f"^# Paper: {paper}", text, re.M)
    assert re.search("^# Hardware: ", text, re.M) and re.search("^# Expected: ", text, re.M) and "samples an hour" in text
    (said,) = re.findall("^# Command: (.*)", text, re.M)
    assert re.fullmatch(rf"deepspeed (--num_gpus 8 )?ddpo_fast/train\.py --config configs/{name}\.yaml", said)
    if not name.startswith("embedded"):
        devices = [line["devices"] for line in PREDICTED.finditer(text)] + re.findall("^#   ([^:]*): does not fit", text, re.M)
        assert {device.split()[0] for device in devices} >= {"RTX-3080", "RTX-3090", "A100-80GB", "8xH100"}  # 10, 24, 80 GB, 8 GPUs


# --- the paper's numbers ---

PORT = {  # samples and updates an iteration, iterations, buffer, min_count, prompt set and its size, reward
    "compressibility": (256, 4, 100, 16, 16, "imagenet_animals", 398, "jpeg_compressibility"),
    "incompressibility": (256, 4, 100, 16, 16, "imagenet_animals", 398, "jpeg_incompressibility"),
    "aesthetic": (256, 2, 200, 32, 16, "simple_animals", 45, "aesthetic"),
    "alignment": (288, 2, 200, 32, 16, "animal_activities", 135, "vlm_alignment"),
}


def derived(config: Config) -> tuple:
    updates, prompts = config.train.num_minibatches * config.train.inner_epochs, load_prompts(config.prompts.name, None).texts
    return (
        config.sample.num_samples, updates, config.run.iterations, config.baseline.buffer_size, config.baseline.min_count,
        config.prompts.name, len(set(prompts)), config.reward.name,
    )  # fmt: skip


def check_what_all_share(config: Config) -> None:
    sample, train, optimizer = config.sample, config.train, config.optimizer
    assert (sample.num_steps, sample.guidance_scale, sample.eta) == (50, 5.0, 1.0)
    assert (train.algorithm, train.clip_range, train.max_grad_norm, train.timestep_fraction) == ("ddpo_is", 1e-4, 1.0, 1.0)
    assert (optimizer.name, optimizer.betas, optimizer.eps, optimizer.weight_decay) == ("adamw", [0.9, 0.999], 1e-8, 1e-4)
    assert (config.prompts.samples_per_prompt, config.prompts.limit, train.kl_coefficient) == (1, None, 0)
    assert (config.baseline.name, config.baseline.std, config.model.dtype) == ("history", "prompt", "auto")  # fp16 on a GPU
    assert all(sample.num_samples % (train.num_minibatches * ranks) == 0 == config.eval.num_samples % ranks for ranks in (1, 8))


@pytest.mark.parametrize("name", LORA)
def test_numbers_are_those_of_the_papers_port(name):
    """LoRA of rank 4 in every attention, lr 3e-4; for SDXL, too, which the headers say."""
    config = parse(command(name))
    check_what_all_share(config)
    assert derived(config) == PORT[name.split("_")[1]]
    assert (config.lora.scope, config.lora.targets, config.lora.rank, config.lora.alpha) == ("all", ["attention"], 4, 4.0)
    assert (config.train.learning_rate, config.train.advantage_clip) == (3e-4, 5.0)
    assert "(rank 4 on attention, lr 3e-4)" in header(name)
    path = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}[name[:4]]
    assert config.model.path == path and (name[:4] == "sd15" or "the port's for SD" in header(name))


def test_numbers_are_those_of_the_paper():
    """51,200 samples in 200 iterations, 4 updates by minibatches of 64, the whole UNet at lr 1e-5; advantages up to 10 in its JAX code."""
    config = parse(command("sd14_paper_compressibility"))
    check_what_all_share(config)
    assert derived(config) == (256, 4, 200, 16, 16, "imagenet_animals", 398, "jpeg_compressibility")
    assert config.sample.num_samples // config.train.num_minibatches == 64 and config.sample.num_samples * config.run.iterations == 51_200
    assert (config.lora.scope, config.train.learning_rate, config.train.advantage_clip) == ("none", 1e-5, 10.0)
    assert config.model.path == "CompVis/stable-diffusion-v1-4" and "clipped at 10" in header("sd14_paper_compressibility").replace(
        "\n#  ", ""
    )


PUBLISHED = {  # prompts, pictures of each, steps, guidance, eta, steps trained, LoRA's rank, scale and layers, KL, steps of an evaluation
    "sd35_medium": (48, 24, 10, 4.5, 0.7, {"size": 9, "among": 9}, 32, 2.0, ["attention"], 1e-3, 40),
    "flux1_dev": (48, 24, 6, 3.5, 0.9, {"size": 5, "among": 5}, 64, 2.0, ["attention", "feed_forward"], 0, 28),
    "flux2_klein": (48, 16, 8, 4.0, 0.7, {"size": 1, "among": 4}, 64, 2.0, ["attention", "feed_forward"], 0, 28),
    "sana": (48, 24, 10, 4.5, 0.7, {"size": 9, "among": 9}, 32, 2.0, ["attention"], 0, 20),
    "qwen_image": (32, 16, 10, 4.0, 1.2, {"size": 2, "among": 5}, 64, 2.0, ["attention", "feed_forward"], 0, 50),
    "z_image": (48, 16, 10, 4.0, 0.7, {"size": 1, "among": 4}, 64, 2.0, ["attention", "feed_forward"], 0, 40),
}


@pytest.mark.parametrize("name", FLOW_RECIPES)
def test_numbers_of_flow_recipes_are_those_of_flow_grpo(name):
    """Two updates of an iteration, by advantages within a prompt over the deviation of all; a clip range for 65,536 elements."""
    config, (model, task) = parse(command(name)), name.rsplit("_", 1)
    sample, train, lora = config.sample, config.train, config.lora
    prompts, each, *expected, kl, evaluated = PUBLISHED[model]
    said = [sample.num_steps, sample.guidance_scale, sample.eta, sample.window, lora.rank, lora.alpha / lora.rank, lora.targets]
    assert (said, config.eval.num_steps, config.eval.sampler) == (expected, evaluated, "ode") and config.model.path in KNOWN
    assert (sample.sampler, sample.height, sample.width, train.learning_rate) == ("flow_sde", 512, 512, 3e-4)
    assert (train.num_minibatches, train.inner_epochs, config.baseline.name, config.baseline.std) == (2, 1, "group", "batch")
    assert train.clip_range == pytest.approx(1e-4 * (73_728 if model == "flux2_klein" else 65_536) / 16_384)
    if task == "pickscore":
        assert (config.reward.name, sample.num_samples, config.prompts.samples_per_prompt) == ("pickscore", prompts * each, each)
        assert train.kl_coefficient == kl
    else:
        assert (config.reward.name, sample.num_samples, train.kl_coefficient) == ("jpeg_compressibility", 64, 0)


# --- what --plan predicts ---


@pytest.fixture(scope="module")
def counted():
    """Each model is counted once for all recipes that train the same of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("count_model", "count_flow", "planned_model"):
            patch.setattr(plan, name, getattr(known, name))
        yield


def size_gib(make, bytes_each: int) -> float:
    with torch.device("meta"):
        network: nn.Module = make()
    return sum(parameter.numel() for parameter in network.parameters()) * bytes_each / 2**30


@pytest.fixture(scope="module")
def weights_gib() -> dict[str, list[float]]:
    """GiB that each of a reward's networks takes, by the configs of their checkpoints, as the reward loads them."""
    vit = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    vision = CLIPVisionConfig(**vit, image_size=224, projection_dim=768)
    clip_h = CLIPConfig(
        text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
        vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14),
        projection_dim=1024,
    )  # fmt: skip
    llama = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    llava = LlavaConfig(vision_config=CLIPVisionConfig(**vit, image_size=336, projection_dim=768), text_config=llama)
    deberta = DebertaConfig(
        vocab_size=50265, hidden_size=1024, intermediate_size=4096, num_hidden_layers=48, num_attention_heads=16, relative_attention=True,
        pos_att_type=["c2p", "p2c"], position_biased_input=False, type_vocab_size=0, max_position_embeddings=512,
    )  # fmt: skip
    return {
        "jpeg_compressibility": [], "jpeg_incompressibility": [],
        "aesthetic": [size_gib(lambda: CLIPVisionModelWithProjection(vision), 4)],
        "vlm_alignment": [size_gib(lambda: LlavaForConditionalGeneration(llava), 2), size_gib(lambda: DebertaModel(deberta), 4)],
        "pickscore": [size_gib(lambda: CLIPModel(clip_h), 4)],
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("embedded")])
def test_headers_say_what_the_reward_takes(name, weights_gib):
    text, config = " ".join(header(name).replace("#", " ").split()), parse(command(name))
    for size in weights_gib[config.reward.name]:
        assert f"{size:.2f} GiB" in text
    if config.reward.name == "vlm_alignment":  # 32 layers' keys and values in fp16 of 576 tokens a picture, 20 a question, 64 an answer
        kept = config.sample.batch_size * (576 + 20 + 64) * 32 * 2 * 4096 * 2 / 2**30
        assert f"{kept:.1f} GiB of keys and values while {config.sample.batch_size} pictures" in text
        assert f"8 ranks take {8 * sum(weights_gib['vlm_alignment']):.0f} GiB" in text


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith("sd15") else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
        if not name.startswith("embedded")
    ],
)
def test_headers_say_what_the_plan_does(name, counted, weights_gib):
    """Time and samples an hour; that it fits, with the reward's weights beside it unless they are said to be elsewhere, and only then."""
    text, config, count = header(name), parse(command(name)), 0
    for line in PREDICTED.finditer(text):
        more = (line["options"] or "").split()
        found = plan.make_plan(parse(command(name, f"--plan={line['devices']}", *more)))
        said = float(line["time"]) * SECONDS[line["unit"]], float(line["rate"].replace(",", ""))
        assert (sum(found.seconds.values()), found.samples_per_hour) == pytest.approx(said, rel=0.03), line[0]
        assert found.advice == [], line[0]
        memory, peak = found.device.memory_mib / 1024, max(plan.phases_mib(found.memory).values()) / 1024
        room = (1 - plan.USABLE) * memory if config.sample.batch_size == "auto" else plan.USABLE * memory - peak
        assert (sum(weights_gib[config.reward.name]) <= room) == (line["reward"] is None), line[0]
        if more:
            assert plan.make_plan(parse(command(name, f"--plan={line['devices']}"))).advice, f"{line[0]}: it does without these options"
        count += 1
    for device in re.findall(r"^#   ([\w-]+) \(\d+ GB\): does not fit", text, re.M):
        assert plan.make_plan(parse(command(name, f"--plan={device}"))).advice, device
        count += 1
    assert count >= 4


def test_a_plan_needs_neither_the_model_nor_a_run_directory(counted, monkeypatch, tmp_path, capsys):
    for module, name in ((trainer, "assemble"), (assemble, "init_distributed"), (assemble, "Policy")):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    monkeypatch.chdir(tmp_path)
    trainer.main(command("sd15_compressibility", "--plan=2xH200"))
    out = capsys.readouterr().out
    assert "memory of one rank of 2 x H200" in out and "128 samples x 51 latents" in out and out.endswith("it fits\n")
    assert "frozen weights        1,799  unet 1,639, vae 160" in out  # the text encoder is there only while prompts are new
    assert "797,184 in fp32" in out and list(tmp_path.iterdir()) == []


# --- they start ---


@pytest.fixture(scope="module")
def stand_in(tiny_model, sdxl, family) -> Callable[[str], list[str]]:
    """Options by which a recipe has a small model of its kind."""

    def options(name: str) -> list[str]:
        if name not in FLOW_RECIPES:
            return [f"--model.path={sdxl if name.startswith('sdxl') else tiny_model}"]
        made = FLOW[name.rsplit("_", 1)[0]]
        call = CALL[made]
        own = {key: value for key, value in call.items() if key not in LEFT_TO_THE_FAMILY | {"guidance_scale", "true_cfg_scale"}}
        size = [f"--sample.height={call['height']}", f"--sample.width={call['width']}"]
        return [f"--model.path={family(made)}", f"--model.arguments={json.dumps(own)}", *size, "--eval.num_steps=3"]

    return options


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.rounding) if name.endswith("_compressibility") else name for name in RECIPES]
)
def test_it_starts(name, stand_in, counted, aesthetic, vlm, bert, clip, tmp_path, monkeypatch):  # noqa: F811
    """A whole iteration with the recipe's options on a small model of its kind, in fp32; its reward's networks are small ones, too."""
    kwargs = {
        "aesthetic": aesthetic,
        "pickscore": {"model": clip},
        "vlm_alignment": {"vlm": vlm, "bert": bert, "layer": 2, "dtype": "fp32"},
    }
    config = parse(command(name))
    num_samples = max(config.train.num_minibatches, config.prompts.samples_per_prompt)
    window = config.sample.window
    trained, steps = (2, 2) if window is None else (window["size"], window["among"] + 1)
    more = [f"--run.dir={tmp_path}/run", f"--sample.num_samples={num_samples}", f"--sample.num_steps={steps}", "--eval.num_samples=2"]
    if not name.startswith("embedded"):
        more += stand_in(name)
    if config.reward.name in kwargs:
        more.append(f"--reward.kwargs={kwargs[config.reward.name]}")
    trainer.main(command(name, *more, "--run.iterations=1"))
    before, row = read_metrics(tmp_path / "run")
    assert (before["heldout_reward_mean"] is None) == name.startswith("embedded")
    assert math.isfinite(before["eval_reward_mean"]) and math.isfinite(row["reward_mean"]) and row["bad_rewards"] == 0
    assert row["transitions"] == trained * num_samples and 0 < row["grad_norm"] < math.inf and row["skipped_updates"] == 0
    assert row["ratio_error"] <= (1e-3 if "flow" in name or name in FLOW_RECIPES else bounds.of_run(tmp_path / "run").ratio)
