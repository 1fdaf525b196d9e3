"""The kernels as compiled ahead of time for four architectures are what bench/results/kernel_resources.csv says, or better."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture
def kernel_resources(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench import kernel_resources

    return kernel_resources


def run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.kernel_resources", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=7200)


def test_no_kernel_got_worse():
    result = run("--check", environment=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_interpreted_kernels_are_not_measured():
    result = run("--check", environment=ENVIRONMENT | {"TRITON_INTERPRET": "1"})
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr and not result.stdout


@pytest.mark.parametrize(
    "before, now, reason",
    [
        ({}, {"spills": 4}, "spills 4"),
        ({"spills": 4}, {"spills": 4}, "spills 4"),
        ({"vector_loads_16b": 7}, {}, "vector_loads_16b 6, was 7"),
        ({"vector_loads_16b": 0}, {"vector_loads_16b": 0}, "no 16-byte load"),
        ({"registers": 31}, {}, "registers 40, was 31"),
        ({}, {"shared_bytes": 163 * 1024 + 1}, "shared_bytes 166913: the limit is 166912"),
        ({"configuration": "another"}, {}, "not in the table"),
    ],
)
def test_a_worse_row_is_named(kernel_resources, before, now, reason):
    good = kernel_resources.Row("op_fwd", "8x8 fp16", "sm_80", 8, 40, 0, 1024, 12, 6, "3.9.0")
    expected, actual = dataclasses.replace(good, **before), dataclasses.replace(good, **now)
    lines = kernel_resources.regressions([expected], [actual])
    assert any(line.startswith("op_fwd [8x8 fp16] sm_80: ") and reason in line for line in lines)


def test_a_row_that_is_gone_is_named(kernel_resources):
    rows = kernel_resources.read()
    assert kernel_resources.regressions(rows[:1], []) == [f"{rows[0].kernel} [{rows[0].configuration}] {rows[0].target}: missing"]


@pytest.mark.parametrize(
    "before, now",
    [
        ({}, {}),
        ({"registers": 32}, {}),
        ({"registers": 10, "triton": "3.8.0"}, {}),
        ({"vector_loads_16b": 5, "registers": 60, "shared_bytes": 0}, {}),
        ({"configuration": "3x5 odd", "vector_loads_16b": 0}, {"configuration": "3x5 odd", "vector_loads_16b": 0}),
        ({"target": "sm_90"}, {"target": "sm_90", "shared_bytes": 200 * 1024}),
    ],
)
def test_what_is_no_worse_passes(kernel_resources, before, now):
    good = kernel_resources.Row("op_fwd", "8x8 fp16", "sm_80", 8, 40, 0, 1024, 12, 6, "3.9.0")
    assert kernel_resources.regressions([dataclasses.replace(good, **before)], [dataclasses.replace(good, **now)]) == []


def test_a_table_is_read_as_it_was_written(kernel_resources, tmp_path):
    rows = kernel_resources.read()
    kernel_resources.write(rows, tmp_path / "table.csv")
    assert kernel_resources.read(tmp_path / "table.csv") == rows and rows
    assert {row.target for row in rows} == set(kernel_resources.TARGETS)


def test_loads_are_counted_by_their_width(kernel_resources):
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd1 + 0 ];
        ld.global.nc.v8.b32 { %r1 }, [ %rd2 + 0 ];
        ld.global.v2.b32 { %r1, %r2 }, [ %rd2 + 0 ];
        ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r1 ];
    """
    assert kernel_resources.cuda_loads(ptx) == [16, 16, 32, 8, 2]
    amdgcn = "global_load_dwordx4 v[0:3]\n buffer_load_dword v1\n buffer_load_ushort v1\n flat_load_dwordx2 v[0:1]\n ds_read_b128 v[0:3]"
    assert kernel_resources.amd_loads(amdgcn) == [16, 4, 2, 8]
