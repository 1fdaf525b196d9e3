"""A network's forward pass in two parts: the prefix, before the first trained layer, and the rest, which can start from its tensors.

The network's own forward runs both parts, so that no code of diffusers is repeated here. It calls blocks one after the other. These are
changed to a subclass whose call can be answered without values, or be given tensors of an earlier call. `undo` leaves nothing behind.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ddpo_fast.networks.lora import block_names
from ddpo_fast.networks.patch import patch, unpatch

ALIGNMENT = 64
"""Where rows are stored, every kept tensor of a row starts at a multiple of this number of bytes."""


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a kept tensor takes where it is stored."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, ...) cut or filled up with zeros to (N, *shape): rows of fewer tokens end with some that no other token attends to."""
    if tensor.shape[1:] == tuple(shape):
        return tensor
    common = (slice(None), *(slice(min(sizes)) for sizes in zip(tensor.shape[1:], shape, strict=True)))
    target = tensor.new_zeros(len(tensor), *shape)
    target[common] = tensor[common]
    return target


def is_trained(module: nn.Module) -> bool:
    """Whether a module has a trained parameter."""
    return any(parameter.requires_grad for parameter in module.parameters())


class _Block:
    """Mixed into the class of a block. It replaces `__call__`, not `forward`, so that a compiled block stays compiled."""

    def __call__(self, *args, **kwargs):
        handler = self.split.handler
        call = super().__call__
        return call(*args, **kwargs) if handler is None else handler(self, call, args, kwargs)


class _PrefixDone(Exception):
    """Every kept tensor is there; the rest is not wanted."""


@dataclass(eq=False)
class _Output:
    """A tensor that a block returns."""

    value: Tensor
    """NaN, 0-dimensional, of its dtype."""
    shape: torch.Size
    """Without the rows."""
    like: int | None
    """Which leaf of the block's arguments has the same shape: with other texts it may have more or fewer tokens, and so has this."""


