"""Finds the parts of a flow transformer's pipeline, by the signature of its class, and checks what can be checked of each alone.

Every fault is a ValueError of one line that begins with `option`, such as "model.path=...".
"""

from pathlib import Path

import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ddpo_fast.pipelines.families import check_not_distilled, family_of
from ddpo_fast.pipelines.model_parts import Parts, check_length, class_of, is_whole, load_tokenizer, made_of, read_config


def components(kind: type) -> dict[str, tuple[type, ...]]:
    """The parts that a pipeline's class takes, and the types that it asks for; less the optional ones, of which text alone needs none."""
    parts = kind._get_signature_keys(kind)[0]
    types = kind._get_signature_types()
    return {part: types[part] for part in parts if part not in kind._optional_components}


def find_parts(option: str, folder: Path, kind: type, index: dict) -> Parts:
    """The parts of a flow model. Those that model_index.json has as [null, null] are left out."""
    family, wanted = family_of(kind), components(kind)
    classes: dict[str, type] = {}
    for part, kinds in wanted.items():
        if index.get(part) != [None, None] or part in (family.network, "vae", "scheduler"):
            classes[part] = _class_of(option, index, part, kinds)
    scheduler = _scheduler(option, folder, classes.pop("scheduler"))
    tokenizers = [part for part in classes if part.startswith("tokenizer")]
    configs = {part: read_config(option, folder, "config.json", part) for part in classes if part not in tokenizers}
    try:
        check_not_distilled(kind.__name__, index, configs[family.network])
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    loaded = {}
    for part in tokenizers:
        encoder = part.replace("tokenizer", "text_encoder")
        text = _text_config(option, encoder, classes[encoder], configs[encoder]) if encoder in classes else None
        loaded[part] = load_tokenizer(option, folder, part, index, None if text is None else text.vocab_size)
        if isinstance(text, transformers.CLIPTextConfig):
            check_length(option, part, loaded[part], text.max_position_embeddings)
    return Parts({part: classes[part] for part in configs}, configs, loaded, scheduler)


def _class_of(option: str, index: dict, part: str, kinds: tuple[type, ...]) -> type:
    """A tokenizer and a scheduler may be others than the pipeline's class asks for: diffusers itself has such models."""
    if part.startswith("tokenizer"):
        kinds = (transformers.PreTrainedTokenizerBase,)
    elif part == "scheduler":
        kinds = (SchedulerMixin,)
    named = class_of(index, part, *kinds)
    if named is None:
        valid = f"{kinds[0].__name__} of {kinds[0].__module__.partition('.')[0]}"
        raise ValueError(f"{option}: model_index.json has {part}={index.get(part)}; valid is {valid}")
    return named


def vae_class(option: str, kind: type, config: dict) -> type:
    """The class of a VAE in a folder of its own. Raises ValueError for one that the pipeline does not take."""
    name, kinds = config.get("_class_name"), components(kind)["vae"]
    found = class_of({"vae": ["diffusers", name]}, "vae", *kinds)
    if found is None:
        raise ValueError(f"{option}: config.json is a {name}'s; valid is {kinds[0].__name__}'s")
    return found


def _text_config(option: str, part: str, kind: type, config: dict) -> transformers.PreTrainedConfig:
    with made_of(f"{option}: {part}/config.json"):
        return kind.config_class.from_dict(config).get_text_config()


def _scheduler(option: str, folder: Path, kind: type) -> SchedulerMixin:
    """The model's own scheduler, of which the levels of noise count, and not the steps."""
    config = read_config(option, folder, "scheduler_config.json", "scheduler")
    is_flow = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    if kind is not FlowMatchEulerDiscreteScheduler and not is_flow:
        raise ValueError(
            f"{option}: its scheduler is a {kind.__name__}; valid is FlowMatchEulerDiscreteScheduler, or another one of diffusers with "
            "prediction_type=flow_prediction and use_flow_sigmas=true"
        )
    where = f"{option}: scheduler/scheduler_config.json"
    for key in ("stochastic_sampling", "invert_sigmas"):
        if config.get(key):
            raise ValueError(
                f"{where} has {key}={config[key]}; valid is false: the levels of noise fall, and a sampler draws its own noise"
            )
    num_levels = config.get("num_train_timesteps", 1000)
    if not is_whole(num_levels) or not 1 <= num_levels <= 100_000:
        raise ValueError(f"{where} has num_train_timesteps={num_levels}; valid is a whole number from 1 to 100000")
    with made_of(where):
        return kind.from_config(config)
