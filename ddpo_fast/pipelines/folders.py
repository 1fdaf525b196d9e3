"""Which pipelines can be trained, and how they are opened: a folder in diffusers format, a hub id, or a single file of weights."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import diffusers
import torch
import transformers

transformers.logging.set_verbosity_error()  # errors of a model are raised instead, in one line
transformers.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from ddpo_fast.distributed.partition import Partition
from ddpo_fast.pipelines import flow_parts, model_parts, single_file, streamed_weights
from ddpo_fast.pipelines.ddim import changed_steps
from ddpo_fast.pipelines.families import Family, family_of
from ddpo_fast.pipelines.hub import CONFIGS, check_readable, choose_weights, file_names, in_one_line, local_folder
from ddpo_fast.pipelines.model_parts import TEXT_ENCODERS, Parts, made_of, read_config
from ddpo_fast.pipelines.recorder import PROBES, Recorder
from ddpo_fast.pipelines.single_file import PREFIXES, SDXL_PREFIXES, is_vae, names_in
from ddpo_fast.pipelines.skeleton import filled, in_dtype, lightened, on_meta
from ddpo_fast.pipelines.template import Asked, Recording, Texts

OURS = (
    "prompt eta num_inference_steps timesteps sigmas height width num_images_per_prompt generator latents output_type return_dict callback "
    "callback_steps callback_on_step_end callback_on_step_end_tensor_inputs args kwargs"
).split()
"""Arguments of a pipeline's call that model.arguments cannot have: other options have them, or a recording needs them."""
TRIED = Asked(2, 4.0)
"""How networks are tried: with guidance, which every family has at this scale."""


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
    classes: dict[str, type]
    """Every network's class, by the name of its part."""
    configs: dict[str, dict]
    """Every network's config."""
    tokenizers: dict[str, transformers.PreTrainedTokenizerBase]
    scheduler: SchedulerMixin
    """A flow model's own; for a diffusion model DDIM's with its betas, whatever sampler it was saved with."""
    weights: dict[str, Weights]
    """Every network's weights, by the name of its part."""
    arguments: dict[str, object]
    """Of the pipeline's call, beyond those of its family."""
    quantize: str = "none"
    """How the network's weights are quantised as they are read, see `networks.quantized.KINDS`."""
    _recorders: dict[torch.dtype, Recorder] = field(default_factory=dict)
    _recordings: dict[tuple[Asked, torch.dtype], Recording] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a user has to be told: what differs from the configs, or from what one would expect."""
        notes, option = [], self.option
        if self.family.process == "diffusion":
            stated = read_config(option, self.folder, "scheduler_config.json", "scheduler")
            if changed := changed_steps(stated, self.scheduler):
                ours, theirs = (", ".join(f"{key}={values[key]}" for key in changed) for values in (changed, stated))
                notes.append(f"{option}: the steps are DDIM's with {ours}; its scheduler_config.json has {theirs}")
        if variants := [f"{part} ({found.variant})" for part, found in self.weights.items() if found.variant is not None]:
            notes.append(f"{option}: weights of a variant are read for {', '.join(variants)}")
        return notes

    def skeleton(self, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
        """The pipeline without weights: a `Recorder` records of it what it would record of the pipeline with weights in this dtype.

        Its text encoders are `lightened`; its network is on the meta device; its VAE's numbers are ones that take no memory. Raises
        ValueError, naming the part, for a network that cannot be made.
        """
        networks = {}
        for part, kind in self.classes.items():
            with made_of(self._config_of(part)):
                networks[part] = in_dtype(on_meta(kind, self.configs[part]), dtype)
                if part == "vae":
                    filled(networks[part])
            if part.startswith("text_encoder"):
                networks[part].forward = made_of(self._config_of(part))(lightened(networks[part]).forward)
        pipe = self.assembled(networks)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _config_of(self, part: str) -> str:
        """A network's config, for errors."""
        weights = self.weights[part]
        apart = part == "vae" and not weights.part and not Path(weights.source).is_file()
        return f"{weights.option}: config.json" if apart else f"{self.option}: {part}/config.json"

    def assembled(self, networks: dict[str, nn.Module]) -> DiffusionPipeline:
        """diffusers' own pipeline of these networks, with the model's tokenizers and scheduler."""
        parts = dict.fromkeys(self.kind._get_signature_keys(self.kind)[0]) | networks | self.tokenizers | {"scheduler": self.scheduler}
        if self.kind is StableDiffusionPipeline:
            parts["requires_safety_checker"] = False
        elif self.kind is StableDiffusionXLPipeline:
            parts["add_watermarker"] = False
        with in_one_line(f"model.path={self.path}"):
            return self.kind.from_pretrained(self.folder, **parts)

    def recorder(self, dtype: torch.dtype = torch.float32) -> Recorder:
        """Of the pipeline without weights in this dtype, always the same one."""
        if dtype not in self._recorders:
            self._recorders[dtype] = Recorder(self.skeleton(dtype), self.family, torch.device("cpu"), self.arguments)
        return self._recorders[dtype]

    def record(self, asked: Asked, dtype: torch.dtype = torch.float32) -> Recording:
        """How the pipeline will call its network if it is called as asked. Raises ValueError if it cannot be called with its parts."""
        try:
            if (asked, dtype) not in self._recordings:
                self._recordings[asked, dtype] = self.recorder(dtype).record(asked)
            return self._recordings[asked, dtype]
        except Exception as error:  # of whatever the pipeline finds
            if isinstance(error, ValueError) and str(error).startswith(f"{self.option}: "):
                raise
            what = f"{self.option}: a {self.kind.__name__} cannot be called with these parts: {type(error).__name__}: {error}"
            raise ValueError(" ".join(what.split())) from error

    def check_call(self, section: str, asked: Asked) -> None:
        """Calls the pipeline without weights, where a size or arguments are asked for. Raises ValueError naming the option at fault.

        section: of the size's options. Some pipelines draw another size than they were asked for.
        """
        if asked.height is None and not self.arguments:
            return
        option = f"{section}.height={asked.height}, {section}.width={asked.width}"
        try:
            recording = self.record(asked)
        except ValueError as error:
            plain = replace(asked, height=None, width=None)
            if asked == plain or not self._can_be_called(plain, self.arguments):
                if not self.arguments or not self._can_be_called(plain, {}):
                    raise
                option = f"model.arguments={json.dumps(self.arguments, default=str)}"
            raise ValueError(f"{option}: {' '.join(str(error.__cause__ or error).split())}") from None
        height, width = self._drawn(recording)
        if asked.height is not None and (height, width) != (asked.height, asked.width):
            raise ValueError(f"{option}: its pipeline draws {height} x {width} pixels instead; valid is a size that it keeps")

    def _can_be_called(self, asked: Asked, arguments: dict[str, object]) -> bool:
        try:
            Recorder(self.skeleton(), self.family, torch.device("cpu"), arguments).record(asked)
        except Exception:  # of whatever the pipeline finds
            return False
        return True

    def _drawn(self, recording: Recording) -> tuple[int, int]:
        """Height and width of a picture. Raises ValueError if the VAE cannot decode such latents."""
        vae = self.recorder().pipe.vae
        with made_of(self._config_of("vae"), f"it cannot decode the {self.family.network}'s latents"):
            vae.to("meta")
            pictures = self.recorder().decode(torch.empty(1, *recording.shape, device="meta"), recording)
            if pictures.dim() != 4 or pictures.shape[1] != 3:
                raise ValueError(f"{recording.shape} becomes {tuple(pictures.shape[1:])}, no picture of three colours")
            filled(vae)
        return tuple(pictures.shape[2:])

    def check_networks(self, asked: Asked = TRIED) -> None:
        """Calls the networks without their weights, which takes some seconds. Raises ValueError if they do not fit together.

        asked: the pictures that a flow model is tried for.
        """
        if self.family.process == "diffusion":
            lengths = {part: self.tokenizers[name].model_max_length for part, name in TEXT_ENCODERS.items() if part in self.configs}
            model_parts.check_networks(self.option, self.kind, self.configs, lengths)
            return
        recording, name, cpu = self.record(asked), self.family.network, torch.device("cpu")
        texts = Texts.of(recording, [self.recorder().texts_of(PROBES[0], recording)[-1]], cpu)
        with made_of(self._config_of(name), "it cannot be called with what the other parts give it"):
            network = lightened(on_meta(self.classes[name], self.configs[name]))
            leaves = texts.gather(torch.zeros(1, dtype=torch.int64))
            recording.template.call(network, torch.zeros(1, *recording.shape), recording.times[:1], leaves)
        self._drawn(recording)


