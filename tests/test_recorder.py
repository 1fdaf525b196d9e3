"""A recorded pipeline: its network is given what the pipeline gives it, for any rows; and the pipeline stays what it was."""

import re
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import CALL, FAMILIES
from shared import CPU
from torch import Tensor

from ddpo_fast.kernels.reference import guide
from ddpo_fast.pipelines import families
from ddpo_fast.pipelines.folders import find_model, open_pipeline
from ddpo_fast.pipelines.recorder import Recorder
from ddpo_fast.pipelines.template import Asked, Recording, Texts
from ddpo_fast.schedule import Levels, Schedule

PROMPTS = ["a cat", "two dogs that play chess"]
NUM_STEPS = 3


@dataclass
class Own:
    """A pipeline's own pictures of PROMPTS, each drawn alone, from fixed latents; and its recording."""

    pipe: DiffusionPipeline
    recorder: Recorder
    recording: Recording
    texts: Texts
    latents: list[list[Tensor]]
    """Of each prompt (1, *shape) before each step, and the final ones."""
    outputs: list[list[Tensor]]
    """Of each prompt (G, *shape) of each step: the unconditional branch first."""
    pictures: list[Tensor]

    def rows(self, *prompts: int) -> np.ndarray:
        """The rows of `texts` that these prompts are in."""
        return np.array(prompts) + self.recording.num_branches - 1

    def call(self, x: Tensor, steps: list[int], rows: np.ndarray) -> Tensor:
        recording = self.recording
        return recording.template.call(self.recorder.network, x, recording.times[steps], self.texts.gather(torch.from_numpy(rows)))


@torch.no_grad()
def _own_run(recorder: Recorder, asked: Asked, prompt: str) -> tuple:
    """Each step's outputs of the network, a tensor a call; the latents before each step, and the last; the picture."""
    pipe, kind, outputs, latents = recorder.pipe, recorder.family, [], []
    encode, step = pipe.encode_prompt, pipe.scheduler.step
    hook = recorder.network.register_forward_hook(lambda module, args, out: outputs.append(torch.stack(list(out[0]))))
    if kind.encoded is not None:
        pipe.encode_prompt = lambda *args, **kwargs: kind.encoded(encode(*args, **kwargs), recorder.arguments)

    def stepped(out, t, x, **options):
        made = step(out, t, x, **options)
        latents.extend([x, made[0]])
        return made

    pipe.scheduler.step = stepped
    negative = {} if kind.negative_prompt is None else {"negative_prompt": kind.negative_prompt}
    options = {**recorder.arguments, **negative, kind.guidance: asked.guidance_scale, "height": asked.height, "width": asked.width}
    try:
        seed = torch.Generator().manual_seed(len(prompt))
        picture = pipe(prompt=[prompt], num_inference_steps=NUM_STEPS, output_type="pt", generator=seed, **options)[0]
    finally:
        hook.remove()
        del pipe.scheduler.step
        pipe.__dict__.pop("encode_prompt", None)
    per_step = len(outputs) // NUM_STEPS
    return [outputs[k * per_step : (k + 1) * per_step] for k in range(NUM_STEPS)], [*latents[::2], latents[-1]], picture


def _pipeline(name: str, request) -> tuple[DiffusionPipeline, dict]:
    """A tiny pipeline and the arguments of its call."""
    if name in FAMILIES:
        return DiffusionPipeline.from_pretrained(request.getfixturevalue("family")(name)), CALL[name]
    folder = request.getfixturevalue({"sd": "tiny_model", "sdxl": "sdxl"}[name])
    return open_pipeline(find_model(str(folder)), torch.float32), {"guidance_scale": 3.0, "height": 16, "width": 16}


@pytest.fixture(scope="module", params=[*FAMILIES, "sd", "sdxl"])
def own(request) -> Own:
    pipe, arguments = _pipeline(request.param, request)
    pipe.set_progress_bar_config(disable=True)
    kind, arguments = families.FAMILIES[type(pipe).__name__], dict(arguments)
    arguments.pop("negative_prompt", None)
    asked = Asked(NUM_STEPS, *(arguments.pop(name) for name in (kind.guidance, "height", "width")))
    recorder = Recorder(pipe, kind, CPU, arguments)
    recording = recorder.record(asked)
    *unconditional, first = recorder.texts_of(PROMPTS[0], recording)
    texts = Texts.of(recording, [*unconditional, first, recorder.texts_of(PROMPTS[1], recording)[-1]], CPU)
    calls, latents, pictures = zip(*(_own_run(recorder, asked, prompt) for prompt in PROMPTS))
    shape = (1, *recording.shape)
    outputs = [[torch.cat([step[call][block].reshape(shape) for call, block in recording.branches]) for step in run] for run in calls]
    return Own(pipe, recorder, recording, texts, list(latents), outputs, list(pictures))


