"""Gradient checkpointing: a UNet's blocks keep only their inputs for backward, which computes the rest again."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint


def checkpoint_gradients(unet: UNet2DConditionModel, context: Callable[[], AbstractContextManager]) -> None:
    """Makes a UNet keep only the inputs of its residual blocks and transformers for backward, which runs these again.

    They run again inside `context()`, the context of the caller's forward pass. torch restores autocast itself. The checkpoints are
    non-reentrant, so that weights get a gradient also where the inputs need none. They keep no random state, because nothing in a UNet
    here draws random numbers.
    """

    def run(module, *args):
        contexts = lambda: (nullcontext(), context())  # noqa: E731
        return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    unet.enable_gradient_checkpointing(run)
