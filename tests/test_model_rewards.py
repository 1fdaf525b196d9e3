"""Rewards that are networks, on small random checkpoints of the real architectures, each against the same thing step by step."""

import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import bounds
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    DebertaConfig,
    DebertaModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ddpo_fast.rewards.vlm_counting import names_animal, names_number, parse_count
from ddpo_fast.scoring.bert_recall import BertRecall
from ddpo_fast.scoring.function import load_reward
from ddpo_fast.scoring.jpeg import jpeg_kilobytes
from ddpo_fast.scoring.pixels import to_pixels
from ddpo_fast.scoring.pretrained import ClipPixels
from ddpo_fast.scoring.scorer import RewardError, open_reward
from ddpo_fast.scoring.server import RewardServer
from ddpo_fast.scoring.vlm import VisionLanguageModel, through_jpeg

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(3, 3, 50, 70, generator=GENERATOR)
PROMPTS = ["cat", "dog", "horse"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def make_clip(folder: Path, projection_dim: int) -> Path:
    torch.manual_seed(projection_dim)
    text = dict(vocab_size=60, max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPModel(
        CLIPConfig(text_config=size | text, vision_config=size | dict(image_size=32, patch_size=8), projection_dim=projection_dim)
    )
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)  # as initialised, every picture's embedding is nearly the same
    model.logit_scale.data.fill_(2.5)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {t: i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12).save_pretrained(folder)
    return folder


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.rint(image * 255).astype(np.uint8).transpose(1, 2, 0)) for image in images.numpy()]


# --- pictures as CLIP wants them ---


@pytest.mark.parametrize("shape", [(64, 64), (50, 70), (71, 40), (36, 36), (20, 24)], ids=str)
@pytest.mark.parametrize("old", [False, True])
def test_pixels_are_those_of_the_processor(tmp_path, shape, old):
    make_clip(tmp_path, 24)
    if old:  # as the checkpoints of 2021 have it
        config = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"size": 36, "crop_size": 32}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    y, x = torch.meshgrid(torch.linspace(0, 1, shape[0]), torch.linspace(0, 1, shape[1]), indexing="ij")
    images = torch.stack([torch.rand(3, *shape, generator=GENERATOR), torch.stack([x, y, (9 * x * y).sin() / 2 + 0.5])])
    expected = CLIPImageProcessorPil.from_pretrained(tmp_path)(as_pil(images), return_tensors="pt")["pixel_values"]
    pixels = ClipPixels(str(tmp_path), "option")(images)
    assert pixels.shape == expected.shape == (2, 3, 32, 32)
    levels = (pixels - expected).abs() * ClipPixels(str(tmp_path), "option").std * 255
    assert levels.max() < 1.01 and levels.mean() < 0.02  # of 255: Pillow computes in 22-bit integers


@pytest.mark.parametrize(
    "change", [{"resample": 0}, {"do_center_crop": False}, {"size": {"height": 32, "width": 32}}, {"crop_size": 48}, {"image_mean": [0.5]}]
)
def test_processor_that_does_something_else_is_refused(tmp_path, change):
    config = json.loads((make_clip(tmp_path, 24) / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=re.escape(f"option={tmp_path}: its preprocessor_config.json is not that of CLIP")):
        ClipPixels(str(tmp_path), "option")


# --- aesthetic ---


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory) -> dict[str, str]:
    """The arguments of the reward: a small CLIP with ViT-L/14's 768 embedding elements, and a predictor of the real shape."""
    folder = tmp_path_factory.mktemp("aesthetic")
    make_clip(folder / "clip", 768)
    widths, generator = (768, 1024, 128, 64, 16, 1), torch.Generator().manual_seed(1)
    tensors = {}
    for layer, n_in, n_out in zip((0, 2, 4, 6, 7), widths, widths[1:]):
        tensors[f"layers.{layer}.weight"] = torch.randn(n_out, n_in, generator=generator) / n_in**0.5 * 2
        tensors[f"layers.{layer}.bias"] = torch.randn(n_out, generator=generator)
    torch.save(tensors, folder / "predictor.pth")
    save_file(tensors, folder / "predictor.safetensors")
    return {"weights": str(folder / "predictor.pth"), "clip": str(folder / "clip")}


