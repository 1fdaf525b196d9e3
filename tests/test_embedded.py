"""The embedded default model and its scorer: they load, draw what is asked, tell pictures apart, and stay small."""

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

import ddpo_fast.embedded
from ddpo_fast.embedded.build_data import read_sheet
from ddpo_fast.embedded.scorer import log_probs, subject_of
from ddpo_fast.embedded.vocabulary import ANIMALS, SUBJECTS, TEMPLATES, caption
from ddpo_fast.rewards.embedded_alignment import embedded_alignment

EMBEDDED = Path(ddpo_fast.embedded.__file__).parent


class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def loaded():
    """The pipeline, and everything that was warned of or logged while it loaded and drew one step."""
    records, loggers = Records(), [logging.getLogger(name) for name in ("diffusers", "transformers", "")]
    for logger in loggers:
        logger.addHandler(records)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / "model")
        pipeline.set_progress_bar_config(disable=True)
        pipeline("cat", num_inference_steps=1)
    for logger in loggers:
        logger.removeHandler(records)
    return pipeline, records.messages + [str(w.message) for w in caught]


@pytest.fixture(scope="module")
def heldout():
    pictures, names, _ = read_sheet("heldout")
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, names


def test_pipeline_loads_by_plain_diffusers_in_fp32_without_warnings(loaded):
    pipeline, messages = loaded
    assert messages == []
    assert {m.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings


def test_the_folder_stays_small():
    files = [path for path in EMBEDDED.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 31e6


def test_no_config_names_a_folder_of_the_machine_that_made_it():
    configs = [path for name in ("model", "flow_model") for path in (EMBEDDED / name).rglob("*.json")]
    assert len(configs) > 10 and [path for path in configs if re.search(r'_path": "/', path.read_text(encoding="utf-8"))] == []


def test_samples_show_what_was_asked_for(loaded):
    pipeline, _ = loaded
    names = ["cat", "lion", "zebra", "frog", "pig", "butterfly", "apple", "car"]
    prompts = [caption(name, template) for name, template in zip(names, TEMPLATES * 2)]
    generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=4.0, eta=1.0, generator=generator, output_type="pt").images
    right = embedded_alignment(images, prompts)
    wrong = torch.stack([embedded_alignment(images, prompts[k:] + prompts[:k]) for k in range(1, len(prompts))])
    assert right.mean() > 0.25 and right.mean() > 10 * wrong.mean()


def test_scorer_recognises_a_style_it_was_not_trained_on(heldout):
    images, names = heldout
    animals = [i for i, name in enumerate(names) if name in ANIMALS]
    labels = torch.tensor([ANIMALS.index(names[i]) for i in animals])
    ranks = log_probs(images[animals])[:, : len(ANIMALS)].argsort(dim=1, descending=True)
    assert (ranks[:, 0] == labels).float().mean() > 0.75
    assert (ranks[:, :5] == labels[:, None]).any(1).float().mean() > 0.9


def test_reward_is_a_deterministic_probability_at_any_size(heldout):
    images, names = heldout[0][:6], heldout[1][:6]
    reward = embedded_alignment(images, names)
    assert reward.shape == (6,) and reward.dtype == torch.float32 and reward.device.type == "cpu"
    assert ((reward >= 0) & (reward <= 1)).all()
    assert torch.equal(reward, embedded_alignment(images, names))
    larger = torch.nn.functional.interpolate(images, (160, 200), mode="bicubic").clamp(0, 1)
    assert embedded_alignment(larger, names).mean() > 0.5 * reward.mean()


@pytest.mark.parametrize(
    "prompt, subject",
    [("cat", "cat"), ("A Polar Bear.", "polar bear"), ("an ant riding a bike", "ant"), ("a goat on a bus", "goat")],
)
def test_subject_of_prompt(prompt, subject):
    assert subject_of(prompt) == subject


@pytest.mark.parametrize("prompt", ["a quasar", "caterpillar", ""])
def test_prompt_without_known_subject_is_named_in_the_error(prompt):
    with pytest.raises(ValueError, match="valid ones are cat, dog") as error:
        embedded_alignment(torch.zeros(1, 3, 64, 64), [prompt])
    assert repr(prompt) in str(error.value)


def test_captions_use_the_right_article():
    assert [caption(name, "{article} {name}") for name in ("cat", "ant", "unicorn", "umbrella", "owl")] == [
        "a cat", "an ant", "a unicorn", "an umbrella", "an owl",
    ]  # fmt: skip
    assert len(ANIMALS) == 45 and len(set(SUBJECTS)) == len(SUBJECTS)


def test_the_flow_model_loads_by_plain_diffusers_and_its_samples_show_what_was_asked_for():
    names = ["cat", "lion", "bear", "frog", "pig", "butterfly", "apple", "car"]
    pipeline = StableDiffusion3Pipeline.from_pretrained(EMBEDDED / "flow_model", text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in range(len(names))]
    images = pipeline(
        names, num_inference_steps=20, guidance_scale=3.0, max_sequence_length=0, generator=generator, output_type="pt"
    ).images
    right = embedded_alignment(images, names)
    wrong = torch.stack([embedded_alignment(images, names[k:] + names[:k]) for k in range(1, len(names))])
    assert right.mean() > 0.5 and wrong.mean() < 0.05
    judged = json.loads((EMBEDDED / "flow_evaluation.json").read_text())
    assert judged["guidance_3"]["animals_top1"] >= 0.88 and judged["guidance_1"]["animals_top1"] >= 0.65
