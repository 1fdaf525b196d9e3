"""Attention back ends of a network: installs one, and finds the fastest at a run's own shapes.

The back ends are those of diffusers' attention dispatcher, which calls PyTorch's kernels, xformers or flash-attn. Shape letters: R network
rows, L queries, M keys, H heads, D channels of a head.
"""

import functools
import importlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer

from ddpo_fast.networks.patch import patch, unpatch

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


@dataclass(frozen=True)
class AttentionCall:
    """A call of attention: queries (R, H, L, D), keys and values (R, H, M, D), and a mask that expands to (R, H, L, M) or none."""

    queries: int
    keys: int
    heads: int
    channels: int
    masked: bool = False
    mask: Tensor | None = field(default=None, compare=False)
    """The mask of the first such call."""

    def __str__(self) -> str:
        words = f"{self.queries} queries, {self.keys} keys, {self.heads} heads of {self.channels} channels"
        return f"{words}, with a mask" if self.masked else words

    def mask_of(self, num_rows: int) -> Tensor | None:
        """The mask for so many rows, in turn those of the first call."""
        if self.mask is None or self.mask.dim() < 4 or len(self.mask) == 1:
            return self.mask
        return self.mask[torch.arange(num_rows) % len(self.mask)]


class _Replaced:
    """Marks the class of a processor that calls one of BACKENDS."""


@functools.cache
def _replaced(processor: type, backend: str) -> type:
    """A class of processors with a back end.

    Some call diffusers' dispatcher, with a back end that they have as an attribute. (diffusers' own setter also sets a global one.) Others
    call `F.scaled_dot_product_attention`: they get a copy of their function in which F is another name space, for nothing but this copy.
    """
    name = AttentionBackendName(BACKENDS[backend])

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        inputs = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return dispatch_attention_fn(*inputs, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=name).transpose(1, 2)

    if hasattr(processor, "_attention_backend"):
        changed = {"_attention_backend": name}
    else:
        own = processor.__call__
        names = own.__globals__ | {"F": SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": attend})}
        del names["__name__"]  # torch.compile would look names up in the module of that name instead
        changed = {"__call__": FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)}
        changed["__call__"].__kwdefaults__ = own.__kwdefaults__
    return type(processor.__name__, (_Replaced, processor), {"__module__": processor.__module__} | changed)


def _processors(network: nn.Module) -> list[object]:
    """What computes the attention of a network's layers, where it can be given a back end. (SANA's linear attention has no choice.)"""
    found = dict.fromkeys(module.processor for module in network.modules() if hasattr(module, "processor"))
    return [processor for processor in found if _is_replaceable(type(processor))]


def _is_replaceable(processor: type) -> bool:
    own = inspect.getattr_static(processor, "__call__", None)
    calls_torch = isinstance(own, FunctionType) and "scaled_dot_product_attention" in own.__code__.co_names
    return hasattr(processor, "_attention_backend") or issubclass(processor, _Replaced) or calls_torch and own.__globals__.get("F") is F


def set_attention(network: nn.Module, backend: str) -> None:
    """Makes a network's attention use one of BACKENDS. sdpa is diffusers' own way, in which PyTorch chooses the kernel: it undoes another.

    Raises ValueError for a network whose attention cannot be given a back end.
    """
    processors = _processors(network)
    for processor in processors:
        if isinstance(processor, _Replaced):
            unpatch(processor, type(processor))
    if backend == "sdpa":
        return
    if not processors:
        raise ValueError(f"attention.backend={backend}: this model has no attention that can be replaced; valid is sdpa")
    for processor in processors:
        patch(processor, _replaced(type(processor), backend))


class _Counting(TorchFunctionMode):
    """Counts PyTorch's attention calls. It makes every operation slower, so it is for one call of the network."""

    def __init__(self):
        self.calls: Counter[AttentionCall] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.count(*args, **kwargs or {})
        return function(*args, **kwargs or {})

    def count(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_) -> None:
        _, heads, queries, channels = query.shape
        self.calls[AttentionCall(queries, key.shape[2], heads, channels, attn_mask is not None, attn_mask)] += 1


def attention_calls(call: Callable[[], object]) -> Counter[AttentionCall]:
    """The attention calls that a call of the network makes."""
    with _Counting() as counting:
        call()
    return counting.calls


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


def check(backend: str, call: AttentionCall, num_rows: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Runs a back end forward and backward and checks its result. Returns a function that runs it again.

    Raises RuntimeError, with the reason, for a back end that cannot run or is inexact.
    """
    if reason := fault(backend, device):
        raise RuntimeError(reason)
    attend = functools.partial(dispatch_attention_fn, backend=AttentionBackendName(BACKENDS[backend]))
    generator, mask = torch.Generator(device).manual_seed(0), call.mask_of(num_rows)
    q, k, v, g = (
        torch.randn(num_rows, length, call.heads, call.channels, generator=generator, device=device).to(dtype).requires_grad_(number < 3)
        for number, length in enumerate((call.queries, call.keys, call.keys, call.queries))
    )

    def run() -> None:
        q.grad = k.grad = v.grad = None
        attend(q, k, v, mask).backward(g)

    few, mask_of_few = [tensor[:1].detach() for tensor in (q, k, v)], call.mask_of(1)
    try:
        run()
        out = attend(*few, mask_of_few).float()
    except Exception as error:  # each back end raises its own class of error
        raise RuntimeError(f"it refuses {call}, {str(dtype).removeprefix('torch.')}: {_one_line(error)}") from error
    if mask_of_few is not None and mask_of_few.is_floating_point():
        mask_of_few = mask_of_few.float()
    exact = F.scaled_dot_product_attention(*(tensor.float().transpose(1, 2) for tensor in few), mask_of_few).transpose(1, 2)
    off = ((out - exact).norm() / exact.norm()).item()
    if not off <= ERROR[dtype]:
        raise RuntimeError(f"its result is off by {off:.2g}{' with a mask' if call.masked else ''}")
    return run


def choose(
    backends: Iterable[str], calls: Counter[AttentionCall], num_rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """The fastest of some back ends over these calls, forward and backward, and a line that says what was measured.

    Raises ValueError if none of them can run.
    """
    seconds, reasons = {}, {}
    for backend in backends:
        try:
            runs = [(check(backend, call, num_rows, dtype, device), count) for call, count in calls.items()]
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
    backend: str, network: nn.Module, call: Callable[[], object], num_rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """The back end that attention.backend means, tried on the attention calls that `call` makes, and for auto a line about the choice.

    `call` runs the network. auto is sdpa on a CPU, where no other back end is faster, and where the attention cannot be replaced.
    Raises ValueError, with the reason, for a back end that cannot run here.
    """
    if backend == "sdpa" or (backend == "auto" and (device.type == "cpu" or not _processors(network))):
        return "sdpa", ""
    calls = attention_calls(call)
    if backend == "auto":
        candidates = [name for name in BACKENDS if name not in ("math", "flex") and _installed(name)]
        choice = choose(candidates, calls, num_rows, dtype, device)
        torch.cuda.empty_cache()  # frees what the trials took
        return choice
    for attention_call in calls:
        try:
            check(backend, attention_call, 1, dtype, device)
        except RuntimeError as error:
            raise ValueError(f"attention.backend={backend}: it cannot run here: {error}; valid is auto or sdpa") from None
    return backend, ""