def aesthetic_by_hand(arguments: dict[str, str], images: torch.Tensor) -> torch.Tensor:
    pixels = CLIPImageProcessorPil.from_pretrained(arguments["clip"])(as_pil(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        z = CLIPModel.from_pretrained(arguments["clip"]).get_image_features(pixels).pooler_output.double()
    z = z / (z * z).sum(1, keepdim=True).sqrt()
    tensors = torch.load(arguments["weights"], weights_only=True)
    for layer in (0, 2, 4, 6, 7):
        z = z @ tensors[f"layers.{layer}.weight"].double().T + tensors[f"layers.{layer}.bias"].double()
    return z[:, 0]


def aesthetic_rounding(arguments: dict[str, str], expected: torch.Tensor) -> float:
    """How far another order of summation may take a score: CLIP's layers and the predictor's, see bounds.py."""
    layers = [CLIPModel.from_pretrained(arguments["clip"]), *(torch.nn.Linear(*widths) for widths in pairwise((768, 1024, 128, 64, 16, 1)))]
    return bounds.SIGMAS * bounds.network_rounding(torch.nn.ModuleList(layers)) * expected.double().square().mean().sqrt().item()


def cosine_rounding(clip: str) -> float:
    """Of a cosine, whose two unit vectors are off by a delta each."""
    return bounds.SIGMAS * 2 * bounds.network_rounding(CLIPModel.from_pretrained(clip))


def small(images: torch.Tensor) -> torch.Tensor:
    """The pictures at the size at which the processor resizes nothing, so that both compute with the same pixels."""
    return torch.nn.functional.interpolate(images, (36, 36))


def test_aesthetic_is_the_predictor_of_the_normalised_embedding(aesthetic):
    reward = open_reward("aesthetic", aesthetic, 60.0, isolate=False)
    expected = aesthetic_by_hand(aesthetic, small(IMAGES))
    assert expected.std() > 0.01
    tolerance = aesthetic_rounding(aesthetic, expected)
    assert (reward(small(IMAGES), PROMPTS) - expected).abs().max() <= tolerance < 0.01 * expected.std()
    resized = aesthetic_by_hand(aesthetic, IMAGES)  # differs by the pixels' rounding
    assert (reward(IMAGES, PROMPTS) - resized).abs().max() < 0.1 * resized.std()


@pytest.mark.rounding
@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 2, "device": "cpu"}, {"weights": ".safetensors"}], ids=str)
def test_aesthetic_does_not_depend_on_the_batch_or_on_the_kind_of_file(aesthetic, changes):
    if "weights" in changes:
        changes = {"weights": aesthetic["weights"].replace(".pth", changes["weights"])}
    expected = load_reward("aesthetic", aesthetic)(IMAGES, PROMPTS)
    found = load_reward("aesthetic", aesthetic | changes)(IMAGES, PROMPTS)
    assert (found - expected).abs().max() <= aesthetic_rounding(aesthetic, expected)


def test_aesthetic_in_half_precision_is_close(aesthetic):
    rewards = load_reward("aesthetic", aesthetic | {"dtype": "bf16"})(IMAGES, PROMPTS)
    expected = load_reward("aesthetic", aesthetic)(IMAGES, PROMPTS)
    assert rewards.dtype == torch.float32 and 0 < (rewards - expected).abs().max() < 0.1


def test_aesthetic_in_a_process_of_its_own_and_by_a_server(aesthetic):
    images = (IMAGES * 255).round() / 255
    here = open_reward("aesthetic", aesthetic, 60.0, isolate=False)
    expected = here(images, PROMPTS)
    isolated = open_reward("aesthetic", aesthetic, 60.0, isolate=True)
    tolerance = aesthetic_rounding(aesthetic, expected)  # another process may have another number of threads
    assert (isolated(images, PROMPTS) - expected).abs().max() <= tolerance
    with RewardServer(here, "127.0.0.1", 0) as server:
        assert server.score(images, PROMPTS, None) == pytest.approx(expected.tolist(), rel=0, abs=tolerance)


def without_some_weights(folder: Path, clip: str) -> str:
    tensors = {key: tensor for key, tensor in load_file(f"{clip}/model.safetensors").items() if "visual_projection" not in key}
    return copied(folder, clip, tensors)


