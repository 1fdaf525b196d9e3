"""The diffusion model as a policy: loading, LoRA, text encoding, noise prediction, decoding."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ddpo_fast.config.options import LoraConfig
from ddpo_fast.dtypes import DTYPES
from ddpo_fast.files import new_folder
from ddpo_fast.memory import num_kept_prompts
from ddpo_fast.networks.gradient_checkpointing import checkpoint_gradients
from ddpo_fast.networks.lora import set_trainable
from ddpo_fast.networks.merged_lora import merge
from ddpo_fast.networks.shared_guidance import SharedGuidance
from ddpo_fast.pipelines.folders import Model, StableDiffusionXLPipeline, open_pipeline


class Policy:
    """A Stable Diffusion pipeline (1.x, 2.x or XL) whose UNet is trained, by LoRA or whole.

    The UNet is called directly until `attach` gives it the engine's wrapper, after which rollout and update both run through
    that. Trainable weights are fp32, frozen ones in the compute dtype; autocast joins them.
    """

    decode_batch = 16
    """Pictures that the VAE decodes together."""
    offload_text_encoder = False
    """Whether the text encoders are on the device only while they are needed."""

    def __init__(self, model: Model, dtype: str, device: torch.device, lora: LoraConfig):
        self.device, self.dtype = device, DTYPES[dtype]
        self.pipe, self.notes = open_pipeline(model, self.dtype), model.notes
        self.variant = next((weights.variant for weights in model.weights.values() if weights.variant is not None), None)
        self.is_sdxl = isinstance(self.pipe, StableDiffusionXLPipeline)
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.text_encoders = [self.pipe.text_encoder, *([self.pipe.text_encoder_2] if self.is_sdxl else [])]
        for module in (self.pipe.vae, *self.text_encoders, self.pipe.unet):
            module.requires_grad_(False).eval()
        self.unet, self.forward = self.pipe.unet, self.pipe.unet
        self.full = lora.scope == "none"
        set_trainable(self.unet, lora.scope, lora.targets, lora.rank, lora.alpha)
        self.merged_layers: list[nn.Module] = []
        self.guidance: AbstractContextManager = nullcontext()
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (self.unet.config.in_channels, height, width)
        height, width = (self.pipe.vae_scale_factor * size for size in (height, width))
        self.time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=self.dtype)
        """(1, 6), SDXL's: the size that a picture was made from, its crop's upper left corner, its size."""
        self._prompt_embeds: dict[str, list[Tensor]] = {}
        """The last used last, see `num_kept_prompts`."""
        self.uncond_embeds, self.uncond_pooled_embeds = self.encode_prompts([""]), self.pool_prompts([""])
        if self.is_sdxl and self.pipe.config.force_zeros_for_empty_prompt:
            self.uncond_embeds.zero_()
            self.uncond_pooled_embeds.zero_()

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
        """Text embeddings (B, L, E) in the compute dtype. Each prompt is encoded alone: no batch changes its embedding."""
        return torch.cat([embeds[0] for embeds in self._encode(prompts)]).to(self.device)

    def pool_prompts(self, prompts: list[str]) -> Tensor | None:
        """SDXL's pooled text embeddings (B, P) in the compute dtype, made along with those of `encode_prompts`; None for SD 1.x and 2.x."""
        return torch.cat([embeds[1] for embeds in self._encode(prompts)]).to(self.device) if self.is_sdxl else None

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> list[list[Tensor]]:
        """Of each prompt, its embeddings (1, L, E) and, for SDXL, the pooled ones (1, P), on the host, where the last used are kept."""
        distinct, kept = dict.fromkeys(prompts), self._prompt_embeds
        if new := [prompt for prompt in distinct if prompt not in kept]:
            for encoder in self.text_encoders:
                encoder.to(self.device)
            for prompt in new:
                encoded = self.pipe.encode_prompt(prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
                kept[prompt] = [encoded[index].cpu() for index in ((0, 2) if self.is_sdxl else (0,))]
            if self.offload_text_encoder:
                for encoder in self.text_encoders:
                    encoder.to("cpu")
        for prompt in distinct:
            kept[prompt] = kept.pop(prompt)  # a dict is in the order of insertion
        most = num_kept_prompts(sum(tensor.nbytes for tensor in kept[prompt]), len(distinct))
        for dropped in list(kept)[:-most]:
            del kept[dropped]
        return [kept[prompt] for prompt in prompts]

    def predict_noise(self, unet_input: Tensor, timesteps: Tensor, prompt_embeds: Tensor, pooled_embeds: Tensor | None = None) -> Tensor:
        """The UNet's output for every row, in rollout and update alike, before guidance.

        unet_input (R, C, H, W) latents in the compute dtype, timesteps (R,) int64, prompt_embeds (R, L, E), of SDXL pooled_embeds (R, P).
        Returns (R, C, H, W) in the compute dtype; what it predicts (noise, v, picture) is the scheduler's prediction_type. With guidance
        the first half of the rows are unconditional; `ddim_step` and `ppo_loss` combine the halves.
        """
        added = None
        if pooled_embeds is not None:
            added = {"text_embeds": pooled_embeds, "time_ids": self.time_ids.expand(len(unet_input), -1)}
        for layer in self.merged_layers:
            layer.refresh()  # here, because a compiled UNet cannot
        with self.guidance, torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16)):
            return self.forward(unet_input, timesteps, encoder_hidden_states=prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]

    def texts_with_empty(self, prompt_embeds: Tensor, pooled_embeds: Tensor | None) -> list[Tensor]:
        """What the UNet is given of the empty prompt and, after it, of each sample's: embeddings and, of SDXL, pooled ones."""
        texts = [torch.cat([self.uncond_embeds, prompt_embeds])]
        if pooled_embeds is not None:
            texts.append(torch.cat([self.uncond_pooled_embeds, pooled_embeds]))
        return texts

    @torch.no_grad()
    def predict_under(self, anchor: str, *inputs: Tensor) -> Tensor:
        """`predict_noise` under other weights, without a gradient.

        "reference": the bare model. LoRA is switched off, merged or not, also what lora.init put there.
        """
        assert anchor == "reference", anchor
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
        texts = [self.uncond_embeds.repeat(num_rows, 1, 1)]
        if self.uncond_pooled_embeds is not None:
            texts.append(self.uncond_pooled_embeds.repeat(num_rows, 1))
        for text in texts:
            text[num_rows // 2 :] += 1  # SDXL's first half may be zeros
        return self.predict_noise(latents, timesteps, *texts)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) fp32 in [0, 1] of final latents (B, C, h, w)."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor
        if vae.config.latents_mean is not None and vae.config.latents_std is not None:
            mean, std = (latents.new_tensor(numbers)[:, None, None] for numbers in (vae.config.latents_mean, vae.config.latents_std))
            latents = latents * std + mean
        parts = latents.split(self.decode_batch)
        return torch.cat([(vae.decode(part, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1) for part in parts])

    @property
    def exported_as(self) -> str:
        """The folder that `export` writes."""
        return "unet" if self.full else "lora"

    def export(self, folder: Path) -> None:
        """Writes <folder>/lora for `pipe.load_lora_weights`, or, fully fine-tuned, <folder>/unet for `UNet2DConditionModel`."""
        if self.full:
            with new_folder(folder / "unet") as target:
                self.unet.save_pretrained(target)
            return
        with new_folder(folder / "lora") as target:
            self.pipe.save_lora_weights(
                target,
                unet_lora_layers=get_peft_model_state_dict(self.unet),
                unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),
            )

    def load_exported(self, folder: Path) -> None:
        """Takes the trained weights that `export` wrote to `folder`. Raises ValueError if there are none, or others."""
        path = folder / ("unet/diffusion_pytorch_model.safetensors" if self.full else "lora/pytorch_lora_weights.safetensors")
        try:
            if self.full:
                self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(path.parent).state_dict())
            else:
                tensors = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}
                unknown = set_peft_model_state_dict(self.unet, tensors).unexpected_keys
                if unknown or len(tensors) != len(self.trainable_parameters()):
                    raise ValueError(f"it has {len(tensors)} tensors, not the {len(self.trainable_parameters())} of this LoRA")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be loaded: {' '.join(str(error).split())}") from None
