"""Every option of a run: frozen dataclasses with the defaults, a model's published settings over them (see published.py), YAML recipes
over those, and the command line over all.

The defaults are the embedded compressibility run, so that no option at all is a run that works on a laptop.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional, Union

import jsonargparse
import yaml

from ddpo_fast import algorithms, samplers
from ddpo_fast.algorithms import Algorithm
from ddpo_fast.config.conflicts import conflicts
from ddpo_fast.config.rules import RULES
from ddpo_fast.prompts import load_prompts

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class ModelConfig:
    """The model to improve."""

    path: str = str(Path(__file__).resolve().parents[1] / "embedded" / "model")
    """A text-to-image pipeline of diffusers: Stable Diffusion 1.x, 2.x or XL with epsilon, v- or sample prediction, or a flow transformer
    such as Stable Diffusion 3 or FLUX.1. A folder in diffusers format, a hub id, or, with model.config, a single .safetensors file of a
    Stable Diffusion 1.x, 2.x or XL. See docs/models.md. Default: the small model that ships with the package."""
    config: Optional[str] = None
    """Only with a single file as model.path: a folder in diffusers format, or a hub id, of a pipeline with the same layout. Its configs and
    its tokenizer are used, its weights are not."""
    vae: Optional[str] = None
    """A VAE that replaces the pipeline's own, for example one of SDXL that does not overflow in fp16: a folder in diffusers format, a hub
    id, or a single .safetensors file. A single file has the config of the pipeline's own VAE."""
    variant: Optional[str] = None
    """Which weights of a folder or hub id are read: fp16 is unet/diffusion_pytorch_model.fp16.safetensors and so on. A part without that
    variant has its plain weights. null: the plain weights; a part without plain weights has its only variant. The variant does not decide
    what the networks compute in: model.dtype does."""
    parts: dict = field(default_factory=dict)
    """Parts of the pipeline to go without, each with null: {text_encoder_3: null, tokenizer_3: null} is Stable Diffusion 3 without its
    T5."""
    arguments: dict = field(default_factory=dict)
    """Arguments of the pipeline's own call that differ from its defaults, such as {max_sequence_length: 256}. Prompts, steps, guidance and
    sizes are options of their own."""
    unlisted: bool = False
    """Try a pipeline of diffusers whose class is in no list here, a flow transformer's. Like all others it is trained as its own call
    calls it, and it is refused where that does not fit. Nobody has tested it."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """What the networks compute in. Latents, log-probs and trained weights are fp32 in any case. auto: fp32 on a CPU; on a GPU fp16 for
    Stable Diffusion and AuraFlow, and bf16 for other families, which overflow in fp16 or were published in bf16. For Stable Diffusion bf16
    is not advised: its rounding moves log-probs by about 1e-4, as much as the clip range."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Bits of the network's frozen weights under LoRA. nf4: 4 bits and a scale for every 64 weights, 4.5 bits in all, by bitsandbytes.
    int8: 8 bits and a scale for every row. The linear layers in the network's blocks are quantised, one after the other as they are read.
    All else stays in model.dtype, and so does every activation. A layer's weights are made whole for each call, forward and backward. See
    docs/distribution.md."""
    share_guidance: bool = True
    """With guidance, compute once for both branches what the UNet does before its first cross-attention. Results are equal to rounding.
    SDXL's branches share nothing, because its time embedding contains the prompt. Nothing is shared if sampling, training or evaluation has
    one branch, nor in a flow transformer."""
    offload_text_encoder: bool = True
    """On a GPU, keep the text encoders there only while they encode new prompts. Each prompt is encoded once."""
    encode_on_host: bool = False
    """On a GPU, run the text encoders on the CPU. They never come to the GPU, where they may be too large beside the network. Each prompt
    is encoded once, which takes a CPU between seconds and minutes: without 16-bit instructions it is slow in fp16 and bf16."""
    offload_vae: bool = False
    """On a GPU, keep the VAE there only while it decodes. On a CPU nothing moves."""
    vae_tiling: bool = False
    """Decode a picture in tiles that overlap, one after the other, if it is larger than the size that diffusers gives the VAE's tiles: the
    `sample_size` in its config, or that of its class (256 for Qwen-Image, 512 for SANA). This saves memory and changes such pictures."""
    compile: bool = False
    """Compile the network with torch.compile. The first iteration takes a minute or two longer. On a CPU this needs a C++ compiler."""


@dataclass(frozen=True)
class LoraConfig:
    """What of the network is trained: low-rank updates of some layers, or everything."""

    scope: str = "all"
    """Where LoRA goes: 'all', 'mid_up' (mid and up blocks of a UNet), 'last:0.5' (the last half of the blocks, or another share), or blocks
    joined by commas ('up_blocks.2,up_blocks.3', 'transformer_blocks.12-23'). 'none' trains the whole network."""
    targets: list[Literal["attention", "feed_forward", "modulation", "convolution", "projection"]] = field(
        default_factory=lambda: ["attention", "feed_forward", "convolution", "projection"]
    )
    """Which layers of those blocks get a LoRA. modulation: of transformers, what turns the time into scales and shifts. convolution and
    projection: of UNets. Layers that a model lacks are left out. SD needs no more than ['attention']; a small model needs all."""
    init: Optional[str] = None
    """A LoRA to start from: a run's directory, a folder that diffusers wrote, or a .safetensors file of diffusers or of kohya's
    sd-scripts. Each of its layers must be trained here, and its rank must be at most lora.rank. Its own scale is kept. Layers that it
    lacks start as usual. Iteration 0 is the model with this LoRA. A file with a part for a text encoder is refused."""
    rank: int = 16
    """Rank r of the update s B A."""
    alpha: float = 16.0
    """Scale s = alpha / rank."""
    forward: Literal["auto", "merged", "separate"] = "auto"
    """How a layer computes with LoRA. merged: with W + s B A, formed once an update. The gradient is the same to rounding, a forward pass
    is as fast as without LoRA, and these layers' weights take memory twice. separate: with W, A and B one after the other. auto: merged in
    fp32. It is separate in fp16 and bf16, which would round a small update away, and at zero.stage=3, which partitions W."""


PromptSet = Literal[
    "simple_animals", "imagenet_animals", "animal_activities", "counting", "unseen_animals", "unseen_animal_activities", "everyday_objects"
]
PromptList = Union[list[str], dict[str, float]]


@dataclass(frozen=True)
class PromptsConfig:
    """Prompts of the training samples."""

    name: Optional[PromptSet] = "simple_animals"
    """A prompt set. Of the paper: simple_animals (45 bare nouns), imagenet_animals (ImageNet's names of its 398 animals), animal_activities
    (135, such as 'a cat washing the dishes'), counting (315, such as 'two cats'). Not in the paper's training: unseen_animals (24),
    unseen_animal_activities (72), everyday_objects (24)."""
    file: Optional[str] = None
    """A file of prompts that replaces the named set. Text: one prompt a line; a weight and a tab before a prompt make it that much more
    frequent. .jsonl, .json, .csv and .tsv may also have metadata for the reward. See docs/prompts.md."""
    list: Optional[PromptList] = None
    """The prompts themselves, instead of a named set: ['a cat', 'a dog'], or with weights {'a cat': 2, 'a dog': 1}."""
    limit: Optional[int] = None
    """Use only this many prompts, the first ones."""
    samples_per_prompt: int = 4
    """Every prompt that is drawn is used for this many samples in a row, so that they can be compared with each other. The paper uses 1: it
    draws a prompt for every sample."""


@dataclass(frozen=True)
class RewardConfig:
    """What is maximised."""

    name: str = "jpeg_compressibility"
    """One of those below (see docs/rewards.md), or your own: path/to/file.py:function, package.module:function, or the address of a
    server, http://host:port/path or https://. Signature: (images (B,3,H,W) fp32 in [0,1], prompts: list of B str, **kwargs) -> (B,)
    numbers, higher is better. Of a class, one instance is made with kwargs and then called."""
    kwargs: dict = field(default_factory=dict)
    """Keyword arguments for the reward."""
    timeout_s: float = 600.0
    """A call that takes longer than this has failed. Its samples are left out of the update."""
    isolate: bool = False
    """Load and call the function in a separate process. If that process crashes, it is started again; if it hangs, it is killed. Numbers
    and device stay the same. On a GPU the process has a CUDA context of its own, about half a GB."""
    max_bad_fraction: float = 0.5
    """If more than this share of an iteration's samples has no finite reward, the run stops before the update and leaves a checkpoint to
    --resume from."""


@dataclass(frozen=True)
class SampleConfig:
    """Sampling."""

    num_samples: int = 48
    """Pictures of an iteration, all ranks together."""
    batch_size: Union[int, Literal["auto"]] = 48
    """Pictures that one rank denoises together. This changes speed and memory; a sample changes by rounding only. auto: as many as --plan
    finds to fit. If memory runs out, the number is halved and the run goes on."""
    decode_batch: int = 16
    """Pictures that the VAE decodes together: 0.4 GB each at 512x512 in fp16."""
    num_steps: int = 10
    """Denoising steps S."""
    sampler: Literal[samplers.CHOICES] = "ddim"
    """How a picture is denoised."""
    guidance_scale: float = 3.0
    """Guidance in sampling and in training: the number that a user gives the pipeline. In most families it is w in
    uncond + w (cond - uncond); 1 turns it off and halves the work. In Z-Image it is w in cond + w (cond - uncond); 0 turns it off. In
    FLUX.1 the network is told the number, and it costs nothing."""
    height: Optional[int] = None
    """Height of a picture, in pixels. Default: the pipeline's own."""
    width: Optional[int] = None
    """Width of a picture, in pixels. Default: the pipeline's own."""
    eta: float = 1.0
    """How much noise a step draws anew. ddim and cps: 0 < eta <= 1. flow_sde, dance_sde and precise: a finite number > 0. ode: none."""
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
    """Where the gradient is computed. ppo: after sampling; it allows any number of updates an iteration. score_accumulation: during
    sampling, for each sample separately, so the update calls the network no more. The gradient is the same to rounding. It needs LoRA and
    exactly one update an iteration (train.num_minibatches=1, train.inner_epochs=1). Sampling then needs the memory of an update of
    sample.batch_size samples, and four bytes for each trained weight and each sample of a rank. train.micro_batch is not used."""
    num_minibatches: int = 4
    """Optimizer updates per pass over an iteration's samples."""
    inner_epochs: int = 1
    """Passes over an iteration's samples."""
    micro_batch: Union[int, Literal["auto"]] = 48
    """Transitions (sample, step) per forward and backward on one rank. This changes speed and memory; the gradient changes by rounding
    only. auto: as many as --plan finds to fit. If memory runs out, the number is halved and the run goes on. With ZeRO the run ends
    instead: an update that has been sent in part cannot begin again."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the network's blocks for the backward pass, which computes the rest again. This saves memory; an update takes
    about a third longer. The gradient is the same, bit for bit."""
    learning_rate: float = 4e-3
    """AdamW's learning rate, constant. Of a published model it is 3e-4 for LoRA and 1e-5 for the whole network."""
    clip_range: float = 3e-4
    """PPO's clip range, stated for SD's 16,384 latent elements. The log-prob is a mean over latent elements, so 1e-4 lets the ratio of a
    whole picture change by a factor of exp(1.6). For D elements the run uses clip_range * 16384 / D, which keeps that factor."""
    advantage_clip: float = 5.0
    """Advantages are clamped to +- this."""
    kl_coefficient: float = 0.0
    """Adds this times the KL divergence from the model without any LoRA (also after lora.init) to the loss of a policy gradient. Like the
    log-prob, the divergence is a mean over latent elements. Each transition costs another forward pass of the network, with LoRA switched
    off. The metric is kl_to_reference. 0: nothing of this is computed."""
    max_grad_norm: float = 1.0
    """Every update's gradient is clipped to this norm."""
    timestep_fraction: float = 1.0
    """Share of each sample's steps that is trained on. Every pass draws other steps. Below 1, the gradient is another estimator, not only
    faster."""

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer updates of an iteration: minibatches x epochs."""
        return self.num_minibatches * self.inner_epochs


@dataclass(frozen=True)
class BaselineConfig:
    """What rewards are compared with: ddpo_is and ddpo_sf."""

    name: Literal["history", "group"] = "history"
    """What a reward is compared with. history: the last rewards of its prompt, as in the paper. group: the iteration's own samples of its
    prompt, as in GRPO; this needs prompts.samples_per_prompt of 2 or more and does not use buffer_size and min_count."""
    buffer_size: int = 4
    """Rewards remembered per prompt."""
    min_count: int = 4
    """If a prompt has fewer rewards than this, the mean and standard deviation of the whole iteration are used."""
    std: Literal["prompt", "batch"] = "prompt"
    """What advantages are divided by. prompt: the standard deviation of the prompt's rewards, as in the paper. batch: that of the whole
    iteration. Use batch for a bounded reward: with prompt, a prompt that always gets nearly 1 turns its last decimals into large
    advantages."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw: PyTorch's. adamw_8bit: bitsandbytes' AdamW, which keeps its state in 8 bits, one scale a block; biases, norms and tensors of
    less than 4,096 elements keep 32 bits. paged_adamw_8bit: on a GPU, that state moves to the host when memory is short."""
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
    """DeepSpeed's ZeRO stage. 1 shards the optimizer state over the ranks. 2 also shards the gradients. 3 also shards the network's weights
    and gathers them for every call; if memory runs out at stage 3, the run ends, in sampling too, because the ranks call together. LoRA
    has next to nothing to shard below 3. See docs/distribution.md."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in host memory. optimizer: its state, its step and the gradients that it takes; with zero.stage 1 to 3. all: the
    network's weights too; with zero.stage=3. Both need optimizer.name=adamw."""


@dataclass(frozen=True)
class DeepspeedConfig:
    """DeepSpeed."""

    config: Optional[str] = None
    """Your own DeepSpeed JSON. It is merged over what these options derive. A contradiction is refused."""


@dataclass(frozen=True)
class KernelsConfig:
    """Fused operations."""

    backend: Literal["auto", "triton", "reference"] = "auto"
    """What runs the denoising step, the loss and, in the UNet, GroupNorm with SiLU and GEGLU. triton: fused kernels. reference: plain
    PyTorch. auto: triton on a GPU; elsewhere reference, with a faster formula for a transformer's GELU in fp32. (triton on a CPU needs
    TRITON_INTERPRET=1, for tests.)"""


@dataclass(frozen=True)
class AttentionConfig:
    """The network's attention."""

    backend: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "math", "xformers", "flash_attn", "flash_attn_3", "flex"] = "auto"
    """What computes the network's attention. sdpa: PyTorch's function with the kernel that it chooses. flash, cudnn, efficient, math: one
    particular kernel of PyTorch's. xformers, flash_attn, flash_attn_3: those packages. flex: PyTorch's flex_attention. auto: on a GPU, the
    one that is fastest at the run's own shapes, measured forward and backward; on a CPU, sdpa."""


