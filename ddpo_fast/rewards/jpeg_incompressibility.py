"""The size of the picture as a JPEG, in kB: DDPO (arXiv:2305.13301) section 5, "incompressibility"."""

from torch import Tensor

from ddpo_fast.scoring.jpeg import jpeg_kilobytes


def jpeg_incompressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """The JPEG size in kB, which is high for pictures full of detail and highest for noise. Returns (B,)."""
    return jpeg_kilobytes(images)
