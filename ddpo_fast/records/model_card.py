"""README.md beside the trained weights: what they are, what they were trained for, what it gave, how to load them."""

import re
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from ddpo_fast import algorithms
from ddpo_fast.algorithms import PolicyGradient
from ddpo_fast.files import write_text
from ddpo_fast.places import LORA_FILE, NETWORKS
from ddpo_fast.prompts import EVALUATIONS
from ddpo_fast.records.kohya import TRANSFORMERS
from ddpo_fast.records.report import Run, read_run

_OPTIONS = (
    "train.algorithm lora.init lora.scope lora.targets lora.rank lora.alpha prompts.name prompts.file sample.num_samples sample.num_steps "
    "sample.guidance_scale sample.height sample.width sample.sampler sample.eta sample.window train.num_minibatches train.inner_epochs "
    "train.learning_rate run.seed"
).split()
_POLICY_GRADIENT_OPTIONS = ("train.clip_range", "train.kl_coefficient", "baseline.name")
_CURVE = 12
"""Rows of the curve, at most."""


def write_card(run_dir: Path, part: str = "") -> None:
    """Writes README.md, before.png and after.png into <run_dir>/<part>/lora, or to the network after full fine-tuning."""
    run, folder = read_run(run_dir), weights_folder(run_dir / part)
    for name, path in pictures(run).items():
        shutil.copyfile(path, folder / name)
    write_text(folder / "README.md", card(run, str(folder), public=False))


def weights_folder(run_dir: Path) -> Path:
    """<run_dir>/lora, or the folder of the whole network. Raises ValueError if there is neither yet."""
    for name in ("lora", *NETWORKS):
        if (run_dir / name).is_dir():
            return run_dir / name
    raise ValueError(f"RUN_DIR={run_dir}: there is no lora/ (or whole network) in it yet; a run writes it with its first checkpoint")


def pictures(run: Run) -> dict[str, Path]:
    """The first and the last grid of images/ by the names that a card knows them by."""
    grids = run.images["eval"]
    return {"before.png": grids[0], "after.png": grids[-1]} if len(grids) > 1 else {}


def base_model(run: Run) -> tuple[str, bool]:
    """What a run's model is called, of a local path its last part, and whether that is a hub id."""
    path = run.config["model"]["path"]
    return (path, True) if _is_on_hub(path) else (Path(path).name, False)


def _is_on_hub(path: str) -> bool:
    return not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None


