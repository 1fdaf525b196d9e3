"""Which weights of a UNet are trained: LoRA on some of its layers, or all of them."""

from peft import LoraConfig
from torch import nn

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolution": ("conv1", "conv2", "conv_shortcut", "conv"),
    "projection": ("proj_in", "proj_out", "time_emb_proj"),
}
"""Ends of the names that diffusers gives the layers inside a UNet's blocks."""


def set_trainable(unet: nn.Module, scope: str, targets: list[str], rank: int, alpha: float) -> None:
    """Makes a frozen UNet trainable, in fp32: all of its weights if the scope is 'none', otherwise a LoRA that is added to it.

    Raises ValueError for a scope that names a block which this UNet lacks, or blocks without layers of the targets.
    """
    if scope == "none":
        unet.requires_grad_(True).float()
        return
    blocks = [name for name, _ in unet.named_modules() if name.count(".") == (0 if name == "mid_block" else 1)]
    blocks = [name for name in blocks if name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")]
    chosen = {
        "all": blocks,
        "mid_up": [name for name in blocks if not name.startswith("down_blocks")],
    }.get(scope, scope.split(","))
    if unknown := set(chosen) - set(blocks):
        raise ValueError(f"lora.scope={scope}: this UNet has no {', '.join(sorted(unknown))}; its blocks are {', '.join(blocks)}")
    ends = tuple(f".{end}" for target in targets for end in LORA_TARGETS[target])
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(ends) and name.startswith(tuple(f"{b}." for b in chosen))
    ]
    if not names:
        raise ValueError(f"lora.scope={scope}: {', '.join(chosen)} have no layers of lora.targets={targets}")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian"))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
