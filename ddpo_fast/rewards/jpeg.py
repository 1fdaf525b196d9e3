"""JPEG size as a reward: DDPO (arXiv:2305.13301) section 5, "compressibility" and "incompressibility"."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from torch import Tensor

from ddpo_fast.scoring.pixels import to_pixels

QUALITY = 95


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each picture as a JPEG of quality 95, in kB (1,000 bytes), at the picture's own resolution.

    images: (B, 3, H, W) in [0, 1]; rounded to 8 bits. Returns (B,) fp32. OpenCV writes the bytes that Pillow does, frees
    the GIL while it works, and is twice as fast.
    """

    def size(rgb: np.ndarray) -> int:
        return len(cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])

    with ThreadPoolExecutor() as pool:
        return torch.tensor([n / 1000 for n in pool.map(size, to_pixels(images))])


def jpeg_compressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus the JPEG size in kB: pictures that compress well. Returns (B,)."""
    return -jpeg_kilobytes(images)


def jpeg_incompressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """The JPEG size in kB: pictures full of detail, noise in the end. Returns (B,)."""
    return jpeg_kilobytes(images)
