"""The command line: recipes, overrides, and 60 ways to get it wrong, each answered in one line before a model is loaded."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from ddpo_fast import train as trainer
from ddpo_fast.config import Config, parse

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

BAD = [  # arguments, what the line must say
    ("--train.learning_rate abc", "train.learning_rate=abc: expected float"),
    ("--train.learning_rate 0", "train.learning_rate=0.0: valid is a finite number > 0"),
    ("--train.learning_rate=-1e-3", "train.learning_rate=-0.001: valid is"),
    ("--train.learning_rate .inf", "train.learning_rate"),
    ("--train.learning_rate", "train.learning_rate: expected one argument"),
    ("--train.learningrate 1", "train.learningrate: no such option; did you mean train.learning_rate"),
    ("--train.learning_rat 1", "train.learning_rat: no such option; did you mean train.learning_rate"),
    ("--learning_rate 1", "learning_rate: no such option; did you mean train.learning_rate"),
    ("--bogus", "bogus: no such option; see --help"),
    ("stray", "stray: no such option"),
    ("--train.clip_range 0", "train.clip_range=0.0: valid is a finite number > 0"),
    ("--train.advantage_clip 0", "train.advantage_clip=0.0: valid is"),
    ("--train.max_grad_norm -1", "train.max_grad_norm=-1.0: valid is"),
    ("--train.num_minibatches 0", "train.num_minibatches=0: valid is a whole number >= 1"),
    ("--train.num_minibatches 1.5", "train.num_minibatches=1.5: expected int"),
    ("--train.num_minibatches 7", "sample.num_samples=48: valid is a multiple of train.num_minibatches"),
    ("--train.inner_epochs 0", "train.inner_epochs=0: valid is"),
    ("--train.micro_batch 0", "train.micro_batch=0: valid is"),
    ("--train.timestep_fraction 0", "train.timestep_fraction=0.0: valid is 0 < fraction <= 1"),
    ("--train.timestep_fraction 1.1", "train.timestep_fraction=1.1: valid is"),
    ("--train.algorithm ppo", "train.algorithm=ppo: expected Literal['ddpo_is', 'ddpo_sf', 'rwr', 'rwr_sparse']"),
    ("--train.algorithm ddpo_sf", "train.algorithm=ddpo_sf: valid is ddpo_is, or exactly one update"),
    ("--train.algorithm ddpo_sf --train.num_minibatches 1 --train.inner_epochs 2", "train.algorithm=ddpo_sf: valid is"),
    ("--train.estimator score_accumulation", "train.estimator=score_accumulation: valid is ppo, or exactly one update an iteration"),
    ("--train.estimator score_accumulation --train.num_minibatches 1 --train.inner_epochs 2", "valid is ppo, or exactly one update"),
    ("--train.estimator score_accumulation --train.num_minibatches 1 --lora.scope none", "valid is ppo, when lora.scope is none"),
    ("--train.algorithm rwr --train.estimator score_accumulation", "valid is ppo, with train.algorithm=rwr or rwr_sparse"),
    ("--train.algorithm rwr_sparse --cache.mode on", "cache.mode=on: valid is auto or off, with train.algorithm=rwr or rwr_sparse"),
    ("--train.algorithm rwr --train.timestep_fraction 0.5", "train.timestep_fraction=0.5: valid is 1, with train.algorithm=rwr"),
    ("--train.kl_coefficient=-1", "train.kl_coefficient=-1.0: valid is a finite number >= 0"),
    ("--train.algorithm rwr --train.kl_coefficient 1", "train.kl_coefficient=1.0: valid is 0, with train.algorithm=rwr"),
    ("--train.kl_coefficient 1 --lora.scope none", "train.kl_coefficient=1.0: valid is 0, when lora.scope is none"),
    (
        "--train.kl_coefficient 1 --train.estimator score_accumulation --train.num_minibatches 1",
        "train.kl_coefficient=1.0: valid is 0, with train.estimator=score_accumulation",
    ),
    ("--train.kl_coefficient 1 --zero.stage 3", "train.kl_coefficient=1.0: valid is 0, with zero.stage=3"),
    ("--rwr.inverse_temperature 0", "rwr.inverse_temperature=0.0: valid is a finite number > 0"),
    ("--rwr.percentile 1", "rwr.percentile=1.0: valid is 0 <= percentile < 1"),
    ("--rwr.guidance_scale 0.5", "rwr.guidance_scale=0.5: valid is a finite number >= 1 (1 is no guidance), or null"),
    ("--rwr.num_timesteps 0", "rwr.num_timesteps=0: valid is a whole number >= 1"),
    ("--train.estimator reinforce", "train.estimator=reinforce: expected Literal['ppo', 'score_accumulation']"),
    ("--sample.eta 0", "there is no policy gradient"),
    ("--sample.eta 1.5", "sample.eta=1.5: valid is 0 < eta <= 1"),
    ("--sample.guidance_scale 0.5", "sample.guidance_scale=0.5: valid is a finite number >= 1"),
    ("--sample.num_steps 0", "sample.num_steps=0: valid is"),
    ("--sample.num_samples 0", "sample.num_samples=0: valid is"),
    ("--sample.batch_size -4", "sample.batch_size=-4: valid is"),
    ("--prompts.samples_per_prompt 5", "prompts.samples_per_prompt=5: valid is a divisor of sample.num_samples"),
    ("--prompts.name animals", "prompts.name=animals: expected Literal['simple_animals'], NoneType"),
    ("--prompts.name null", "prompts.name=None: valid is simple_animals, unless prompts.file is given"),
    ("--prompts.file /nowhere.txt", "prompts.file=/nowhere.txt: valid is a text file with at least one line"),
    ("--prompts.limit 0", "prompts.limit=0: valid is"),
    ("--model.path /nowhere", "model.path=/nowhere: valid is a folder with model_index.json, or a hub id"),
    ("--model.path {empty}", "valid is a folder with model_index.json"),
    ("--model.path {other_pipeline}", "it holds a FluxPipeline; valid is a StableDiffusionPipeline"),
    ("--model.path {broken_pipeline}", "model_index.json cannot be read"),
    ("--model.dtype fp8", "model.dtype=fp8: expected Literal"),
    ("--lora.scope middle", "lora.scope=middle: valid is all, mid_up, none, or block names"),
    ("--lora.rank 0", "lora.rank=0: valid is"),
    ("--lora.alpha 0", "lora.alpha=0.0: valid is"),
    ("--lora.targets []", "lora.targets=[]: valid is at least one of"),
    ("--lora.targets [mlp]", "lora.targets"),
    ("--baseline.buffer_size 3", "baseline.buffer_size=3: valid is a whole number >= baseline.min_count"),
    (
        "--baseline.name group --prompts.samples_per_prompt 1",
        "baseline.name=group: valid is history, or group with prompts.samples_per_prompt of at least 2",
    ),
    ("--baseline.name grpo", "baseline.name=grpo: expected Literal['history', 'group']"),
    ("--baseline.min_count 0", "baseline.min_count=0: valid is"),
    ("--optimizer.name sgd", "optimizer.name=sgd: expected"),
    ("--optimizer.betas [0.9]", "optimizer.betas=[0.9]: valid is two numbers in [0, 1)"),
    ("--optimizer.betas [0.9,1.0]", "optimizer.betas=[0.9, 1.0]: valid is"),
    ("--optimizer.eps 0", "optimizer.eps=0.0: valid is"),
    ("--optimizer.weight_decay -1", "optimizer.weight_decay=-1.0: valid is"),
    ("--zero.stage 4", "zero.stage=4: expected Literal[0, 1, 2, 3]"),
    ("--zero.offload optimizer", "zero.offload=optimizer: valid is none, optimizer with zero.stage 1 to 3, or all with zero.stage=3"),
    ("--zero.offload all --zero.stage 2", "zero.offload=all: valid is none, optimizer with zero.stage 1 to 3"),
    ("--zero.offload all --zero.stage 3 --optimizer.name adamw_8bit", "zero.offload=all: valid is none, unless optimizer.name=adamw"),
    ("--zero.stage 3 --lora.forward merged", "lora.forward=merged: valid is auto or separate, with zero.stage=3"),
    ("--zero.stage 3 --cache.mode on", "cache.mode=on: valid is auto or off, with zero.stage=3"),
    ("--zero.stage 3 --model.compile true", "model.compile=True: valid is false, with zero.stage=3"),
    (
        "--zero.stage 3 --train.estimator score_accumulation --train.num_minibatches 1",
        "train.estimator=score_accumulation: valid is ppo, with zero.stage=3",
    ),
    (
        "--train.gradient_checkpointing true --train.estimator score_accumulation --train.num_minibatches 1",
        "train.gradient_checkpointing=True: valid is false, with train.estimator=score_accumulation",
    ),
    ("--train.gradient_checkpointing true --model.compile true", "train.gradient_checkpointing=True: valid is false, with model.compile"),
    ("--deepspeed.config /nowhere.json", "deepspeed.config=/nowhere.json: cannot be read"),
    ("--eval.every 0", "eval.every=0: valid is"),
    ("--eval.prompts []", "eval.prompts=[]: valid is a list with at least one prompt"),
    ("--run.seed -1", "run.seed=-1: valid is a whole number in [0, 2^63)"),
    ("--run.iterations 0", "run.iterations=0: valid is"),
    ("--run.keep_checkpoints 0", "run.keep_checkpoints=0: valid is"),
    ("--run.dir {file}", "valid is a folder, not a file"),
    ("--run.dir {finished}", "a directory that holds no run yet; to continue the one in it, add --resume"),
    ("--run.dir {empty} --resume", "valid is the directory of a run with a checkpoint"),
    ("--resume", "run.dir=None: valid is the directory of a run with a checkpoint"),
    ("--reward.name beauty", "reward.name=beauty: valid is one of jpeg_compressibility"),
    ("--reward.name aesthetic", "reward.name=aesthetic: this reward comes in a later version"),
    ("--reward.name /nowhere.py:f", "reward.name=/nowhere.py:f: there is no file /nowhere.py"),
    ("--reward.name no_such_module:f", "importing no_such_module failed: ModuleNotFoundError"),
    ("--reward.name ddpo_fast.rewards.jpeg:f", "ddpo_fast.rewards.jpeg has no function f; it has: "),
    ("--reward.name {broken_reward}:f", "SyntaxError"),
    ('--reward.kwargs {{"a":1}}', "reward.kwargs={{'a': 1}}: jpeg_compressibility(images, prompts, **kwargs) does not take them"),
    ("--reward.kwargs 3", "reward.kwargs=3: expected dict"),
    ("--reward.timeout_s 0", "reward.timeout_s=0.0: valid is"),
    ("--reward.max_bad_fraction 1.5", "reward.max_bad_fraction=1.5: valid is 0 <= fraction <= 1"),
    ("--reward.name http://", "reward.name=http://: valid is an address such as http://127.0.0.1:8000/"),
    ("--reward.name http://host --reward.isolate true", "reward.isolate=True: valid is False for a remote reward"),
    ("--config /nowhere.yaml", "--config /nowhere.yaml: cannot be read: No such file or directory"),
    ("--config={not_yaml}", "not_yaml: not valid YAML"),
    ("--config", "cannot be read"),
    ("--prompts.limit few", "prompts.limit=few: expected int, NoneType"),
    ("--config {unknown_key}", "train.rate: no such option"),
    ("--config {unknown_section}", "trainer.learning_rate: no such option"),
    ("--config {scalar_section}", "scalar_section: valid is a mapping of sections"),
    ("--config {list_config}", "list_config: valid is a mapping of sections"),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory, tiny_model) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    files = {
        "file": "", "other_pipeline/model_index.json": json.dumps({"_class_name": "FluxPipeline"}), "broken_pipeline/model_index.json": "{",
        "finished/checkpoints/3": "", "broken_reward.py": "def f(:", "not_yaml": "train: {", "unknown_key": "train: {rate: 1}",
        "unknown_section": "trainer: {learning_rate: 1}", "scalar_section": "train: 3", "list_config": "[1, 2]",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    return {name.split("/")[0].removesuffix(".py"): folder / name.split("/")[0] for name in [*files, "empty"]} | {"tiny": tiny_model}


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_options_are_one_line_and_exit_2(arguments, message, paths, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "Policy", lambda *a: pytest.fail("the model was loaded"))
    model = [] if "--model.path" in arguments else ["--model.path", str(paths["tiny"])]
    with pytest.raises(SystemExit) as exit_:
        trainer.main([*model, *arguments.format(**paths).split()])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    assert message.format(**paths) in captured.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--lora.scope up_blocks.7", "this UNet has no up_blocks.7; its blocks are down_blocks.0, down_blocks.1, "),
        ("--lora.scope up_blocks.1 --lora.targets [attention]", "up_blocks.1 have no layers of lora.targets=['attention']"),
        ("--sample.num_steps 1001", "sample.num_steps=1001: valid is 1 to 1000"),
    ],
)
def test_what_only_the_model_can_tell(arguments, message, paths, capsys):
    with pytest.raises(SystemExit, match="2"):
        trainer.main(["--model.path", str(paths["tiny"]), *arguments.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes(recipe):
    text = recipe.read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert len(header) >= 4 and f"--config configs/{recipe.name}" in text
    config = parse(["--config", str(recipe)])
    for section, values in yaml.safe_load(text).items():
        for key, value in values.items():
            assert config[f"{section}.{key}"] == value


def test_without_options_it_is_the_embedded_compressibility_run():
    assert parse([]) == parse(["--config", str(CONFIGS / "embedded_compressibility.yaml")]) == Config()


def test_command_line_beats_recipe_beats_default(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {learning_rate: 1.0e-5, micro_batch: 3}\n")
    config = parse(["--config", str(recipe), "--train.micro_batch", "5"])
    assert (config.train.learning_rate, config.train.micro_batch, config.train.clip_range) == (1e-5, 5, Config().train.clip_range)


def test_print_config_is_a_recipe(capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        parse(["--train.learning_rate", "0.5", "--print_config"])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert parse(["--config", str(recipe)]) == Config().replace(train__learning_rate=0.5)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    text = capsys.readouterr().out
    for section in dataclasses.fields(Config):
        for option in dataclasses.fields(section.type):
            entry = text.split(f"--{section.name}.{option.name} ")[1].split("\n  --")[0]
            assert len(" ".join(entry.split())) > 40, f"{section.name}.{option.name}: {entry}"
