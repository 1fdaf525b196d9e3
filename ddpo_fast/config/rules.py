"""What each option's value must be, beyond its type; what options do not go together is in conflicts.py."""

import os
import re
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ddpo_fast import samplers
from ddpo_fast.algorithms import Regression
from ddpo_fast.gpus import GPUS, parse_devices
from ddpo_fast.places import is_hub_id, is_lora, lora_file


def _number(low, high=sys.float_info.max, open_low=False):
    """A check that a number is in [low, high], or (low, high]: neither NaN nor infinite."""
    return lambda value, _: (value > low if open_low else value >= low) and value <= high


_LARGEST = 2**63 - 1
_positive = _number(1, _LARGEST), "a whole number >= 1 and < 2^63"
_BLOCKS = r"mid_block|\w+\.\d+(-\d+)?"
_SCOPE = re.compile(rf"all|mid_up|none|({_BLOCKS})(,({_BLOCKS}))*")
RULES = [
    *(
        (option, _positive[1], _positive[0])
        for option in (
            "lora.rank",
            "prompts.samples_per_prompt",
            "sample.num_samples",
            "sample.decode_batch",
            "sample.num_steps",
            "train.num_minibatches",
            "train.inner_epochs",
            "baseline.min_count",
            "eval.every",
            "eval.num_samples",
            "run.iterations",
            "run.checkpoint_every",
            "run.keep_checkpoints",
        )
    ),
    *(
        (option, "a finite number > 0", _number(0, open_low=True))
        for option in (
            "lora.alpha",
            "reward.timeout_s",
            "train.learning_rate",
            "train.clip_range",
            "train.advantage_clip",
            "train.max_grad_norm",
            "optimizer.eps",
        )
    ),
    *(
        (option, f"auto, or {_positive[1]}", lambda value, _: value == "auto" or _positive[0](value, _))
        for option in ("sample.batch_size", "train.micro_batch")
    ),
    (
        "model.path",
        "a whole model; this is a LoRA: lora.init starts from it, beside the model.path that it is of",
        lambda v, c: not is_lora(v),
    ),
    (
        "model.path",
        "a folder with model_index.json, or a hub id such as org/name, or a .safetensors file; not a .ckpt, a pickle, which runs code when "
        "it is loaded",
        lambda v, c: _is_model(v) or _is_single_file(v),
    ),
    (
        "model.config",
        "with model.path=FILE.safetensors a folder with model_index.json, or a hub id such as org/name, of a pipeline of the same layout; "
        "else null",
        lambda v, c: (v is not None and _is_model(v)) if _is_single_file(c.model.path) else v is None,
    ),
    (
        "model.vae",
        "a folder with config.json, or a hub id such as org/name, or a .safetensors file",
        lambda v, c: v is None or _is_model(v, "config.json") or _is_single_file(v),
    ),
    (
        "model.variant",
        "a word such as fp16, or null; null with a single file",
        lambda v, c: v is None or bool(re.fullmatch(r"[\w-]+", v)) and c.model.config is None,
    ),
    (
        "model.quantize",
        "none with a single file as model.path, whose weights are read all at once",
        lambda v, c: v == "none" or c.model.config is None,
    ),
    (
        "model.quantize",
        "none or int8 where bitsandbytes is not installed",
        lambda v, c: v != "nf4" or find_spec("bitsandbytes") is not None,
    ),
    (
        "lora.scope",
        "all, mid_up, none, last:SHARE with 0 < SHARE <= 1, or blocks joined by commas, such as mid_block,up_blocks.2 or "
        "transformer_blocks.12-23",
        lambda v, c: 0 < float(v.removeprefix("last:")) <= 1 if v.startswith("last:") else bool(_SCOPE.fullmatch(v)),
    ),
    (
        "lora.init",
        "the directory of a run, a folder with pytorch_lora_weights.safetensors, a LoRA's .safetensors file, or null",
        lambda v, c: v is None or c.run.resume or (lora_file(v) is not None and is_lora(v)),
    ),
    ("lora.targets", "at least one of attention, feed_forward, modulation, convolution, projection", lambda v, c: len(v) > 0),
    ("prompts.list", "null, when prompts.file is given", lambda v, c: v is None or c.prompts.file is None),
    ("prompts.list", "at least one prompt, a text; a weight is a finite number > 0", lambda v, c: v is None or _is_prompt_list(v)),
    (
        "prompts.name",
        "a prompt set, unless prompts.file or prompts.list is given",
        lambda v, c: v is not None or c.prompts.file is not None or c.prompts.list is not None,
    ),
    ("prompts.limit", _positive[1], lambda v, c: v is None or _positive[0](v, c)),
    ("prompts.samples_per_prompt", "a divisor of sample.num_samples", lambda v, c: c.sample.num_samples % v == 0),
    ("sample.guidance_scale", "a finite number >= 0", _number(0)),
    (
        "sample.eta",
        lambda c: samplers.find(c.sample.sampler).VALID_ETA,
        lambda v, c: samplers.find(c.sample.sampler).takes(v),
    ),
    (
        "sample.window",
        "null, or {size: N, among: N, every: N} with 1 <= size <= among <= sample.num_steps and every >= 1; size has to be there",
        lambda v, c: v is None or _is_window(v, c.sample.num_steps),
    ),
    (
        "eval.sampler",
        lambda c: f"null, or a sampler that takes sample.eta={c.sample.eta}",
        lambda v, c: v is None or samplers.find(v).takes(c.sample.eta),
    ),
    *(
        (option, f"{_positive[1]}, or null", lambda v, c: v is None or _positive[0](v, c))
        for option in ("eval.num_steps", "sample.height", "sample.width", "eval.height", "eval.width")
    ),
    *(  # a pipeline that is given one side only takes its own size
        (
            f"{of}.width",
            f"{_positive[1]} beside {of}.height, or null without it",
            lambda v, c, of=of: (v is None) == (c[f"{of}.height"] is None),
        )
        for of in ("sample", "eval")
    ),
    ("eval.guidance_scale", "a finite number >= 0, or null", lambda v, c: v is None or _number(0)(v, c)),
    ("sample.num_samples", "a multiple of train.num_minibatches", lambda v, c: v % c.train.num_minibatches == 0),
    ("train.kl_coefficient", "a finite number >= 0", _number(0)),
    ("zero.stage", "0, 1, 2 or 3", lambda v, c: type(v) is int),  # true is in a Literal that has 1
    (
        "zero.offload",
        "none, optimizer with zero.stage 1 to 3, or all with zero.stage=3",
        lambda v, c: c.zero.stage >= {"none": 0, "optimizer": 1, "all": 3}[v],
    ),
    ("train.timestep_fraction", "0 < fraction <= 1", _number(0, 1, open_low=True)),
    ("reward.max_bad_fraction", "0 <= fraction <= 1", _number(0, 1)),
    (
        "baseline.name",
        "history, or group with prompts.samples_per_prompt of at least 2: a single sample has nothing to be compared with",
        lambda v, c: v == "history" or c.prompts.samples_per_prompt > 1 or isinstance(c.algorithm, Regression),
    ),
    ("baseline.buffer_size", "a whole number >= baseline.min_count and < 2^63", lambda v, c: c.baseline.min_count <= v <= _LARGEST),
    ("optimizer.betas", "two numbers in [0, 1)", lambda v, c: len(v) == 2 and all(0 <= b < 1 for b in v)),
    ("optimizer.weight_decay", "a finite number >= 0", _number(0)),
    *((option, "a number of MiB >= 0", lambda v, c: v is None or _number(0)(v, c)) for option in ("cache.device_mib", "cache.host_mib")),
    *(
        (option, "a prompt set or a list with at least one prompt, or null", lambda v, c: v is None or len(v) > 0)
        for option in ("eval.prompts", "eval.heldout")
    ),
    ("run.seed", "a whole number in [0, 2^63)", _number(0, _LARGEST)),
    ("run.dir", "a folder, not a file, or the name of one that can be made", lambda v, c: v is None or _can_be_folder(v)),
    (
        "run.dir",
        "the directory of a run with a checkpoint, when run.resume is set",
        lambda v, c: not c.run.resume or (v is not None and _has_checkpoint(v)),
    ),
    (
        "run.dir",
        "a directory that holds no run yet; to continue the one in it, add --resume",
        lambda v, c: c.run.resume or v is None or not _has_checkpoint(v),
    ),
    (
        "run.plan",
        f"here, or one of {', '.join(GPUS)}, or several of them as in 8xH200",
        lambda v, c: v is None or parse_devices(v) is not None,
    ),
]
"""(option, what is valid in words, whether (value, config) is)."""


