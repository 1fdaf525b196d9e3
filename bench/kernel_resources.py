"""The GPU resources that every Triton kernel uses, compiled ahead of time for four architectures: no GPU is needed.

    python -m bench.kernel_resources            # rewrites bench/results/kernel_resources.csv
    python -m bench.kernel_resources --check    # compares with it; exits 1 and names each row that regressed

Host functions run under `record_launches`, so that a kernel is compiled for exactly the arguments, alignments and options of a launch.
Columns: registers of a thread; spills, which are bytes of local memory of a CUDA thread (a stack frame counts, too) or, on AMD, spilled
registers and bytes of scratch memory; shared memory of a program; the number of load instructions from global memory, and how many of
these load 16 bytes or more a thread.
"""

import argparse
import csv
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ddpo_fast.kernels import ddim_step, geglu, group_norm_silu, ppo_loss
from ddpo_fast.kernels.launch import Launch, interpreted, record_launches

TABLE = Path(__file__).parent / "results" / "kernel_resources.csv"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MORE_REGISTERS = 8
"""ptxas may use this many more registers before that counts as a regression."""


@dataclass(frozen=True)
class Row:
    """One kernel of one configuration on one architecture; the columns of the table."""

    kernel: str
    configuration: str
    target: str
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    global_loads: int
    vector_loads_16b: int
    triton: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies a row."""
        return self.kernel, self.configuration, self.target

    @property
    def must_vectorise(self) -> bool:
        """Whether 16-byte loads are possible. They are not if rows are odd in length or gathered, nor in kernels that merge."""
        return not re.search(r"\b(odd|gather)\b", self.configuration) and "merge" not in self.kernel


def _latent_ops(dtype: torch.dtype, guided: bool, channels_last: bool, clip: bool, shape: tuple[int, int, int], num_rows: int) -> None:
    num_steps = 50
    coefficients = torch.ones(num_steps, 7 if clip else 4)
    index = torch.zeros(num_rows, dtype=torch.int64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    noise_pred = torch.zeros((1 + guided) * num_rows, *shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    with torch.no_grad():
        ddim_step.ddim_step(noise_pred, torch.zeros(num_rows, *shape), coefficients, index, 0, index, 5.0)
    trajectories = torch.zeros(2, num_steps + 1, *shape), torch.zeros(2, num_steps), torch.zeros(2)
    loss, _ = ppo_loss.ppo_loss(noise_pred, *trajectories, coefficients, index, index, 5.0)
    loss.backward()


def _group_norm_silu(shape: tuple[int, int, int], channels_last: bool, dtype: torch.dtype) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.zeros(2, *shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.zeros(2, shape[0], dtype=dtype)
    y = group_norm_silu.group_norm_silu(x, 32, weight, bias, 1e-5)
    y.backward(y.detach())


def _geglu(num_rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.zeros(num_rows, 2 * width, dtype=dtype, requires_grad=True)
    y = geglu.geglu(x)
    y.backward(y.detach())


def configurations() -> dict[str, Callable[[], None]]:
    """What is compiled: names, and functions that launch the kernels. A name has "gather" if 4 channels lie next to each other."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    out = {}

    def latents(dtype=torch.float16, guided=True, channels_last=False, clip=False, shape=(4, 64, 64), num_rows=8, suffix=""):
        name = f"latents {'x'.join(map(str, shape))} {names[dtype]} {'guided' if guided else 'unguided'}"
        name += " channels_last gather" * channels_last + " clip" * clip + suffix
        out[name] = functools.partial(_latent_ops, dtype, guided, channels_last, clip, shape, num_rows)

    for shape in (4, 64, 64), (4, 128, 128):
        for dtype in names:
            for guided in (True, False):
                latents(dtype, guided, shape=shape)
        latents(channels_last=True, shape=shape)
    latents(guided=False, channels_last=True)
    latents(torch.float32, channels_last=True)
    latents(clip=True)
    latents(torch.float32, channels_last=True, clip=True)
    latents(shape=(3, 65, 67), suffix=" odd")
    # the launcher makes other kernels for a count of 1 and for multiples of 16
    latents(num_rows=1, suffix=" one row")
    latents(num_rows=64, suffix=" 64 rows")

    def norm(shape, channels_last, dtype=torch.float16, suffix=""):
        layout = "channels_last" if channels_last else "NCHW"
        out[f"GroupNorm {'x'.join(map(str, shape))} {names[dtype]} {layout}{suffix}"] = lambda: _group_norm_silu(
            shape, channels_last, dtype
        )

    for shape in (320, 64, 64), (1280, 8, 8), (960, 64, 64), (320, 128, 128), (640, 64, 64), (1280, 32, 32):
        for channels_last in (False, True):
            norm(shape, channels_last)
    norm((320, 64, 64), False, torch.float32)
    norm((320, 64, 64), True, torch.bfloat16)
    norm((320, 9, 13), False, suffix=" odd")

    for num_rows, width, dtype in (
        (4096, 1280, torch.float16),
        (64, 5120, torch.float16),
        (4096, 1280, torch.float32),
        (4096, 1280, torch.bfloat16),
    ):
        out[f"GEGLU {num_rows}x{width} {names[dtype]}"] = lambda n=num_rows, w=width, d=dtype: _geglu(n, w, d)
    return out