def card(run: Run, weights: str, public: bool) -> str:
    """The model card of a run. weights: folder or hub id to load them from.

    public: of a local model, too, only the path's last part is in it, as of other paths in any case.
    """
    options, full = run.config, run.config["lora"]["scope"] == "none"
    (base, on_hub), reward = base_model(run), Path(options["reward"]["name"]).name
    part, network = run.environment["network"]
    kind = ["stable-diffusion"] if part == "unet" else []
    tags = ["text-to-image", *kind, "ddpo", "reinforcement-learning", *([] if full else ["lora"])]
    data = ModelCardData(base_model=base if on_hub else None, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    what = f"The {network}" if full else f"A LoRA for the {network}"
    origin = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`, a local model"
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {run.name}",
        f"{what} of {origin}, trained by reinforcement learning ([DDPO](https://arxiv.org/abs/2305.13301), "
        f"`{options['train']['algorithm']}`) with ddpo_fast for the reward `{reward}`.",
        _curve(run),
    ]
    if pictures(run):
        parts.append("The same prompts and the same noise, before and after; below each picture its reward:")
        parts.append("![before](before.png)\n\n![after](after.png)")
    elsewhere = "" if full else _elsewhere(part, network, weights, public)
    parts += ["## Use", _use(run, weights, full, public), elsewhere, "## Training", _training(run)]
    content = "\n\n".join(part for part in parts if part) + "\n"
    return str(ModelCard(content))


def _curve(run: Run) -> str:
    evaluated = run.evaluations()
    if not evaluated:
        return ""
    num_rows = min(_CURVE, len(evaluated))
    chosen = [evaluated[round(i * (len(evaluated) - 1) / max(1, num_rows - 1))] for i in range(num_rows)]
    names = {name: f"reward, {evaluation.title}" for name, evaluation in EVALUATIONS.items() if run.evaluations(name)}
    rows = [
        f"| {row['iteration']} | {row['samples']:,} | {row['device_hours']:.3g} | {' | '.join(_mean(row, name) for name in names)} |"
        for row in chosen
    ]
    head = f"| iteration | samples | device-hours | {' | '.join(names.values())} |\n|--:|--:|--:|{'--:|' * len(names)}\n"
    return f"On a fixed evaluation set of {evaluated[-1]['eval_samples']} pictures, ± the standard error:\n\n{head}" + "\n".join(rows)


def _mean(row: dict, name: str) -> str:
    if row.get(f"{name}_reward_mean") is None:
        return "–"
    return f"{row[f'{name}_reward_mean']:.4g} ± {row[f'{name}_reward_std'] / row[f'{name}_samples'] ** 0.5:.2g}"


def _use(run: Run, weights: str, full: bool, public: bool) -> str:
    """Python code that draws a picture as the evaluation does: by DDIM, or as a flow model's pipeline does."""
    model, environment = run.config["model"], run.environment
    part, network = environment["network"]
    by_ddim = "scheduler" in environment
    names = {name: Path(path).name if public and not _is_on_hub(path) else path for name, path in model.items() if isinstance(path, str)}
    classes, arguments = {*([network] if full else []), *(["DDIMScheduler"] if by_ddim else [])}, f'"{names["path"]}"'
    pipeline, constructor = "DiffusionPipeline", "from_pretrained"
    if "config" in names:  # a single file, which does not say what it is of
        pipeline = DiffusionPipeline.load_config(model["config"])["_class_name"]
        constructor, arguments = "from_single_file", f'{arguments}, config="{names["config"]}"'
    if "vae" in names:
        vae = "from_single_file" if names["vae"].endswith(".safetensors") else "from_pretrained"
        arguments += f', vae=AutoencoderKL.{vae}("{names["vae"]}")'
        classes.add("AutoencoderKL")
    if variant := environment.get("variant"):
        arguments += f', variant="{variant}"'
    arguments += "".join(f", {absent}=None" for absent in model.get("parts", {}))
    lines = [f"from diffusers import {', '.join(sorted({*classes, pipeline}))}", "", f"pipe = {pipeline}.{constructor}({arguments})"]
    lines.append(f'pipe.{part} = {network}.from_pretrained("{weights}")' if full else f'pipe.load_lora_weights("{weights}")')
    call = {"num_inference_steps": run.sampling["num_steps"], environment["guidance"]: run.sampling["guidance_scale"]}
    if by_ddim:
        steps = "".join(f", {key}={value!r}" for key, value in environment["scheduler"].items())
        lines.append(f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{steps})")
        call["eta"] = run.sampling["eta"]
    call |= {side: run.sampling[side] for side in ("height", "width") if run.sampling[side] is not None}
    shown = ", ".join(f"{key}={value!r}" for key, value in (call | environment["arguments"]).items())
    lines.append(f'image = pipe(prompt="a prompt", {shown}).images[0]')
    return "```python\n" + "\n".join(lines) + "\n```"


def _elsewhere(part: str, network: str, weights: str, public: bool) -> str:
    """What to do with a LoRA outside of a pipeline of diffusers."""
    fetch = f"`hf download {weights} --local-dir lora`, then " if public else ""
    folder = "lora" if public else weights
    kohya = (
        f"For ComfyUI, AUTOMATIC1111 and others, {fetch}`ddpo-fast kohya {folder}` writes a file that they read whole. "
        f"`{LORA_FILE}` has names that they do not all know, and they leave out what they do not know.\n\n"
    )
    return (
        f"{kohya if part == 'unet' or network in TRANSFORMERS else ''}"
        f"The {part} alone takes it, too:\n\n"
        f'```python\n{part}.load_lora_adapter("{weights}", prefix="{part}", weight_name="{LORA_FILE}")\n```\n\n'
        "Its layers are then peft's. `PeftModel.from_pretrained` does not read it."
    )


def _training(run: Run) -> str:
    values = {"reward.name": Path(run.config["reward"]["name"]).name}
    is_policy_gradient = issubclass(algorithms.find(run.config["train"]["algorithm"]), PolicyGradient)
    own = [f"algorithm.{key}" for key in run.config.get("algorithm", {})]
    for option in (*_OPTIONS, *own, *(_POLICY_GRADIENT_OPTIONS if is_policy_gradient else ())):
        section, key = option.split(".")
        value = run.config.get(section, {}).get(key)  # the run may be older than the option
        values[option] = Path(value).name if option in ("prompts.file", "lora.init") and value else value
    values |= run.environment
    if listed := run.config["prompts"].get("list"):
        values["prompts.list"] = f"{len(listed)} of its own"
    if listed or run.config["prompts"]["file"]:
        del values["prompts.name"]
    rows = [f"| {name} | {value} |" for name, value in values.items() if value is not None]
    return "| | |\n|---|---|\n" + "\n".join(rows)
