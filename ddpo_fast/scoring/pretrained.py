"""Pretrained networks for rewards: loads transformers' checkpoints, and prepares pictures for CLIP."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()  # `load_model` raises errors of a checkpoint instead, in one line
transformers.logging.disable_progress_bar()

from torch import Tensor, nn
from torch.nn import functional as F

from ddpo_fast.dtypes import DTYPES
from ddpo_fast.pipelines.hub import CONFIGS, check_readable, choose_weights, file_names, in_one_line, local_folder

logger = logging.getLogger(__name__)


def load(from_pretrained: Callable, source: str, option: str, valid: str, **kwargs) -> Any:
    """`from_pretrained(source)` of something without weights. source: a folder or a hub id.

    Raises ValueError, naming the option `option`, if it is not there or not `valid`.
    """
    with _or_valid(valid):
        folder = local_folder(option, source)
        with in_one_line(f"{option}={source}"):
            return from_pretrained(folder, **kwargs)


def load_model(cls: type, source: str, option: str, valid: str, dtype: str, unused: tuple[str, ...] = ()) -> nn.Module:
    """A frozen network on the CPU. The checkpoint has to have all weights except those whose names begin with an entry of `unused`.

    The weights are the plain ones, or the only variant. transformers reads a .bin without running code. Raises ValueError as `load` does.
    """
    if dtype not in DTYPES:
        raise ValueError(f"reward.kwargs.dtype={dtype}: valid is {', '.join(DTYPES)}")
    with _or_valid(valid):
        names = file_names(option, source, local_folder(option, source))
        pickles = [name for name in names if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?", name)]
        has_tensors = any(name.startswith("model.") and ".safetensors" in name for name in names)
        variant, files = (None, pickles) if pickles and not has_tensors else choose_weights(f"{option}={source}", names, "", "model", None)
        if variant:
            logger.warning("%s=%s: the weights of the variant %s are read", option, source, variant)
        folder = local_folder(option, source, [*CONFIGS, *files])
        check_readable(f"{option}={source}", folder, files)
        with in_one_line(f"{option}={source}"):
            model, found = cls.from_pretrained(folder, variant=variant, dtype=DTYPES[dtype], output_loading_info=True)
        if missing := sorted(key for key in found["missing_keys"] if not key.startswith(unused)):
            raise ValueError(f"{option}={source}: {len(missing)} weights are missing, {missing[0]} first")
    return model.requires_grad_(False).eval()


@contextmanager
def _or_valid(valid: str) -> Iterator[None]:
    """Inside, a ValueError's message is extended by what is valid."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; valid is {valid}") from error


def check_device(device: str) -> torch.device | None:
    """The device that an argument `device` names; None for "auto", the pictures' device. Raises ValueError if there is none such here."""
    if device == "auto":
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"reward.kwargs.device={device}: {str(error).splitlines()[0]}; valid is auto, cpu, cuda or cuda:N") from None


def check_batch_size(batch_size: int) -> int:
    """The argument `batch_size`. Raises ValueError if it is not a whole number >= 1."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"reward.kwargs.batch_size={batch_size}: valid is a whole number >= 1")
    return batch_size


class ClipPixels:
    """Does with tensors, on their device, what a CLIP image processor does with a picture by its preprocessor_config.json.

    Rounds to 8 bits, resizes with antialiasing, crops the centre, computes (x - mean) / std for each channel. Like Pillow, it resizes the
    width, then the height, and clamps and rounds after each. In one step, sharp edges would differ by up to 17 of 255 levels.
    """

    def __init__(self, source: str, option: str):
        """Raises ValueError if the folder or hub id `source` has no processor, or one that does something else."""
        valid = "a folder or hub id of a CLIP model with its preprocessor_config.json"
        config, _ = load(transformers.ImageProcessingMixin.get_image_processor_dict, source, option, valid)
        try:
            size, crop = config["size"], config["crop_size"]
            self.shortest_edge = size if isinstance(size, int) else size["shortest_edge"]
            self.crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            self.mode = {2: "bilinear", 3: "bicubic"}[config["resample"]]
            self.mean, self.std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
            if not all(config[f"do_{step}"] for step in ("resize", "center_crop", "normalize")) or self.shortest_edge < max(self.crop):
                raise ValueError
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{option}={source}: its preprocessor_config.json is not that of CLIP; valid is one that resizes the shortest edge "
                "(bicubic or bilinear), crops the centre and normalises"
            ) from None

    def __call__(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1]; returns (B, 3, crop height, crop width) fp32."""
        levels = (images.float() * 255).round().clamp(0, 255)
        height, width = (self.shortest_edge * side // min(levels.shape[2:]) for side in levels.shape[2:])
        for size in ((levels.shape[2], width), (height, width)):
            levels = F.interpolate(levels, size, mode=self.mode, antialias=True).round().clamp(0, 255)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        levels = levels[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        return (levels / 255 - self.mean.to(levels.device)) / self.std.to(levels.device)
