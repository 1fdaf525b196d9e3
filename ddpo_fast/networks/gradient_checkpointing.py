"""Gradient checkpointing: a network's blocks keep only their inputs for backward, which computes the rest again."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpo_fast.networks.lora import block_names
from ddpo_fast.networks.patch import patch

Context = Callable[[], AbstractContextManager]


class _Checkpointed:
    """Mixed into the class of a block. The whole call runs again: diffusers' own checkpoints leave arguments out, such as Chroma's mask."""

    def __call__(self, *args, **kwargs):
        call = super().__call__
        return _run(self.run_again_in, call, *args, **kwargs) if torch.is_grad_enabled() else call(*args, **kwargs)


def _run(context: Context, call: Callable, *args, **kwargs) -> object:
    contexts = lambda: (nullcontext(), context())  # noqa: E731
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)


def checkpoint_gradients(network: nn.Module, context: Context) -> None:
    """Makes a network keep only the inputs of its blocks for backward, which runs these again: of a UNet, the residual blocks and
    transformers inside its blocks.

    They run again inside `context()`, the context of the caller's forward pass. torch restores autocast itself. The checkpoints are
    non-reentrant, so that weights get a gradient also where the inputs need none. They keep no random state, because nothing in a network
    here draws random numbers.
    """
    if isinstance(network, UNet2DConditionModel):
        network.enable_gradient_checkpointing(lambda module, *args: _run(context, module, *args))
        return
    for name in block_names(network):
        patch(network.get_submodule(name), _Checkpointed, run_again_in=context)
