"""Prompt sets, prompt files and the draw of an iteration's prompts."""

import hashlib
import json
import re
from typing import get_args

import numpy as np
import pytest

from ddpo_fast import train as trainer
from ddpo_fast.config import PromptSet
from ddpo_fast.prompts import EVERYDAY_OBJECTS, PROMPT_SETS, SIMPLE_ANIMALS, UNSEEN_ANIMALS, Prompts, draw_prompts, load_prompts, plural

ANIMALS = Prompts(SIMPLE_ANIMALS)


def test_simple_animals_are_the_45_of_the_paper():
    prompts = load_prompts("simple_animals", None)
    animals = prompts.texts
    assert prompts.weights is prompts.metadata is None and len(animals) == len(set(animals)) == 45
    assert all(animal.isalpha() and animal.islower() for animal in animals)
    assert animals[:3] == ["cat", "dog", "horse"] and animals[-2:] == ["hedgehog", "kangaroo"]


@pytest.mark.parametrize(
    "limit, expected", [(None, ["a red fox", "ein Bär", "猫"]), (2, ["a red fox", "ein Bär"]), (9, ["a red fox", "ein Bär", "猫"])]
)
def test_prompt_file(tmp_path, limit, expected):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\n  a red fox \r\n\n \t \nein Bär\n猫".encode())
    assert load_prompts(None, str(file), limit) == Prompts(expected)


def test_options_name_every_set():
    assert set(get_args(PromptSet)) == set(PROMPT_SETS)


def test_activities_have_the_right_article():
    prompts = load_prompts("animal_activities", None).texts
    assert len(prompts) == len(set(prompts)) == 135
    assert prompts[:3] == ["a cat washing the dishes", "a cat riding a bike", "a cat playing chess"]
    assert [prompt for prompt in prompts if not prompt.startswith("a ")] == [
        "an ant washing the dishes", "an ant riding a bike", "an ant playing chess",
    ]  # fmt: skip
    assert {prompt.split(" ", 2)[1] for prompt in prompts} == set(SIMPLE_ANIMALS)
    assert load_prompts("unseen_animal_activities", None).texts[15:17] == ["an octopus washing the dishes", "an octopus riding a bike"]


def test_counting_is_every_number_of_every_animal():
    prompts = load_prompts("counting", None).texts
    numbers = {"two", "three", "four", "five", "six", "seven", "eight"}
    assert len(set(prompts)) == 315 == 7 * 45 and {prompt.split()[0] for prompt in prompts} == numbers
    assert {"two cats", "eight kangaroos", "three mice", "five geese", "six wolves", "seven foxes", "two butterflies", "four sheep"} <= set(
        prompts
    )
    assert len({plural(animal) for animal in SIMPLE_ANIMALS + UNSEEN_ANIMALS}) == 45 + 24


def test_imagenet_animals_are_the_names_of_the_classes_0_to_397():
    prompts = load_prompts("imagenet_animals", None).texts
    assert len(prompts) == len(set(prompts)) == 398
    known = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 134: "crane", 151: "Chihuahua", 281: "tabby, tabby cat"}
    assert {i: prompts[i] for i in known} == known and prompts[397] == "puffer, pufferfish, blowfish, globefish"
    assert prompts[2] == "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"
    digest = "502198a6a0f7f97cc291bcc04010eb552d02ab37e6a6ebbb577dc9d6f999973c"
    assert hashlib.sha256("\n".join(prompts).encode()).hexdigest() == digest  # as timm 1.0.31 has them


def test_unseen_sets_share_nothing_with_what_is_trained_on():
    seen = {word for name in ("simple_animals", "imagenet_animals") for prompt in PROMPT_SETS[name] for word in prompt.split(", ")}
    assert not set(UNSEEN_ANIMALS) & set(SIMPLE_ANIMALS) and not set(EVERYDAY_OBJECTS) & seen
    assert len(set(UNSEEN_ANIMALS)) == len(set(EVERYDAY_OBJECTS)) == 24
    assert {"snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus"} <= set(UNSEEN_ANIMALS)


def test_weights_of_a_file_and_of_a_list(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("2.5\ta red fox\nein Bär\n\n1e-1 \t  a cat\n")
    assert load_prompts(None, str(file)) == Prompts(["a red fox", "ein Bär", "a cat"], [2.5, 1.0, 0.1])
    assert load_prompts("simple_animals", None, None, {"a": 2.0, "b": 1.0}) == Prompts(["a", "b"], [2.0, 1.0])
    assert load_prompts("simple_animals", None, 1, {"a": 2.0, "b": 1.0}) == Prompts(["a"])
    assert load_prompts("simple_animals", None, None, ["b", "a"]) == Prompts(["b", "a"])


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "two", ""])
def test_wrong_weight_names_file_and_line(tmp_path, weight):
    file = tmp_path / "prompts.txt"
    file.write_text(f"1\ta cat\n\n{weight or 'a dog'}\ta dog\n")
    with pytest.raises(ValueError, match=re.escape(f"prompts.file={file}: line 3 has weight {weight or 'a dog'!r}; valid is a number > 0")):
        load_prompts(None, str(file))


@pytest.mark.parametrize("limit", [None, 1, 7, 45, 100])
def test_limit_takes_the_first_and_leaves_the_set_alone(limit):
    prompts = load_prompts("simple_animals", None, limit).texts
    assert prompts == SIMPLE_ANIMALS[:limit]
    prompts.append("unicorn")
    assert "unicorn" not in SIMPLE_ANIMALS


