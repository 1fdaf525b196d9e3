"""What a pipeline gives its network: one call as a template, which any rows of latents, times and texts can be put into.

Shape letters: R network rows, B samples, *shape one sample's latents as the pipeline's scheduler is given them.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

LIST = -1
"""The row dimension of an argument that is a list with an element for each row."""

Row = Tensor | object
"""What an argument has of one row: a tensor whose row dimension is 1 long, or an element of a list."""


@dataclass(frozen=True)
class Asked:
    """How a pipeline is called, apart from its prompts."""

    num_steps: int
    guidance_scale: float
    height: int | None = None
    width: int | None = None
    """Pixels; None: the pipeline's own size."""

    @classmethod
    def of(cls, options) -> "Asked":
        """For the pictures that `options`, config.sample or config.evaluation, ask for."""
        return cls(options.num_steps, options.guidance_scale, options.height, options.width)

    @property
    def texts(self) -> tuple:
        """What a prompt's text depends on."""
        return self.guidance_scale, self.height, self.width


@dataclass(frozen=True)
class Template:
    """A call of the network. Its positional and keyword arguments are flattened into leaves."""

    spec: TreeSpec
    leaves: list
    """The recorded ones. Those with a row dimension are replaced in a call."""
    dims: list[int | None]
    """Each leaf's row dimension; None: it is the same for any rows."""
    latents: int
    """Which leaf the latents are,"""
    time: int
    """and which the time."""
    shape: tuple[int, ...]
    """Of the latents in one row."""

    @property
    def texts(self) -> list[int]:
        """The leaves that have rows and are neither latents nor time."""
        return [i for i, dim in enumerate(self.dims) if dim is not None and i not in (self.latents, self.time)]

    def call(self, network: Callable, x: Tensor, times: Tensor, texts: list) -> Tensor:
        """The network's output (R, *shape) for latents x (R, *shape), times (R,) and the leaves `texts`, R rows each."""
        leaves = list(self.leaves)
        recorded = leaves[self.latents]
        first = recorded[0] if isinstance(recorded, list) else recorded
        rows = x.reshape(len(x), *self.shape).to(first.dtype)
        leaves[self.latents] = list(rows.unbind()) if isinstance(recorded, list) else rows
        leaves[self.time] = times
        for i, leaf in zip(self.texts, texts):
            leaves[i] = leaf
        args, kwargs = tree_unflatten(leaves, self.spec)
        out = network(*args, **kwargs)[0]
        return (torch.stack(list(out)) if isinstance(out, list | tuple) else out).reshape(x.shape)


@dataclass(frozen=True)
class Recording:
    """What was recorded of a pipeline that was called as `asked`."""

    asked: Asked
    template: Template
    branches: tuple[tuple[int, int], ...]
    """Where each branch of guidance is in a step's calls: the call, and its block of rows. An unconditional one comes first."""
    times: Tensor
    """(S,) what the network is told of each step, as the pipeline rounds it; on the CPU."""
    sigmas: Tensor | None
    """(S + 1,) fp64, the scheduler's levels of noise; None if it has none."""
    sign: float
    """1, or -1 if the pipeline negates the network's output before its scheduler takes it."""
    guidance_scale: float
    """w in o = uncond + w (cond - uncond); 1 if there is one branch."""
    rescaled: bool
    """Whether o is scaled to the norm of cond along the last dimension."""
    shape: tuple[int, ...]
    """Of one sample's latents, as the scheduler is given them."""

    @property
    def num_branches(self) -> int:
        """Network rows of a sample: 2 with guidance."""
        return len(self.branches)

    @property
    def digest(self) -> str:
        """A hash of times, levels and guidance: what another version of the pipeline might change."""
        numbers = [self.times.double(), *([] if self.sigmas is None else [self.sigmas])]
        text = [repr(tensor.tolist()) for tensor in numbers], self.sign, self.guidance_scale, self.num_branches, self.rescaled, self.shape
        return hashlib.sha256(repr(text).encode()).hexdigest()[:16]

    @property
    def output_scale(self) -> float:
        """w of the outputs that a step or a loss still has to combine; 1 if there is one of a sample."""
        return self.guidance_scale if self.num_outputs == 2 else 1.0

    @property
    def num_outputs(self) -> int:
        """Rows of the output that a sample has for `guide`: both branches, or the one that a rescaling pipeline makes of them."""
        return 1 if self.rescaled else self.num_branches

    def text_rows(self, prompts: np.ndarray) -> np.ndarray:
        """Which texts the network rows of some samples are given, of their prompts' (B,): all unconditional rows come first."""
        return np.concatenate([np.zeros_like(prompts), prompts]) if self.num_outputs == 2 else prompts

    def combined(self, out: Tensor) -> Tensor:
        """The rows that a step and a loss take of the network's output: (R, *shape) as it is, or (R / 2, *shape) fp32 where rescaled.

        c = uncond + w (cond - uncond),    o = c norm(cond) / norm(c), the norms along the last dimension
        """
        if not self.rescaled:
            return out
        uncond, cond = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2)
        both = uncond + self.guidance_scale * (cond - uncond)
        return both * (cond.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))


