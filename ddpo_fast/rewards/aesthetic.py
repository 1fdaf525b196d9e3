"""How much people like a picture, judged by the LAION aesthetics predictor: DDPO (arXiv:2305.13301) section 5.2, "aesthetic quality"."""

import os
import pickle

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from ddpo_fast.scoring.pretrained import ClipPixels, check_batch_size, check_device, load_model

CLIP = "openai/clip-vit-large-patch14"
WIDTHS = (768, 1024, 128, 64, 16, 1)
LAYERS = (0, 2, 4, 6, 7)
"""The numbers of the predictor's linear layers in its file. The numbers between them were dropout in training."""
_VALID = (
    "the file sac+logos+ava1-l14-linearMSE.pth, or its tensors as .safetensors: download it from "
    "https://github.com/christophschuhmann/improved-aesthetic-predictor and give its path, anywhere on this machine"
)


class Aesthetic:
    """The score of a picture, on a scale of 1 to 10: W5 (W4 (W3 (W2 (W1 z + b1) + b2) + b3) + b4) + b5, all in fp32, where z is CLIP
    ViT-L/14's image embedding divided by its L2 norm, and the layers have 1024, 128, 64, 16 and 1 outputs."""

    def __init__(
        self,
        weights: str | None = None,
        clip: str = CLIP,
        device: str = "auto",
        dtype: str = "fp32",
        batch_size: int = 32,
    ):
        """weights: the predictor's file. clip: folder or hub id. device: auto is the pictures' device. dtype: CLIP's, fp32, fp16 or bf16.

        Raises ValueError for what is missing or damaged, before it is needed.
        """
        if weights is None:
            raise ValueError(f"reward.kwargs.weights=None: valid is {_VALID}")
        self.predictor = load_predictor(weights)
        self.device, self.batch_size = check_device(device), check_batch_size(batch_size)
        self.pixels = ClipPixels(clip, "reward.kwargs.clip")
        model = load_model(CLIPModel, clip, "reward.kwargs.clip", f"CLIP ViT-L/14: {CLIP}, or a folder with it", dtype)
        if (width := model.config.projection_dim) != WIDTHS[0]:
            raise ValueError(f"reward.kwargs.clip={clip}: its embedding has {width} elements; valid is CLIP ViT-L/14, which has 768")
        self.encoder, self.projection = model.vision_model, model.visual_projection

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1]; the prompts do not matter. Returns (B,) fp32 on the CPU."""
        device = self.device or images.device
        for module in (self.encoder, self.projection, self.predictor):
            module.to(device)
        return torch.cat([self._score(part.to(device)).cpu() for part in images.split(self.batch_size)])

    def _score(self, images: Tensor) -> Tensor:
        embedding = self.projection(self.encoder(self.pixels(images).to(self.projection.weight.dtype)).pooler_output)
        return self.predictor(F.normalize(embedding.float()))[:, 0]


def load_predictor(path: str) -> nn.Sequential:
    """The predictor's five layers, fp32, from its file. Raises ValueError if the file is missing, damaged or of another model."""
    option = f"reward.kwargs.weights={path}"
    if not os.path.isfile(path):
        raise ValueError(f"{option}: there is no such file; valid is {_VALID}")
    try:
        if path.endswith(".safetensors"):
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{option}: cannot be read ({type(error).__name__}); valid is {_VALID}") from error
    predictor = nn.Sequential(*(nn.Linear(n_in, n_out) for n_in, n_out in zip(WIDTHS, WIDTHS[1:])))
    names = {f"{i}.{kind}": f"layers.{layer}.{kind}" for i, layer in enumerate(LAYERS) for kind in ("weight", "bias")}
    for key, parameter in predictor.state_dict().items():
        if shapes.get(names[key]) != tuple(parameter.shape):
            raise ValueError(f"{option}: {names[key]} has shape {shapes.get(names[key])}, not {tuple(parameter.shape)}; valid is {_VALID}")
    predictor.load_state_dict({key: tensors[name] for key, name in names.items()})
    return predictor.requires_grad_(False)
