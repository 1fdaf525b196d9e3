"""Every option of a run: frozen dataclasses (the only place with defaults), YAML recipes over them, the command line over those.

The defaults are the embedded compressibility run, so that no option at all is a run that works on a laptop.
"""

import ast
import dataclasses
import difflib
import os
import re
import time
import typing
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal, Optional, Union

import jsonargparse
import yaml

from ddpo_fast import algorithms, rewards, samplers
from ddpo_fast.algorithms import Algorithm
from ddpo_fast.config.conflicts import conflicts
from ddpo_fast.config.rules import RULES
from ddpo_fast.gpus import HERE
from ddpo_fast.places import PLACES, is_missing, located, located_kwargs, may_be_same
from ddpo_fast.prompts import load_prompts
from ddpo_fast.terminal import user_error

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class ModelConfig:
    """The model to improve."""

    path: str = str(Path(__file__).resolve().parents[1] / "embedded" / "model")
    """Folder in diffusers format, or hub id, of a Stable Diffusion 1.x, 2.x or XL pipeline (epsilon, v- or sample prediction); or a single
    .safetensors file, with model.config; see docs/models.md. Default: the small model that ships with the package."""
    config: Optional[str] = None
    """With a single file as model.path: folder in diffusers format, or hub id, of a pipeline of the same layout, for its configs and its
    tokenizer. Its weights are not read."""
    vae: Optional[str] = None
    """A VAE instead of the pipeline's, one of SDXL that does not overflow in fp16, say: folder in diffusers format, hub id, or a single
    .safetensors file, which has the config of the pipeline's own."""
    variant: Optional[str] = None
    """Which weights of a folder or hub id: fp16 is unet/diffusion_pytorch_model.fp16.safetensors and so on. A part without that variant has
    its plain weights. null: the plain weights, or, of a part that has none, the only variant. model.dtype is what they compute in."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Compute type of the networks; latents, log-probs and trainable weights are fp32 in any case. auto: fp16 on a
    GPU, fp32 on a CPU. bf16's log-prob noise (about 1e-4) is as large as the clip range."""
    share_guidance: bool = True
    """With guidance, compute what the UNet does before its first cross-attention once for both branches instead of twice. Exact but for
    rounding. SDXL's branches have nothing in common: the prompt is in its time embedding, too. Not done where sampling, training or
    evaluation has one branch."""
    offload_text_encoder: bool = True
    """On a GPU, have the text encoders there only while new prompts are encoded, which each prompt is once."""
    compile: bool = False
    """Compile the UNet with torch.compile. The first iteration takes a minute or two longer; on a CPU it needs a C++
    compiler."""


@dataclass(frozen=True)
class LoraConfig:
    """What of the UNet is trained: low-rank updates of some layers, or everything."""

    scope: str = "all"
    """Where LoRA goes: 'all', 'mid_up' (mid and up blocks), block names joined by commas ('up_blocks.2,up_blocks.3'),
    or 'none' = full fine-tuning of the UNet."""
    targets: list[Literal["attention", "feed_forward", "convolution", "projection"]] = field(
        default_factory=lambda: ["attention", "feed_forward", "convolution", "projection"]
    )
    """Which layers of those blocks get a LoRA. SD needs no more than ['attention']; a small model needs all."""
    init: Optional[str] = None
    """A LoRA to start from: a run's directory, a folder that diffusers wrote, or a .safetensors file of diffusers or of kohya's
    sd-scripts. Its layers have to be trained and its rank at most lora.rank; its own scale is kept, and what it lacks starts as without
    it. Iteration 0 is the model with it. A file with a text encoder's part is refused."""
    rank: int = 16
    """Rank r of the update s B A."""
    alpha: float = 16.0
    """Scale s = alpha / rank."""
    forward: Literal["auto", "merged", "separate"] = "auto"
    """merged: a layer computes with W + s B A, formed once an update; the gradient is the same to rounding, and a forward pass as fast
    as without LoRA, for a second copy of these layers' weights. separate: W, A and B each on its own. auto: merged in fp32;
    fp16 and bf16 would round a small update away, so separate, and so at zero.stage=3, which partitions W."""


PromptSet = Literal[
    "simple_animals", "imagenet_animals", "animal_activities", "counting", "unseen_animals", "unseen_animal_activities", "everyday_objects"
]
PromptList = Union[list[str], dict[str, float]]