def compile_launch(launch: Launch, target: GPUTarget):
    """The kernel compiled as `JITFunction.run` would on that target, for the arguments of a launch."""
    backend = make_backend(target)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    kwargs = dict(num_warps=launch.num_warps, enable_fp_fusion=False, **launch.constexprs)
    bound_args, specialization, options = binder(*launch.args, **kwargs)
    options, signature, constexprs, attrs = launch.kernel._pack_args(backend, kwargs, bound_args, specialization, options)
    return triton.compile(ASTSource(launch.kernel, signature, constexprs, attrs), target=target, options=options.__dict__)


def cuda_loads(ptx: str) -> list[int]:
    """The bytes a thread gets from each load from global memory."""
    loads = re.findall(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[a-z](\d+)\s", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in loads]


def amd_loads(amdgcn: str) -> list[int]:
    """The bytes a thread gets from each load from global memory."""
    sizes = {"byte": 1, "short": 2, "dword": 4}
    loads = re.findall(r"\b(?:global|buffer|flat)_load_[us]?(byte|short|dword)(?:x(\d))?", amdgcn)
    return [sizes[unit] * int(count or 1) for unit, count in loads]


def _cuda_usage(asm: dict) -> tuple[int, int, list[int]]:
    """Registers, bytes of local memory, and the loads."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, cuda_loads(asm["ptx"])


def _amd_usage(asm: dict) -> tuple[int, int, list[int]]:
    """Vector registers, spilled ones and bytes of scratch memory, and the loads."""
    names = "vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"
    registers, *spills = (int(re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"])[1]) for name in names)
    return registers, sum(spills), amd_loads(asm["amdgcn"])


def rows_of(task: tuple[str, str]) -> list[Row]:
    """The rows of a configuration on a target."""
    name, target = task
    rows = {}
    with record_launches() as launches:
        configurations()[name]()
    for launch in launches:
        compiled = compile_launch(launch, TARGETS[target])
        registers, spills, loads = (_cuda_usage if "cubin" in compiled.asm else _amd_usage)(compiled.asm)
        row = Row(
            kernel=launch.kernel.__name__.removeprefix("_").removesuffix("_kernel"), configuration=name, target=target,
            num_warps=launch.num_warps, registers=registers, spills=spills, shared_bytes=compiled.metadata.shared,
            global_loads=len(loads), vector_loads_16b=sum(size >= 16 for size in loads), triton=triton.__version__,
        )  # fmt: skip
        assert row.key not in rows, f"{row.key} is launched twice"
        rows[row.key] = row
    return list(rows.values())


def measure() -> list[Row]:
    """Measures the whole table, in two processes."""
    tasks = [(name, target) for name in configurations() for target in TARGETS]
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        rows = [row for part in pool.imap_unordered(rows_of, tasks) for row in part]
    targets = list(TARGETS)
    return sorted(rows, key=lambda row: (row.kernel, row.configuration, targets.index(row.target)))


def write(rows: list[Row], file: Path = TABLE) -> None:
    """Writes a table."""
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(file: Path = TABLE) -> list[Row]:
    """Reads a table."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [Row(**{field.name: field.type(row[field.name]) for field in fields(Row)}) for row in csv.DictReader(lines)]


def problems(row: Row) -> list[str]:
    """What is wrong with a row, independently of earlier rows."""
    found = []
    if row.spills:
        found.append(f"spills {row.spills}, not 0")
    if row.shared_bytes > SHARED_LIMIT[row.target]:
        found.append(f"shared_bytes {row.shared_bytes}: the limit is {SHARED_LIMIT[row.target]}")
    if row.must_vectorise and not row.vector_loads_16b:
        found.append("no 16-byte load, though its rows are contiguous")
    return found


def regressions(expected: list[Row], actual: list[Row]) -> list[str]:
    """One line for each row of `actual` that is worse than in `expected`, is missing, or is not there yet."""
    before, now = {row.key: row for row in expected}, {row.key: row for row in actual}
    found = {key: ["missing"] for key in before if key not in now}
    for key, row in now.items():
        reasons = problems(row)
        if (old := before.get(key)) is None:
            reasons.append("not in the table: make kernel-table")
        else:
            if row.vector_loads_16b < old.vector_loads_16b:
                reasons.append(f"vector_loads_16b {row.vector_loads_16b}, was {old.vector_loads_16b}")
            if row.triton == old.triton and row.registers > old.registers + MORE_REGISTERS:
                reasons.append(f"registers {row.registers}, was {old.registers}")
        if reasons:
            found[key] = reasons
    return [
        f"{kernel} [{configuration}] {target}: {'; '.join(found[kernel, configuration, target])}" for kernel, configuration, target in found
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_resources", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help=f"compare with {TABLE.name} instead of rewriting it")
    check = parser.parse_args(argv).check
    if interpreted():
        print("TRITON_INTERPRET is set: the kernels would be interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    rows = measure()
    found = regressions(read() if check else rows, rows)
    if not check:
        write(rows)
    for line in found:
        print(line)
    print(f"{len(rows)} rows, {len(found)} with something wrong; Triton {triton.__version__}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