def test_the_network_s_outputs_are_the_pipeline_s_own_bits(own):
    """At every step, in calls of as many rows as the pipeline's: of both branches, or of one where it makes two calls."""
    branches = own.recording.branches
    sizes = [range(len(branches))] if len({call for call, _ in branches}) == 1 else [[0], [1]]
    for prompt, (latents, outputs) in enumerate(zip(own.latents, own.outputs)):
        rows = np.concatenate([np.zeros(len(branches) - 1, np.int64), own.rows(prompt)])
        for k, expected in enumerate(outputs):
            for size in map(list, sizes):
                x = latents[k].repeat(len(size), *[1] * len(own.recording.shape))
                assert torch.equal(own.call(x, [k] * len(size), rows[size]), expected[size]), (prompt, k)


def test_rows_may_be_of_any_steps(own):
    """A row of a call whose rows are of different steps has the bits that it has in a call of its step alone."""
    steps, prompts = [2, 0, 1], [1, 0, 1]
    rows = own.rows(*prompts)
    mixed = own.call(torch.cat([own.latents[i][k] for i, k in zip(prompts, steps)]), steps, rows)
    for n, k in enumerate(steps):
        alone = own.call(torch.cat([own.latents[i][k] for i in prompts]), [k] * 3, rows)
        assert torch.equal(mixed[n], alone[n])


def test_a_step_without_noise_is_the_pipeline_s_own(own):
    """The guided output that a step is made of moves the latents as the scheduler does, by Euler's step or DDIM's at eta 0."""
    recording, scheduler = own.recording, own.pipe.scheduler
    table = Schedule.of(Levels.of(recording, scheduler), "ode", 0.0).coefficients
    for prompt, latents in enumerate(own.latents):
        conditions = own.texts.conditions(own.rows(prompt))
        for k, (x, expected) in enumerate(pairwise(latents)):
            given = x.repeat(recording.num_outputs, *[1] * len(recording.shape))
            out = conditions.call(own.recorder.network, given, recording.times[k].expand(len(given)))
            out = guide(out, 1, recording.output_scale)
            ours = table[k, 0] * x + table[k, 1] * out
            assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_pictures_are_the_pipeline_s_own(own):
    for latents, picture in zip(own.latents, own.pictures):
        assert torch.equal(own.recorder.decode(latents[-1], own.recording), picture.float())
    three = own.recorder.decode(torch.cat([own.latents[i][-1] for i in (0, 1, 0)]), own.recording)
    apart = (own.pictures[0] - own.pictures[1]).norm()
    for picture, i in zip(three, (0, 1, 0)):  # of a batch, in its order
        assert (picture - own.pictures[i][0]).norm() < 0.01 * apart


def test_the_pipeline_stays_what_it_was(own):
    pipe, kind, state = own.pipe, type(own.pipe), torch.get_rng_state()
    before, scheduler = dict(pipe.__dict__), dict(pipe.scheduler.__dict__)
    own.recorder.record(own.recording.asked)
    own.recorder.texts_of("a bird", own.recording)
    own.recorder.decode(own.latents[0][-1], own.recording)
    assert type(pipe) is kind and pipe.__dict__ == before and torch.equal(torch.get_rng_state(), state)
    assert pipe.scheduler.__dict__ == scheduler


def test_a_prompt_that_is_cut_is_found_and_tokenizers_stay_what_they_were(own):
    """How many tokens are lost: of a prompt with one letter more it is as many more as tokenizers that count letters."""
    tokenizers = {name: part for name, part in own.pipe.components.items() if name.startswith("tokenizer")}
    before = {name: (type(part), dict(part.__dict__)) for name, part in tokenizers.items()}
    long, longer = "a" + " b" * 600, "a" + " b" * 601
    for prompt in ("b", long, longer):
        own.recorder.texts_of(prompt, own.recording)
    assert {"b", long, longer} & own.recorder.cut.keys() == {long, longer}
    found = [dict(re.findall(r"(\w+) cuts (\d+) of its", own.recorder.cut[prompt])) for prompt in (long, longer)]
    assert found[0].keys() == found[1].keys() == tokenizers.keys()
    assert all(int(found[1][name]) - int(found[0][name]) in (1, 2) for name in tokenizers)
    assert {name: (type(part), part.__dict__) for name, part in tokenizers.items()} == before


def test_a_recording_says_what_another_version_might_change(own):
    asked = own.recording.asked
    again, longer = own.recorder.record(asked), own.recorder.record(replace(asked, num_steps=NUM_STEPS + 1))
    assert again.digest == own.recording.digest != longer.digest
