"""The names that options have for the dtypes that a model computes in."""

import warnings

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def chosen(name: str, on_gpu: bool, on_gpus: str) -> str:
    """The name of a dtype, with auto resolved: `on_gpus`, the family's own, on a GPU, and fp32 on a CPU."""
    return name if name != "auto" else on_gpus if on_gpu else "fp32"


def autocast(device: str, dtype: torch.dtype, is_unet: bool, whole: bool) -> torch.autocast:
    """What a network is called in that computes in `dtype`: a UNet under autocast, a transformer only if all of it is fp32 masters.

    whole: whether the whole network is trained. Around a transformer with 16-bit weights autocast would make its norms fp32.
    """
    if whole and not is_unet:
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # torch's fused norm, which takes no masters
    return torch.autocast(device, dtype, enabled=dtype in (torch.float16, torch.bfloat16) and (is_unet or whole))