def find_model(
    path: str,
    config: str | None = None,
    vae: str | None = None,
    variant: str | None = None,
    parts: Mapping[str, None] | None = None,
    arguments: Mapping[str, object] | None = None,
    quantize: str = "none",
    unlisted: bool = False,
) -> Model:
    """Finds a model and checks it by its configs and the names of its weights.

    path: a folder or hub id. If `config` is given, path is a file of weights as Stable Diffusion was first published, and `config` is a
    folder or hub id with the configs and the tokenizer of a pipeline of the same layout. vae: folder, hub id or file of a VAE to take
    instead of the pipeline's. variant: that of the weights, see `choose_weights`. parts: those to go without, each with null. arguments:
    of the pipeline's call. quantize: how the network's weights are. unlisted: whether its class may be one without an entry in FAMILIES.
    Raises ValueError, naming the option, for what cannot be trained.
    """
    option, source = ("model.path", path) if config is None else ("model.config", config)
    folder, option = local_folder(option, source), f"{option}={source}"
    index = read_config(option, folder, "model_index.json")
    kind = model_parts.check_index(option, index, unlisted)
    index |= _left_out(kind, parts or {})
    _check_arguments(kind, arguments or {})
    family = family_of(kind)
    if family.process == "flow" and config is not None:
        raise ValueError(f"{option}: it holds a {kind.__name__}; valid for a single file is a pipeline of Stable Diffusion 1.x, 2.x or XL")
    found = (flow_parts if family.process == "flow" else model_parts).find_parts(option, folder, kind, index)
    own = {part: made for part, made in found.classes.items() if part != "vae" or vae is None}
    weights = _in_file(path, kind, list(own)) if config is not None else _find_weights(option, path, folder, own, variant)
    vae_option = option
    if vae is not None:
        weights["vae"], vae_option = _other_vae(option, kind, vae, variant, found)
    if family.process == "diffusion":
        where = "vae/config.json" if vae_option == option else "config.json"
        channels = model_parts.check_vae(vae_option, where, found.configs["vae"])
        found.configs["unet"] = model_parts.check_unet(option, kind, found.configs["unet"], channels)
    if variant is not None and variant not in {chosen.variant for chosen in weights.values()}:
        raise ValueError(f"model.variant={variant}: no part of {path} has weights of that variant; valid is null")
    return Model(path, option, kind, family, folder, **vars(found), weights=weights, arguments=dict(arguments or {}), quantize=quantize)


