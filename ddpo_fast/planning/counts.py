"""Networks counted without being loaded: parameters, operations, bytes alive during a call. Shape letter: R UNet rows.

Networks are built from their configs as fake tensors, shapes without memory, and called as the policy calls them, while two modes
count operations and the bytes alive.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ddpo_fast.distributed.deepspeed_options import LIVE_ELEMENTS, PERSISTENT_ELEMENTS
from ddpo_fast.kernels import Ops, reference
from ddpo_fast.memory import MIB
from ddpo_fast.networks.fused_unet import fuse
from ddpo_fast.networks.gradient_checkpointing import checkpoint_gradients
from ddpo_fast.networks.lora import set_trainable
from ddpo_fast.networks.merged_lora import merge
from ddpo_fast.networks.shared_guidance import SharedGuidance
from ddpo_fast.networks.split import Split, stored_bytes
from ddpo_fast.pipelines.folders import find_model
from ddpo_fast.pipelines.hub import local_folder
from ddpo_fast.pipelines.model_parts import NETWORKS, TEXT_ENCODERS, check_vae, read_config, text_encoder

ROWS = (8, 16)
"""Rows that a call is counted at. With fewer, small tensors of fixed size may decide when the peak is reached."""

_SD15 = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {
        "sample_size": 512,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
}
_SDXL = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": _SD15["vae"] | {"sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": _SD15["text_encoder"],
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
    "scheduler": _SD15["scheduler"],
}
ARCHITECTURES: dict[str, dict[str, dict]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD15,
    "runwayml/stable-diffusion-v1-5": _SD15,
    "CompVis/stable-diffusion-v1-4": _SD15,
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
}
"""Pipelines known without a network, as differences from the defaults of diffusers' and transformers' classes."""
VAES = {"madebyollin/sdxl-vae-fp16-fix": _SDXL["vae"] | {"force_upcast": False}}
"""VAEs known without a network."""


def architecture(path: str, vae: str | None = None, config: str | None = None, variant: str | None = None) -> dict[str, dict]:
    """The configs of a pipeline's unet, vae, scheduler, text_encoder and, for SDXL, text_encoder_2: of `ARCHITECTURES`, else checked.

    The arguments are those of `find_model`; a VAE may be of `VAES`. Raises ValueError as `find_model` does.
    """
    source = config or path
    known = None if Path(source).is_dir() else ARCHITECTURES.get(source)
    own = None if vae is None or Path(vae).is_dir() else VAES.get(vae)
    if known is None:
        model = find_model(path, config, vae if own is None else None, variant)
        if model.family.process == "flow":
            raise ValueError(f"{model.option}: it holds a {model.kind.__name__}; valid for a plan, and for sizes that are auto, is a UNet")
        model.check_networks()
        known = model.configs | {"scheduler": dict(model.scheduler.config)}
    elif vae is not None and own is None:
        own = read_config(f"model.vae={vae}", local_folder("model.vae", vae), "config.json")
        check_vae(f"model.vae={vae}", "config.json", own)
    return known if own is None else known | {"vae": own}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside it have made and that are still alive: `now`, and their largest sum, `peak`.

    `flop` are those of `flop_counter`, which would take a call of its own: it makes cycles, which hold what checkpointing computes again.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flop = 0
        self._alive: dict[int, weakref.ref] = {}
        self._operations = flop_counter().flop_registry

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operations = self._operations.get(func._overloadpacket)
        if operations is not None:
            self.flop += operations(*args, **kwargs, out_val=out)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive and not _holds(storage, args, kwargs):  # a view is no new storage
                    self._add(storage._cdata, storage)
        return out

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        num_bytes = storage.nbytes()

        def freed(_):
            del self._alive[key]
            self.now -= num_bytes

        self._alive[key] = weakref.ref(storage, freed)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def _holds(storage: torch.UntypedStorage, *arguments) -> bool:
    """Whether a tensor among an operation's arguments is in this storage."""
    return any(isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata == storage._cdata for leaf in tree_leaves(arguments))


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of matrix operations, which does not know attention on a CPU."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
        },
    )


@dataclass(frozen=True)
class Call:
    """One network call: operations of a row, and the bytes that it needs beyond weights, fixed_bytes + R row_bytes at most."""

    row_flop: float
    fixed_bytes: float
    row_bytes: float

    def mib(self, num_rows: int) -> float:
        return (self.fixed_bytes + num_rows * self.row_bytes) / MIB


