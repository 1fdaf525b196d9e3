"""The command line: recipes, overrides, and hundreds of ways to get it wrong, each answered in one line before a model is loaded."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ddpo_fast import algorithms, assemble
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse, parse_or_exit
from ddpo_fast.config.options import Config
from ddpo_fast.config.rules import RULES
from ddpo_fast.places import PLACES, located

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
    ("--train.num_minibatches 7", "sample.num_samples=64: valid is a multiple of train.num_minibatches"),
    ("--train.inner_epochs 0", "train.inner_epochs=0: valid is"),
    ("--train.micro_batch 0", "train.micro_batch=0: valid is"),
    ("--train.timestep_fraction 0", "train.timestep_fraction=0.0: valid is 0 < fraction <= 1"),
    ("--train.timestep_fraction 1.1", "train.timestep_fraction=1.1: valid is"),
    ("--train.algorithm ppo", "train.algorithm=ppo: valid is one of ddpo_is, ddpo_sf, rwr, rwr_sparse"),
    ("--train.algorithm ddpo_sf", "train.algorithm=ddpo_sf: valid is ddpo_is, or exactly one update"),
    ("--train.algorithm ddpo_sf --train.num_minibatches 1 --train.inner_epochs 2", "train.algorithm=ddpo_sf: valid is"),
    ("--train.estimator score_accumulation", "train.estimator=score_accumulation: valid is ppo, or exactly one update an iteration"),
    ("--train.estimator score_accumulation --train.num_minibatches 1 --train.inner_epochs 2", "valid is ppo, or exactly one update"),
    ("--train.estimator score_accumulation --train.num_minibatches 1 --lora.scope none", "valid is ppo, when lora.scope is none"),
    ("--train.algorithm rwr --train.estimator score_accumulation", "valid is ppo, with train.algorithm=rwr: its loss is not"),
    ("--train.algorithm rwr_sparse --cache.mode on", "cache.mode=on: valid is auto or off, with train.algorithm=rwr_sparse: "),
    ("--cache.mode on --lora.scope none", "cache.mode=on: valid is auto or off, when lora.scope is none: nothing is frozen"),
    (
        "--cache.mode on --train.estimator score_accumulation --train.num_minibatches 1",
        "cache.mode=on: valid is auto or off, with train.estimator=score_accumulation: no transition is visited twice",
    ),
    ("--train.algorithm rwr --train.timestep_fraction 0.5", "train.timestep_fraction=0.5: valid is 1, with train.algorithm=rwr"),
    ("--train.kl_coefficient=-1", "train.kl_coefficient=-1.0: valid is a finite number >= 0"),
    ("--train.algorithm rwr --train.kl_coefficient 1", "train.kl_coefficient=1.0: valid is 0, with train.algorithm=rwr"),
    ("--train.kl_coefficient 1 --lora.scope none", "train.kl_coefficient=1.0: valid is 0, when lora.scope is none"),
    (
        "--train.kl_coefficient 1 --train.estimator score_accumulation --train.num_minibatches 1",
        "train.kl_coefficient=1.0: valid is 0, with train.estimator=score_accumulation",
    ),
    ("--train.kl_coefficient 1 --zero.stage 3", "train.kl_coefficient=1.0: valid is 0, with zero.stage=3"),
    ("--train.kl_coefficient 1 --model.compile true", "train.kl_coefficient=1.0: valid is 0, with model.compile=true"),
    ("--train.algorithm rwr --algorithm.inverse_temperature 0", "algorithm.inverse_temperature=0.0: valid is a finite number > 0"),
    ("--train.algorithm rwr_sparse --algorithm.percentile 1", "algorithm.percentile=1.0: valid is 0 <= percentile < 1"),
    (
        "--train.algorithm rwr --algorithm.guidance_scale 0.5",
        "algorithm.guidance_scale=0.5: valid for Stable Diffusion 1.x and 2.x is a finite number >= 1",
    ),
    ("--train.algorithm rwr --algorithm.num_timesteps 0", "algorithm.num_timesteps=0: valid is a whole number >= 1"),
    ("--algorithm.percentile 0.5", "algorithm.percentile: it is an option with train.algorithm=rwr_sparse"),
    ("--train.algorithm rwr --algorithm.percentile 0.5", "algorithm.percentile: it is an option with train.algorithm=rwr_sparse"),
    ("--algorithm.inverse_temperature 1", "algorithm.inverse_temperature: it is an option with train.algorithm=rwr"),
    ("--algorithm.num_timesteps 1", "algorithm.num_timesteps: it is an option with train.algorithm=rwr, rwr_sparse"),
    ("--train.algorithm rwr --algorithm.temperature 1", "algorithm.temperature: no such option; did you mean algorithm.inverse_temp"),
    ("--train.algorithm rwr --train.algorithm ddpo_is --algorithm.num_timesteps 1", "algorithm.num_timesteps: it is an option with"),
    ("--config {rwr_recipe} --algorithm.percentile 0.5", "algorithm.percentile: it is an option with train.algorithm=rwr_sparse"),
    ("--config {percentile_recipe}", "algorithm.percentile: it is an option with train.algorithm=rwr_sparse"),
    ('--train {{"algorithm":"rwr"}} --algorithm.percentile 0.5', "algorithm.percentile: it is an option with train.algorithm=rwr_sparse"),
    ('--train {{"algorithm":"ppo"}}', "train.algorithm=ppo: valid is one of ddpo_is, ddpo_sf, rwr, rwr_sparse"),
    ("--rwr.percentile 1", "rwr.percentile: no such option; did you mean algorithm.percentile"),
    ("--train.estimator reinforce", "train.estimator=reinforce: expected Literal['ppo', 'score_accumulation']"),
    ("--sample.eta 0", "there is no policy gradient"),
    ("--sample.eta 1.5", "sample.eta=1.5: valid is 0 < eta <= 1"),
    ("--sample.sampler euler", "sample.sampler=euler: expected Literal['cps', 'dance_sde', 'ddim', 'flow_sde', 'ode', 'precise']"),
    ("--sample.sampler ode", "sample.sampler=ode: valid is a sampler that draws noise, with train.algorithm=ddpo_is: a step without noise"),
    ("--sample.sampler ode --train.algorithm ddpo_sf --train.num_minibatches 1", "with train.algorithm=ddpo_sf: a step without noise has"),
    (
        '--sample.window {{"size":0}}',
        "sample.window={{'size': 0}}: valid is null, or {{size: N, among: N, every: N}} with 1 <= size <= among <= sample.num_steps",
    ),
    ('--sample.window {{"size":11}}', "sample.window={{'size': 11}}: valid is null, or "),
    ('--sample.window {{"size":2,"among":11}}', "sample.window={{'size': 2, 'among': 11}}: valid is null, or "),
    ('--sample.window {{"size":3,"among":2}}', "sample.window={{'size': 3, 'among': 2}}: valid is null, or "),
    ('--sample.window {{"size":3,"every":0}}', "sample.window={{'size': 3, 'every': 0}}: valid is null, or "),
    ('--sample.window {{"among":3}}', "sample.window={{'among': 3}}: valid is null, or "),
    ('--sample.window {{"size":3,"steps":5}}', "sample.window={{'size': 3, 'steps': 5}}: valid is null, or "),
    ('--sample.window {{"size":6}} --sample.num_steps 5', "sample.window={{'size': 6}}: valid is null, or "),
    ('--sample.window {{"size":1.5}}', "sample.window={{'size': 1.5}}: expected dict[str, int], NoneType"),
    ("--sample.window 3", "sample.window=3: expected dict[str, int], NoneType"),
    (
        '--sample.window {{"size":3}} --train.algorithm rwr',
        "sample.window={{'size': 3}}: valid is null, with train.algorithm=rwr: it does not train on the steps that sampling makes",
    ),
    (
        '--sample.window {{"size":3}} --train.algorithm rwr --sample.sampler ode',
        "sample.window={{'size': 3}}: valid is null, with sample.sampler=ode: no step draws noise",
    ),
    ("--sample.guidance_scale 0.5", "sample.guidance_scale=0.5: valid for Stable Diffusion 1.x and 2.x is a finite number >= 1"),
    ("--sample.guidance_scale -1", "sample.guidance_scale=-1.0: valid is a finite number >= 0"),
    ("--sample.num_steps 0", "sample.num_steps=0: valid is"),
    ("--sample.num_samples 0", "sample.num_samples=0: valid is"),
    ("--sample.batch_size -4", "sample.batch_size=-4: valid is"),
    ("--prompts.samples_per_prompt 5", "prompts.samples_per_prompt=5: valid is a divisor of sample.num_samples"),
    ("--prompts.name animals", "prompts.name=animals: expected Literal['simple_animals', 'imagenet_animals', "),
    ("--prompts.name null", "prompts.name=None: valid is a prompt set, unless prompts.file or prompts.list is given"),
    ("--prompts.file /nowhere.txt", "prompts.file=/nowhere.txt: there is no such file; valid is .txt with a prompt a line, .jsonl"),
    ("--prompts.limit 0", "prompts.limit=0: valid is"),
    ("--model.path /nowhere", "model.path=/nowhere: valid is a folder with model_index.json, or a hub id"),
    ("--model.path {empty}", "valid is a folder with model_index.json"),
    (
        "--model.path {other_pipeline}",
        "it holds a KolorsPipeline; valid is one of StableDiffusionPipeline, StableDiffusionXLPipeline, Stable",
    ),
    ("--model.path {broken_pipeline}", "model_index.json cannot be read"),
    ("--model.dtype fp8", "model.dtype=fp8: expected Literal"),
    ("--lora.scope middle", "lora.scope=middle: valid is all, mid_up, none, last:SHARE with 0 < SHARE <= 1, or blocks joined by "),
    *(
        (f"--lora.scope {scope}", f"lora.scope={scope}: valid is all")
        for scope in ("last:0", "last:1.1", "last:nan", "last:", "a.1-", "a,b.1")
    ),
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
    ("--zero.offload all --zero.stage 3 --optimizer.name adamw_8bit", "zero.offload=all: valid is none, with optimizer.name=adamw_8bit"),
    ("--zero.stage 3 --lora.forward merged", "lora.forward=merged: valid is auto or separate, with zero.stage=3"),
    ("--zero.stage 3 --cache.mode on", "cache.mode=on: valid is auto or off, with zero.stage=3"),
    ("--zero.stage 3 --model.compile true", "model.compile=true: valid is false, with zero.stage=3"),
    (
        "--zero.stage 3 --train.estimator score_accumulation --train.num_minibatches 1",
        "train.estimator=score_accumulation: valid is ppo, with zero.stage=3",
    ),
    (
        "--train.gradient_checkpointing true --train.estimator score_accumulation --train.num_minibatches 1",
        "train.gradient_checkpointing=true: valid is false, with train.estimator=score_accumulation",
    ),
    ("--train.gradient_checkpointing true --model.compile true", "train.gradient_checkpointing=true: valid is false, with model.compile"),
    ("--deepspeed.config /nowhere.json", "deepspeed.config=/nowhere.json: cannot be read"),
    ("--eval.every 0", "eval.every=0: valid is"),
    ("--prompts.list []", "prompts.list=[]: valid is at least one prompt"),
    ('--prompts.list {{"a":0}}', "prompts.list={{'a': 0.0}}: valid is at least one prompt, a text; a weight is a finite number > 0"),
    ("--prompts.list [a] --prompts.file {some_lines}", "prompts.list=['a']: valid is null, when prompts.file is given"),
    ("--prompts.file {bad_weight}", "line 1 has weight 0.0; valid is a number > 0, a tab, a prompt"),
    ("--eval.sampler euler", "eval.sampler=euler: expected Literal['cps', 'dance_sde', 'ddim', 'flow_sde', 'ode', 'precise'], NoneType"),
    ("--eval.num_steps 0", "eval.num_steps=0: valid is a whole number >= 1 and < 2^63, or null"),
    ("--sample.height 0 --sample.width 8", "sample.height=0: valid is a whole number >= 1 and < 2^63, or null"),
    ("--sample.height 64", "sample.width=None: valid is a whole number >= 1 and < 2^63 beside sample.height, or null without it"),
    ("--eval.width 64", "eval.width=64: valid is a whole number >= 1 and < 2^63 beside eval.height, or null without it"),
    ("--eval.guidance_scale 0.5", "eval.guidance_scale=0.5: valid for Stable Diffusion 1.x and 2.x is a finite number >= 1"),
    ("--eval.prompts animals", "eval.prompts=animals: expected Literal['simple_animals', "),
    ("--eval.prompts []", "eval.prompts=[]: valid is a prompt set or a list with at least one prompt"),
    ("--eval.heldout []", "eval.heldout=[]: valid is a prompt set or a list with at least one prompt"),
    ("--eval.heldout animals", "eval.heldout=animals: expected Literal['simple_animals', "),
    ("--run.seed -1", "run.seed=-1: valid is a whole number in [0, 2^63)"),
    ("--run.iterations 0", "run.iterations=0: valid is"),
    ("--run.keep_checkpoints 0", "run.keep_checkpoints=0: valid is"),
    ("--run.dir {file}", "valid is a folder, not a file"),
    ("--run.dir {finished}", "a directory that holds no run yet; to continue the one in it, add --resume"),
    ("--run.dir {empty} --resume", "valid is the directory of a run with a checkpoint"),
    ("--resume", "run.dir=None: valid is the directory of a run with a checkpoint"),
    ("--reward.name beauty", "reward.name=beauty: valid is one of aesthetic"),
    ("--reward.name aesthetic", "reward.kwargs.weights=None: valid is the file sac+logos+ava1-l14-linearMSE.pth"),
    ("--reward.name /nowhere.py:f", "reward.name=/nowhere.py:f: there is no file /nowhere.py"),
    ("--reward.name no_such_module:f", "importing no_such_module failed: ModuleNotFoundError"),
    ("--reward.name ddpo_fast.scoring.jpeg:f", "ddpo_fast.scoring.jpeg has no function f; it has: "),
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
    ("--config {empty}", "empty: cannot be read: not a file"),
    ("--config /dev/zero", "--config /dev/zero: cannot be read: not a file"),
    ("--config {binary}", "binary: cannot be read: 'utf-8' codec can't decode"),
    ("--config {null_byte}", "null_byte: not valid YAML: unacceptable character"),
    ("--config {python_tag}", "python_tag: not valid YAML: could not determine a constructor for the tag"),
    ("--config {python_name}", "python_name: not valid YAML: could not determine a constructor for the tag"),
    ("--config {duplicate_key}", "duplicate_key: not valid YAML: rank is given twice"),
    ("--config {duplicate_section}", "duplicate_section: not valid YAML: lora is given twice"),
    ("--config {unknown_of_two}", "lora.rnak: no such option; did you mean lora.rank"),
    ("--config {laughs}", "laughs: not valid YAML: there are no aliases here"),
    ("--config {cycle}", "cycle: not valid YAML: there are no aliases here"),
    ("--config {deep}", "deep: not valid YAML: nested too deeply"),
    ("--config {endless_number}", "endless_number: not valid YAML: a number of too many digits"),
    ("--config {no_day}", "no_day: cannot be read: month must be in 1..12"),
    ("--config {two_documents}", "two_documents: not valid YAML: expected a single document"),
    ("--config {number_key}", "number_key: valid is a mapping of sections"),
    ("--config {scalar}", "scalar: valid is a mapping of sections"),
    ("--config {empty_file}", "empty_file: valid is a mapping of sections"),
    ("--prompts.file {empty}", "empty: there is no such file"),
    ("--prompts.file {file}", "file: it has no prompt"),
    ("--prompts.file {blank_lines}", "blank_lines: it has no prompt"),
    ("--prompts.file {binary}", "binary: line 3 is not in UTF-8 (invalid start byte)"),
    ("--prompts.file {null_byte}", "null_byte: line 1 has a null byte"),
    ("--prompts.file {enormous_line}", "enormous_line: line 2 has a prompt of 3,999,999 characters; valid is at most 10,000"),
    ("--prompts.file /dev/zero", "prompts.file=/dev/zero: there is no such file"),
    ("--run.dir=", "run.dir=: valid is a folder"),
    ("--run.dir {file}/inside", "file/inside: valid is a folder, not a file"),
    ("--run.dir {long_name}", "valid is a folder, not a file, or the name of one that can be made"),
    ("--run.dir bell\a", "valid is a folder, not a file, or the name of one that can be made"),
    ("--model.path {long_name}", "valid is a folder with model_index.json, or a hub id"),
    ("--model.path ../../etc", "/../../etc: valid is a folder with model_index.json"),
    ("--model.path {file}", "file: valid is a folder with model_index.json"),
    ("--model.path {deep_pipeline}", "model_index.json cannot be read: maximum recursion depth"),
    ("--model.path {binary_pipeline}", "model_index.json cannot be read: 'utf-8' codec can't decode"),
    ("--model.path {list_pipeline}", "model_index.json cannot be read: it is no object"),
    ("--model.path {custom_class}", "it holds a ['pipeline', 'MyPipeline']; valid is one of StableDiffusionPipeline, "),
    ("--model.path {custom_module}", "model_index.json has unet=['own_unet', 'Unet']; valid are classes of diffusers, transformers"),
    ("--model.path {installed_module}", "model_index.json has vae=['os', 'system']; valid are classes of diffusers, transformers"),
    ("--model.path {number_module}", "model_index.json has vae=[7, 7]; valid are classes of diffusers, transformers"),
    ("--model.path {path_part}", "model_index.json has ../../x=['diffusers', 'AutoencoderKL']; valid are classes of"),
    ("--model.path {path_module}", "model_index.json has vae=['../../x', 'AutoencoderKL']; valid are classes of"),
    ("--model.path {other_unet}", "model_index.json has unet=['diffusers', 'UNet3DConditionModel']; valid is UNet2DConditionModel"),
    ("--model.path {no_unet}", "model_index.json has unet=None; valid is UNet2DConditionModel of diffusers"),
    ("--reward.name ..x:f", "importing ..x failed: TypeError"),
    ("--reward.name ../../../x.py:f", "/../../../x.py:f: there is no file /"),
    ("--reward.name {long_name}.py:f", "there is no file {long_name}.py"),
    ("--reward.name {raising_reward}:f", "ValueError: first second"),
    ("--reward.name {empty_reward}:f", "has no function f; it has: none"),
    ("--reward.name {empty_reward}:__file__", "has no function __file__"),
    ("--reward.name os:system", "reward.kwargs={{}}: system(images, prompts, **kwargs) does not take them"),
    ("--reward.kwargs {{a:1,a:2}}", "reward.kwargs"),
    ("--deepspeed.config {empty}", "empty: cannot be read: "),
    ("--deepspeed.config {deep}", "deep: cannot be read: "),
    ("--deepspeed.config {binary}", "binary: cannot be read: "),
    ("--deepspeed.config {long_name}", "cannot be read: "),
    ("--run.plan 0xH200", "run.plan=0xH200: valid is here, or one of"),
    ("--run.plan H2000", "run.plan=H2000: valid is here, or one of"),
    ("--resume --run.dir {no_config}", "its config.yaml is missing or damaged"),
    ("--resume --run.dir {list_run}", "list_run/config.yaml: valid is a mapping of sections"),
    ("--resume --run.dir {tag_run}", "tag_run/config.yaml: not valid YAML: could not determine a constructor"),
    ("--resume --run.dir {binary_run}", "binary_run/config.yaml: cannot be read"),
    ("--resume --run.dir {laughs_run}", "laughs_run/config.yaml: not valid YAML: there are no aliases here"),
    ("--resume --run.dir {unknown_run}", "unknown_run/config.yaml: lora.rnak: no such option; did you mean lora.rank"),
    ("--resume --run.dir {old_run}", "old_run/config.yaml: trainer.rate: no such option; did you mean train."),
    ("--resume --run.dir {former_run}", "change or remove that option in the file, then --resume)"),
    (
        "--resume --run.dir {rwr_run}",
        "rwr_run/config.yaml: rwr.percentile: no such option; did you mean algorithm.percentile? (another version may have written it; "
        "change or remove that option in the file, then --resume)",
    ),
    ("--resume --run.dir {wrong_run}", "lora.rank=0: valid is a whole number >= 1"),
    ("--resume --run.dir {other_run} --lora.rank 2", "lora.rank=2: the run in run.dir={other_run} began with 99; --resume keeps it"),
]
LAUGHS = "a: &a [lol]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm"))
BINARY = bytes(range(256)) * 4


def index(**changed) -> str:
    """A model_index.json of a Stable Diffusion pipeline with parts changed, or, with None, left out."""
    parts = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    return json.dumps({name: value for name, value in (parts | changed).items() if value is not None})


@pytest.fixture(scope="module")
def paths(tmp_path_factory, tiny_model) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("bad")
    explode = f"import os\nos.mkdir({str(folder / 'exploded')!r})\n"
    runs = {
        "list_run": "[1]", "tag_run": "lora: !!python/object/apply:os.system ['false']", "binary_run": BINARY, "laughs_run": LAUGHS,
        "unknown_run": "lora: {rnak: 2}", "wrong_run": "lora: {rank: 0}", "other_run": "lora: {rank: 99}\nmodel: {path: a/b}",
        "old_run": "trainer: {rate: 2}", "former_run": "train: {algorithm: ppo}",
        "rwr_run": "train: {algorithm: rwr_sparse}\nrwr: {percentile: 0.9}",
    }  # fmt: skip
    files = {
        "file": "", "other_pipeline/model_index.json": '{"_class_name": "KolorsPipeline"}', "broken_pipeline/model_index.json": "{",
        "finished/checkpoints/3": "", "broken_reward.py": "def f(:", "not_yaml": "train: {", "unknown_key": "train: {rate: 1}",
        "unknown_section": "trainer: {learning_rate: 1}", "scalar_section": "train: 3", "list_config": "[1, 2]",
        "binary": BINARY, "null_byte": "a\0b", "python_tag": f"lora: {{rank: !!python/object/apply:os.system ['touch {folder}/exploded']}}",
        "python_name": "reward: {name: !!python/name:os.system }", "duplicate_key": "lora: {rank: 1, rank: 2}",
        "duplicate_section": "lora: {rank: 1}\nlora: {alpha: 2}", "unknown_of_two": "lora: {rank: 1, rnak: 2}", "laughs": LAUGHS,
        "cycle": "lora: &a {rank: *a}", "deep": "[" * 100_000, "endless_number": f"lora: {{rank: 1{'0' * 5000}}}",
        "no_day": "run: {dir: 2026-99-99}", "two_documents": "lora: {rank: 1}\n---\nlora: {rank: 2}", "number_key": "lora: {1: 2}",
        "scalar": "3", "empty_file": "", "blank_lines": "\n \n\t\n", "enormous_line": "cat\n" + "dog " * 1_000_000,
        "deep_pipeline/model_index.json": '{"a":' * 100_000, "binary_pipeline/model_index.json": BINARY,
        "list_pipeline/model_index.json": "[]", "custom_class/model_index.json": index(_class_name=["pipeline", "MyPipeline"]),
        "custom_class/pipeline.py": explode, "custom_module/model_index.json": index(unet=["own_unet", "Unet"]),
        "custom_module/unet/own_unet.py": explode, "installed_module/model_index.json": index(vae=["os", "system"]),
        "number_module/model_index.json": index(vae=[7, 7]), "path_module/model_index.json": index(vae=["../../x", "AutoencoderKL"]),
        "path_part/model_index.json": index(**{"../../x": ["diffusers", "AutoencoderKL"]}), "no_unet/model_index.json": index(unet=None),
        "other_unet/model_index.json": index(unet=["diffusers", "UNet3DConditionModel"]),
        "raising_reward.py": "raise ValueError('first\\nsecond')", "empty_reward.py": "",
        **{f"{run}/checkpoints/1/state.json": "{}" for run in ["no_config", *runs]},
        **{f"{run}/config.yaml": content for run, content in runs.items()},
        "rwr_recipe": "train: {algorithm: rwr}", "percentile_recipe": "algorithm: {percentile: 0.5}",
        "some_lines": "a cat", "bad_weight": "0\ta cat",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "empty").mkdir()
    tops = {name.split("/")[0] for name in [*files, "empty"]}
    yield {top.removesuffix(".py"): folder / top for top in tops} | {"tiny": tiny_model, "long_name": folder / ("x" * 300)}
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_options_are_one_line_and_exit_2(arguments, message, paths, capsys, monkeypatch):
    monkeypatch.setattr(assemble, "Policy", lambda *a: pytest.fail("the model was loaded"))
    model = [] if "--model.path" in arguments else ["--model.path", str(paths["tiny"]), "--sample.num_steps", "10"]
    with pytest.raises(SystemExit) as exit_:
        trainer.main([*model, *arguments.format(**paths).split()])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    assert message.format(**paths) in captured.err


SECTIONS = {section.name: section.type for section in dataclasses.fields(Config) if section.name != "algorithm"}
OWNER = {f"algorithm.{option.name}": name for name in algorithms.CHOICES for option in dataclasses.fields(algorithms.find(name))}
"""An algorithm that has the option."""
OPTIONS = {
    f"{section}.{option.name}": typing.get_type_hints(kind)[option.name]
    for section, kind in [*SECTIONS.items(), *(("algorithm", algorithms.find(name)) for name in algorithms.CHOICES)]
    for option in dataclasses.fields(kind)
}
VALUES = {
    "few": "few", ".nan": math.nan, ".inf": math.inf, "-1": -1, "0": 0, "1.5": 1.5, "true": True,
    "null": None, "''": "", "[]": [], "[1, 2]": [1, 2], "[[x]]": [["x"]], "{a: 1}": {"a": 1},
    f"1{'0' * 400}": 10**400, f"1{'0' * 5000}": 10**4999, f"[1{'0' * 400}, 0.9]": [10**400, 0.9],
    "1.0e+400": math.inf, "[" * 500: None, "*a": None, "&a [*a]": None, "{a: 1, a: 2}": None, "!!python/name:os.system ": None,
}  # fmt: skip
"""YAML and what it says; None for what is refused whatever the option, and for null."""


def chosen(option: str) -> list[str]:
    """What a command line needs to have the option."""
    return [f"--train.algorithm={OWNER[option]}"] if option in OWNER else []


def rules(option: str) -> list:
    """(what is valid in words, or of a config; whether a value is), of an option."""
    own = algorithms.find(OWNER[option]).RULES if option in OWNER else ()
    return [rule[1:] for rule in (*RULES, *((f"algorithm.{rule[0]}", *rule[1:]) for rule in own)) if rule[0] == option]


def takes(annotation, value) -> bool:
    """Whether a value is of an option's type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Union:
        return any(takes(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(takes(arguments[0], k) and takes(arguments[1], v) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(takes(argument, item) for argument in arguments for item in value)
    return type(value) in ((int, float) if annotation is float else (annotation,))


def is_bad(option: str, text: str) -> bool:
    """Whether YAML is wrong for an option: of another type, no number that a computer has, or one that the rules call too small."""
    value, texts = VALUES[text], [said(Config()) if callable(said) else said for said, _ in rules(option)]
    if value is None and text != "null" or not takes(OPTIONS[option], value):
        return True
    numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, float | int)]
    if any(not 0 <= number < 2**63 for number in numbers):
        return True
    return value == 0 and type(value) is int and any(re.search(r">= 1|> 0|\b0 < ", valid) for valid in texts)


GENERATED = [(option, text) for option in OPTIONS for text in VALUES if is_bad(option, text)]


def test_a_prompt_that_is_a_number_is_refused():
    with pytest.raises(ValueError, match=r"^prompts.list=\{1984: 1.0\}: valid is at least one prompt, a text; a weight is"):
        parse(["--prompts.list={1984: 1.0}"])


@pytest.mark.parametrize("option, text", GENERATED, ids=lambda value: value if len(value) < 30 else f"{value[:9]}-{len(value)}")
def test_what_no_option_takes_is_one_line_that_names_it(option, text, capsys, tmp_path):
    """On the command line; in a recipe where an option takes any text, and for null, which the parser lets pass there."""
    section, key = option.split(".")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{section}:\n  {key}: {text}\n")
    in_recipe = text == "null" or takes(OPTIONS[option], "any text")
    with pytest.raises(SystemExit) as exit_:
        parse_or_exit([*chosen(option), *(["--config", str(recipe)] if in_recipe else [f"--{option}={text}"])])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == "" and re.fullmatch(r"error: .*\n", captured.err)
    assert captured.err.startswith((f"error: {option}", f"error: --config {recipe}: not valid YAML: ") if in_recipe else f"error: {option}")


def test_enough_is_generated_for_every_option():
    assert len(GENERATED) > 1000 and {option for option, _ in GENERATED} == set(OPTIONS)


def test_what_is_valid_is_not_called_bad():
    """Every default is of its option's type and, said on the command line, the default."""
    for option, annotation in OPTIONS.items():
        config = parse(chosen(option))
        default = config[option]
        assert takes(annotation, default), option
        assert parse([*chosen(option), f"--{option}={default if isinstance(default, str) else json.dumps(default)}"]) == config


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--lora.scope up_blocks.7", "this network has no up_blocks.7; its blocks are down_blocks.0 to .1, mid_block, up_blocks.0 to .1"),
        ("--lora.scope up_blocks.1 --lora.targets [attention]", "up_blocks.1 have no layers of lora.targets=['attention']"),
        ("--sample.num_steps 1001", "sample.num_steps=1001: valid is 1 to 1000"),
        (
            "--sample.sampler flow_sde",
            "sample.sampler=flow_sde: it is for flow models, and this is a diffusion model; valid is cps, ddim, ode, precise",
        ),
        ("--eval.sampler dance_sde", "eval.sampler=dance_sde: it is for flow models, and this is a diffusion model; valid is cps, ddim"),
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
            option = f"{section}.{key}"
            assert config[option] == (located(option, value) if option in PLACES else value)


def test_without_options_it_is_the_embedded_compressibility_run():
    assert parse([]) == parse(["--config", str(CONFIGS / "embedded_compressibility.yaml")]) == Config()


def test_command_line_beats_recipe_beats_default(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {learning_rate: 1.0e-5, micro_batch: 3}\n")
    config = parse(["--config", str(recipe), "--train.micro_batch", "5"])
    assert (config.train.learning_rate, config.train.micro_batch, config.train.clip_range) == (1e-5, 5, Config().train.clip_range)


RWR = algorithms.find("rwr")


def test_the_options_are_those_of_the_chosen_algorithm(tmp_path):
    """However it is chosen; the last choice counts."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {algorithm: rwr}\nalgorithm: {inverse_temperature: 2.0}\n")
    sparse = algorithms.find("rwr_sparse")(percentile=0.5)
    cases = [
        ([], algorithms.find("ddpo_is")()),
        (["--train.algorithm", "rwr"], RWR()),
        (["--train.algorithm=rwr"], RWR()),
        (["--train", "{algorithm: rwr}"], RWR()),
        (["--train={algorithm: rwr}", "--algorithm.num_timesteps=3"], RWR(num_timesteps=3)),
        (["--config", str(recipe)], RWR(inverse_temperature=2.0)),
        ([f"--config={recipe}", "--algorithm.population=iteration"], RWR(inverse_temperature=2.0, population="iteration")),
        (["--train.algorithm=rwr", "--train.algorithm=rwr_sparse", "--algorithm.percentile=0.5"], sparse),
        (["--algorithm.percentile=0.5", "--train.algorithm=rwr_sparse"], sparse),
        (["--train.algorithm=ddpo_sf", "--train.num_minibatches=1"], algorithms.find("ddpo_sf")()),
    ]
    for argv, expected in cases:
        found = parse(argv).algorithm
        assert type(found) is type(expected) and found == expected, argv


@pytest.mark.parametrize("options", ["--sample.sampler=ode", "--eval.sampler=ode --eval.num_steps=20 --eval.guidance_scale=1"])
def test_the_ode_is_for_evaluation_or_a_regression(options):
    regression = ["--train.algorithm=rwr"] if options.startswith("--sample") else []
    config = parse([*options.split(), *regression])
    assert "ode" in (config.sample.sampler, config.eval.sampler)


@pytest.mark.parametrize("window", [{"size": 10}, {"size": 1, "among": 1}, {"size": 3, "among": 5, "every": 7}])
def test_a_window_as_it_may_be(window):
    assert parse([f"--sample.window={json.dumps(window)}"]).sample.window == window


def test_print_config_is_a_recipe(capsys, tmp_path):
    for more in ([], ["--train.algorithm=rwr", "--algorithm.num_timesteps=3"], ["--train={algorithm: rwr}", "--eval.sampler=ode"]):
        argv = ["--train.learning_rate", "0.5", *more]
        with pytest.raises(SystemExit, match="0"):
            parse([*argv, "--print_config"])
        recipe = tmp_path / "r.yaml"
        recipe.write_text(capsys.readouterr().out)
        assert parse(["--config", str(recipe)]) == parse(argv) and parse(argv).train.learning_rate == 0.5


def test_help_explains_every_option(capsys):
    """Of those of an algorithm, where the command line has chosen it."""
    texts = {}
    for name in algorithms.CHOICES:
        with pytest.raises(SystemExit, match="0"):
            parse([f"--train.algorithm={name}", "--help"])
        texts[name] = capsys.readouterr().out
    for option in OPTIONS:
        text = texts[OWNER.get(option, Config().train.algorithm)]
        entry = re.split(rf"{re.escape(f'--{option}')}[ ,]", text)[1].split("\n  --")[0]  # Python 3.13: a comma before another name
        assert len(" ".join(entry.split())) > 40, f"{option}: {entry}"
    assert all(("--algorithm.percentile" in text) == (name == "rwr_sparse") for name, text in texts.items())