def _left_out(kind: type, parts: Mapping[str, None]) -> dict[str, list]:
    """What model_index.json has of parts that a user goes without."""
    family = family_of(kind)
    known = [part for part in kind._get_signature_keys(kind)[0] if part not in (family.network, "vae", "scheduler")]
    for part, value in parts.items():
        if part not in known or value is not None:
            raise ValueError(f"model.parts={json.dumps(parts, default=str)}: valid is null for some of {', '.join(known)}")
    return {part: [None, None] for part in parts}


def _check_arguments(kind: type, arguments: Mapping[str, object]) -> None:
    ours = {*OURS, family_of(kind).guidance}
    valid = [name for name in inspect.signature(kind.__call__).parameters if name not in ours and name != "self"]
    if unknown := next((name for name in arguments if name not in valid), None):
        raise ValueError(f"model.arguments={json.dumps(arguments, default=str)}: {unknown} is none; valid are {', '.join(valid)}")


def _other_vae(option: str, kind: type, vae: str, variant: str | None, found: Parts) -> tuple[Weights, str]:
    """The weights of a VAE that takes the place of the pipeline's, and the option that its config, now in `found`, comes from."""
    vae_option = f"model.vae={vae}"
    if not Path(vae).is_file():
        folder = local_folder("model.vae", vae)
        found.configs["vae"] = read_config(vae_option, folder, "config.json")
        if family_of(kind).process == "flow":
            found.classes["vae"] = flow_parts.vae_class(vae_option, kind, found.configs["vae"])
        return _find_weights(vae_option, vae, folder, {"": found.classes["vae"]}, variant)[""], vae_option
    if family_of(kind).process == "flow":
        raise ValueError(f"{vae_option}: a file is a VAE of Stable Diffusion 1.x, 2.x or XL; valid is a folder, or a hub id")
    if not is_vae(names_in(vae_option, vae)):
        raise ValueError(f"{vae_option}: it holds no decoder.*; valid is a file of an AutoencoderKL's weights")
    return Weights(vae_option, vae, "", None, []), option  # a VAE in a file has the config of the pipeline's