def copied(folder: Path, clip: str, tensors: dict, files=("config.json", "preprocessor_config.json")) -> str:
    folder.mkdir()
    for name in files:
        (folder / name).write_text((Path(clip) / name).read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


WHAT_TO_DOWNLOAD = (
    "valid is the file sac+logos+ava1-l14-linearMSE.pth, or its tensors as .safetensors: download it from https://github.com/"
)


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "there is no such file"),
        (b"not weights", "cannot be read (UnpicklingError)"),
        (b"", "cannot be read (EOFError)"),
        ("object", "cannot be read (UnpicklingError)"),
        ({"layers.0.weight": torch.zeros(1024, 512)}, "layers.0.weight has shape (1024, 512), not (1024, 768)"),
        ({"linear.weight": torch.zeros(3)}, "layers.0.weight has shape None, not (1024, 768)"),
        (torch.zeros(3), "cannot be read (AttributeError)"),
    ],
    ids=["missing", "garbage", "empty", "code", "shape", "other names", "tensor"],
)
def test_wrong_predictor_weights_are_one_line_that_says_what_to_download(aesthetic, tmp_path, content, reason):
    file = tmp_path / "predictor.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(
            BertModel(BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
            if content == "object"
            else content,
            file,
        )
    with pytest.raises(ValueError, match=re.escape(f"reward.kwargs.weights={file}: {reason}; {WHAT_TO_DOWNLOAD}")) as error:
        load_reward("aesthetic", aesthetic | {"weights": str(file)})
    assert "\n" not in str(error.value)


def test_damaged_safetensors_are_refused(aesthetic, tmp_path):
    (tmp_path / "predictor.safetensors").write_bytes(b"12345678 not tensors")
    with pytest.raises(ValueError, match=r"predictor.safetensors: cannot be read \(SafetensorError\); valid is"):
        load_reward("aesthetic", aesthetic | {"weights": str(tmp_path / "predictor.safetensors")})


