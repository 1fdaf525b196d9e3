"""Which weights of a network are trained: LoRA on some of its layers, or all of them."""

import re

from peft import LoraConfig
from torch import nn

from ddpo_fast.networks.experts import give_experts_gradients

LORA_TARGETS: dict[str, str] = {
    "attention": r"\.(to_[qkv]|to_out|to_out\.0|add_[qkv]_proj|to_add_out|to_(q|k|v|out)_t|to_qkv_mlp_proj)$",
    "feed_forward": r"\.(ff|ff_context|ff_i|ff_t|ffn|feed_forward|img_mlp|txt_mlp)\.|\.proj_mlp$|single_transformer_blocks\.\d+\.proj_out$",
    "modulation": r"\.(norm|norm1|norm1_context)\.linear$|\.(adaLN_modulation|img_mod|txt_mod)\.\d+$",
    "convolution": r"\.(conv1|conv2|conv_shortcut|conv)$",
    "projection": r"\.(attentions\.\d+\.proj_(in|out)|time_emb_proj)$",
}
"""lora.targets, and what diffusers calls such layers inside a network's blocks."""
_UNET = ("down_blocks", "mid_block", "up_blocks")


def set_trainable(network: nn.Module, scope: str, targets: list[str], rank: int, alpha: float) -> None:
    """Makes a frozen network trainable, in fp32: all of its weights if the scope is 'none', otherwise a LoRA that is added to it.

    Raises ValueError for a scope that names a block which this network lacks, or blocks without layers of the targets.
    """
    give_experts_gradients(network)
    if scope == "none":
        network.requires_grad_(True).float()
        return
    names = lora_layers(network, scope, targets)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian"))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_layers(network: nn.Module, scope: str, targets: list[str]) -> list[str]:
    """The names of the layers that get a LoRA: linear layers and convolutions, but not depthwise ones. Raises as `set_trainable` does."""
    chosen = _blocks_of(network, scope)
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and name.startswith(tuple(f"{block}." for block in chosen))
        and any(re.search(LORA_TARGETS[target], name) for target in targets)
    ]
    if not names:
        raise ValueError(f"lora.scope={scope}: {_in_words(chosen)} have no layers of lora.targets={targets}")
    return names


def block_names(network: nn.Module) -> list[str]:
    """The names of a network's blocks, such as transformer_blocks.3, in the order of its lists; a UNet's mid_block is between its lists."""
    children = dict(network.named_children())
    lists = [name for name in _UNET if name in children] or [name for name, child in children.items() if _has_blocks(child)]
    return [block for name in lists for block in ([name] if name == "mid_block" else [f"{name}.{i}" for i in range(len(children[name]))])]


def _has_blocks(child: nn.Module) -> bool:
    """Whether a module is a list of blocks, which have several layers. (HiDream's projections of its captions are a list, too.)"""
    items = child if isinstance(child, nn.ModuleList) else []
    return any(sum(isinstance(module, nn.Linear | nn.Conv2d) for module in item.modules()) > 1 for item in items)


def _blocks_of(network: nn.Module, scope: str) -> list[str]:
    """The blocks that lora.scope names: all, mid_up, last:SHARE, or blocks and ranges of blocks joined by commas."""
    blocks = block_names(network)
    if scope == "all":
        return blocks
    if scope == "mid_up" and "up_blocks.0" in blocks:
        return [name for name in blocks if not name.startswith("down_blocks")]
    if scope.startswith("last:"):
        return blocks[-max(1, round(float(scope.removeprefix("last:")) * len(blocks))) :]
    chosen = []
    for entry in scope.split(","):
        first, _, end = entry.partition("-")
        last = f"{first.rpartition('.')[0]}.{end}" if end else first
        if not {first, last} <= set(blocks) or blocks.index(last) < blocks.index(first):
            raise ValueError(f"lora.scope={scope}: this network has no {entry}; its blocks are {_in_words(blocks)}")
        chosen += blocks[blocks.index(first) : blocks.index(last) + 1]
    return chosen


def _in_words(blocks: list[str]) -> str:
    """'transformer_blocks.0 to .23, mid_block': neighbours of a list are named by the first and the last."""
    runs: list[list[str]] = []
    for block in blocks:
        name, _, index = block.partition(".")
        if runs and index and runs[-1][-1] == f"{name}.{int(index) - 1}":
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to .{run[-1].partition('.')[2]}" for run in runs)
