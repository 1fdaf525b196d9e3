"""Prompt sets, prompt files and the draw of an iteration's prompts."""

import hashlib
import json
import re
from typing import get_args

import numpy as np
import pytest

from ddpo_fast import prompt_files
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import PromptSet
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


@pytest.mark.parametrize(
    "weight, shown", [("0", "0.0"), ("-1", "-1.0"), ("nan", "nan"), ("inf", "inf"), ("two", "'two'"), ("a cat", "'a cat'")]
)
def test_wrong_weight_names_file_and_line(tmp_path, weight, shown):
    file = tmp_path / "prompts.txt"
    file.write_text(f"1\ta cat\n\n{weight}\ta dog\n")
    with pytest.raises(
        ValueError, match=re.escape(f"prompts.file={file}: line 3 has weight {shown}; valid is a number > 0, a tab, a prompt")
    ):
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


# --- files ---


def write(tmp_path, name: str, content: str | bytes) -> str:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(tmp_path / name)


OBJECTS = '{"prompt": "two cats", "metadata": {"count": 2}}\n\n{"prompt": " a dog ", "weight": 2.5, "tag": "one"}\n"ein Bär"\n'
WITH_METADATA = Prompts(["two cats", "a dog", "ein Bär"], [1.0, 2.5, 1.0], [{"count": 2}, {"tag": "one"}, {}])
INDENTED = json.dumps([json.loads(line) for line in OBJECTS.splitlines() if line], indent=2)
TABLE = 'prompt,category,weight\n"a cat, sitting",animals,2\n\n"a ""red"" car\nin the rain",,\n,,\n'
FROM_TABLE = Prompts(["a cat, sitting", 'a "red" car\nin the rain'], [2.0, 1.0], [{"category": "animals"}, {"category": ""}])


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("p.jsonl", OBJECTS, WITH_METADATA),
        ("p.NDJSON", OBJECTS.replace("\n", "\r\n"), WITH_METADATA),
        ("p.json", OBJECTS, WITH_METADATA),
        ("p.json", INDENTED, WITH_METADATA),
        ("p.json", '["a cat", "{a dog}", "# three", "a --w 2"]', Prompts(["a cat", "{a dog}", "# three", "a --w 2"])),
        ("p.json", '{"a cat": 2, "prompt": 1}', Prompts(["a cat", "prompt"], [2.0, 1.0])),
        ("p.json", '{"prompt": "a cat", "weight": null, "metadata": null}', Prompts(["a cat"])),
        ("p.jsonl", '{"prompt": "a cat", "tag": 1, "metadata": {"x": [1, null]}}', Prompts(["a cat"], None, [{"tag": 1, "x": [1, None]}])),
        ("p.jsonl", '{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 2}', Prompts(["a", "a"], None, [{"n": 1}, {"n": 2}])),
        ("p.csv", TABLE, FROM_TABLE),
        ("p.csv", TABLE.replace(",animals,", ";animals;").replace("y,w", "y;w").replace("t,c", "t;c").replace(",,\n", ";;\n"), FROM_TABLE),
        ("p.csv", "Prompt\na cat\n", Prompts(["a cat"])),
        ("p.tsv", 'prompt\na cat, a "big" one\n', Prompts(['a cat, a "big" one'])),
        ("p.tsv", "id\tprompt\n7\ta cat\n", Prompts(["a cat"], None, [{"id": "7"}])),
        ("p", "a cat\n", Prompts(["a cat"])),
        ("p.txt", "# a comment\n#\n## another\na cat\n1\t# three\n 1\t#dog\n", Prompts(["a cat", "# three", "#dog"])),
        ("p.txt", "{red|blue} fox\n[cat:dog:0.5]\n{{cat}}, best\na [1] fox -- sitting\n", None),
        ("p.txt", "a cat\t\n2\ta dog \t\n", Prompts(["a cat", "a dog"], [1.0, 2.0])),
        ("p.txt", "a\u2028cat\na\x0bdog\n\n\na cat\na cat\n", Prompts(["a\u2028cat", "a\x0bdog", "a cat", "a cat"])),
        ("p.txt", "a cat\rein Bär\r", Prompts(["a cat", "ein Bär"])),
        ("p.txt", b"\xef\xbb\xbfa cat\r\nein B\xc3\xa4r", Prompts(["a cat", "ein Bär"])),
        ("p.txt", "a cat\r\nein Bär\n".encode("utf-16"), Prompts(["a cat", "ein Bär"])),
        ("p.txt", b"\xfe\xff" + "a cat\nein Bär".encode("utf-16-be"), Prompts(["a cat", "ein Bär"])),
        ("p.txt", "a cat\nein Bär\n".encode("utf-32"), Prompts(["a cat", "ein Bär"])),
        ("p.csv", TABLE.encode("utf-16"), FROM_TABLE),
        ("p.jsonl", b"\xef\xbb\xbf" + OBJECTS.encode(), WITH_METADATA),
    ],
)  # fmt: skip
def test_formats(tmp_path, name, content, expected):
    if expected is None:
        expected = Prompts(content.splitlines())
    assert load_prompts(None, write(tmp_path, name, content)) == expected