class Split:
    """Splits a network, which can then run in three ways: `recording` the prefix's tensors, `replaying` them, or as `run_prefix` alone.

    The prefix is all blocks that the network calls before the first trained one. What is made of their outputs, and is given to a block
    of the rest, is kept. If something there is made of outputs of both parts, or used in another way, the prefix ends earlier. There is
    none if the first block is trained, or a layer outside the blocks.
    """

    def __init__(self, network: nn.Module, call: Callable[[int], Tensor]):
        """`call(R)` runs the network on R rows, an even number, as it will be run, with the same values every time.

        Raises ValueError if the rest of this network cannot run from kept tensors. This is tried, and must give the same bits.
        """
        self.network, self.handler = network, None
        names = [*(["conv_in"] if hasattr(network, "conv_in") else []), *block_names(network)]
        self.blocks = [network.get_submodule(name) for name in names]
        self.prefix: list[nn.Module] = []
        """In the order of a call."""
        self.outputs: dict[nn.Module, object] = {}
        """What each block returns, with an `_Output` for every tensor; in the order of a call."""
        self.wanted: dict[nn.Module, dict[int, int]] = {}
        """The kept tensors' places: by block and leaf of its arguments, which of the tensors it is. One may have several places."""
        for block in self.blocks:
            patch(block, _Block, split=self)
        try:
            with torch.no_grad():
                self._trace(call)
                self._choose(call)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Makes the blocks what they were."""
        for block in self.blocks:
            unpatch(block, _Block)

    def compile(self) -> None:
        """Compiles every block by itself: a network that is compiled as a whole could not be split."""
        for block in self.blocks:
            block.compile()

    def _trace(self, call: Callable[[int], Tensor]) -> None:
        def handler(block, call, args, kwargs):
            if block in self.outputs:
                raise ValueError("this network calls a block twice")
            shapes = [leaf.shape if isinstance(leaf, Tensor) else None for leaf in tree_leaves((args, kwargs))]
            out, found = call(*args, **kwargs), {}
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and id(tensor) not in found:  # a block may return one tensor in two places
                    like = shapes.index(tensor.shape) if tensor.shape in shapes else None
                    found[id(tensor)] = _Output(tensor.new_full((), torch.nan), tensor.shape[1:], like)
            self.outputs[block] = tree_map_only(Tensor, lambda tensor: found[id(tensor)], out)
            return out

        with self._handling(handler):
            call(2)

    def _choose(self, call: Callable[[int], Tensor]) -> None:
        order, inside = list(self.outputs), {parameter for block in self.blocks for parameter in block.parameters()}
        first = next((n for n, block in enumerate(order) if is_trained(block)), 0)
        if any(parameter.requires_grad and parameter not in inside for parameter in self.network.parameters()):
            first = 0
        for end in range(first, 0, -1):
            self.prefix, rest = order[:end], order[end:]
            given, made = self._reached(call, self.prefix), self._reached(call, rest)
            if any(given[block].keys() & made[block].keys() for block in rest):
                continue  # to keep this would keep what the rest made
            numbers = {}
            for block in rest:
                if given[block]:
                    self.wanted[block] = {n: numbers.setdefault(id(leaf), len(numbers)) for n, leaf in given[block].items()}
            if self.wanted and self._holds(call):
                return
            self.wanted = {}
        self.prefix = []
        if first:
            raise ValueError("this network uses what its first blocks return in a way that does not let it be split")

    def _reached(self, call: Callable[[int], Tensor], marked: list[nn.Module]) -> dict[nn.Module, dict[int, Tensor]]:
        """What of each block's arguments is made of the marked blocks' outputs. Autograd knows it; no block is run."""
        reached = {}

        def handler(block, call, args, kwargs):
            torch.set_grad_enabled(True)  # where `call` has switched it off, it switches it back
            leaves = tree_leaves((args, kwargs))
            reached[block] = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad}
            return tree_map_only(Tensor, lambda t: t.requires_grad_(block in marked), self._answer(block, args, kwargs))

        with torch.no_grad(), self._handling(handler):
            call(2)
        return reached

    def _holds(self, call: Callable[[int], Tensor]) -> bool:
        if isinstance(next(self.network.parameters()), FakeTensor):
            return True
        with self.recording() as kept:
            straight = call(2)
        if any(len(tensor) != 2 for tensor in kept):
            return False
        with self.replaying(kept):
            replayed = call(2)
        return torch.allclose(straight, replayed, rtol=0, atol=0, equal_nan=True)

    @contextmanager
    def _handling(self, handler: Callable) -> Iterator[None]:
        self.handler = handler
        try:
            yield
        finally:
            self.handler = None

    def _answer(self, block: nn.Module, args: tuple, kwargs: dict) -> object:
        """What the block returns, but for the values: NaN that take no memory."""
        leaves, made = tree_leaves((args, kwargs)), {}
        num_rows = len(next(leaf for leaf in leaves if isinstance(leaf, Tensor)))  # the first one has the hidden states

        def answer(output):
            shape = (num_rows, *output.shape) if output.like is None else leaves[output.like].shape
            return made.setdefault(output, output.value.expand(shape))

        return tree_map_only(_Output, answer, self.outputs[block])

    def _keep(self, kept: list[Tensor], block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Adds to `kept` what the block is the first to be given."""
        if block in self.wanted:
            leaves = tree_leaves((args, kwargs))
            for n, number in self.wanted[block].items():
                if number == len(kept):
                    kept.append(leaves[n])

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Inside, a call of the network adds the kept tensors, (R, ...) each, to the list."""
        kept = []

        def handler(block, call, args, kwargs):
            self._keep(kept, block, args, kwargs)
            return call(*args, **kwargs)

        with self._handling(handler):
            yield kept

    @contextmanager
    def replaying(self, kept: list[Tensor]) -> Iterator[None]:
        """Inside, a call of the network on as many rows runs only the rest, from these tensors. It does not use the latents' values.

        Rows may have been recorded beside others, with longer or shorter texts.
        """
        prefix = set(self.prefix)

        def handler(block, call, args, kwargs):
            if block in prefix:
                return self._answer(block, args, kwargs)
            if block in self.wanted:
                leaves, spec = tree_flatten((args, kwargs))
                for n, number in self.wanted[block].items():
                    leaves[n] = resized(kept[number], leaves[n].shape[1:])
                args, kwargs = tree_unflatten(leaves, spec)
            return call(*args, **kwargs)

        with self._handling(handler):
            yield

    def run_prefix(self, call: Callable[[], object]) -> list[Tensor]:
        """The kept tensors of a call of the network in which blocks of the rest are not run. It ends when all are there."""
        kept, prefix, last = [], set(self.prefix), list(self.wanted)[-1]

        def handler(block, call, args, kwargs):
            self._keep(kept, block, args, kwargs)
            if block is last:
                raise _PrefixDone
            return call(*args, **kwargs) if block in prefix else self._answer(block, args, kwargs)

        with torch.no_grad(), self._handling(handler):
            try:
                call()
            except _PrefixDone:
                pass
        return kept