@dataclass(frozen=True)
class PromptsConfig:
    """Prompts of the training samples."""

    name: Optional[PromptSet] = "simple_animals"
    """A prompt set of the paper: simple_animals (45 bare nouns), imagenet_animals (ImageNet's names of its 398 animals),
    animal_activities (135, as in 'a cat washing the dishes'), counting (315, as in 'two cats'); or one that the paper's runs have not
    seen: unseen_animals (24), unseen_animal_activities (72), everyday_objects (24)."""
    file: Optional[str] = None
    """A file of prompts instead of a named set: text with a prompt a line (after a weight and a tab, if it is to be drawn so much more
    often), .jsonl, .json, .csv or .tsv, which may have metadata for the reward; see docs/prompts.md."""
    list: Optional[PromptList] = None
    """The prompts themselves, instead of a named set: ['a cat', 'a dog'], or with weights {'a cat': 2, 'a dog': 1}."""
    limit: Optional[int] = None
    """Use only the first so many prompts of the set."""
    samples_per_prompt: int = 4
    """Each prompt drawn is used for this many samples in a row, so that they can be compared with each other. The paper
    draws every sample's prompt anew: 1."""


@dataclass(frozen=True)
class RewardConfig:
    """What is maximised."""

    name: str = "jpeg_compressibility"
    """One of those below, see docs/rewards.md, or your own: path/to/file.py:function or package.module:function.
    Signature: (images (B,3,H,W) fp32 in [0,1], prompts: list of B str, **kwargs) -> (B,) numbers, higher is better; a class is made
    once, with kwargs, and its instance called. Or a server's address, http://host:port/path or https://."""
    kwargs: dict = field(default_factory=dict)
    """Keyword arguments for the reward."""
    timeout_s: float = 600.0
    """A call that takes longer counts as failed: its samples are left out of the update."""
    isolate: bool = False
    """Load and call the function in a process of its own, which is started anew when it crashes and is killed when it hangs. Numbers
    and device are the same; on a GPU it has a CUDA context of its own, about half a GB."""
    max_bad_fraction: float = 0.5
    """When more than this share of an iteration's samples has no finite reward, the run stops before the update, with a checkpoint to
    --resume from."""


@dataclass(frozen=True)
class SampleConfig:
    """Sampling."""

    num_samples: int = 48
    """Pictures an iteration, over all ranks."""
    batch_size: Union[int, Literal["auto"]] = 48
    """Pictures denoised together on one rank. Speed and memory only: a sample depends on it by rounding alone. auto: as many as --plan
    finds to fit. Should memory run out all the same, it is halved and the run goes on."""
    decode_batch: int = 16
    """Pictures that the VAE decodes together: 0.4 GB each at 512x512 in fp16."""
    num_steps: int = 10
    """Denoising steps S."""
    sampler: Literal[samplers.CHOICES] = "ddim"
    """How a picture is denoised."""
    guidance_scale: float = 3.0
    """Classifier-free guidance w in uncond + w (cond - uncond), in sampling and in training; 1 turns it off and halves
    the work."""
    eta: float = 1.0
    """With ddim, how much of a step's noise is drawn anew, 0 < eta <= 1. At 0 DDIM is deterministic and has no policy gradient."""
    window: Optional[dict[str, int]] = None
    """Only some steps draw noise and are trained on; the others follow the ODE. {size: 3, among: 5, every: 1}: 3 steps in a row, somewhere
    among the first 5; their place is drawn again every iteration. Without among: among all steps. Without every: 1.
    train.timestep_fraction is then a share of the window. null: every step is the sampler's."""