@pytest.mark.parametrize(
    "clip, reason",
    [
        ("/nowhere/clip", "there is no such folder; valid is a folder or hub id of a CLIP model"),
        ("nowhere/clip", ".*; valid is a folder or hub id of a CLIP model"),
        ("narrow", "its embedding has 24 elements; valid is CLIP ViT-L/14, which has 768"),
        ("headless", "1 weights are missing, visual_projection.weight first; valid is CLIP ViT-L/14: openai/clip-vit-large-patch14"),
        ("bert", ".*; valid is CLIP ViT-L/14: openai"),
    ],
)
def test_wrong_clip_is_one_line(aesthetic, tmp_path, clip, reason):
    path = clip
    if clip == "narrow":
        path = str(make_clip(tmp_path / "clip", 24))
    elif clip == "headless":
        path = without_some_weights(tmp_path / "clip", aesthetic["clip"])
    elif clip == "bert":
        path = str(make_clip(tmp_path / "clip", 24))
        BertModel(
            BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ).save_pretrained(path)
    with pytest.raises(ValueError, match=f"^reward.kwargs.clip={re.escape(path)}: {reason}.*$"):
        load_reward("aesthetic", aesthetic | {"clip": path})


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        ({"device": "tpu9"}, r"reward.kwargs.device=tpu9: .*; valid is auto, cpu, cuda or cuda:N"),
        ({"dtype": "int8"}, "reward.kwargs.dtype=int8: valid is fp32, fp16, bf16"),
        ({"batch_size": 0}, "reward.kwargs.batch_size=0: valid is a whole number >= 1"),
        ({"model": "x"}, r"reward.kwargs={.*}: Aesthetic\(\*\*kwargs\) does not take them: got an unexpected keyword argument 'model'"),
    ],
)
def test_wrong_arguments_of_aesthetic_are_refused(aesthetic, kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        load_reward("aesthetic", aesthetic | kwargs)


# --- CLIP score ---


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(make_clip(tmp_path_factory.mktemp("clip_score") / "clip", 24))


def cosines_by_hand(clip: str, images: torch.Tensor, tokens: list[list[int]]) -> torch.Tensor:
    """Each picture and prompt alone, unpadded."""
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessorPil.from_pretrained(clip)
    cosines = []
    for picture, ids in zip(as_pil(images), tokens):
        with torch.no_grad():
            a = model.get_image_features(processor(picture, return_tensors="pt")["pixel_values"]).pooler_output[0].double()
            b = model.get_text_features(torch.tensor([ids])).pooler_output[0].double()
        cosines.append((a * b).sum() / (a.norm() * b.norm()))
    return torch.stack(cosines)


def ids(word: str) -> list[int]:
    """Token ids of the small vocabulary: a start, a letter each, the last with its word's end, and an end."""
    letters = [2 + ord(letter) - ord("a") for letter in word]
    return [0, *letters[:-1], letters[-1] + 26, 1]


@pytest.mark.rounding
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_clip_score_is_the_cosine_and_pickscore_its_logit(clip, batch_size):
    expected = cosines_by_hand(clip, small(IMAGES), [ids(prompt) for prompt in PROMPTS])
    assert expected.std() > 0.005
    cosine = load_reward("clip_score", {"model": clip, "batch_size": batch_size})(small(IMAGES), PROMPTS)
    tolerance = cosine_rounding(clip)
    assert (cosine - expected).abs().max() <= tolerance < 0.1 * expected.std()
    for name, kwargs in (("clip_score", {"scaled": True}), ("pickscore", {})):
        logit = load_reward(name, {"model": clip, "batch_size": batch_size} | kwargs)(small(IMAGES), PROMPTS)
        assert (logit - expected * np.exp(2.5)).abs().max() <= tolerance * np.exp(2.5)


def test_clip_score_reads_no_more_of_a_prompt_than_clip_does(clip):
    reward = load_reward("clip_score", {"model": clip})
    letters = "abcdefghijklmnop"
    whole = ids(letters)
    truncated = [*whole[:11], 1]
    expected = cosines_by_hand(clip, small(IMAGES[:2]), [truncated, ids("cat")])
    assert (reward(small(IMAGES[:2]), [letters, "cat"]) - expected).abs().max() <= cosine_rounding(clip)


def test_processor_of_another_folder(clip, tmp_path):
    bare = copied(tmp_path / "bare", clip, load_file(f"{clip}/model.safetensors"), ["config.json"])
    with pytest.raises(ValueError, match=f"^reward.kwargs.model={bare}: .*preprocessor_config.json"):
        load_reward("clip_score", {"model": bare})
    with pytest.raises(ValueError, match="^reward.kwargs.processor=/nowhere/clip: there is no such folder"):
        load_reward("clip_score", {"model": bare, "processor": "/nowhere/clip"})
    expected = load_reward("clip_score", {"model": clip})(IMAGES, PROMPTS)
    assert torch.equal(load_reward("clip_score", {"model": bare, "processor": clip})(IMAGES, PROMPTS), expected)


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        ({"model": "/nowhere/clip"}, "reward.kwargs.model=/nowhere/clip: there is no such folder; valid is"),
        ({"scaled": "yes"}, "reward.kwargs.scaled=yes: valid is true or false"),
        ({"dtype": "int8"}, "reward.kwargs.dtype=int8: valid is"),
    ],
)
def test_wrong_arguments_of_clip_score_are_refused(clip, kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        load_reward("clip_score", {"model": clip} | kwargs)


# --- weighted sum ---

PARTS = """
def brightness(images, prompts, scale=1.0):
    answer = images.mean((1, 2, 3)) * scale
    images.zero_()
    return answer

def length(images, prompts):
    return [len(prompt) if prompt != "dog" else float("nan") for prompt in prompts]

def failing(images, prompts):
    raise KeyError("wolf")
"""


def test_weighted_sum_of_rewards_with_and_without_arguments(tmp_path, aesthetic):
    (tmp_path / "parts.py").write_text(PARTS)
    rewards = {
        f"{tmp_path}/parts.py:brightness": {"weight": 10, "kwargs": {"scale": 3.0}},
        "jpeg_compressibility": -0.5,
        "aesthetic": {"weight": 2.0, "kwargs": aesthetic},
    }
    expected = (
        30 * IMAGES.double().mean((1, 2, 3)) + 0.5 * jpeg_kilobytes(IMAGES) + 2 * load_reward("aesthetic", aesthetic)(IMAGES, PROMPTS)
    )
    total = open_reward("weighted_sum", {"rewards": rewards}, 60.0, isolate=False)(IMAGES.clone(), PROMPTS)
    torch.testing.assert_close(total, expected.double(), rtol=1e-6, atol=1e-6)


def test_what_one_reward_has_no_number_for_has_none(tmp_path):
    (tmp_path / "parts.py").write_text(PARTS)
    kwargs = {"rewards": {f"{tmp_path}/parts.py:length": 2, f"{tmp_path}/parts.py:brightness": 0.0}}
    total = open_reward("weighted_sum", kwargs, 60.0, isolate=False)(IMAGES.clone(), PROMPTS)
    assert total[0] == 6 and total[1].isnan() and total[2] == 10


def test_a_part_that_fails_fails_the_sum_with_its_reason(tmp_path):
    (tmp_path / "parts.py").write_text(PARTS)
    reward = open_reward("weighted_sum", {"rewards": {"jpeg_compressibility": 1, f"{tmp_path}/parts.py:failing": 1}}, 60.0, isolate=False)
    with pytest.raises(RewardError, match="the reward function raised KeyError: 'wolf'"):
        reward(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    "rewards, reason",
    [
        ({}, r"reward.kwargs.rewards={}: valid is {name: weight, ...} with at least one reward"),
        (["jpeg_compressibility"], r"reward.kwargs.rewards=\['jpeg_compressibility'\]: valid is {name: weight"),
        ({"jpeg_compressibility": "1"}, "reward.kwargs.rewards.jpeg_compressibility=1: valid is a finite weight"),
        ({"jpeg_compressibility": True}, "reward.kwargs.rewards.jpeg_compressibility=True: valid is a finite weight"),
        ({"jpeg_compressibility": float("nan")}, "reward.kwargs.rewards.jpeg_compressibility=nan: valid is a finite weight"),
        ({"jpeg_compressibility": {"kwargs": {}}}, "reward.kwargs.rewards.jpeg_compressibility=.*: valid is a finite weight"),
        ({"jpeg_compressibility": {"weight": 1, "arguments": {}}}, r"jpeg_compressibility=.*: valid is {weight: ..., kwargs: {...}}"),
        ({"jpeg_compressibility": 1, "beauty": 1}, "reward.kwargs.rewards.beauty: reward.name=beauty: valid is one of"),
        ({"aesthetic": 1}, "reward.kwargs.rewards.aesthetic: reward.kwargs.weights=None: valid is the file sac"),
        ({"http://u:secret@h/": 1}, "reward.name: valid is an address without user name and password"),
        ({"http://u:secret@h/": "1"}, "reward.kwargs.rewards.an address=1: valid is a finite weight"),
        ({"http://h/": {"weight": 1, "kwargs": {}}}, "rewards.an address=.*: valid is a weight alone; the server is given its arguments"),
        ({1: 1}, "reward.kwargs.rewards: 1 is no name of a reward"),
        ({"jpeg_compressibility": {"weight": 1, "kwargs": {"a": 1}}}, r"rewards.jpeg_compressibility: reward.kwargs={'a': 1}: .*take them"),
    ],
)
def test_wrong_parts_of_a_sum_are_refused(rewards, reason):
    with pytest.raises(ValueError, match=f"^.*{reason}.*$") as error:
        load_reward("weighted_sum", {"rewards": rewards})
    assert "secret" not in str(error.value)


# --- a vision-language model's answer ---

WORDS = (
    "USER ASSISTANT : ? , . what is going on in this image Answer concisely How many are there animal What The contains two three four "
    "five cat dog wolf cats dogs wolves 3 a b c"
).split()
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
SIZE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)


