"""Speed of every operation: its PyTorch twin run eagerly, the twin under torch.compile, and the Triton kernels.

    python -m bench.kernels                 # the benchmarks; each appends a row to bench/results/kernels.csv as soon as it is done
    python -m pytest bench/kernels.py       # the same without the rows; any option of pytest and pytest-benchmark

A twin is the operation in ddpo_fast.kernels.reference. A benchmark first compares its provider's result with the eager twin's. If it is
wrong, the benchmark fails and there is no row. Ideal bytes: every tensor that the operation has to read or write, once. On a GPU, a time
is that of the device, from CUDA events: a sleeping kernel before them lets the host queue all launches. Up to 16 sets of inputs take
turns, so that the L2 cache holds no part of a large one. On a CPU, the shapes are small and the kernels are left out, because Triton's
interpreter is not made for speed. Caches make more than 100 % of the copy's bandwidth possible.
"""

import argparse
import functools
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from bench.rows import RESULTS, Writer, device_name
from ddpo_fast.kernels import reference, select
from ddpo_fast.kernels.launch import interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
TOLERANCE = {torch.float32: (2e-4, 1e-4), torch.float16: (5e-3, 2e-3), torch.bfloat16: (4e-2, 8e-3)}
"""By an output's dtype: the largest error over the largest element, and the norm of the error over that of the output. The twin rounds to
the tensors' dtype between its steps, the kernels once at the end. So a single element may differ by more than a wrong factor would make
it. These errors have no common sign, however, so that the second number finds a factor that is off by 1 %."""
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One operation on one kind of input."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float16
    layout: str = "NCHW"

    def __str__(self) -> str:
        layout = "" if self.op == "geglu" else f"-{self.layout}"
        return f"{self.op}-{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}{layout}"


def cases() -> list[Case]:
    """(B, C, H, W) of Stable Diffusion 1.5 and SDXL, guided for the latent operations, and (rows, D). Shapes are small on a CPU."""
    if not ON_GPU:
        shapes = {"ddim_step": (8, 4, 64, 64), "ppo_loss": (8, 4, 64, 64), "group_norm_silu": (2, 128, 64, 64), "geglu": (1024, 640)}
        return [Case(op, shape, dtype) for op, shape in shapes.items() for dtype in (torch.float32, torch.bfloat16)]
    out = []
    for op in ("ddim_step", "ppo_loss"):
        out += [Case(op, shape) for shape in ((8, 4, 64, 64), (64, 4, 64, 64), (64, 4, 128, 128))]
        out += [Case(op, (64, 4, 64, 64), dtype) for dtype in (torch.bfloat16, torch.float32)]
        out += [Case(op, (64, 4, 64, 64), layout="channels_last")]
    for layout in LAYOUTS:
        shapes = (16, 320, 64, 64), (16, 960, 64, 64), (16, 1280, 8, 8), (4, 320, 128, 128), (4, 1280, 32, 32)
        out += [Case("group_norm_silu", shape, layout=layout) for shape in shapes]
    out += [Case("group_norm_silu", (16, 320, 64, 64), dtype) for dtype in (torch.bfloat16, torch.float32)]
    out += [Case("geglu", shape) for shape in ((16 * 4096, 1280), (16 * 64, 5120), (4 * 4096, 2560))]
    out += [Case("geglu", (16 * 4096, 1280), dtype) for dtype in (torch.bfloat16, torch.float32)]
    return out


def directions(op: str) -> tuple[str, ...]:
    """The directions in which an operation is timed: forward, and backward if it is differentiated."""
    return ("forward",) if op == "ddim_step" else ("forward", "backward")