@pytest.mark.parametrize("samples_per_prompt", [1, 2, 8])
def test_every_drawn_prompt_has_its_samples_in_a_row(samples_per_prompt):
    drawn = draw_prompts(ANIMALS, 64, samples_per_prompt, seed=0, iteration=0).texts
    assert len(drawn) == 64 and set(drawn) <= set(SIMPLE_ANIMALS)
    runs = [drawn[i : i + samples_per_prompt] for i in range(0, 64, samples_per_prompt)]
    assert all(len(set(run)) == 1 for run in runs)
    assert [run[0] for run in runs] == draw_prompts(ANIMALS, 64 // samples_per_prompt, 1, seed=0, iteration=0).texts


@pytest.mark.parametrize("seed, iteration", [(0, 0), (0, 1), (1, 0), (2**40, 10**6)])
def test_draw_is_a_function_of_seed_and_iteration(seed, iteration):
    drawn = draw_prompts(ANIMALS, 64, 1, seed, iteration)
    np.random.seed(1)  # global state must not enter
    assert draw_prompts(ANIMALS, 64, 1, seed, iteration) == drawn
    assert draw_prompts(ANIMALS, 64, 1, seed + 1, iteration) != drawn
    assert draw_prompts(ANIMALS, 64, 1, seed, iteration + 1) != drawn


def test_iterations_and_seeds_do_not_repeat_each_other():
    prompts = Prompts([str(i) for i in range(1000)])
    draws = {(s, i): np.array(draw_prompts(prompts, 256, 1, s, i).texts) for s in range(3) for i in range(3)}
    for one in draws:
        for other in draws:
            for shift in range(128):
                if one != other or shift:
                    same = np.mean(draws[one][shift:] == draws[other][: 256 - shift])
                    assert same < 0.06, f"(seed, iteration) {one} from sample {shift} on is that of {other}"


def test_draw_is_uniform():
    counts = np.zeros(45)
    for iteration in range(100):
        counts += np.bincount(
            [SIMPLE_ANIMALS.index(p) for p in draw_prompts(ANIMALS, 256, 1, seed=0, iteration=iteration).texts], minlength=45
        )
    expected = 25600 / 45
    assert ((counts - expected) ** 2 / expected).sum() < 78.7  # chi-squared, 44 degrees of freedom, 0.1 % level


def test_weighted_draw_is_in_proportion_and_a_function_of_seed_and_iteration():
    weights = [4.0, 2.0, 1.0, 1.0]

    def draw(scale, num_samples, samples_per_prompt, seed, iteration):
        prompts = Prompts(["a", "b", "c", "d"], [scale * weight for weight in weights])
        return draw_prompts(prompts, num_samples, samples_per_prompt, seed, iteration).texts

    counts = np.zeros(4)
    for iteration in range(100):
        drawn = draw(1, 256, 1, 0, iteration)
        assert drawn == draw(2, 256, 1, 0, iteration)
        counts += np.bincount(["abcd".index(prompt) for prompt in drawn], minlength=4)
    expected = 25600 * np.array(weights) / 8
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees of freedom, 0.1 % level
    assert draw(2.5e307, 256, 1, 0, 1) == draw(1, 256, 1, 0, 1)
    assert draw(1, 256, 4, 0, 1)[::4] == draw(1, 64, 1, 0, 1)
    assert draw(1, 256, 1, 1, 1) != draw(1, 256, 1, 0, 1)


def test_a_run_draws_by_weight_and_evaluates_on_a_named_set(tiny_model, tmp_path):
    (tmp_path / "reward.py").write_text(
        "import json\n\n"
        "def score(images, prompts, file):\n"
        "    with open(file, 'a') as file:\n"
        "        print(json.dumps(prompts), file=file)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    kwargs = json.dumps({"file": str(tmp_path / "prompts.jsonl")})
    listed = {"a cat": 3.0, "a dog": 1.0}
    trainer.main([
        f"--model.path={tiny_model}", f"--run.dir={tmp_path / 'run'}", f"--reward.name={tmp_path}/reward.py:score",
        f"--reward.kwargs={kwargs}", "--lora.rank=2",
        "--sample.num_samples=8", "--sample.num_steps=2", "--sample.batch_size=8", "--eval.num_samples=4", "--run.iterations=1",
        "--train.num_minibatches=1", "--prompts.samples_per_prompt=1", f"--prompts.list={json.dumps(listed)}",
        "--eval.prompts=unseen_animals", "--eval.heldout=everyday_objects",
    ])  # fmt: skip
    seen = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    evaluated = [["snail", "hippopotamus", "cheetah", "crocodile"], ["chair", "table", "lamp", "cup"]]
    assert seen == [*evaluated, draw_prompts(Prompts(["a cat", "a dog"], [3.0, 1.0]), 8, 1, 0, 1).texts, *evaluated]


def test_held_out_prompts_are_not_trained_on(tiny_model, capsys):
    with pytest.raises(SystemExit) as exit:
        trainer.main([f"--model.path={tiny_model}", "--prompts.limit=3", '--eval.heldout=["a snail", "dog"]'])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert "eval.heldout=['a snail', 'dog']: 'dog' is a training prompt" in said