def make_tokenizer(special: dict[str, str], template: str) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=list(words.items())[: len(special)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vlm")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "image_token": "<image>"}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32), make_tokenizer(special, "<s> $A"), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(1)
    text = LlamaConfig(**SIZE, vocab_size=5 + len(WORDS), pad_token_id=0, bos_token_id=1, eos_token_id=2, num_key_value_heads=2)
    vision = CLIPVisionConfig(**SIZE, image_size=32, patch_size=8)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=4))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    make_tokenizer(special, "[CLS] $A [SEP]").save_pretrained(folder)
    torch.manual_seed(0)
    config = DebertaConfig(
        **SIZE, vocab_size=4 + len(WORDS), relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False,
        type_vocab_size=0, max_position_embeddings=40,
    )  # fmt: skip
    DebertaModel(config).save_pretrained(folder)
    return str(folder)


def answer_by_hand(vlm: str, image: torch.Tensor, question: str) -> str:
    """Greedy decoding of one picture, without padding, cache or generate()."""
    file = io.BytesIO()
    as_pil(image[None])[0].save(file, "JPEG", quality=80)
    processor, model = AutoProcessor.from_pretrained(vlm), LlavaForConditionalGeneration.from_pretrained(vlm)
    inputs = processor(images=Image.open(file), text=f"USER: <image> {question} ASSISTANT:", return_tensors="pt")
    tokens = inputs["input_ids"]
    start = tokens.shape[1]
    while tokens.shape[1] < start + 64 and (tokens.shape[1] == start or tokens[0, -1] != 2):
        with torch.no_grad():
            logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(2)], 1)
    return processor.decode(tokens[0, start:], skip_special_tokens=True)