@dataclass(frozen=True)
class Texts:
    """The texts of some distinct prompts on the device, each once, as rows of the template's leaves."""

    recording: Recording
    leaves: list
    """Tensors, or lists, with a row for the unconditional branch, if there is one, and then for each prompt."""
    device: torch.device

    @classmethod
    def of(cls, recording: Recording, rows: list[list[Row]], device: torch.device) -> "Texts":
        """From each text's rows. Raises ValueError for texts whose rows do not fit together."""
        template, leaves = recording.template, []
        for i, column in zip(template.texts, zip(*rows)):
            if template.dims[i] == LIST:
                leaves.append([part.to(device) if isinstance(part, Tensor) else part for part in column])
            elif len({part.shape for part in column}) > 1:
                raise ValueError(f"its text is {tuple(column[0].shape)} for one prompt and another size for others: they cannot be batched")
            else:
                leaves.append(torch.cat(column, template.dims[i]).to(device))
        return cls(recording, leaves, device)

    def gather(self, index: Tensor) -> list:
        """The template's leaves for network rows (R,), each a row of these texts."""
        template, found = self.recording.template, []
        for i, leaf in zip(template.texts, self.leaves):
            if isinstance(leaf, list):
                found.append([leaf[row] for row in index.tolist()])
            else:
                found.append(leaf.index_select(template.dims[i], index))
        return found

    def conditions(self, prompts: np.ndarray) -> "Conditions":
        """Those of samples whose prompts are in these rows (B,), see `Recording.text_rows`."""
        return Conditions(self, torch.from_numpy(self.recording.text_rows(prompts)).to(self.device))


@dataclass(frozen=True)
class Conditions:
    """What the network is given of R rows besides latents and time."""

    texts: Texts
    index: Tensor
    """(R,) int64: rows of `texts`. Where guidance is rescaled, a row stands for both of its branches."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor | slice) -> "Conditions":
        whole = isinstance(rows, slice) and rows == slice(None)
        return self if whole else Conditions(self.texts, self.index[rows])  # itself it has gathered its leaves already

    @cached_property
    def leaves(self) -> list:
        """The template's leaves for these rows, of both branches where guidance is rescaled."""
        index = self.index
        return self.texts.gather(torch.cat([torch.zeros_like(index), index]) if self.texts.recording.rescaled else index)

    def call(self, network: Callable, x: Tensor, times: Tensor) -> Tensor:
        """The output (R, *shape) of which a step or a loss is made, for latents x (R, *shape) and times (R,)."""
        recording = self.texts.recording
        if recording.rescaled:
            x, times = x.repeat(2, *[1] * (x.dim() - 1)), times.repeat(2)
        return recording.combined(recording.template.call(network, x, times, self.leaves))