def arguments(case: Case, seed: int) -> tuple:
    """Random arguments of the operation. The tensor that gets a gradient, if there is one, is the first."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    if case.op == "geglu":
        num_rows, width = case.shape
        return (normal(num_rows, 2 * width, dtype=case.dtype).requires_grad_(),)
    batch, *inner = case.shape
    if case.op == "group_norm_silu":
        x = normal(*case.shape, dtype=case.dtype).contiguous(memory_format=LAYOUTS[case.layout]).requires_grad_()
        return x, 32, normal(inner[0], dtype=case.dtype), normal(inner[0], dtype=case.dtype), 1e-5

    noise_pred = normal(2 * batch, *inner, dtype=case.dtype).contiguous(memory_format=LAYOUTS[case.layout])
    std = torch.linspace(0.5, 1.0, 10, device=DEVICE)
    table = torch.stack([1.0 - 0.1 * std, -0.1 * std, std, (std * math.sqrt(2 * math.pi)).log()], dim=1)
    rows = torch.arange(batch, device=DEVICE)
    steps = rows % len(table)
    if case.op == "ddim_step":
        return noise_pred, normal(*case.shape), table, steps, 1, rows, 5.0
    latents = normal(batch, len(table) + 1, *inner)
    advantages = normal(batch).abs() + 0.5  # of one sign, so that their sum, the loss, is not small and has a meaningful relative error
    zeros = torch.zeros(batch, len(table), device=DEVICE)
    log_probs = reference.ppo_loss(noise_pred, latents, zeros, advantages, table, rows, steps, 5.0, score_function=True)[1][0] / -advantages
    # a ratio of 1 is away from the ends of the clip range, and the weight keeps fp16 gradients from underflowing
    zeros[rows, steps] = log_probs
    return noise_pred.requires_grad_(), latents, zeros, advantages, table, rows, steps, 5.0, 1e-2, 1024.0


def ideal_bytes(case: Case, direction: str) -> int:
    """Bytes that have to be read and written, each tensor once. Tables and single numbers of a row do not count."""
    elements, size = math.prod(case.shape), case.dtype.itemsize
    if case.op == "ddim_step":
        return elements * (2 * size + 4 + 4 + 2 * size)
    if case.op == "ppo_loss":
        return elements * (2 * size + 4 + 4 + (2 * size if direction == "backward" else 0))
    tensors = {("group_norm_silu", "forward"): 2, ("group_norm_silu", "backward"): 3, ("geglu", "forward"): 3, ("geglu", "backward"): 5}
    return elements * size * tensors[case.op, direction]


def provide(provider: str, op: str) -> Callable:
    """The implementation of an operation."""
    twin = getattr(reference, op)
    if provider == "fused":
        return getattr(select("triton", DEVICE), op)
    return torch.compile(twin, dynamic=False, fullgraph=True) if provider == "compile" else twin


def outputs(function: Callable, inputs: tuple, direction: str) -> tuple[Tensor, ...]:
    """The outputs that are compared with the twin's."""
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    return (gradient(out[0], inputs[0])(),) if direction == "backward" else out


def gradient(out: Tensor, leaf: Tensor) -> Callable[[], Tensor]:
    """A function that runs the backward pass, as often as wanted."""
    upstream = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaf, upstream, retain_graph=True)[0]