def _find_weights(option: str, source: str, folder: Path, classes: dict[str, type], variant: str | None) -> dict[str, Weights]:
    names, weights = file_names(option.partition("=")[0], source, folder), {}
    for part, kind in classes.items():
        stem = "diffusion_pytorch_model" if issubclass(kind, ModelMixin) else "model"
        weights[part] = Weights(option, source, part, *choose_weights(option, names, part, stem, variant))
        check_readable(option, folder, weights[part].files)
    return weights


def open_pipeline(
    model: Model, dtype: torch.dtype, device: torch.device = torch.device("cpu"), partition: Partition | None = None
) -> DiffusionPipeline:
    """The pipeline in `dtype`, with its weights, which are read from safetensors only, and with the model's scheduler.

    It is on the CPU, but for a network that is quantised or partitioned as it is read, which is on the device.

    SDXL's own VAE overflows in fp16, and its config says so by `force_upcast`. Such a VAE is then in fp32, as in diffusers, except that of
    SD 1.x and 2.x, which does not overflow. Raises ValueError, naming the option, for weights that are damaged or belong to another
    network.
    """
    name, how = model.family.network, model.quantize if model.quantize != "none" else partition
    others = {part: _load(part, model, weights, dtype) for part, weights in model.weights.items() if part != name or how is None}
    network = {} if how is None else {name: _stream(name, model, dtype, device, how)}
    pipe = model.assembled(others | network)
    if model.family.process == "diffusion":
        pipe.unet.register_to_config(sample_size=model.configs["unet"]["sample_size"])
    if model.kind is not StableDiffusionPipeline and dtype == torch.float16 and pipe.vae.config.get("force_upcast", False):
        pipe.vae.float()
    return pipe


def _load(part: str, model: Model, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """A network with its weights. Raises ValueError if its files lack a weight: transformers would draw it at random and say so only if
    asked."""
    if Path(weights.source).is_file():
        return single_file.load(weights.option, weights.source, model.folder, part, weights.part, dtype)
    folder, kind = local_folder(weights.option.split("=")[0], weights.source, [*CONFIGS, *weights.files]), model.classes[part]
    options = {"subfolder": weights.part, "variant": weights.variant, "dtype": dtype, "use_safetensors": True}
    with in_one_line(weights.option):
        if issubclass(kind, ModelMixin):
            network, found = kind.from_pretrained(folder, **options), {"missing_keys": ()}
        else:
            network, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    single_file.check_complete(weights.option, network)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{weights.option}: {part}/*.safetensors lack {missing[0]}")
    return network


def _stream(part: str, model: Model, dtype: torch.dtype, device: torch.device, how: str | Partition) -> nn.Module:
    """`_load` for a network that is quantised or partitioned as it is read. A single file is read whole before it is partitioned."""
    weights = model.weights[part]
    if Path(weights.source).is_file():
        network = _load(part, model, weights, dtype)
        for parameter in network.parameters():
            how.take(parameter)
        return network
    folder = local_folder(weights.option.split("=")[0], weights.source, [*CONFIGS, *weights.files])
    files = [folder / name for name in weights.files if name.endswith(".safetensors")]
    with in_one_line(weights.option):
        network = streamed_weights.load(sorted(files), model.classes[part], model.configs[part], dtype, device, how)
    single_file.check_complete(weights.option, network)
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