def recall_by_hand(bert: str, layer: int, candidate: str, reference: str) -> float:
    model = DebertaModel.from_pretrained(bert)
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}

    def states(sentence: str) -> torch.Tensor:
        ids = [words.get(word, 3) for word in re.findall(r"\w+|[^\w\s]+", sentence)]
        ids = [1, *ids[:38], 2]
        with torch.no_grad():
            return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].double()

    x, y = states(reference), states(candidate)
    best = [max(float(a @ b / (a.norm() * b.norm())) for b in y) for a in x[1:-1]]
    return sum(best) / len(best)


def test_pictures_go_through_jpeg_as_pillow_writes_and_reads_it():
    for rgb, picture in zip(to_pixels(IMAGES), as_pil(IMAGES)):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=80)
        assert np.array_equal(np.asarray(through_jpeg(rgb)), np.asarray(Image.open(file))) and not np.array_equal(rgb, through_jpeg(rgb))


@pytest.mark.parametrize("batch_size", [2, 16])
def test_answers_are_those_of_each_picture_and_question_alone(vlm, batch_size):
    questions = ["What animal is in this image?", "How many wolves are there in this image, a, b, c?", "is a cat?"]
    expected = [answer_by_hand(vlm, image, question) for image, question in zip(IMAGES, questions)]
    assert len(set(expected)) == 3
    assert VisionLanguageModel(vlm, "auto", "fp32", batch_size).answers(IMAGES, questions) == expected


def test_a_template_that_writes_the_beginning_itself_is_not_given_another(vlm, tmp_path):
    folder = shutil.copytree(vlm, tmp_path / "vlm")
    (folder / "chat_template.jinja").write_text("<s>" + TEMPLATE)
    question = ["What animal is in this image?"] * 3
    expected = VisionLanguageModel(vlm, "auto", "fp32", 16).answers(IMAGES, question)
    assert VisionLanguageModel(str(folder), "auto", "fp32", 16).answers(IMAGES, question) == expected


def test_vlm_alignment_is_the_recall_of_the_prompt_in_the_answer(vlm, bert):
    reward = open_reward("vlm_alignment", {"vlm": vlm, "bert": bert, "layer": 2, "dtype": "fp32", "batch_size": 2}, 60.0, isolate=False)
    answers = [answer_by_hand(vlm, image, "Answer concisely: what is going on in this image?") for image in IMAGES]
    prompts = ["a cat", "dogs", "a wolf and a dog"]
    expected = [recall_by_hand(bert, 2, answer, f"The image contains {prompt}") for answer, prompt in zip(answers, prompts)]
    assert np.std(expected) > 0.01
    assert reward(IMAGES, prompts).tolist() == pytest.approx(expected, abs=1e-5)


def test_recall_of_sentences_of_different_length_and_of_none(bert):
    recall = BertRecall(bert, 3)
    candidates = ["two dogs", " ".join(60 * ["cat", "wolf"]), "", "The image contains three cats."]
    references = ["The image contains three cats", "The image contains a", "The image contains a", "The image contains three cats."]
    with torch.no_grad():
        result = recall(candidates, references).tolist()
    assert result[2] == 0 and result[3] == pytest.approx(1, abs=1e-6)
    assert result[:2] == pytest.approx([recall_by_hand(bert, 3, *pair) for pair in zip(candidates[:2], references[:2])], abs=1e-5)


@pytest.mark.parametrize(
    "answer, number, animals, expected",
    [
        ("There are five wolves.", "five", "wolves", (True, True)),
        ("5", "five", "wolves", (True, False)),
        ("Five, I think: a Wolf", "five", "wolves", (True, True)),
        ("15 werewolves", "five", "wolves", (False, False)),
        ("fish and sheep", "two", "sheep", (False, True)),
        ("two polar bears", "two", "polar bears", (True, True)),
        ("", "two", "cats", (False, False)),
    ],
)
def test_what_an_answer_names(answer, number, animals, expected):
    assert (names_number(answer, number), names_animal(answer, animals)) == expected


