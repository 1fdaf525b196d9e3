"""The tests marked `rounding` under every instruction set that this CPU has, with one and two threads: as other CPUs would compute.

PyTorch's own kernels are chosen by ATEN_CPU_CAPABILITY, oneDNN's by ONEDNN_MAX_CPU_ISA. What a CPU lacks ends PyTorch with an illegal
instruction and is a lower set, without a word, to oneDNN; so both are asked first what there is. `make test-cpus`; arguments go on to
pytest.
"""

import os
import subprocess
import sys
from pathlib import Path

COMBINATIONS = [  # PyTorch's, oneDNN's, threads
    ("default", "SSE41", 1),
    ("default", "AVX", 2),
    ("avx2", "AVX2", 1),
    ("avx2", "SSE41", 2),
    ("avx512", "AVX512_CORE", 1),
    ("avx512", "AVX512_CORE_BF16", 2),
    ("avx512", "AVX512_CORE_AMX", 1),
]
KERNELS = ["default", "avx2", "avx512"]
ONEDNN = ["SSE41", "AVX", "AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX"]
PROBE = """
import torch
print("capability", torch.backends.cpu.get_cpu_capability().lower())
torch.nn.functional.conv2d(torch.ones(2, 8, 16, 16), torch.ones(8, 8, 3, 3))
"""


def probe(**variables: str) -> tuple[str, str]:
    """The instruction sets that PyTorch and oneDNN choose: by themselves, unless a variable says otherwise."""
    plain = {name: value for name, value in os.environ.items() if name not in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")}
    asked = plain | {"ONEDNN_VERBOSE": "1"} | variables
    lines = subprocess.run([sys.executable, "-c", PROBE], env=asked, capture_output=True, text=True, check=True).stdout.splitlines()
    (kernels,) = [line.split()[1] for line in lines if line.startswith("capability ")]
    (onednn,) = [line.partition(",cpu,isa:")[2] for line in lines if ",cpu,isa:" in line]
    return kernels, onednn


def available() -> tuple[list[str], dict[str, str]]:
    """What this CPU has of KERNELS; of ONEDNN those that are not the one below, with oneDNN's name for them."""
    kernels = KERNELS[: KERNELS.index(probe()[0]) + 1]
    found = {isa: probe(ONEDNN_MAX_CPU_ISA=isa)[1] for isa in ONEDNN}
    return kernels, {isa: found[isa] for isa, below in zip(ONEDNN, [None, *ONEDNN]) if found[isa] != found.get(below)}


def main(arguments: list[str]) -> int:
    (kernels, onednn), results = available(), {}
    for capability, isa, threads in COMBINATIONS:
        variables = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": str(threads)}
        name = " ".join(f"{key}={value}" for key, value in variables.items())
        if capability not in kernels or isa not in onednn:
            results[name] = "not on this CPU, skipped"
            continue
        print(f"\n{name} ({onednn[isa]})", flush=True)
        command = [sys.executable, "-m", "pytest", "-m", "rounding and not slow", "--benchmark-disable"]
        command += ["-n", "2", "--dist", "loadfile"] if threads == 1 else []  # two cores in either case
        code = subprocess.run([*command, *arguments], cwd=Path(__file__).parents[1], env=os.environ | variables).returncode
        results[name] = "passed" if code == 0 else f"FAILED, pytest's exit code {code}"
    print("", *(f"{name}: {result}" for name, result in results.items()), sep="\n")
    return int("passed" not in results.values() or any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