@dataclass(frozen=True)
class TrainConfig:
    """The update."""

    algorithm: Literal[algorithms.CHOICES] = "ddpo_is"
    """What an update does with the rewards. An algorithm's own options are algorithm.*; --help shows those of the algorithm that the
    command line chooses. docs/algorithms.md has the equations."""
    estimator: Literal["ppo", "score_accumulation"] = "ppo"
    """Where the gradient is computed. ppo: after sampling, which any number of updates an iteration needs. score_accumulation:
    during sampling, each sample's apart, so that no second UNet pass is needed: the same gradient to rounding, for exactly one update an
    iteration (train.num_minibatches=1, train.inner_epochs=1) of LoRA. Sampling then needs an update's memory, for
    sample.batch_size samples, and four bytes for each trained weight of every sample of a rank; train.micro_batch is not used."""
    num_minibatches: int = 4
    """Optimizer updates per pass over an iteration's samples."""
    inner_epochs: int = 1
    """Passes over an iteration's samples."""
    micro_batch: Union[int, Literal["auto"]] = 48
    """Transitions (sample, step) per forward and backward on one rank. Speed and memory only: the gradient depends on
    it by rounding alone. auto: as many as --plan finds to fit. Should memory run out all the same, it is halved and the run goes on (with
    ZeRO it ends: an update of which a part has been sent cannot begin anew)."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the UNet's blocks for the backward pass, which then computes what is inside of them again: less
    memory for an update about a third slower. The gradient is the same, bit for bit."""
    learning_rate: float = 4e-3
    """AdamW's; constant. About 3e-4 for LoRA on SD, 1e-5 for its full UNet."""
    clip_range: float = 3e-4
    """PPO's clip range at SD's 16,384 latent elements. The log-prob is a mean over latent elements, so 1e-4 there is a
    true ratio range of exp(1.6); for D elements the range used is clip_range * 16384 / D, the same trust region."""
    advantage_clip: float = 5.0
    """Advantages are clamped to +- this."""
    kl_coefficient: float = 0.0
    """Adds this times the KL divergence from the model without LoRA (the bare one, also after lora.init), a mean over latent elements as
    the log-prob is, to the loss of ddpo_is or ddpo_sf. Another UNet forward pass, with LoRA switched off, for each transition; metric
    kl_to_reference. 0: nothing is computed."""
    max_grad_norm: float = 1.0
    """Gradient norm clip of every update."""
    timestep_fraction: float = 1.0
    """Share of each sample's steps that is trained on, drawn anew every pass. Below 1 is another estimator, not only a
    faster one."""

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer updates of an iteration: minibatches x epochs."""
        return self.num_minibatches * self.inner_epochs


@dataclass(frozen=True)
class BaselineConfig:
    """What rewards are compared with: ddpo_is and ddpo_sf."""

    name: Literal["history", "group"] = "history"
    """What a reward is compared with. history: its prompt's last rewards, as in the paper. group: the iteration's own samples of its
    prompt, as in GRPO; buffer_size and min_count are not used, and prompts.samples_per_prompt has to be 2 or more."""
    buffer_size: int = 4
    """Rewards remembered per prompt."""
    min_count: int = 4
    """With fewer than this many rewards of a prompt, the whole iteration's mean and standard deviation stand in."""
    std: Literal["prompt", "batch"] = "prompt"
    """What advantages are divided by: the standard deviation of the prompt's rewards, as in the paper, or that of the whole
    iteration's. For a bounded reward 'batch': a prompt that always gets nearly 1 would else turn its last decimals into
    advantages as large as any."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw_8bit: bitsandbytes' AdamW with its state in 8 bits, block by block; biases, norms and tensors of less than 4,096
    elements keep 32, since a block has one scale. paged_adamw_8bit: on a GPU, that state moves to the host when memory is short."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the gradient's mean and square."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""


@dataclass(frozen=True)
class ZeroConfig:
    """What is spread over the ranks, or kept in host memory."""

    stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 1 shards the optimizer state over the ranks, 2 the gradients too, 3 the UNet's weights as well,
    which are then gathered for every call; memory that runs out then ends the run, in sampling too, since the ranks call together.
    LoRA has next to nothing to shard below 3. See docs/distribution.md."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in host memory: optimizer (its state, its step and the gradients that it takes; zero.stage 1 to 3), all
    (the UNet's weights too; zero.stage=3). With optimizer.name=adamw."""


@dataclass(frozen=True)
class DeepspeedConfig:
    """DeepSpeed."""

    config: Optional[str] = None
    """Your own DeepSpeed JSON, merged over what these options derive; what contradicts them is refused."""


@dataclass(frozen=True)
class KernelsConfig:
    """Fused operations."""

    backend: Literal["auto", "triton", "reference"] = "auto"
    """What runs the denoising step, the loss and, in the UNet, GroupNorm with SiLU and GEGLU. triton: fused kernels.
    reference: plain PyTorch. auto: triton on a GPU, reference elsewhere. (triton on a CPU needs TRITON_INTERPRET=1, for
    tests.)"""


