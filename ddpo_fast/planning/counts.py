"""Networks counted without being loaded: parameters, operations, bytes alive during a call. Shape letter: R network rows.

Networks are built from their configs as fake tensors, shapes without memory, and called as the policy calls them, while two modes
count operations and the bytes alive.
"""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ddpo_fast.distributed.deepspeed_options import LIVE_ELEMENTS, PERSISTENT_ELEMENTS
from ddpo_fast.dtypes import autocast
from ddpo_fast.kernels import Ops, reference
from ddpo_fast.memory import MIB
from ddpo_fast.networks.experts import ExpertsWithGradient
from ddpo_fast.networks.fused_unet import fuse
from ddpo_fast.networks.gradient_checkpointing import checkpoint_gradients
from ddpo_fast.networks.lora import set_trainable
from ddpo_fast.networks.merged_lora import merge
from ddpo_fast.networks.patch import patch
from ddpo_fast.networks.quantized import quantize
from ddpo_fast.networks.shared_guidance import SharedGuidance
from ddpo_fast.networks.split import Split, stored_bytes
from ddpo_fast.pipelines.folders import Model
from ddpo_fast.pipelines.model_parts import NETWORKS, TEXT_ENCODERS, text_encoder
from ddpo_fast.pipelines.skeleton import in_dtype, on_meta, replaced, tile
from ddpo_fast.pipelines.template import Asked, Row, Texts

ROWS = (8, 16)
"""Rows that a call is counted at. With fewer, small tensors of fixed size may decide when the peak is reached."""


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


def _merge(network: nn.Module) -> list[nn.Module]:
    """`merge` with copies that are never refreshed, for which a weight needs an address."""

    def make_copy(layer: nn.Module) -> None:
        layer.merged_weight = torch.empty_like(layer.base_layer.weight, requires_grad=False)
        layer.refresh = lambda: None

    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer.refresh = partial(make_copy, layer)
    return merge(network)


@dataclass(frozen=True)
class ModelCounts:
    """What a pipeline is made of and what its calls cost."""

    weight_bytes: dict[str, int]
    """Frozen weights of the trained network, vae and text encoders, and the copies that LoRA is merged into."""
    trained_shapes: tuple[tuple[int, ...], ...]
    """Of each trained tensor; they are fp32."""
    gathered_bytes: float
    """The network's weights that are whole on a rank of ZeRO 3 at a time, at most."""
    num_latents: int
    """Elements of a sample's latents."""
    embed_bytes: int
    """All that the network is given of a prompt, of SDXL with its time_ids."""
    forward: Call
    """The network without gradient."""
    update: Call
    """The network forward and backward."""
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
    """The network forward and backward from that on, less the kept tensors, which it is given."""
    network: str = "unet"
    """The trained network's part."""
    split_fault: str | None = None
    """Why the network has no prefix, although its first blocks are frozen."""
    encoder_bytes: int = 0
    """Weights of text encoders that are on the device only while they encode."""
    read_bytes: int = 0
    """Host memory that a rank needs to read the model: all weights but those that are quantised or partitioned as they are read."""

    @property
    def num_trainable(self) -> int:
        return sum(map(math.prod, self.trained_shapes))


@dataclass(frozen=True)
class Computing:
    """How a run computes with its networks."""

    fused: bool = False
    """Whether GroupNorm, SiLU and GEGLU are the Triton kernels."""
    merged: bool = False
    """Whether LoRA computes with merged weights."""
    shared: bool = False
    """Whether guidance's branches share what precedes the first cross-attention."""
    checkpointing: bool = False
    """Whether the network's blocks are run again in backward."""
    quantize: str = "none"
    """model.quantize."""
    tiled: bool = False
    """model.vae_tiling."""


