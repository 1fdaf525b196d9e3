"""Which pipelines can be trained, and how they are opened: a folder in diffusers format, a hub id, or a single file of weights."""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers

transformers.logging.set_verbosity_error()  # errors of a model are raised instead, in one line
transformers.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()

from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from ddpo_fast.pipelines import model_parts, single_file
from ddpo_fast.pipelines.ddim import changed_steps
from ddpo_fast.pipelines.families import FAMILIES, Family
from ddpo_fast.pipelines.hub import CONFIGS, check_readable, choose_weights, file_names, in_one_line, local_folder
from ddpo_fast.pipelines.model_parts import NETWORKS, TEXT_ENCODERS, read_config
from ddpo_fast.pipelines.single_file import PREFIXES, SDXL_PREFIXES, is_vae, names_in


@dataclass(frozen=True)
class Weights:
    """Where a network's weights are."""

    option: str
    source: str
    """Folder, hub id or single file."""
    part: str
    """The network's folder in `source`, or ""; in a single file, what the names of its weights begin with."""
    variant: str | None
    """None for the plain weights."""
    files: list[str]


@dataclass(frozen=True)
class Model:
    """A model that has been checked except for the contents of its weights. `open_pipeline` opens it."""

    path: str
    """Folder, hub id or single file."""
    option: str
    """The option that its configs come from: "model.path=..." or, for a single file, "model.config=..."."""
    kind: type
    """The pipeline's class."""
    family: Family
    folder: Path
    """Where its configs and tokenizers are."""
    configs: dict[str, dict]
    """Every network's config, by the name of its part."""
    tokenizers: dict[str, transformers.PreTrainedTokenizerBase]
    scheduler: DDIMScheduler
    """A DDIM scheduler with the model's betas, whatever sampler the model was saved with."""
    weights: dict[str, Weights]
    """Every network's weights, by the name of its part."""
    notes: list[str]
    """What a user has to be told."""

    def check_networks(self) -> None:
        """Calls the networks without their weights, which takes some seconds. Raises ValueError if they do not fit together."""
        lengths = {part: self.tokenizers[name].model_max_length for part, name in TEXT_ENCODERS.items() if part in self.configs}
        model_parts.check_networks(self.option, self.kind, self.configs, lengths)


def find_model(path: str, config: str | None = None, vae: str | None = None, variant: str | None = None) -> Model:
    """Finds a model and checks it by its configs and the names of its weights.

    path: a folder or hub id. If `config` is given, path is a file of weights as Stable Diffusion was first published, and `config` is a
    folder or hub id with the configs and the tokenizer of a pipeline of the same layout. vae: folder, hub id or file of a VAE to take
    instead of the pipeline's. variant: that of the weights, see `choose_weights`. Raises ValueError, naming the option, for what cannot
    be trained.
    """
    option, source = ("model.path", path) if config is None else ("model.config", config)
    folder, option = local_folder(option, source), f"{option}={source}"
    index = read_config(option, folder, "model_index.json")
    kind = model_parts.check_index(option, index)
    stated = read_config(option, folder, "scheduler_config.json", "scheduler")
    scheduler = model_parts.check_scheduler(option, kind, index, stated)
    encoders = {part: name for part, name in TEXT_ENCODERS.items() if part == "text_encoder" or kind is StableDiffusionXLPipeline}
    configs = {part: read_config(option, folder, "config.json", part) for part in ("unet", "vae", *encoders)}
    tokenizers = {}
    for part, name in encoders.items():
        tokenizers[name] = model_parts.load_tokenizer(option, folder, name, index, configs[part])
        configs[part] |= {"_class_name": index[part][1]}
    parts = [part for part in configs if part != "vae" or vae is None]
    weights = _in_file(path, kind, parts) if config is not None else _find_weights(option, path, folder, parts, variant)
    vae_option = option
    if vae is not None and Path(vae).is_file():
        vae_option = f"model.vae={vae}"
        if not is_vae(names_in(vae_option, vae)):
            raise ValueError(f"{vae_option}: it holds no decoder.*; valid is a file of an AutoencoderKL's weights")
        weights["vae"] = Weights(vae_option, vae, "", None, [])
        vae_option = option  # a VAE in a file has the config of the pipeline's
    elif vae is not None:
        vae_folder, vae_option = local_folder("model.vae", vae), f"model.vae={vae}"
        configs["vae"] = read_config(vae_option, vae_folder, "config.json")
        weights["vae"] = _find_weights(vae_option, vae, vae_folder, [""], variant)[""]
    channels = model_parts.check_vae(vae_option, "vae/config.json" if vae_option == option else "config.json", configs["vae"])
    configs["unet"] = model_parts.check_unet(option, kind, configs["unet"], channels)
    if variant is not None and variant not in {found.variant for found in weights.values()}:
        raise ValueError(f"model.variant={variant}: no part of {path} has weights of that variant; valid is null")
    return Model(
        path,
        option,
        kind,
        FAMILIES[kind.__name__],
        folder,
        configs,
        tokenizers,
        scheduler,
        weights,
        _notes(option, stated, scheduler, weights),
    )


