"""Gradient checkpointing: of a UNet's blocks, backward is left the inputs and computes the rest again."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint


def checkpoint_gradients(unet: UNet2DConditionModel, context: Callable[[], AbstractContextManager]) -> None:
    """Makes a UNet keep, of its residual blocks and transformers, only the inputs for backward, which runs them again.

    They run again inside of `context()`, what the caller's forward pass runs in besides autocast, which is restored by itself.
    Non-reentrant, so that the gradient reaches weights behind inputs that have none; and nothing in a UNet here draws random numbers.
    """

    def run(module, *args):
        contexts = lambda: (nullcontext(), context())  # noqa: E731
        return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    unet.enable_gradient_checkpointing(run)
