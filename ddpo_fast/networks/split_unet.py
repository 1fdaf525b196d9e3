"""A UNet's forward pass in two parts: the prefix, before the first trained layer, and the rest, which can start from the prefix's tensors.

The UNet's own forward runs both parts, so that no code of diffusers is repeated here. It calls stages one after the other: conv_in, each
down, mid and up block. These are changed to a subclass whose call can return the tensors of an earlier call. `undo` leaves nothing behind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ddpo_fast.networks.patch import patch, unpatch

ALIGNMENT = 64
"""Where rows are stored, every kept tensor of a row starts at a multiple of this number of bytes."""
_BEHIND_STAGES = ("conv_norm_out", "conv_out")
"""What a UNet runs after its last stage. Everything else outside the stages (the embeddings) may feed all of them."""


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a kept tensor takes where it is stored."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


class _Stage:
    """Mixed into the class of a stage. It replaces `__call__`, not `forward`, so that a compiled stage stays compiled."""

    def __call__(self, *args, **kwargs):
        handler = self.split.handler
        call = super().__call__
        return call(*args, **kwargs) if handler is None else handler(self, call, args, kwargs)


class _PrefixDone(Exception):
    """The prefix has run; the rest is not wanted."""


class SplitUNet:
    """Splits a UNet, which can then run in three ways: `recording` the prefix's tensors, `replaying` them, or as `run_prefix` alone.

    The prefix is all stages that the UNet calls before the first one with a trained parameter. The outputs that the rest takes as
    arguments are kept. There is no prefix if the first stage has a trained parameter, or if one outside the stages may feed all of them.
    """

    def __init__(self, unet: nn.Module, call: Callable[[int], Tensor]):
        """`call(R)` runs the UNet on R rows as it will be run, with the same values every time.

        Raises ValueError if the rest of this UNet cannot run from the prefix's tensors. This is tried, and must give the same bits.
        """
        self.unet, self.handler = unet, None
        children = dict(unet.named_children())
        blocks = [*children["down_blocks"], children.get("mid_block"), *children["up_blocks"]]
        self.stages = [stage for stage in (children["conv_in"], *blocks) if stage is not None]
        for stage in self.stages:
            patch(stage, _Stage, split=self)
        self.prefix: dict[nn.Module, TreeSpec] = {}
        """The prefix's stages in the order that they are called, and the structure of their outputs."""
        self.shapes: dict[nn.Module, list[torch.Size]] = {}
        """The shapes of the tensors in each stage's output, without the row dimension."""
        self.sources: dict[nn.Module, list[tuple[nn.Module, int]]] = {}
        """Which output first had each tensor: a block's result may also be among the tensors that it leaves for a later block."""
        self.wanted: list[tuple[nn.Module, int]] = []
        """The kept tensors, each as a stage and n: it is the n-th tensor of the stage's output."""
        try:
            with torch.no_grad():
                self._trace(call)
                if self.wanted and not isinstance(next(unet.parameters()), FakeTensor):
                    self._try(call)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Makes the stages what they were."""
        for stage in self.stages:
            unpatch(stage, _Stage)

    def compile(self) -> None:
        """Compiles every stage by itself: a UNet that is compiled as a whole could not be split."""
        for stage in self.stages:
            stage.compile()

    def _trace(self, call: Callable[[int], Tensor]) -> None:
        inside = {parameter for stage in self.stages for parameter in stage.parameters()}
        outside = (name for name, p in self.unet.named_parameters() if p.requires_grad and p not in inside)
        if any(name.split(".")[0] not in _BEHIND_STAGES for name in outside):
            return
        made, used, called, rest = {}, set(), [], False

        def handler(stage, call, args, kwargs):
            nonlocal rest
            rest = rest or any(parameter.requires_grad for parameter in stage.parameters())
            called.append(stage)
            if rest:
                used.update(made[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in made)
                return call(*args, **kwargs)
            out = call(*args, **kwargs)
            leaves, self.prefix[stage] = tree_flatten(out)
            self.shapes[stage] = [leaf.shape[1:] for leaf in leaves]
            self.sources[stage] = [made.setdefault(id(leaf), (stage, n)) for n, leaf in enumerate(leaves)]
            alive.append(leaves)  # so that no other tensor gets its id
            return out

        alive = []
        with self._handling(handler):
            call(2)
        if len(called) != len(set(called)):
            raise ValueError("this UNet calls a block twice")
        self.wanted = [(stage, n) for stage in self.prefix for n in range(len(self.shapes[stage])) if (stage, n) in used]
        if self.prefix and not self.wanted:
            raise ValueError("this UNet changes what its blocks return before the next one takes it, so it cannot be split")

    def _try(self, call: Callable[[int], Tensor]) -> None:
        with self.recording() as kept:
            straight = call(2)
        with self.replaying(kept):
            replayed = call(2)
        if not torch.allclose(straight, replayed, rtol=0, atol=0, equal_nan=True):
            raise ValueError("this UNet does more between its blocks than pass on what they return, so it cannot be split")

    @contextmanager
    def _handling(self, handler: Callable) -> Iterator[None]:
        self.handler = handler
        try:
            yield
        finally:
            self.handler = None

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Inside, a call of the UNet adds the kept tensors, (R, ...) each, to the list."""
        kept = []

        def handler(stage, call, args, kwargs):
            out = call(*args, **kwargs)
            if stage in self.prefix:
                leaves = tree_leaves(out)
                kept.extend(leaves[n] for owner, n in self.wanted if owner is stage)
            return out

        with self._handling(handler):
            yield kept

    @contextmanager
    def replaying(self, kept: list[Tensor]) -> Iterator[None]:
        """Inside, a call of the UNet on as many rows runs only the rest, from these tensors. It does not use the latents' values."""
        known = dict(zip(self.wanted, kept))
        nowhere = kept[0].new_full((), torch.nan)

        def handler(stage, call, args, kwargs):
            if stage not in self.prefix:
                return call(*args, **kwargs)
            leaves = [
                known[source] if source in known else nowhere.expand(len(kept[0]), *shape)
                for source, shape in zip(self.sources[stage], self.shapes[stage])
            ]
            return tree_unflatten(leaves, self.prefix[stage])

        with self._handling(handler):
            yield

    def run_prefix(self, call: Callable[[], object]) -> list[Tensor]:
        """The kept tensors of a call of the UNet that ends where the rest begins."""

        def stop(stage, call, args, kwargs):
            if stage not in self.prefix:
                raise _PrefixDone
            return recorder(stage, call, args, kwargs)

        with torch.no_grad(), self.recording() as kept:
            recorder, self.handler = self.handler, stop
            try:
                call()
            except _PrefixDone:
                pass
        return kept
