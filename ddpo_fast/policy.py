"""The diffusion model as a policy: loading, LoRA, text encoding, noise prediction, decoding."""

import json
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers

transformers.logging.set_verbosity_error()  # it warns that torchvision is missing, for image processors that are not used here
transformers.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()

from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ddpo_fast.files import new_folder
from ddpo_fast.gradient_checkpointing import checkpoint_gradients
from ddpo_fast.lora import set_trainable
from ddpo_fast.merged_lora import merge
from ddpo_fast.shared_guidance import SharedGuidance

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Policy:
    """A Stable Diffusion pipeline whose UNet is trained, by LoRA or whole.

    The UNet is called directly until `attach` gives it the engine's wrapper, after which rollout and update both run through
    that. Trainable weights are fp32, frozen ones in the compute dtype; autocast joins them.
    """

    decode_batch = 16
    """Pictures that the VAE decodes together."""
    offload_text_encoder = False
    """Whether the text encoder is on the device only while it is needed."""

    def __init__(self, path: str, dtype: str, device: torch.device, scope: str, targets: list[str], rank: int, alpha: float):
        self.device, self.dtype = device, DTYPES[dtype]
        try:
            self.pipe = StableDiffusionPipeline.from_pretrained(
                path, dtype=self.dtype, use_safetensors=True, safety_checker=None, requires_safety_checker=False
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"model.path={path}: {' '.join(str(error).split())}") from error
        unet = self.pipe.unet.config
        if unet.addition_embed_type is not None or unet.in_channels != self.pipe.vae.config.latent_channels:
            raise ValueError(f"model.path={path}: its UNet takes more than latents, time and text; valid is SD 1.x or 2.x text-to-image")
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        for module in (self.pipe.vae, self.pipe.text_encoder, self.pipe.unet):
            module.requires_grad_(False).eval()
        self.unet, self.forward = self.pipe.unet, self.pipe.unet
        self.full = scope == "none"
        set_trainable(self.unet, scope, targets, rank, alpha)
        self.merged_layers: list[nn.Module] = []
        self.guidance: AbstractContextManager = nullcontext()
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (self.unet.config.in_channels, height, width)
        self._prompt_embeds: dict[str, Tensor] = {}
        self.uncond_embeds = self.encode_prompts([""])

    def attach(self, forward: nn.Module, partitioned: bool = False) -> None:
        """Runs the UNet through `forward`, an engine's wrapper of it, from now on, frozen convolutions in channels_last layout.

        That layout takes 5 % off an iteration of the embedded model on a CPU (bench.waterfall). DeepSpeed's start wants the ordinary one,
        and so do weights that are partitioned, which are gathered anew for every call.
        """
        self.forward = forward
        for parameter in self.unet.parameters():
            if parameter.dim() == 4 and not parameter.requires_grad and not partitioned:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def merge_lora(self) -> None:
        """Makes the UNet compute with LoRA's update merged into a copy of its weights, see `merged_lora.merge`, from now on."""
        self.merged_layers = merge(self.unet)

    def checkpoint_gradients(self) -> None:
        """Makes the UNet keep only the inputs of its residual blocks and transformers for backward, which computes them again."""
        checkpoint_gradients(self.unet, lambda: self.guidance)

    def share_guidance(self) -> None:
        """Makes `predict_noise`, which must be given both branches from now on, compute once what they have in common.

        Raises ValueError, see `SharedGuidance`.
        """
        self.guidance = SharedGuidance(self.unet, partial(self.example_call, 2))

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Text embeddings (B, L, E) in the compute dtype. Each prompt is encoded once and alone: no batch changes its embedding."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompt_embeds]:
            self.pipe.text_encoder.to(self.device)
            for prompt in new:
                self._prompt_embeds[prompt] = self.pipe.encode_prompt(prompt, self.device, 1, False)[0].cpu()
            if self.offload_text_encoder:
                self.pipe.text_encoder.to("cpu")
        return torch.cat([self._prompt_embeds[prompt] for prompt in prompts]).to(self.device)

    def predict_noise(self, unet_input: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """The UNet's output for every row, in rollout and update alike, before guidance.

        unet_input (R, C, H, W) latents in the compute dtype, timesteps (R,) int64, prompt_embeds (R, L, E). Returns (R, C, H, W) in
        the compute dtype; what it predicts (noise, v, picture) is the scheduler's prediction_type. With guidance the first half of the
        rows are unconditional; `ddim_step` and `ppo_loss` combine the halves.
        """
        for layer in self.merged_layers:
            layer.refresh()  # here, because a compiled UNet cannot
        with self.guidance, torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16)):
            return self.forward(unet_input, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]

    @torch.no_grad()
    def predict_reference_noise(self, *inputs: Tensor) -> Tensor:
        """`predict_noise` of the model as it was before training, without a gradient: LoRA is switched off, merged or not."""
        self.unet.disable_adapters()
        try:
            return self.predict_noise(*inputs)
        finally:
            self.unet.enable_adapters()

    @torch.no_grad()
    def example_call(self, num_rows: int) -> Tensor:
        """`predict_noise` of the same arbitrary rows every time, an even number: the same latents with two embeddings."""
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(num_rows // 2, *self.latent_shape, generator=generator).repeat(2, 1, 1, 1).to(self.device, self.dtype)
        timesteps = torch.full((num_rows,), 500, device=self.device)
        embeds = self.uncond_embeds.repeat(num_rows, 1, 1)
        embeds[num_rows // 2 :].neg_()
        return self.predict_noise(latents, timesteps, embeds)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) fp32 in [0, 1] of final latents (B, C, h, w)."""
        vae = self.pipe.vae
        parts = (latents.to(vae.dtype) / vae.config.scaling_factor).split(self.decode_batch)
        return torch.cat([(vae.decode(part, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1) for part in parts])

    def export(self, folder: Path) -> None:
        """Writes <folder>/lora for `pipe.load_lora_weights`, or, fully fine-tuned, <folder>/unet for `UNet2DConditionModel`."""
        if self.full:
            with new_folder(folder / "unet") as target:
                self.unet.save_pretrained(target)
            return
        with new_folder(folder / "lora") as target:
            StableDiffusionPipeline.save_lora_weights(
                target,
                unet_lora_layers=get_peft_model_state_dict(self.unet),
                unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),
            )


def check_model_class(path: str) -> None:
    """Raises ValueError for a local folder that is not a Stable Diffusion 1.x or 2.x pipeline."""
    index = Path(path, "model_index.json")
    if not index.is_file():
        return  # a hub id: from_pretrained will tell
    try:
        name = json.loads(index.read_text()).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"model.path={path}: model_index.json cannot be read: {error}") from None
    if name != "StableDiffusionPipeline":
        raise ValueError(f"model.path={path}: it holds a {name}; valid is a StableDiffusionPipeline (SD 1.x or 2.x)")
