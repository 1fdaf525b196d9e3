"""Prompt sets, prompt files and the draw of an iteration's prompts."""

import numpy as np
import pytest

from ddpo_fast.prompts import SIMPLE_ANIMALS, draw_prompts, load_prompts


def test_simple_animals_are_the_45_of_the_paper():
    animals = load_prompts("simple_animals", None)
    assert len(animals) == len(set(animals)) == 45
    assert all(animal.isalpha() and animal.islower() for animal in animals)
    assert animals[:3] == ["cat", "dog", "horse"] and animals[-2:] == ["hedgehog", "kangaroo"]


@pytest.mark.parametrize(
    "limit, expected", [(None, ["a red fox", "ein Bär", "猫"]), (2, ["a red fox", "ein Bär"]), (9, ["a red fox", "ein Bär", "猫"])]
)
def test_prompt_file(tmp_path, limit, expected):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\n  a red fox \r\n\n \t \nein Bär\n猫".encode())
    assert load_prompts(None, str(file), limit) == expected


@pytest.mark.parametrize("limit", [None, 1, 7, 45, 100])
def test_limit_takes_the_first_and_leaves_the_set_alone(limit):
    prompts = load_prompts("simple_animals", None, limit)
    assert prompts == SIMPLE_ANIMALS[:limit]
    prompts.append("unicorn")
    assert "unicorn" not in SIMPLE_ANIMALS


@pytest.mark.parametrize("samples_per_prompt", [1, 2, 8])
def test_every_drawn_prompt_has_its_samples_in_a_row(samples_per_prompt):
    drawn = draw_prompts(SIMPLE_ANIMALS, 64, samples_per_prompt, seed=0, iteration=0)
    assert len(drawn) == 64 and set(drawn) <= set(SIMPLE_ANIMALS)
    runs = [drawn[i : i + samples_per_prompt] for i in range(0, 64, samples_per_prompt)]
    assert all(len(set(run)) == 1 for run in runs)
    assert [run[0] for run in runs] == draw_prompts(SIMPLE_ANIMALS, 64 // samples_per_prompt, 1, seed=0, iteration=0)


@pytest.mark.parametrize("seed, iteration", [(0, 0), (0, 1), (1, 0), (2**40, 10**6)])
def test_draw_is_a_function_of_seed_and_iteration(seed, iteration):
    drawn = draw_prompts(SIMPLE_ANIMALS, 64, 1, seed, iteration)
    np.random.seed(1)  # global state must not enter
    assert draw_prompts(SIMPLE_ANIMALS, 64, 1, seed, iteration) == drawn
    assert draw_prompts(SIMPLE_ANIMALS, 64, 1, seed + 1, iteration) != drawn
    assert draw_prompts(SIMPLE_ANIMALS, 64, 1, seed, iteration + 1) != drawn


def test_iterations_and_seeds_do_not_repeat_each_other():
    prompts = [str(i) for i in range(1000)]
    draws = {(s, i): np.array(draw_prompts(prompts, 256, 1, s, i)) for s in range(3) for i in range(3)}
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
            [SIMPLE_ANIMALS.index(p) for p in draw_prompts(SIMPLE_ANIMALS, 256, 1, seed=0, iteration=iteration)], minlength=45
        )
    expected = 25600 / 45
    assert ((counts - expected) ** 2 / expected).sum() < 78.7  # chi-squared, 44 degrees of freedom, 0.1 % level