@dataclass(frozen=True)
class CacheConfig:
    """The activation cache."""

    mode: Literal["auto", "on", "off"] = "auto"
    """Keep what the network's frozen layers before the first trained layer compute in the rollout, so that the update does not compute it
    again. Needs zero.stage below 3 and a lora.scope that leaves such layers, such as mid_up. auto: on if these layers are at least 3 % of
    the network."""
    device_mib: Optional[float] = None
    """MiB of each device that the cache may take. Default: half of what is free at the start."""
    host_mib: Optional[float] = None
    """MiB of pinned host memory that each rank's cache may take when the device's part is full. It is copied to the GPU ahead of its use.
    What fits in neither is computed again. Default: half of what is free at the start, divided by the machine's ranks; on a CPU none."""


@dataclass(frozen=True)
class EvalConfig:
    """Fixed evaluation sets."""

    every: int = 4
    """Evaluate every so many iterations, and before the first and after the last."""
    num_samples: int = 48
    """Pictures of each fixed evaluation set. Prompts and noise are the same every time."""
    prompts: Optional[Union[PromptSet, list[str]]] = None
    """Prompts of the evaluation set, in turn: a list, or the name of a prompt set. Default: the training prompts."""
    sampler: Optional[Literal[samplers.CHOICES]] = None
    """How evaluation pictures are denoised. They have no window. Default: ode for a flow transformer, as its pipeline draws; otherwise
    sample.sampler."""
    num_steps: Optional[int] = None
    """Denoising steps of evaluation pictures. Default: sample.num_steps."""
    guidance_scale: Optional[float] = None
    """Guidance of evaluation pictures. Default: sample.guidance_scale."""
    height: Optional[int] = None
    """Height of evaluation pictures, in pixels. Default: sample.height."""
    width: Optional[int] = None
    """Width of evaluation pictures, in pixels. Default: sample.width."""
    heldout: Optional[Union[PromptSet, list[str]]] = None
    """Prompts that the run does not train on, such as unseen_animals. They make a second fixed evaluation set of eval.num_samples pictures
    (metrics heldout_*), which shows what the model has learnt about other prompts. It also decides which weights are the best: see
    run.keep_best."""


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


def mismatch(option: str, expected: str, value: str) -> str:
    """The line for a value of another type."""
    expected = re.sub(r"typing\.|<class '(\w+)'>", r"\1", expected)
    return " ".join(f"{option}={value}: expected {expected}".split())


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
                    raise ValueError(mismatch(f"{section.name}.{option.name}", str(option.type), "None"))
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
        """The guidance scale of the update's loss."""
        own = self.algorithm.guidance_scale
        return self.sample.guidance_scale if own is None else own

    @property
    def evaluation(self) -> SampleConfig:
        """How evaluation pictures are made: as samples, but for what eval says, and without a window."""
        own = {name: getattr(self.eval, name) for name in ("sampler", "num_steps", "guidance_scale", "height", "width")}
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
