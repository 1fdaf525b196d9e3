"""The size of pictures as JPEG files."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from torch import Tensor

from ddpo_fast.scoring.pixels import to_pixels

QUALITY = 95


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each picture as a JPEG of quality 95, in kB (1,000 bytes), at the picture's own resolution.

    images: (B, 3, H, W) in [0, 1]; rounded to 8 bits. Returns (B,) fp32. OpenCV writes the same bytes as Pillow, frees
    the GIL while it works, and is twice as fast.
    """

    def size(rgb: np.ndarray) -> int:
        return len(cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])

    with ThreadPoolExecutor() as pool:
        return torch.tensor([n / 1000 for n in pool.map(size, to_pixels(images))])
