"""Attention back ends of a UNet: installs one, and finds the fastest at a run's own shapes.

The back ends are those of diffusers' attention dispatcher, which calls PyTorch's kernels, xformers or flash-attn. Shape letters: R UNet
rows, L queries, M keys, H heads, D channels of a head.
"""

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.benchmark import Timer

BACKENDS = {
    "sdpa": "native", "flash": "_native_flash", "cudnn": "_native_cudnn", "efficient": "_native_efficient", "math": "_native_math",
    "xformers": "xformers", "flash_attn": "flash", "flash_attn_3": "_flash_3", "flex": "flex",
}  # fmt: skip
"""Values of attention.backend, and the dispatcher's names for them. Its other back ends have no backward pass or download their kernel."""
PACKAGES = {"xformers": "xformers", "flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface"}
"""The package that a back end needs besides PyTorch."""
ON_CPU = ("auto", "sdpa", "flash", "math")
"""Values of attention.backend that have a backward pass on a CPU."""
ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""A back end is used only if norm(its result - result of fp32 math) / norm(result of fp32 math) is at most this."""

Shape = tuple[int, int, int, int]
"""(L, M, H, D) of one call."""


class DispatchedAttention:
    """A processor for diffusers' `Attention` that calls one of BACKENDS."""

    def __init__(self, backend: str):
        self.backend = AttentionBackendName(BACKENDS[backend])

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask=None, temb=None
    ) -> Tensor:
        """hidden_states (R, L, C), encoder_hidden_states (R, M, E) or None for attention to itself; returns (R, L, C)."""
        assert attention_mask is None, "a text-to-image UNet is called without masks"
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        out = dispatch_attention_fn(*(layer(x).unflatten(-1, (attn.heads, -1)) for layer, x in inputs), backend=self.backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def set_attention(unet: nn.Module, backend: str) -> None:
    """Makes a UNet's attention use one of BACKENDS. sdpa changes nothing: diffusers then lets PyTorch choose the kernel.

    Raises ValueError for an attention that does more than project, attend and project.
    """
    if backend == "sdpa":
        return
    if special := not_plain(unet):
        raise ValueError(f"attention.backend={backend}: {special} is not plain attention; valid is sdpa")
    for module in unet.modules():
        if isinstance(module, Attention):
            module.processor = DispatchedAttention(backend)


def not_plain(unet: nn.Module) -> str | None:
    """The name of an attention layer that does more than project, attend and project; None if none does."""
    for name, attn in unet.named_modules():
        if isinstance(attn, Attention):
            extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attn.added_kv_proj_dim)
            plain = type(attn.processor) is AttnProcessor2_0 and not attn.residual_connection and attn.rescale_output_factor == 1
            if not plain or any(extras):
                return name
    return None


