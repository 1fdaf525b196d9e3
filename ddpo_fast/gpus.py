"""What is known about GPUs without having one. Imports only the standard library, so that the command line can check a name at once."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU by its maker's specification: dense matrix products, no sparsity."""

    memory_gib: float
    fp16_tflops: float
    """fp16 and bf16 inputs, fp32 accumulation."""
    fp32_tflops: float
    """Without TF32, which PyTorch leaves off for matrix products."""
    link_gb_s: float
    """To other GPUs of the machine, one way: NVLink, or PCIe where there is none."""


GPUS = {
    "B200": Gpu(179, 2250, 75, 900),
    "H200": Gpu(140, 989, 67, 450),
    "H100": Gpu(80, 989, 67, 450),
    "A100-80GB": Gpu(80, 312, 19.5, 300),
    "A100-40GB": Gpu(40, 312, 19.5, 300),
    "V100-32GB": Gpu(32, 125, 15.7, 150),
    "L40S": Gpu(45, 362, 91.6, 32),
    "L4": Gpu(22, 121, 30.3, 32),
    "T4": Gpu(15, 65, 8.1, 16),
    "RTX-4090": Gpu(24, 165, 82.6, 32),
    "RTX-3090": Gpu(24, 71, 35.6, 32),
    "RTX-3080": Gpu(10, 59.5, 29.8, 32),
}
HERE = "here"


def parse_devices(text: str) -> tuple[int, str] | None:
    """'8xH200' as (8, "H200"), 'H200' as (1, "H200"), 'here' as (1, "here"), in any case; None for any other name or number."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(.+)", text.lower())
    names = {name.lower(): name for name in (*GPUS, HERE)}
    return (int(found[1] or 1), names[found[2]]) if found and found[2] in names else None