@dataclass(frozen=True)
class AttentionConfig:
    """The UNet's attention."""

    backend: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "math", "xformers", "flash_attn", "flash_attn_3", "flex"] = "auto"
    """What computes the UNet's attention. sdpa: PyTorch's function, with the kernel that it chooses; flash, cudnn, efficient,
    math: one of its kernels; xformers, flash_attn, flash_attn_3: those packages; flex: PyTorch's flex_attention. auto: on a GPU the
    fastest by measurement at the run's own shapes, forward and backward; sdpa on a CPU."""


@dataclass(frozen=True)
class CacheConfig:
    """The activation cache."""

    mode: Literal["auto", "on", "off"] = "auto"
    """Keep what the UNet's frozen layers before the first trained one compute in the rollout, so that the update does not compute
    it again. Needs a lora.scope that leaves such layers, such as mid_up, and zero.stage below 3. auto: on where they are at least 3 %
    of the UNet."""
    device_mib: Optional[float] = None
    """Memory of each device for it, in MiB. Default: half of what is free at the start."""
    host_mib: Optional[float] = None
    """Pinned host memory of each rank behind that, copied to the GPU ahead of its use; what fits in neither is computed again.
    Default: half of what is free at the start, divided by the machine's ranks; on a CPU none."""


@dataclass(frozen=True)
class EvalConfig:
    """Fixed evaluation sets."""

    every: int = 4
    """Evaluate every so many iterations (and before the first and after the last)."""
    num_samples: int = 48
    """Pictures of each fixed evaluation set: same prompts, same noise every time."""
    prompts: Optional[Union[PromptSet, list[str]]] = None
    """Prompts of the evaluation set, in turn: a list, or the name of a prompt set. Default: the training prompts."""
    sampler: Optional[Literal[samplers.CHOICES]] = None
    """How evaluation pictures are denoised. They have no window. Default: sample.sampler."""
    num_steps: Optional[int] = None
    """Denoising steps of evaluation pictures. Default: sample.num_steps."""
    guidance_scale: Optional[float] = None
    """Classifier-free guidance of evaluation pictures. Default: sample.guidance_scale."""
    heldout: Optional[Union[PromptSet, list[str]]] = None
    """Prompts that the run does not train on, such as unseen_animals: a second fixed evaluation set of eval.num_samples pictures, which
    shows what has been learnt about others (metrics heldout_*), and decides which weights are the best, see run.keep_best."""


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    dir: Optional[str] = None
    """Run directory. Default: runs/<reward>-<date>-<time>."""
    seed: int = 0
    """Every random number of the run is a function of this seed and of what it is for."""
    iterations: int = 7
    """Rounds of sampling and training."""
    checkpoint_every: int = 1
    """Save everything for exact resume every so many iterations (and at the end)."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep the weights with the highest reward on held-out prompts, or, without eval.heldout, on the fixed evaluation set, in
    <run dir>/best/, beside the newest ones."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """What gets the metrics and the evaluation's pictures beside metrics.jsonl: tensorboard (files in the run directory), wandb or
    trackio, which have to be installed and logged in. See docs/results.md."""
    resume: bool = False
    """Continue the newest checkpoint of run.dir with that run's config. `--resume` for short."""
    plan: Optional[str] = None
    """Only print what the run would need (memory by kind, time of an iteration, samples an hour) on these devices: a GPU such
    as H200, several such as 8xH200, or here, this machine. `--plan=8xH200` for short, `--plan` for here."""