def count(call: Callable[[int], object], then: Callable[[list], object] = list.clear) -> tuple[Call, float]:
    """Counts `call(R)` and then `then([what it returned])` at `ROWS` rows and draws a line. Works on real tensors and on fake ones.

    Also returns the bytes of a row that are alive between the two. `then` takes the result out of the list, so that it can be freed.
    """
    lives, left = [], []
    for num_rows in ROWS:
        with LiveBytes() as live:
            result = [call(num_rows)]
            left.append(live.now)
            then(result)
        lives.append(live)
    rows = ROWS[1] - ROWS[0]
    slope = (lives[1].peak - lives[0].peak) / rows
    return Call(lives[1].flop / ROWS[1], lives[0].peak - ROWS[0] * slope, slope), (left[1] - left[0]) / rows


class _CudaNorms(TorchFunctionMode):
    """Normalisations in fp32, as autocast has them on a GPU and not on a CPU, which is where fake tensors are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.group_norm, F.layer_norm):
            args = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
            kwargs = {key: arg.float() if isinstance(arg, Tensor) else arg for key, arg in kwargs.items()}
        return func(*args, **kwargs)


class _SavesInput(torch.autograd.Function):
    """An operation of `reference` that saves its input alone, as the Triton kernel in its place does."""

    @staticmethod
    def forward(ctx, operation, x, *rest):
        ctx.operation, ctx.rest = operation, rest
        ctx.save_for_backward(x)
        return operation(x, *rest)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.operation(x, *ctx.rest)
        return None, torch.autograd.grad(y, x, grad)[0], *(None for _ in ctx.rest)


def _merge(unet: nn.Module) -> list[nn.Module]:
    """`merge` with copies that are never refreshed, for which a weight needs an address."""

    def make_copy(layer: nn.Module) -> None:
        layer.merged_weight = torch.empty_like(layer.base_layer.weight, requires_grad=False)
        layer.refresh = lambda: None

    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            layer.refresh = partial(make_copy, layer)
    return merge(unet)


@dataclass(frozen=True)
class ModelCounts:
    """What a pipeline is made of and what its calls cost."""

    weight_bytes: dict[str, int]
    """Frozen weights of unet, vae and text encoders, and the copies that LoRA is merged into."""
    trained_shapes: tuple[tuple[int, ...], ...]
    """Of each trained tensor; they are fp32."""
    gathered_bytes: float
    """UNet weights that are whole on a rank of ZeRO 3 at a time, at most."""
    num_latents: int
    """Elements of a sample's latents."""
    embed_bytes: int
    """A prompt's embeddings, of SDXL with its time_ids."""
    forward: Call
    """The UNet without gradient."""
    update: Call
    """The UNet forward and backward."""
    image_bytes: int
    """A decoded picture, fp32."""
    saved_row_bytes: float
    """What a row keeps between forward and backward."""
    decode: Call
    """The VAE's decoder; a row is a picture."""
    prefix_flop: float
    """Of a row before the network's first trained layer, see `Split`; 0 if there is none."""
    kept_row_bytes: int
    """What the activation cache stores of a row."""
    cached_update: Call
    """The UNet forward and backward from that on, less the kept tensors, which it is given."""

    @property
    def num_trainable(self) -> int:
        return sum(map(math.prod, self.trained_shapes))