class _Networks(ABC):
    """A pipeline's networks without weights, trained and computing as `count_model` says, called as a policy calls them."""

    embed_bytes: int
    num_latents: int
    decoded_shape: tuple[int, ...]
    """Of what the VAE's decoder is given of a sample."""

    def __init__(self, part: str, parts: dict[str, nn.Module], vae_dtype: torch.dtype, lora, computing: Computing):
        self.part, self.parts, self.network, self.vae, self.vae_dtype = part, parts, parts[part], parts["vae"], vae_dtype
        self.computing = computing
        for network in parts.values():
            network.requires_grad_(False).eval()
        nn.Module.to(self.vae, vae_dtype)
        if computing.tiled:
            tile(self.vae)
        if computing.quantize != "none":
            quantize(self.network, computing.quantize)
        set_trainable(self.network, lora.scope, lora.targets, lora.rank, lora.alpha)
        self.copies = _merge(self.network) if computing.merged else []
        self.guidance = nullcontext()

    def fake(self) -> None:
        """Gives the networks fake weights and the trained one gradients, which are accounted for apart; fuses, shares what is wanted."""
        for network in (self.network, self.vae):
            replaced(network, lambda t: torch.empty(t.shape, dtype=t.dtype))
        for parameter in self.trained():
            parameter.grad = torch.empty_like(parameter)
        if self.computing.fused:
            saving = [lambda x, *rest, op=op: _SavesInput.apply(op, x, *rest) for op in (reference.group_norm_silu, reference.geglu)]
            fuse(self.network, Ops("counted", reference.ddim_step, reference.ppo_loss, *saving))
        if self.computing.shared:  # all calls are of both branches
            self.guidance = SharedGuidance(self.network, partial(self.forward, 2))
        if self.computing.checkpointing:
            checkpoint_gradients(self.network, self.running)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    @abstractmethod
    def forward(self, num_rows: int) -> Tensor:
        """The network's output for so many rows."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the network computes as it does in a run; also where checkpointing runs its blocks again."""
        with self.guidance:
            yield

    def decode(self, num_rows: int) -> Tensor:
        images = self.vae.decode(torch.empty(num_rows, *self.decoded_shape, dtype=self.vae_dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)


class _UNet(_Networks):
    """Those of Stable Diffusion, from their configs."""

    def __init__(self, arch: dict[str, dict], dtype: torch.dtype, lora, on_gpu: bool, computing: Computing):
        with torch.device("meta"):
            parts = {part: kind.from_config(arch[part]) for part, kind in NETWORKS.items()}
            encoders = {part: text_encoder(part, arch[part]) for part in TEXT_ENCODERS if part in arch}
        self.dtype = dtype
        for network in (*parts.values(), *encoders.values()):
            nn.Module.to(network, dtype)
        unet, vae = parts["unet"], parts["vae"]
        is_sdxl = unet.config.addition_embed_type == "text_time"
        upcast = is_sdxl and vae.config.force_upcast and dtype == torch.float16  # as `open_pipeline` has it
        super().__init__("unet", parts | encoders, torch.float32 if upcast else dtype, lora, computing)
        self.pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim if is_sdxl else 0
        num_tokens = encoders["text_encoder"].config.max_position_embeddings if "text_encoder" in encoders else 77
        size = unet.config.sample_size
        self.embed_shape = num_tokens, unet.config.cross_attention_dim
        self.decoded_shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        self.num_latents = math.prod(self.decoded_shape)
        self.embed_bytes = (math.prod(self.embed_shape) + (self.pooled + 6 if self.pooled else 0)) * dtype.itemsize
        self.autocast = autocast("cpu", dtype, is_unet=True, whole=lora.scope == "none")
        self.norms = _CudaNorms() if on_gpu and dtype != torch.float32 else nullcontext()

    def forward(self, num_rows: int) -> Tensor:
        empty = partial(torch.empty, num_rows, dtype=self.dtype)
        added = {"text_embeds": empty(self.pooled), "time_ids": empty(6)} if self.pooled else None
        x, timesteps, embeds = empty(*self.decoded_shape), torch.empty(num_rows, dtype=torch.int64), empty(*self.embed_shape)
        with self.autocast, self.running():
            return self.network(x, timesteps, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.norms, self.guidance:
            yield


class _EvenExperts(ExpertsWithGradient):
    """Experts where no token has numbers to choose by: each is given as many. The operations are those of any choice."""

    def shares(self, flat_expert_indices: Tensor) -> list[int]:
        share, rest = divmod(len(flat_expert_indices), len(self.experts))
        return [share + (number < rest) for number in range(len(self.experts))]


class _Whole(TorchDispatchMode):
    """Inside, what is made of real whole numbers is computed, such as the lengths of texts that a network makes a list of."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and all(not isinstance(tensor, FakeTensor) and not tensor.dtype.is_floating_point for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _faked(part: Row) -> Row:
    """What an argument has of one row, without memory; whole numbers stay."""
    return torch.empty_like(part) if isinstance(part, Tensor) and part.dtype.is_floating_point else part


class _Transformer(_Networks):
    """Those of a flow model, whose network is called as its pipeline calls it."""

    def __init__(self, model: Model, asked: Asked, prompt: str, dtype: torch.dtype, lora, computing: Computing):
        """asked, prompt: how it is called. Raises ValueError for a pipeline that cannot be called so."""
        part = model.family.network
        recorder, self.recording = model.recorder(dtype), model.record(asked, dtype)
        parts = {name: in_dtype(on_meta(model.classes[name], model.configs[name]), dtype) for name in (part, "vae")}
        parts |= {name: getattr(recorder.pipe, name) for name in model.classes if name not in parts}
        upcast = parts["vae"].config.get("force_upcast", False) and dtype == torch.float16  # as `open_pipeline` has it
        super().__init__(part, parts, torch.float32 if upcast else dtype, lora, computing)
        for module in self.network.modules():
            if isinstance(module, ExpertsWithGradient):
                patch(module, _EvenExperts)
        self.dtype, self.rows = dtype, recorder.texts_of(prompt, self.recording)
        self.autocast = autocast("cpu", dtype, is_unet=False, whole=lora.scope == "none")
        self.embed_bytes = sum(row.nbytes for row in self.rows[-1] if isinstance(row, Tensor))
        self.num_latents = math.prod(self.recording.shape)
        self.decoded_shape = recorder.decoded_shape(self.recording)

    def fake(self) -> None:
        rows = [[_faked(part) for part in row] for row in self.rows]
        with _Whole():
            self.texts = Texts.of(self.recording, rows, torch.device("cpu"))
        super().fake()

    def forward(self, num_rows: int) -> Tensor:
        """Half of the rows without the prompt, where there is guidance."""
        with unset_fake_temporarily():
            index = torch.arange(num_rows) * len(self.rows) // num_rows
        x, times = torch.empty(num_rows, *self.recording.shape, dtype=self.dtype), torch.empty(num_rows, dtype=self.recording.times.dtype)
        with self.autocast, self.running(), _Whole():
            return self.recording.template.call(self.network, x, times, self.texts.gather(index))


def _backward(result: list[Tensor]) -> None:
    result.pop().float().square().mean().backward()


def _count_calls(networks: _Networks) -> dict[str, object]:
    """What the networks' calls cost: some of the fields of `ModelCounts`."""
    with torch.no_grad():
        forward, _ = count(networks.forward)
        decode, image_bytes = count(networks.decode)
    update, saved_row_bytes = count(networks.forward, _backward)
    found = {"forward": forward, "decode": decode, "image_bytes": int(image_bytes), "update": update, "saved_row_bytes": saved_row_bytes}
    none = {"prefix_flop": 0.0, "kept_row_bytes": 0, "cached_update": update}
    try:
        split = Split(networks.network, networks.forward)
    except ValueError as error:
        return found | none | {"split_fault": str(error)}
    if not split.wanted:
        return found | none
    kept: dict[int, list[Tensor]] = {}

    def prefix(num_rows: int) -> None:
        kept[num_rows] = split.run_prefix(partial(networks.forward, num_rows))

    def replay(num_rows: int) -> None:
        with split.replaying(kept[num_rows]):
            _backward([networks.forward(num_rows)])

    prefix_flop = count(prefix)[0].row_flop
    kept_row_bytes = sum(stored_bytes(tensor[:1]) for tensor in kept[ROWS[0]])
    return found | {"prefix_flop": prefix_flop, "kept_row_bytes": kept_row_bytes, "cached_update": count(replay)[0]}


def count_model(arch: dict[str, dict], dtype: torch.dtype, lora, *, on_gpu: bool, **computing) -> ModelCounts:
    """Counts a UNet's pipeline with the trained weights that `lora` (scope, targets, rank, alpha) asks for, computing in `dtype`.

    on_gpu: autocast's rules are a GPU's. computing: see `Computing`. Raises as `set_trainable` does.
    """
    return _counted(_UNet(arch, dtype, lora, on_gpu, Computing(**computing)))


def count_flow(model: Model, asked: Asked, prompt: str, dtype: torch.dtype, lora, **computing) -> ModelCounts:
    """`count_model` of a flow model, called for the pictures that are asked for with this prompt. Also raises as `Model.record` does."""
    return _counted(_Transformer(model, asked, prompt, dtype, lora, Computing(**computing)))


def _counted(networks: _Networks) -> ModelCounts:
    with FakeTensorMode(allow_non_fake_inputs=True):
        networks.fake()
        calls = _count_calls(networks)
    weights = list(networks.network.parameters())
    num_bytes = sum(p.nbytes for p in weights)
    live = num_bytes * LIVE_ELEMENTS / sum(p.numel() for p in weights)
    persistent = sum(p.nbytes for p in weights if p.numel() <= PERSISTENT_ELEMENTS)
    frozen = {name: sum(p.nbytes for p in part.parameters() if not p.requires_grad) for name, part in networks.parts.items()}
    return ModelCounts(
        weight_bytes=frozen | {"merged": sum(layer.merged_weight.nbytes for layer in networks.copies)},
        trained_shapes=tuple(tuple(parameter.shape) for parameter in networks.trained()),
        gathered_bytes=min(num_bytes, live + persistent),
        num_latents=networks.num_latents,
        embed_bytes=networks.embed_bytes,
        network=networks.part,
        **calls,
    )