@dataclass(frozen=True)
class Config:
    """All options of a run."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    sample: SampleConfig = SampleConfig()
    train: TrainConfig = TrainConfig()
    algorithm: Algorithm = field(default_factory=algorithms.find(TrainConfig().algorithm))
    baseline: BaselineConfig = BaselineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    zero: ZeroConfig = ZeroConfig()
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    kernels: KernelsConfig = KernelsConfig()
    attention: AttentionConfig = AttentionConfig()
    cache: CacheConfig = CacheConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    def check(self) -> None:
        """Raises ValueError, naming the option, its value and what is valid, for what the types do not rule out."""
        for section in dataclasses.fields(self):
            values = getattr(self, section.name)
            for option in dataclasses.fields(values):  # the parser lets a recipe's null pass everywhere
                if getattr(values, option.name) is None and type(None) not in typing.get_args(option.type):
                    raise ValueError(_mismatch(f"{section.name}.{option.name}", str(option.type), "None"))
        own = [(f"algorithm.{option}", valid, lambda v, c, ok=ok: ok(v)) for option, valid, ok in self.algorithm.RULES]
        for option, valid, ok in [*RULES, *own]:
            value = self[option]
            try:
                good = ok(value, self)
            except (OSError, ValueError):  # a path that is too long, or has a null byte in it
                good = False
            if not good:
                raise ValueError(f"{option}={value}: valid is {valid(self) if callable(valid) else valid}")
        if conflict := next(conflicts(self), None):
            raise ValueError(conflict)
        load_prompts(self.prompts.name, self.prompts.file, self.prompts.limit, self.prompts.list)  # whose file may be at fault

    @property
    def training_guidance(self) -> float:
        """The guidance scale of the update's loss; 1 is none."""
        own = self.algorithm.guidance_scale
        return self.sample.guidance_scale if own is None else own

    @property
    def evaluation(self) -> SampleConfig:
        """How evaluation pictures are made: as samples, but for what eval says, and without a window."""
        own = {name: getattr(self.eval, name) for name in ("sampler", "num_steps", "guidance_scale")}
        return dataclasses.replace(self.sample, window=None, **{name: value for name, value in own.items() if value is not None})

    def __getitem__(self, option: str):
        section, key = option.split(".")
        return getattr(getattr(self, section), key)

    def replace(self, **options) -> "Config":
        """A copy with `section__key=value` changed."""
        sections = {}
        for option, value in options.items():
            section, key = option.split("__")
            sections.setdefault(section, {})[key] = value
        return dataclasses.replace(self, **{s: dataclasses.replace(getattr(self, s), **kv) for s, kv in sections.items()})

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def _parser(algorithm: str) -> jsonargparse.ArgumentParser:
    """The parser of all options. `algorithm.*` are those of one algorithm."""
    parser = jsonargparse.ArgumentParser(
        prog="deepspeed ddpo_fast/train.py",
        usage="%(prog)s [--config RECIPE] [--section.option VALUE ...] [--resume] [--plan[=DEVICES]]",
        description="Improves a text-to-image diffusion model by reinforcement learning (DDPO). Without options, the embedded "
        "model learns to draw pictures that compress well.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A recipe: a YAML file of differences from the defaults.")
    for section in dataclasses.fields(Config):
        parser.add_class_arguments(algorithms.find(algorithm) if section.name == "algorithm" else section.type, section.name)
    for action in parser._actions:
        if choices := {"train.algorithm": algorithms, "sample.sampler": samplers, "reward.name": rewards}.get(action.dest):
            action.help = f"{action.help} {_told(choices)}"
    return parser


