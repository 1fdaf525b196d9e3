"""Prompt distributions: which prompts a run trains on, and which prompt each sample gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ddpo_fast.prompt_files import read_entries

SIMPLE_ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant "
    "butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama "
    "camel bat gorilla hedgehog kangaroo"
).split()
"""The 45 nouns of the paper's aesthetic experiment (DDPO, arXiv:2305.13301, appendix)."""

UNSEEN_ANIMALS = (
    "snail hippopotamus cheetah crocodile lobster octopus elephant giraffe penguin panda koala rhinoceros ostrich flamingo peacock "
    "walrus otter beaver leopard hamster scorpion jellyfish crab owl"
).split()
"""24 animals that are not among the 45, to see what a run has learnt about others, as the paper did (its lists are not public)."""

EVERYDAY_OBJECTS = (
    "chair table lamp cup bottle book shoe bicycle car clock umbrella backpack teapot guitar camera scissors candle pillow bucket ladder "
    "kettle toaster telephone suitcase"
).split()
"""24 things that are not animals, for the same purpose."""

ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")
"""The paper's activities, section 5.3."""

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}

_PLURALS = {
    "sheep": "sheep", "deer": "deer", "fish": "fish", "mouse": "mice", "goose": "geese", "wolf": "wolves", "jellyfish": "jellyfish",
    "octopus": "octopuses",
}  # fmt: skip


def plural(noun: str) -> str:
    """An animal's plural: fox, foxes; butterfly, butterflies; monkey, monkeys; mouse, mice."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _doing(animals: list[str]) -> list[str]:
    return [f"{'an' if animal[0] in 'aeiou' else 'a'} {animal} {activity}" for animal in animals for activity in ACTIVITIES]


PROMPT_SETS = {
    "simple_animals": SIMPLE_ANIMALS,
    "imagenet_animals": (Path(__file__).resolve().parent / "prompt_sets/imagenet_animals.txt").read_text(encoding="utf-8").splitlines(),
    "animal_activities": _doing(SIMPLE_ANIMALS),
    "counting": [f"{number} {plural(animal)}" for number in NUMBERS for animal in SIMPLE_ANIMALS],
    "unseen_animals": UNSEEN_ANIMALS,
    "unseen_animal_activities": _doing(UNSEEN_ANIMALS),
    "everyday_objects": EVERYDAY_OBJECTS,
}
"""45, 398, 135, 315, 24, 72 and 24 prompts. imagenet_animals: the names of ImageNet's classes 0 to 397, as in "tench, Tinca tinca"."""


@dataclass(frozen=True)
class Prompts:
    """Prompts with their weights and metadata. The same text may occur more than once, with different metadata."""

    texts: list[str]
    weights: list[float] | None = None
    """How often each is drawn, relative to the others; None if all are equally likely."""
    metadata: list[dict] | None = None
    """What the reward is told about each prompt: a JSON object, {} if there is nothing; None if no prompt has metadata."""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Prompts":
        """The prompts of a slice, or those with these numbers, in this order."""
        picked = np.arange(len(self))[rows].tolist()
        return Prompts(*(column and [column[row] for row in picked] for column in (self.texts, self.weights, self.metadata)))


def load_prompts(
    name: str | None, file: str | None, limit: int | None = None, listed: list[str] | dict[str, float] | None = None
) -> Prompts:
    """At most the first `limit` prompts of `listed` (a mapping has weights) or `file`, otherwise of the named set.

    Raises ValueError, naming the file and the line at fault, see `read_entries`.
    """
    if file is None:
        texts = list(PROMPT_SETS[name] if listed is None else listed)[:limit]
        return Prompts(texts, _different([listed[text] for text in texts]) if isinstance(listed, dict) else None)
    texts, weights, metadata = [], [], []
    for text, weight, entry in islice(read_entries(file), limit):
        texts.append(text)
        weights.append(weight)
        metadata.append(entry)
    if not texts:
        raise ValueError(f"prompts.file={file}: it has no prompt")
    return Prompts(texts, _different(weights), metadata if any(metadata) else None)


def _different(weights: list[float]) -> list[float] | None:
    return weights if len(set(weights)) > 1 else None


def evaluation_prompts(prompts: str | list[str] | Prompts, count: int) -> Prompts:
    """The prompts of `count` evaluation pictures, which take turns: those given, or those of the named set."""
    if not isinstance(prompts, Prompts):
        prompts = Prompts(PROMPT_SETS[prompts] if isinstance(prompts, str) else prompts)
    return prompts[[i % len(prompts) for i in range(count)]]


@dataclass(frozen=True)
class Evaluation:
    """A kind of fixed evaluation set."""

    name: str
    """The prefix of its metrics: <name>_reward_mean and so on."""
    option: str
    """The option that sets its prompts."""
    pictures: str
    """Its grids are images/<pictures>_<iteration>.png."""
    words: str
    """What it is called in sentences."""
    title: str
    """What it is called in plots and tables."""
    heading: str
    """What its pictures are called on a page."""
    first_id: int
    """Its samples are numbered from here, training samples from 0: their noise never meets."""


EVALUATIONS = {
    evaluation.name: evaluation
    for evaluation in (
        Evaluation(
            "eval", "eval.prompts", "iteration", "the fixed evaluation set", "fixed evaluation", "Same prompts, same noise", 1 << 48
        ),
        Evaluation("heldout", "eval.heldout", "heldout", "held-out prompts", "held-out evaluation", "Held-out prompts", 1 << 49),
    )
}
"""In the order of their weight: the last that a run has decides which weights are the best."""


@dataclass(frozen=True)
class EvaluationSet:
    """The prompts of each picture of a fixed evaluation set."""

    kind: Evaluation
    prompts: Prompts


def evaluation_sets(options, prompts: Prompts) -> list[EvaluationSet]:
    """The fixed evaluation sets that `options`, config.eval, asks for: `eval` and, with eval.heldout, `heldout`.

    Raises ValueError for a held-out prompt that is also trained on.
    """
    evaluations = [EvaluationSet(EVALUATIONS["eval"], evaluation_prompts(options.prompts or prompts, options.num_samples))]
    if options.heldout is not None:
        heldout = evaluation_prompts(options.heldout, options.num_samples)
        if seen := sorted(set(heldout.texts).intersection(prompts.texts)):
            raise ValueError(
                f"eval.heldout={options.heldout}: {seen[0]!r} is a training prompt; valid are prompts that are not trained on, or null"
            )
        evaluations.append(EvaluationSet(EVALUATIONS["heldout"], heldout))
    return evaluations


def draw_prompts(prompts: Prompts, num_samples: int, samples_per_prompt: int, seed: int, iteration: int) -> Prompts:
    """The prompts of all samples of an iteration, each for `samples_per_prompt` samples in a row.

    A prompt's probability is in proportion to its weight; without weights all are equally likely. The result is a function of
    (seed, iteration): every rank draws the whole list and takes its part of it.
    """
    generator, count = np.random.default_rng((0, seed, iteration)), num_samples // samples_per_prompt
    if prompts.weights is None:
        drawn = generator.integers(len(prompts), size=count)
    else:
        shares = np.array(prompts.weights) / max(prompts.weights)  # their sum is finite
        drawn = generator.choice(len(prompts), size=count, p=shares / shares.sum())
    return prompts[drawn.repeat(samples_per_prompt)]
