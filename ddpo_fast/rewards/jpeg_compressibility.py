"""Minus the size of the picture as a JPEG, in kB: DDPO (arXiv:2305.13301) section 5, "compressibility"."""

from torch import Tensor

from ddpo_fast.scoring.jpeg import jpeg_kilobytes


def jpeg_compressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus the JPEG size in kB, which is highest for pictures that compress well. Returns (B,)."""
    return -jpeg_kilobytes(images)