def check(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raises AssertionError if a provider's result is not the eager twin's."""
    assert len(actual) == len(expected)
    for number, (one, other) in enumerate(zip(actual, expected)):
        assert one.dtype == other.dtype and one.shape == other.shape
        difference, other = one.detach().double() - other.detach().double(), other.detach().double()
        for norm, name, tolerance in zip((math.inf, 2), ("largest element", "norm"), TOLERANCE[one.dtype]):
            error, scale = (torch.linalg.vector_norm(x, norm).item() for x in (difference, other))
            error /= max(scale, torch.finfo(torch.float32).tiny)  # both are 0 if an output is nothing but zeros
            assert error <= tolerance, f"output {number} is off by {error:.3g} of its {name}, {tolerance:.3g} is tolerated"


class CudaTime:
    """A point in time on the GPU's current stream. The difference of two is in seconds."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "CudaTime") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def sleep() -> None:
    """Keeps the GPU busy for some 10 ms, while the host queues what is to be timed."""
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of `copy_` between two tensors much larger than any cache; the median of 20."""
    source = torch.ones((1 << 30) if ON_GPU else (1 << 27), dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    timer, times = CudaTime if ON_GPU else time.perf_counter, []
    for _ in range(20):
        start = timer()
        target.copy_(source)
        times.append(timer() - start)
    return 2 * source.numel() / statistics.median(times)


def providers() -> dict[str, str]:
    """All providers, each with the reason why it cannot run here, "" if it can."""
    compiler = ON_GPU or shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    return {
        "fused": "" if ON_GPU and not interpreted() else "needs a GPU and no TRITON_INTERPRET: the interpreter has no speed",
        "eager": "",
        "compile": "" if compiler else "torch.compile needs a C++ compiler",
    }


def benchmarks() -> list[tuple[str, Case, str]]:
    """(provider, case, direction) of each benchmark. torch.compile takes seconds a case, so it comes last, after both other providers."""
    can_run = [provider for provider, missing in providers().items() if not missing]
    every = [(provider, case, direction) for case in cases() for direction in directions(case.op) for provider in can_run]
    compiled = torch.float16 if ON_GPU else torch.float32, "NCHW"
    every = [each for each in every if each[0] != "compile" or (each[1].dtype, each[1].layout) == compiled]
    return sorted(every, key=lambda each: each[0] == "compile")


def keys(provider: str, case: Case, direction: str) -> dict[str, str]:
    """The columns of the table `kernels` that say what was measured."""
    return dict(
        op=case.op, direction=direction, provider=provider, shape="x".join(map(str, case.shape)),
        dtype=str(case.dtype).removeprefix("torch."), layout="" if case.op == "geglu" else case.layout,
    )  # fmt: skip


def pytest_generate_tests(metafunc) -> None:
    every = [pytest.param(provider, case, direction, id=f"{case}-{direction}-{provider}") for provider, case, direction in benchmarks()]
    metafunc.parametrize("provider, case, direction", every)


@pytest.mark.filterwarnings("default")  # torch.compile's warnings about itself are not a kernel's failure
@pytest.mark.benchmark(disable_gc=True, **({"timer": CudaTime} if ON_GPU else {}))
def test_speed(benchmark, provider, case, direction):
    functorch_config.donated_buffer = False  # a compiled backward pass is run more than once
    torch.compiler.reset()
    function = provide(provider, case.op)
    inputs = arguments(case, 0)
    check(outputs(function, inputs, direction), outputs(getattr(reference, case.op), inputs, direction))

    size = ideal_bytes(case, direction)
    # eager latent operations are hundreds of launches: more than two would fill the GPU's queue and time the host
    host_bound = provider == "eager" and case.op in ("ddim_step", "ppo_loss")
    copies = 2 if host_bound else min(16, max(2, (256 << 20) // size))
    calls = [functools.partial(function, *inputs) for inputs in [arguments(case, seed) for seed in range(copies)]]
    if direction == "backward":
        calls = [gradient(out[0] if isinstance(out, tuple) else out, call.args[0]) for call in calls for out in [call()]]

    def run():
        for call in calls:
            call()

    run()
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    rounds = 30 if ON_GPU else max(10, min(30, int(0.3 / once)))
    benchmark.pedantic(run, setup=sleep if ON_GPU else None, rounds=rounds, warmup_rounds=2)

    p20, p50, p80 = (1e6 / copies * statistics.quantiles(benchmark.stats.stats.data, n=10, method="inclusive")[i] for i in (1, 4, 7))
    gb_per_s = size / p50 / 1e3
    benchmark.extra_info.update(
        **keys(provider, case, direction), p20_us=p20, p50_us=p50, p80_us=p80, bytes=size, gb_per_s=gb_per_s,
        percent_of_copy=100e9 * gb_per_s / copy_bandwidth(),
    )  # fmt: skip


class Rows:
    """Plugin of pytest that writes a benchmark's row as soon as it is done."""

    def __init__(self, writer: Writer, wanted: Callable[[dict], bool], deadline: float):
        """wanted: whether a benchmark with these `keys` is wanted. deadline: of time.time, by which the last benchmark has to end."""
        self.writer, self.wanted, self.deadline = writer, wanted, deadline
        self.begun, self.longest = 0.0, 0.0

    def pytest_collection_modifyitems(self, config, items) -> None:
        """Leaves out what is not wanted."""
        chosen = [item for item in items if self.wanted(keys(**item.callspec.params))]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_runtest_setup(self, item) -> None:
        self.begun = time.time()

    def pytest_runtest_teardown(self, item) -> None:
        """Writes the row of a benchmark unless it failed. Stops before a benchmark that would not end in time."""
        self.longest = max(self.longest, time.time() - self.begun)
        if time.time() + self.longest > self.deadline:
            item.session.shouldstop = "there is no time for more"
        info = item.funcargs["benchmark"].extra_info
        if "p50_us" in info:
            row = self.writer.add(**info)
            measured = "{op} {direction} {provider} {shape} {dtype} {layout}: {p50_us} us, {gb_per_s} GB/s, {percent_of_copy} %"
            print(f"\n{measured.format(**row)}", flush=True)


def measure(writer: Writer, argv: list[str], wanted: Callable[[dict], bool] = lambda _: True, deadline: float = math.inf) -> int:
    """Runs the benchmarks that are `wanted`, by their `keys`, until the `deadline`. `argv` is pytest's. Returns pytest's exit status."""
    print(f"{device_name()}: a copy moves {copy_bandwidth() / 1e9:.1f} GB/s, read and written")
    for provider, missing in providers().items():
        if missing:
            print(f"{provider}: not run: {missing}")
    plugins = [Rows(writer, wanted, deadline)]
    status = pytest.main([str(Path(__file__)), "--capture=no", "--benchmark-quiet", *argv], plugins=plugins)
    print(f"{writer.path}: {'written' if writer.path.exists() else 'nothing to write'}")
    return int(status)


def main(argv: list[str] | None = None) -> int:
    """The command line. Options that it does not know are pytest's. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    known, others = parser.parse_known_args(argv)
    return measure(Writer("kernels", known.out, ["python", "-m", "bench.kernels", *others]), others)


if __name__ == "__main__":
    sys.exit(main())