def test_vlm_counting_is_the_mean_of_both_answers_matches(vlm):
    reward = open_reward("vlm_counting", {"vlm": vlm, "dtype": "fp32"}, 60.0, isolate=False)
    prompts = ["five cats", "three dogs", "two wolves"]
    expected = []
    for image, prompt in zip(IMAGES, prompts):
        number, animals = prompt.split()
        how_many = answer_by_hand(vlm, image, f"How many {animals} are there in this image?").split()
        which = answer_by_hand(vlm, image, "What animal is in this image?").split()
        numerals = {"two": "2", "three": "3", "four": "4", "five": "5"}
        singular = {"cats": "cat", "dogs": "dog", "wolves": "wolf"}
        expected.append((bool({number, numerals[number]} & {*how_many}) + bool({animals, singular[animals]} & {*which})) / 2)
    assert len(set(expected)) > 1
    assert reward(IMAGES, prompts).tolist() == expected


@pytest.mark.parametrize("prompt", ["cat", "nine cats", "two", ""])
def test_vlm_counting_wants_a_number_and_animals(prompt):
    with pytest.raises(ValueError, match=re.escape(f"prompt {prompt!r}: valid for vlm_counting is a number from two to eight")):
        parse_count(prompt)


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        (
            {"vlm": "/nowhere"},
            "reward.kwargs.vlm=/nowhere: there is no such folder; valid is a folder or hub id of a vision-language model",
        ),
        ({"vlm": "{clip}"}, "reward.kwargs.vlm={clip}: .*; valid is a folder or hub id of a vision-language model"),
        ({"vlm": "{silent}"}, "reward.kwargs.vlm={silent}: its processor has no chat template; valid is"),
        ({"bert": "/nowhere"}, "reward.kwargs.bert=/nowhere: there is no such folder; valid is a folder or hub id of a text encoder"),
        ({"layer": 4}, "reward.kwargs.layer=4: valid is 1 to 3, the layers of"),
        ({"layer": "last"}, "reward.kwargs.layer=last: valid is 1 to 3"),
        ({"dtype": "int8"}, "reward.kwargs.dtype=int8: valid is fp32, fp16, bf16"),
    ],
)
def test_wrong_models_that_answer_are_one_line(vlm, bert, clip, tmp_path, kwargs, reason):
    silent = shutil.copytree(vlm, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    kwargs = {key: value.format(clip=clip, silent=silent) if isinstance(value, str) else value for key, value in kwargs.items()}
    with pytest.raises(ValueError, match=f"^{reason.format(clip=clip, silent=silent)}.*$"):
        load_reward("vlm_alignment", {"vlm": vlm, "bert": bert, "layer": 2, "dtype": "fp32"} | kwargs)


# --- a class as a reward ---

CLASSES = """
class Counts:
    def __init__(self, start=0):
        self.calls = start
        if start < 0:
            raise KeyError("no weights")

    def __call__(self, images, prompts):
        self.calls += 1
        return [self.calls] * len(prompts)

class NotCallable:
    pass
"""


def test_a_class_is_made_once_with_the_arguments(tmp_path):
    (tmp_path / "counts.py").write_text(CLASSES)
    reward = open_reward(f"{tmp_path}/counts.py:Counts", {"start": 5}, 60.0, isolate=False)
    assert [reward(IMAGES, PROMPTS).tolist() for _ in range(2)] == [[6] * 3, [7] * 3]


@pytest.mark.parametrize(
    "name, kwargs, reason",
    [
        ("Counts", {"stop": 1}, r"reward.kwargs={'stop': 1}: Counts\(\*\*kwargs\) does not take them: .*'stop'"),
        ("Counts", {"start": -1}, r"reward.name=.*Counts: Counts\(\*\*kwargs\) raised KeyError: 'no weights'"),
        ("NotCallable", {}, r"reward.name=.*: an instance of NotCallable cannot be called with \(images, prompts\)"),
        ("Missing", {}, "has no function Missing; it has: Counts, NotCallable"),
    ],
)
def test_a_class_that_does_not_do_is_refused(tmp_path, name, kwargs, reason):
    (tmp_path / "counts.py").write_text(CLASSES)
    with pytest.raises(ValueError, match=reason):
        load_reward(f"{tmp_path}/counts.py:{name}", kwargs)