def _has_checkpoint(run_dir: str) -> bool:
    return any(path.name.isdigit() for path in Path(run_dir, "checkpoints").glob("*"))


def _is_model(path: str, config: str = "model_index.json") -> bool:
    return Path(path, config).is_file() if Path(path).exists() else is_hub_id(path)


def _is_single_file(path: str) -> bool:
    return Path(path).suffix == ".safetensors" and Path(path).is_file()


def _is_window(window: dict[str, int], num_steps: int) -> bool:
    known = {"among": num_steps, "every": 1} | window
    return known.keys() == {"size", "among", "every"} and 1 <= known["size"] <= known["among"] <= num_steps and known["every"] >= 1


def _is_prompt_list(prompts: list[str] | dict[str, float]) -> bool:
    weights = prompts.values() if isinstance(prompts, dict) else []
    is_text = all(isinstance(prompt, str) for prompt in prompts)  # the parser takes any key of a mapping
    return is_text and len(prompts) > 0 and all(0 < weight <= sys.float_info.max for weight in weights)


def _can_be_folder(path: str) -> bool:
    with suppress(FileNotFoundError):
        os.lstat(path)  # raises OSError for a name that is too long, or behind a file
    there = next(folder for folder in (Path(path), *Path(path).absolute().parents) if os.path.lexists(folder))
    return bool(path.strip()) and path.isprintable() and there.is_dir() and os.access(there, os.W_OK)