def attention_shapes(unet: nn.Module, call: Callable[[], object]) -> Counter[Shape]:
    """The attention calls that a call of the UNet makes, by shape."""
    shapes = Counter()

    def count(attn, args, kwargs):
        hidden_states = args[0]
        context = kwargs.get("encoder_hidden_states")
        keys = hidden_states if context is None else context
        shapes[hidden_states.shape[1], keys.shape[1], attn.heads, attn.inner_dim // attn.heads] += 1

    hooks = [module.register_forward_pre_hook(count, with_kwargs=True) for module in unet.modules() if isinstance(module, Attention)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _installed(backend: str) -> bool:
    return backend not in PACKAGES or importlib.util.find_spec(PACKAGES[backend]) is not None


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def fault(backend: str, device: torch.device) -> str | None:
    """Why a value of attention.backend cannot run on a device with the packages that are installed; None if no reason is known.

    A package whose kernels were built for another PyTorch fails when it is imported; xformers warns instead, and keeps the error.
    """
    if device.type == "cpu" and backend not in ON_CPU:
        return "it needs a GPU, and this run is on a CPU"
    package = PACKAGES.get(backend)
    if package is None:
        return None
    if not _installed(backend):
        return f"the package {package} is not installed"
    try:
        importlib.import_module(package)
        error = importlib.import_module("xformers._cpp_lib")._cpp_library_load_exception if backend == "xformers" else None
    except Exception as raised:  # a linker or a package's own check may raise anything
        error = raised
    return error and f"the package {package} does not load in PyTorch {torch.__version__}: {_one_line(error)}"


def require(backend: str, device: torch.device) -> None:
    """Raises ValueError for a value of attention.backend that cannot run on a device with the packages that are installed."""
    if reason := fault(backend, device):
        raise ValueError(f"attention.backend={backend}: it cannot run here: {reason}; valid is auto or sdpa")


def check(backend: str, shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Runs a back end forward and backward and checks its result. Returns a function that runs it again.

    Raises RuntimeError, with the reason, for a back end that cannot run or is inexact.
    """
    if reason := fault(backend, device):
        raise RuntimeError(reason)
    queries, keys, heads, channels = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, g = (
        torch.randn(num_rows, length, heads, channels, generator=generator, device=device).to(dtype).requires_grad_(number < 3)
        for number, length in enumerate((queries, keys, keys, queries))
    )

    def run() -> None:
        q.grad = k.grad = v.grad = None
        dispatch_attention_fn(q, k, v, backend=AttentionBackendName(BACKENDS[backend])).backward(g)

    try:
        run()
        few = [tensor[:1].detach() for tensor in (q, k, v)]
        out = dispatch_attention_fn(*few, backend=AttentionBackendName(BACKENDS[backend])).float()
    except Exception as error:  # each back end raises its own class of error
        call = f"{queries} queries, {keys} keys, {heads} heads of {channels} channels, {str(dtype).removeprefix('torch.')}"
        raise RuntimeError(f"it refuses {call}: {_one_line(error)}") from error
    exact = F.scaled_dot_product_attention(*(tensor.float().transpose(1, 2) for tensor in few)).transpose(1, 2)
    off = ((out - exact).norm() / exact.norm()).item()
    if not off <= ERROR[dtype]:
        raise RuntimeError(f"its result is off by {off:.2g}")
    return run


def choose(backends: Iterable[str], shapes: Counter[Shape], num_rows: int, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The fastest of some back ends over calls of these shapes, forward and backward, and a line that says what was measured.

    Raises ValueError if none of them can run.
    """
    seconds, reasons = {}, {}
    for backend in backends:
        try:
            runs = [(check(backend, shape, num_rows, dtype, device), count) for shape, count in shapes.items()]
            timers = [(Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()), count) for run, count in runs]
            seconds[backend] = sum(count * timer.blocked_autorange(min_run_time=0.05).median for timer, count in timers)
        except RuntimeError as error:
            reasons[backend] = str(error)
    ranked = sorted(seconds, key=seconds.get)
    unfit = "".join(f"; {backend} cannot: {reason[:120]}" for backend, reason in reasons.items())
    if not ranked:
        raise ValueError(f"attention.backend=auto: no back end can run here{unfit}")
    times = ", ".join(f"{backend} {1000 * seconds[backend]:.3g} ms" for backend in ranked)
    return ranked[0], f"attention.backend: {ranked[0]}; forward and backward at {num_rows} rows: {times}{unfit}"


def resolve(
    backend: str, unet: nn.Module, call: Callable[[], object], num_rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """The back end that attention.backend means, tried at the shapes that occur in `call`, and for auto a line about the choice.

    `call` runs the UNet. auto is sdpa on a CPU, where no other back end is faster, and for a UNet whose attention cannot be replaced.
    Raises ValueError, with the reason, for a back end that cannot run here.
    """
    if backend == "sdpa" or (backend == "auto" and (device.type == "cpu" or not_plain(unet))):
        return "sdpa", ""
    shapes = attention_shapes(unet, call)
    if backend == "auto":
        candidates = [name for name in BACKENDS if name not in ("math", "flex") and _installed(name)]
        choice = choose(candidates, shapes, num_rows, dtype, device)
        torch.cuda.empty_cache()  # frees what the trials took
        return choice
    for shape in shapes:
        try:
            check(backend, shape, 1, dtype, device)
        except RuntimeError as error:
            raise ValueError(f"attention.backend={backend}: it cannot run here: {error}; valid is auto or sdpa") from None
    return backend, ""