def _find_weights(option: str, source: str, folder: Path, parts: list[str], variant: str | None) -> dict[str, Weights]:
    names, weights = file_names(option.partition("=")[0], source, folder), {}
    for part in parts:
        stem = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
        weights[part] = Weights(option, source, part, *choose_weights(option, names, part, stem, variant))
        check_readable(option, folder, weights[part].files)
    return weights


def _notes(option: str, stated: dict, scheduler: DDIMScheduler, weights: dict[str, Weights]) -> list[str]:
    """Lines about what differs from the configs, or from what one would expect."""
    notes = []
    if changed := changed_steps(stated, scheduler):
        ours, theirs = (", ".join(f"{key}={values[key]}" for key in changed) for values in (changed, stated))
        notes.append(f"{option}: the steps are DDIM's with {ours}; its scheduler_config.json has {theirs}")
    if variants := [f"{part} ({found.variant})" for part, found in weights.items() if found.variant is not None]:
        notes.append(f"{option}: weights of a variant are read for {', '.join(variants)}")
    return notes


def open_pipeline(model: Model, dtype: torch.dtype) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline in `dtype`, with its weights, which are read from safetensors only, and with DDIM's scheduler.

    SDXL's own VAE overflows in fp16, and its config says so by `force_upcast`. The VAE is then in fp32, as in diffusers. Raises ValueError,
    naming the option, for weights that are damaged or belong to another network.
    """
    parts = {part: _load(part, model, weights, dtype) for part, weights in model.weights.items()}
    parts |= {**model.tokenizers, "scheduler": model.scheduler, "feature_extractor": None, "image_encoder": None}
    is_sdxl = model.kind is StableDiffusionXLPipeline
    parts |= {"add_watermarker": False} if is_sdxl else {"safety_checker": None, "requires_safety_checker": False}
    option = f"model.path={model.path}"
    with in_one_line(option):
        pipe = model.kind.from_pretrained(model.folder, **parts)
    pipe.unet.register_to_config(sample_size=model.configs["unet"]["sample_size"])
    if is_sdxl and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.float()
    return pipe


def _load(part: str, model: Model, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """A network with its weights. Raises ValueError if its files lack a weight: transformers would draw it at random and say so only if
    asked."""
    if Path(weights.source).is_file():
        return single_file.load(weights.option, weights.source, model.folder, part, weights.part, dtype)
    folder = local_folder(weights.option.split("=")[0], weights.source, [*CONFIGS, *weights.files])
    options = {"subfolder": weights.part, "variant": weights.variant, "dtype": dtype, "use_safetensors": True}
    with in_one_line(weights.option):
        if part not in NETWORKS:
            kind = getattr(transformers, model.configs[part]["_class_name"])
            network, found = kind.from_pretrained(folder, output_loading_info=True, **options)
        else:
            network, found = NETWORKS[part].from_pretrained(folder, **options), {"missing_keys": ()}
    single_file.check_complete(weights.option, network)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{weights.option}: {part}/*.safetensors lack {missing[0]}")
    return network


def _in_file(path: str, kind: type, parts: list[str]) -> dict[str, Weights]:
    """The weights in a single file. Raises ValueError if no name in it begins as the names of one of the parts do."""
    prefixes, option = SDXL_PREFIXES if kind is StableDiffusionXLPipeline else PREFIXES, f"model.path={path}"
    names = names_in(option, path)
    for part in parts:
        if not any(name.startswith(prefixes[part]) for name in names):
            raise ValueError(
                f"{option}: it holds no {prefixes[part]}*; valid is a whole checkpoint, of a {kind.__name__} as model.config says"
            )
    return {part: Weights(option, path, prefixes[part], None, []) for part in parts}
