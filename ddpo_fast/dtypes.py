"""The names that options have for the dtypes that a model computes in."""

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def chosen(name: str, on_gpu: bool) -> str:
    """The name of a dtype, with auto resolved: fp16 on a GPU, fp32 on a CPU."""
    return name if name != "auto" else "fp16" if on_gpu else "fp32"
