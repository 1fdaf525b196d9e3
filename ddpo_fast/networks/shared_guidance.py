"""Guidance runs the UNet on every latent twice, with the prompt and without. Layers before the first use of the prompt need to run once.

The modules that finish before the first cross-attention begins are changed to a subclass that can compute the first half of the rows
and return it twice. A module keeps its parameters, its name and its place, and `undo` leaves nothing behind.
"""

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ddpo_fast.networks.patch import patch, unpatch

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How much sharing may change the UNet's output: norm(change) / norm(output). It changes the rounding, which depends on the batch."""


class _Shared:
    """Mixed into a module's class. Rows are [unconditional; conditional], and up to here both halves are the same."""

    def __call__(self, *args, **kwargs):
        if not self.shared_guidance.active:
            return super().__call__(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda x: x[: len(x) // 2], (args, kwargs))
        out, twice = super().__call__(*args, **kwargs), {}
        for leaf in tree_leaves(out):  # a block may return one tensor in two places
            if id(leaf) not in twice:
                twice[id(leaf)] = torch.cat([leaf, leaf])
        return tree_map_only(Tensor, lambda x: twice[id(x)], out)


def _before_cross_attention(unet: nn.Module, call: Callable[[], object]) -> list[nn.Module]:
    """The outermost modules of the UNet's blocks that finish before a call enters a cross-attention for the first time."""
    left, reached = [], False

    def enter(module, args, kwargs):
        nonlocal reached
        given = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        reached = reached or (isinstance(module, Attention) and given is not None)

    def leave(module, args, output):
        if not reached:
            left.append(module)

    stages = [unet.conv_in, *unet.down_blocks]
    hooks = [m.register_forward_pre_hook(enter, with_kwargs=True) for stage in stages for m in stage.modules()]
    hooks += [m.register_forward_hook(leave) for stage in stages for m in stage.modules()]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    inside = {id(child) for module in left for child in module.modules() if child is not module}
    return [module for module in left if id(module) not in inside] if reached else []


class SharedGuidance:
    """A context inside which a UNet computes only once what both branches of guidance have in common.

    Exact up to rounding: in a smaller batch a row may have other bits. Inside, every call must have [unconditional; conditional] rows
    of the same latents and timesteps.
    """

    @torch.no_grad()
    def __init__(self, unet: nn.Module, call: Callable[[], Tensor]):
        """`call()` runs the UNet on such rows, always the same. Raises ValueError if its result is another one inside the context."""
        self.active = False
        self.modules = _before_cross_attention(unet, call) if unet.config.addition_embed_type is None else []
        """The shared modules. There are none if no down block has cross-attention, or if the time embedding has the prompt, as in SDXL."""
        for module in self.modules:
            patch(module, _Shared, shared_guidance=self)
        if isinstance(next(unet.parameters()), FakeTensor):
            return
        straight = call()
        with self:
            shared = call()
        error = ((shared.float() - straight.float()).norm() / straight.float().norm()).item()
        if not error <= TOLERANCE[straight.dtype]:
            self.undo()
            raise ValueError(f"the branches of this UNet differ before its first cross-attention (its output changes by {error:.2g})")

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *_) -> None:
        self.active = False

    def undo(self) -> None:
        """Makes the modules what they were. Later changes of their classes must be undone first."""
        for module in self.modules:
            unpatch(module, _Shared)