NO_PROMPT = 'line 2 has no prompt; valid is {"prompt": "...", "weight": 1, "metadata": {...}}'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", 'a cat\n{"prompt": "a dog"}\n', "line 2 is JSON; valid is .txt with a prompt a line, .jsonl, .json, .csv or .tsv"),
        ("p.txt", '{"prompt": "a dog", }\n', "line 1 is JSON"),
        ("p.txt", "{'prompt': 'a dog'}\n", "line 1 is JSON"),
        ("p.txt", '["a cat", "a dog"]', "line 1 is JSON"),
        ("p.list", INDENTED, "line 1 is JSON"),
        ("p.txt", '\n{\n  "a cat": 2\n}', "line 2 is JSON"),
        ("p.txt", TABLE, "line 1 is a header of CSV; valid is .txt with"),
        ("p", "id\tPrompt\n1\ta cat\n", "line 1 is a header of CSV"),
        ("p.txt", '"prompt"\n"a cat"\n', "line 1 is a header of CSV"),
        ("p.yaml", "- a cat\n", "valid is .txt with a prompt a line, .jsonl"),
        ("p.txt", "a cat\n#dog\n", 'line 2 begins with "#": valid is "# " for a comment, or a weight and a tab before such a prompt'),
        ("p.txt", "a cat --n bad --w 512 --h 512\n", "line 1 has --n, an option of other programs; valid is the prompt alone, or .jsonl"),
        ("p.txt", "a cat\n2\ta dog --ar 16:9\n", "line 2 has --ar"),
        ("p.txt", "--niji a cat", "line 1 has --niji"),
        ("p.txt", "2\t\n", "line 1 has an empty prompt"),
        ("p.txt", "a cat\n 2 \t \n", "line 2 has an empty prompt"),
        ("p.txt", "\n \n# all of it\n", "it has no prompt"),
        ("p.txt", "", "it has no prompt"),
        ("p.txt", "a cat\nein B\xe4r\n".encode("latin-1"), "line 2 is not in UTF-8 (invalid continuation byte); valid is UTF-8, or UTF-16"),
        ("p.txt", b"a\r\nb\rc\nein B\xff", "line 4 is not in UTF-8 (invalid start byte)"),
        ("p.txt", "a cat\nein Bär".encode("utf-16")[:-1], "line 2 is not in UTF-16 (truncated data)"),
        ("p.txt", "a cat\na dog".encode("utf-16-le"), "line 1 has a null byte, as UTF-16 without a byte order mark"),
        ("p.csv", b"prompt\na cat\na\0dog\n", "line 3 has a null byte"),
        ("p.txt", "a cat\n" + "a " * 5001, "line 2 has a prompt of 10,001 characters; valid is at most 10,000"),
        ("p.jsonl", '"a cat"\n{"prompt": "a dog", }\n', "line 2 is no JSON: "),
        ("p.jsonl", '"a cat"\na dog\n', "line 2 is no JSON: Expecting value"),
        ("p.jsonl", '"a cat"\n["a dog"]\n', NO_PROMPT),
        ("p.jsonl", '"a cat"\n{"text": "a dog"}\n', NO_PROMPT),
        ("p.jsonl", '"a cat"\nnull\n', NO_PROMPT),
        ("p.jsonl", '{"prompt": null}', "line 1 has the prompt None; valid is a text"),
        ("p.jsonl", '{"prompt": ["a cat"]}', "line 1 has the prompt ['a cat']; valid is a text"),
        ("p.jsonl", '{"prompt": " "}', "line 1 has an empty prompt"),
        ("p.jsonl", '{"prompt": "a\\u0000cat"}', "line 1 has a prompt with a null byte or half of a surrogate pair"),
        ("p.jsonl", '"a cat \\ud83d"', "line 1 has a prompt with a null byte or half of a surrogate pair"),
        ("p.jsonl", '"a"\n{"prompt": "b", "weight": true}', "line 2 has weight True; valid is a finite number > 0"),
        ("p.jsonl", '{"prompt": "b", "weight": "2"}', "line 1 has weight '2'"),
        ("p.jsonl", '{"prompt": "b", "weight": 0}', "line 1 has weight 0;"),
        ("p.jsonl", '{"prompt": "b", "weight": NaN}', "line 1: NaN is no number of JSON"),
        ("p.jsonl", '{"prompt": "b", "metadata": {"x": 1e999}}', "line 1: 1e999 is no number of JSON"),
        ("p.jsonl", '{"prompt": "b", "weight": 1' + "0" * 400 + "}", "line 1 has weight 1000"),
        ("p.jsonl", '{"prompt": "b", "metadata": [1]}', "line 1 has metadata that is no object: [1]"),
        ("p.jsonl", '{"prompt": "b", "x": 1, "metadata": {"x": 1}}', "line 1 has 'x' twice, in its metadata and beside it"),
        ("p.jsonl", '{"prompt": "b", "prompt": "c"}', "line 1: 'prompt' is given twice"),
        ("p.jsonl", '{"prompt": "b", "x": ' + "[" * 100_000 + "}", "line 1: it is nested too deeply"),
        ("p.json", '[\n  "a cat"\n  "a dog"\n]', "line 3 is no JSON: "),
        ("p.json", '["a cat", 2]', "entry 2 has no prompt"),
        ("p.json", '{"a cat": "much"}', "entry 1 has weight 'much'"),
        ("p.json", '{"prompts": ["a cat"]}', "entry 1 has weight ['a cat']"),
        ("p.json", "[]", "it has no prompt"),
        ("p.json", "3", "entry 1 has no prompt"),
        ("p.csv", "a cat,animals\n", "line 1 is 'a cat,animals'; valid is a header with a column prompt"),
        ("p.csv", "", "line 1 is ''; valid is a header"),
        ("p.csv", '["' + "x" * 200_000 + '"]', "line 1: field larger than field limit"),
        ("p.csv", "prompt,category\n", "it has no prompt"),
        ("p.csv", "prompt,Prompt\na,b\n", "line 1 has the column 'prompt' twice"),
        ("p.csv", TABLE + "a dog\n", "line 7 has 1 columns, and the header 3"),
        ("p.csv", "prompt,x\na dog, brown,1\n", "line 2 has 3 columns, and the header 2"),
        ("p.csv", 'prompt\na cat\n"a dog\n\n', "line 3: unexpected end of data"),
        ("p.csv", "prompt,weight\na cat,inf\n", "line 2 has weight inf"),
        ("p.csv", "prompt,weight\na cat,two\n", "line 2 has weight 'two'"),
        ("p.csv", "prompt,x\n ,1\n", "line 2 has an empty prompt"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_names_it_and_the_place(tmp_path, name, content, message):
    file = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        parse([f"--prompts.file={file}"])
    assert str(error.value).startswith(f"prompts.file={file}: {message}") and len(str(error.value)) < 400 + len(file)


@pytest.mark.parametrize("name", ["nowhere.txt", "folder", "a" * 300, "locked.txt"])
def test_a_file_that_cannot_be_read(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked.txt").write_text("a cat")
    message = "there is no such file"
    if name == "locked.txt":
        message = "it cannot be read: Permission denied"

        def refuse(*args, **kwargs):  # root may read anything
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(prompt_files, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=re.escape(f"prompts.file={tmp_path / name}: {message}")):
        load_prompts(None, str(tmp_path / name))


def test_a_run_draws_by_weight_and_tells_the_reward_the_metadata(tiny_model, tmp_path):
    """The evaluation's prompts are those trained on, with their metadata; a held-out set has none."""
    (tmp_path / "reward.py").write_text(
        "import json\n\n"
        "def score(images, prompts, file, metadata=None):\n"
        "    with open(file, 'a') as file:\n"
        "        print(json.dumps([prompts, metadata]), file=file)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    kwargs = json.dumps({"file": str(tmp_path / "seen.jsonl")})
    entries = [{"prompt": "a cat", "count": 1}, {"prompt": "a dog"}, {"prompt": "a cat", "metadata": {"count": 2}, "weight": 1.5}]
    file = write(tmp_path, "prompts.json", json.dumps(entries))
    trainer.main([
        f"--model.path={tiny_model}", f"--run.dir={tmp_path / 'run'}", f"--reward.name={tmp_path}/reward.py:score",
        f"--reward.kwargs={kwargs}", "--lora.rank=2",
        "--sample.num_samples=8", "--sample.num_steps=2", "--sample.batch_size=4", "--eval.num_samples=4", "--run.iterations=1",
        "--train.num_minibatches=1", "--prompts.samples_per_prompt=1", f"--prompts.file={file}", "--eval.heldout=everyday_objects",
    ])  # fmt: skip
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    evaluated = [["a cat", "a dog", "a cat", "a cat"], [{"count": 1}, {}, {"count": 2}, {"count": 1}]]
    heldout = [["chair", "table", "lamp", "cup"], None]
    drawn = draw_prompts(Prompts([*"012"], [1.0, 1.0, 1.5]), 8, 1, 0, 1).texts
    texts, metadata = ([column[int(i)] for i in drawn] for column in (["a cat", "a dog", "a cat"], [{"count": 1}, {}, {"count": 2}]))
    batches = [[texts[:4], metadata[:4]], [texts[4:], metadata[4:]]]
    assert seen == [evaluated, heldout, *batches, evaluated, heldout] and len(set(drawn)) == 3


@pytest.mark.parametrize("changed, option", [([], "prompts.name"), (["file", "--eval.prompts=unseen_animals"], "eval.prompts")])
def test_a_reward_that_needs_metadata_is_refused_before_the_model_is_loaded(tiny_model, tmp_path, capsys, changed, option):
    (tmp_path / "reward.py").write_text("def score(images, prompts, metadata):\n    return [1.0] * len(prompts)\n")
    file = write(tmp_path, "p.jsonl", '{"prompt": "a cat", "count": 1}')
    changed = [f"--prompts.file={file}" if argument == "file" else argument for argument in changed]
    with pytest.raises(SystemExit) as exit:
        trainer.main([f"--model.path={tiny_model}", f"--reward.name={tmp_path}/reward.py:score", *changed])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert f"score needs metadata, and the prompts of {option} have none; valid is a prompts.file with metadata" in said


def test_held_out_prompts_are_not_trained_on(tiny_model, capsys):
    with pytest.raises(SystemExit) as exit:
        trainer.main([f"--model.path={tiny_model}", "--prompts.limit=3", '--eval.heldout=["a snail", "dog"]'])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert "eval.heldout=['a snail', 'dog']: 'dog' is a training prompt" in said