def _told(choices: ModuleType) -> str:
    """The choices of a folder, each with the first paragraph that its file says of it. No file is imported."""
    told = []
    for name in choices.CHOICES:
        tree = ast.parse(Path(choices.__path__[0], f"{name}.py").read_text(encoding="utf-8"))
        documented = [node for node in (tree, *tree.body) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        paragraph = next(filter(None, map(ast.get_docstring, documented)), "").split("\n\n")[0]
        told.append(f"{name}: {' '.join(paragraph.split()).rstrip('.')}.")
    return " ".join(told).replace("%", "%%")


def parse(argv: list[str]) -> Config:
    """The config of a command line, its places as absolute paths. Raises ValueError with one line that names the option, its value and
    what is valid."""
    short = {"--resume": "--run.resume=true", "--plan": f"--run.plan={HERE}"}
    argv = [short.get(arg, arg) for arg in argv if not arg.startswith("--local_rank")]
    argv = [f"--run.{arg[2:]}" if arg.startswith("--plan=") else arg for arg in argv]
    argv = [f"--config={os.path.expanduser(arg[9:])}" if arg.startswith("--config=") else arg for arg in argv]
    try:
        _check_values(argv)
        argv = [*_began(argv), *argv]
        parser, options = _parsed(argv)
        sections = parser.instantiate(options)
        config = _with_places(Config(**{section.name: sections[section.name] for section in dataclasses.fields(Config)}))
        if config.run.resume:
            _check_places(config)
        config.check()
        if config.run.resume:
            _check_resumed(config)
        return config
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(_one_line(str(error))) from None


def _began(argv: list[str]) -> list[str]:
    """What a run that is to be resumed began with, as the beginning of a command line; nothing for a new run."""
    folder = _last(argv, "run.dir", None)
    if str(_last(argv, "run.resume", False)).lower() != "true" or not folder:
        return []
    began = ["--config", os.path.join(located("run.dir", str(folder)), "config.yaml")]
    if not os.path.exists(began[1]):
        return []
    _check_values(began)
    _check_known(began)
    own = _last(began, "train.algorithm", TrainConfig().algorithm)
    if (asked := _last(argv, "train.algorithm", own)) != own:
        raise ValueError(f"train.algorithm={asked}: the run in run.dir={folder} began with {own}; --resume keeps it")
    return began


def _parsed(argv: list[str]) -> tuple[jsonargparse.ArgumentParser, jsonargparse.Namespace]:
    """A command line's options, and the parser that knows those of its algorithm."""
    parser = _parser(_checked(_last(argv, "train.algorithm", TrainConfig().algorithm)))
    return parser, parser.parse_args(argv)


def _last(argv: list[str], option: str, default: object) -> object:
    """What a command line and its recipes say of an option, before they are parsed."""
    (section, key), found = option.split("."), default
    for name, value in zip(argv, [*argv[1:], ""]):
        if "=" in name:
            name, value = name.split("=", 1)
        if name == "--config":
            found = (_recipe(value).get(section) or {}).get(key, found)
        elif name == f"--{section}":  # a mapping, or a file that has one
            with suppress(yaml.YAMLError, AttributeError, OSError):
                text = Path(value).read_text(encoding="utf-8") if os.path.isfile(value) else value
                found = yaml.load(text, _Loader).get(key, found)
        elif name == f"--{option}":
            found = value
    return found


def _checked(algorithm: str) -> str:
    if algorithm not in algorithms.CHOICES:
        raise ValueError(f"train.algorithm={algorithm}: valid is one of {', '.join(algorithms.CHOICES)}")
    return algorithm


def _with_places(config: Config) -> Config:
    changed = {option.replace(".", "__"): located(option, config[option]) for option in PLACES if config[option] is not None}
    return config.replace(**changed, reward__kwargs=located_kwargs(config.reward.kwargs))


def _check_known(began: list[str]) -> None:
    """Raises ValueError for a run whose config.yaml has what this version does not know."""
    try:
        _parsed(began)
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(
            f"{began[1]}: {_one_line(str(error))} (another version may have written it; change or remove that option in "
            "the file, then --resume)"
        ) from None


def _check_places(config: Config) -> None:
    """Raises ValueError for what a resumed run needs and does not find."""
    for option in PLACES:
        if option not in ("run.dir", "lora.init") and config[option] is not None and is_missing(option, config[option]):
            raise ValueError(f"{option}={config[option]}: there is nothing of this name now; add --{option}=PLACE to say where it is")


_FREE_ON_RESUME = {
    "sample.batch_size", "sample.decode_batch", "train.micro_batch", "train.gradient_checkpointing", "model.offload_text_encoder",
    "model.variant", "reward.timeout_s", "reward.isolate", "reward.max_bad_fraction", "eval.every",
    *(f"cache.{option.name}" for option in dataclasses.fields(CacheConfig)),
    *(f"run.{option.name}" for option in dataclasses.fields(RunConfig) if option.name != "seed"),
}  # fmt: skip


_RESOLVED = ("model.dtype", "auto"), ("attention.backend", "auto")
"""What a run's config.yaml has the outcome of."""


def _check_resumed(config: Config) -> None:
    """A resumed run goes on as it began: what shapes it cannot be changed halfway."""
    path = Path(config.run.dir, "config.yaml")
    began = yaml.load(path.read_text(encoding="utf-8"), _Loader) if path.exists() else None
    if not isinstance(began, dict):
        raise ValueError(f"run.dir={config.run.dir}: its config.yaml is missing or damaged, so --resume cannot know how the run began")
    for section, values in dataclasses.asdict(config).items():
        for key, value in values.items():
            option = f"{section}.{key}"
            # an option that is newer than the run is free, but for the one without whose iteration 0 there is no before
            before = began.get(section, {}).get(key, None if option == "eval.heldout" else value)
            if option in (*PLACES, "reward.kwargs") and may_be_same(option, value, before):
                continue
            if value != before and option not in _FREE_ON_RESUME and (option, value) not in _RESOLVED:
                raise ValueError(f"{option}={value}: the run in run.dir={config.run.dir} began with {before}; --resume keeps it")


def _mismatch(option: str, expected: str, value: str) -> str:
    expected = re.sub(r"typing\.|<class '(\w+)'>", r"\1", expected)
    return " ".join(f"{option}={value}: expected {expected}".split())


class _Refused(yaml.MarkedYAMLError):
    """YAML that may be valid and still is nothing that an option means."""


class _Loader(yaml.SafeLoader):
    """YAML without what grows beyond its text or means something else than it seems: aliases, keys given twice, endless numbers."""

    depth = 0

    def compose_node(self, parent, index):
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise _Refused(problem="there are no aliases here", problem_mark=mark)
        self.depth += 1
        if self.depth > 50:
            raise _Refused(problem="nested too deeply", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise _Refused(problem=f"{twice} is given twice", problem_mark=mark)
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > 100:
            raise _Refused(problem="a number of too many digits", problem_mark=mark)
        return node


def _check_values(argv: list[str]) -> None:
    """Raises ValueError, naming the option, for values that the parser below would take too far, and for recipes that are none."""
    for option, value in zip(argv, [*argv[1:], ""]):
        if "=" in option:
            option, value = option.split("=", 1)
        if option == "--config":
            _recipe(value)
            continue
        try:
            yaml.compose(value, _Loader)
        except _Refused as error:
            shown = " ".join(value[:40].split()) + "..." * (len(value) > 40)
            raise ValueError(f"{option.removeprefix('--')}={shown}: {error.problem}") from None
        except yaml.YAMLError:
            pass  # a string


def _recipe(path: str) -> dict[str, dict]:
    """The sections of a recipe. Raises ValueError for what is none."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "not a file")  # a device or a pipe may never end
        sections = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    nested = isinstance(sections, dict) and all(isinstance(values, dict) for values in sections.values())
    if not nested or not all(isinstance(key, str) for keys in (sections, *sections.values()) for key in keys):
        raise ValueError(f"--config {path}: valid is a mapping of sections, each a mapping of options, as --print_config shows")
    return sections


def _one_line(message: str) -> str:
    """jsonargparse's message as one line that names the option, its value and what is valid."""
    if found := re.match(r"""Parser key "([\w.]+)":\s*Expected an? (.*?)\.? Got value: (.*)""", message, re.S):
        return _mismatch(*found.groups())
    if found := re.match(r"""Parser key "([\w.]+)":.*Subtypes: \[(.*?)\]\s.*Given value: (.*)""", message, re.S):
        return _mismatch(*found.groups())
    options = {f"{s.name}.{o.name}": "" for s in dataclasses.fields(Config) for o in dataclasses.fields(s.type)}
    for name in algorithms.CHOICES:
        for option in dataclasses.fields(algorithms.find(name)):
            others = options.get(f"algorithm.{option.name}", "with train.algorithm=")
            options[f"algorithm.{option.name}"] = f"{others}{', ' * (others[-1] != '=')}{name}"
    if found := re.match(r"unrecognized arguments: (?:--)?([^\s=]*)", message):
        unknown = found[1]
    elif found := re.match(r"Option '(.*)' is not accepted", message):
        unknown = found[1]
    elif found := re.match(r"Group '(.*)' does not accept option '(.*)'", message):
        unknown = ".".join(found.groups())
    else:
        return " ".join(message.split())
    if options.get(unknown):
        return f"{unknown}: it is an option {options[unknown]}"
    close = difflib.get_close_matches(unknown, sorted(options), n=3, cutoff=0.5)
    return f"{unknown}: no such option; {'did you mean ' + ' or '.join(close) + '?' if close else 'see --help'}"


RANK_0_SAYS_IT_S = 30
"""How long the other ranks wait for rank 0 to say what is wrong with the command line."""


def parse_or_exit(argv: list[str]) -> Config:
    """`parse`, with a bad command line ended by `user_error`."""
    try:
        return parse(argv)
    except ValueError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(RANK_0_SAYS_IT_S)  # every rank has the same command line, and the first to end ends the others
        user_error(error)
