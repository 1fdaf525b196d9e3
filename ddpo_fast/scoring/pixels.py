"""Pictures as 8-bit pixels and as PNG files."""

import io

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 2**27
"""Most pixels of all pictures of a batch together: 512 pictures of 512x512. A PNG file of a few kB can claim to have more."""


def to_pixels(images: Tensor) -> np.ndarray:
    """images (B, 3, H, W) in [0, 1], rounded to 8 bits: (B, H, W, 3) uint8."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def encode_png(images: Tensor) -> list[bytes]:
    """Each picture as a PNG file."""
    return [cv2.imencode(".png", rgb[:, :, ::-1])[1].tobytes() for rgb in to_pixels(images.nan_to_num())]


def decode_png(files: list[bytes]) -> Tensor:
    """PNG files of one size as images (B, 3, H, W) fp32 in [0, 1]. Raises ValueError for anything else."""
    try:
        pictures = [Image.open(io.BytesIO(file), formats=["PNG"]) for file in files]  # reads no more than the header
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a PNG file: {error}") from None
    (width, height), *others = {picture.size for picture in pictures}
    if others or width * height * len(files) > MAX_PIXELS:
        raise ValueError(f"valid are pictures of one size, of no more than {MAX_PIXELS} pixels together")
    try:
        pixels = np.stack([picture.convert("RGB") for picture in pictures])
    except (OSError, SyntaxError) as error:
        raise ValueError(f"a damaged PNG file: {error}") from None
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