class _Networks:
    """A pipeline's networks without weights, trained and computing as `count_model` says, called as a policy calls them."""

    def __init__(self, arch: dict[str, dict], dtype: torch.dtype, lora, on_gpu: bool, merged: bool):
        with torch.device("meta"):
            self.unet, self.vae = (kind.from_config(arch[part]) for part, kind in NETWORKS.items())
            encoders = {part: text_encoder(part, arch[part]) for part in TEXT_ENCODERS if part in arch}
        unet, self.parts, self.dtype = self.unet, {"unet": self.unet, "vae": self.vae} | encoders, dtype
        is_sdxl = unet.config.addition_embed_type == "text_time"
        upcast = is_sdxl and self.vae.config.force_upcast and dtype == torch.float16
        self.vae_dtype = torch.float32 if upcast else dtype  # as `open_pipeline` has it
        for network in self.parts.values():
            nn.Module.to(network, self.vae_dtype if network is self.vae else dtype).requires_grad_(False).eval()
        set_trainable(unet, lora.scope, lora.targets, lora.rank, lora.alpha)
        self.copies = _merge(unet) if merged else []
        self.pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim if is_sdxl else 0
        num_tokens = encoders["text_encoder"].config.max_position_embeddings if "text_encoder" in encoders else 77
        size = unet.config.sample_size
        self.embed_shape = num_tokens, unet.config.cross_attention_dim
        self.latent_shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        self.autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        self.norms = _CudaNorms() if on_gpu and dtype != torch.float32 else nullcontext()
        self.guidance = nullcontext()

    def fake(self, fused: bool, shared: bool, checkpointing: bool) -> None:
        """Gives the networks fake weights and the UNet gradients, which are accounted for apart; fuses and shares what is wanted."""
        for network in (self.unet, self.vae):
            network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        for parameter in self.trained():
            parameter.grad = torch.empty_like(parameter)
        if fused:
            saving = [lambda x, *rest, op=op: _SavesInput.apply(op, x, *rest) for op in (reference.group_norm_silu, reference.geglu)]
            fuse(self.unet, Ops("counted", reference.ddim_step, reference.ppo_loss, *saving))
        if shared:  # all calls are of both branches
            self.guidance = SharedGuidance(self.unet, partial(self.forward, 2))
        if checkpointing:
            checkpoint_gradients(self.unet, self._run_again)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def forward(self, num_rows: int) -> Tensor:
        empty = partial(torch.empty, num_rows, dtype=self.dtype)
        added = {"text_embeds": empty(self.pooled), "time_ids": empty(6)} if self.pooled else None
        x, timesteps, embeds = empty(*self.latent_shape), torch.empty(num_rows, dtype=torch.int64), empty(*self.embed_shape)
        with self.autocast, self.norms, self.guidance:
            return self.unet(x, timesteps, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]

    @contextmanager
    def _run_again(self) -> Iterator[None]:
        with self.norms, self.guidance:
            yield

    def decode(self, num_rows: int) -> Tensor:
        images = self.vae.decode(torch.empty(num_rows, *self.latent_shape, dtype=self.vae_dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)


def _backward(result: list[Tensor]) -> None:
    result.pop().float().square().mean().backward()


def _count_calls(networks: _Networks) -> dict[str, object]:
    """What the networks' calls cost: some of the fields of `ModelCounts`."""
    with torch.no_grad():
        forward, _ = count(networks.forward)
        decode, image_bytes = count(networks.decode)
    update, saved_row_bytes = count(networks.forward, _backward)
    found = {"forward": forward, "decode": decode, "image_bytes": int(image_bytes), "update": update, "saved_row_bytes": saved_row_bytes}
    split = Split(networks.unet, networks.forward)
    if not split.wanted:
        return found | {"prefix_flop": 0.0, "kept_row_bytes": 0, "cached_update": update}
    kept: dict[int, list[Tensor]] = {}

    def prefix(num_rows: int) -> None:
        kept[num_rows] = split.run_prefix(partial(networks.forward, num_rows))

    def replay(num_rows: int) -> None:
        with split.replaying(kept[num_rows]):
            _backward([networks.forward(num_rows)])

    prefix_flop = count(prefix)[0].row_flop
    kept_row_bytes = sum(stored_bytes(tensor[:1]) for tensor in kept[ROWS[0]])
    return found | {"prefix_flop": prefix_flop, "kept_row_bytes": kept_row_bytes, "cached_update": count(replay)[0]}


def count_model(
    arch: dict[str, dict],
    dtype: torch.dtype,
    lora,
    *,
    on_gpu: bool,
    fused: bool,
    merged: bool = False,
    shared: bool = False,
    checkpointing: bool = False,
) -> ModelCounts:
    """Counts a pipeline with the trained weights that `lora` (scope, targets, rank, alpha) asks for, computing in `dtype`.

    on_gpu: autocast's rules are a GPU's. fused: GroupNorm, SiLU and GEGLU are the Triton kernels. merged: LoRA computes with merged
    weights. shared: the branches of guidance share what precedes the first cross-attention. checkpointing: the UNet's blocks are run
    again in backward. Raises as `set_trainable` does.
    """
    networks = _Networks(arch, dtype, lora, on_gpu, merged)
    with FakeTensorMode():
        networks.fake(fused, shared, checkpointing)
        calls = _count_calls(networks)
    weights = list(networks.unet.parameters())
    unet_bytes = sum(p.nbytes for p in weights)
    live = unet_bytes * LIVE_ELEMENTS / sum(p.numel() for p in weights)
    persistent = sum(p.nbytes for p in weights if p.numel() <= PERSISTENT_ELEMENTS)
    frozen = {name: sum(p.nbytes for p in part.parameters() if not p.requires_grad) for name, part in networks.parts.items()}
    return ModelCounts(
        weight_bytes=frozen | {"merged": sum(layer.merged_weight.nbytes for layer in networks.copies)},
        trained_shapes=tuple(tuple(parameter.shape) for parameter in networks.trained()),
        gathered_bytes=min(unet_bytes, live + persistent),
        num_latents=math.prod(networks.latent_shape),
        embed_bytes=(math.prod(networks.embed_shape) + (networks.pooled + 6 if networks.pooled else 0)) * dtype.itemsize,
        **calls,
    )
