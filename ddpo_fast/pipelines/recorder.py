"""Records from a pipeline's own call what its network is given, and has the pipeline encode prompts and decode latents.

Inside a recording the pipeline's class, network and scheduler are replaced; outside it is diffusers' own. Shape letters: B samples, S
steps, *shape one sample's latents as the scheduler is given them.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten
from transformers import PreTrainedTokenizerBase

from ddpo_fast.pipelines.families import Family
from ddpo_fast.pipelines.template import LIST, Asked, Recording, Row, Template

PROBES = ("a", "a very big dog that runs", "two cats")
"""Prompts of different lengths, by which a recording finds what of a call depends on the prompt."""
TOLERANCE = 1e-5
"""norm(error) / norm of the guided output that is recorded: what fp32 leaves."""


class _Reached(Exception):
    """The pipeline has come to where its answer is known."""


class _Replaced:
    """Mixed into a pipeline's class while it is recorded."""

    @property
    def _execution_device(self) -> torch.device:
        return self.recorder.device

    def encode_prompt(self, *args, **kwargs):
        return self.recorder.encoded(super().encode_prompt, args, kwargs)

    def prepare_latents(self, *args, **kwargs):
        made = super().prepare_latents(*args, **kwargs)
        parts = list(made) if isinstance(made, tuple) else [made]
        parts[0] = self.recorder.first_latents(parts[0])
        return tuple(parts) if isinstance(made, tuple) else parts[0]


class _Steps:
    """Mixed into a scheduler's class while its pipeline is recorded: `step` asks the recorder."""

    def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
        return (self.recorder.stepped(model_output, sample),)


class _Tokenizer:
    """Mixed into a tokenizer's class while a prompt is encoded: tells the recorder how long texts are that it may cut."""

    def __call__(self, text, *args, **kwargs):
        kwargs["verbose"] = False  # of texts that are too long
        if kwargs.get("truncation"):
            for one in [text] if isinstance(text, str) else text:
                whole = super().__call__(one, add_special_tokens=kwargs.get("add_special_tokens", True), verbose=False)["input_ids"]
                self.recorder.tokenized(self, one, len(whole), kwargs.get("max_length") or self.model_max_length)
        return super().__call__(text, *args, **kwargs)


class _Network:
    """Stands for a pipeline's network. It is none of its modules, so that a compiled or wrapped one is not bypassed."""

    def __init__(self, network: object, call: Callable):
        self.__dict__.update(network=network, call=call)

    def __getattr__(self, name: str):
        return getattr(self.network, name)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def _is_leaf(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor | list | tuple)


@dataclass
class _Call:
    """One call of the network."""

    leaves: list
    spec: TreeSpec

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "_Call":
        return cls(*tree_flatten((args, kwargs), is_leaf=_is_leaf))


@dataclass
class _Answer:
    """What encode_prompt has returned, for any number of prompts."""

    leaves: list
    spec: TreeSpec
    dims: list[int | None]

    @classmethod
    def of(cls, two: object, three: object) -> "_Answer":
        """From what it returned for two prompts, and for three."""
        (leaves, spec), (others, _) = (tree_flatten(found, is_leaf=_is_leaf) for found in (two, three))
        return cls(leaves, spec, [_row_dim(a, b) for a, b in zip(leaves, others)])

    def rows(self, num_prompts: int) -> object:
        """The first prompt's answer, so many times."""
        found = []
        for leaf, dim in zip(self.leaves, self.dims):
            if dim is not None:
                leaf = leaf[:1] * num_prompts if dim == LIST else torch.cat([leaf.narrow(dim, 0, 1)] * num_prompts, dim)
            found.append(leaf)
        return tree_unflatten(found, self.spec)


@dataclass
class _Trace:
    """What a run of a pipeline with a stubbed network has shown."""

    calls: list[_Call]
    outputs: list[Tensor]
    """What the network answered to each call of the shown steps, (R, ...) fp32."""
    guided: list[Tensor]
    """(B, *shape) what the scheduler was given at each shown step,"""
    latents: list[Tensor]
    """and from which latents."""
    num_steps: int
    sigmas: Tensor | None


class Recorder:
    """Calls a pipeline with parts of it replaced."""

    def __init__(
        self, pipe: DiffusionPipeline, family: Family, device: torch.device, arguments: dict | None = None,
        encodes_on: torch.device | None = None,
    ):  # fmt: skip
        """arguments: of the pipeline's call, beyond those of its family: the option model.arguments. encodes_on: where the text encoders
        run; None: on the device."""
        self.pipe, self.family, self.device, self.encodes_on = pipe, family, device, encodes_on or device
        self.arguments = {**family.arguments, **(arguments or {})}
        self.network = getattr(pipe, family.network)
        self.answers: dict[Asked, list[_Answer]] = {}
        """What encode_prompt returns, by which decoding goes: its prompts do not matter."""
        self.stepped: Callable[[Tensor, Tensor], Tensor] | None = None
        """Of a step: the network's guided output and the latents to the next latents."""
        self.first_latents = self.encoded = None
        self.tokenized: Callable | None = None
        """Of a tokenizer, a text, how many tokens that is, and how many of them are kept at most."""
        self.cut: dict[str, str] = {}
        """Of prompts that are too long: which tokenizer cuts how many tokens."""

    @contextmanager
    def _replaced(self, network: Callable, stepped: Callable, first_latents: Callable, encoded: Callable, no_steps: bool) -> Iterator:
        """Inside, the pipeline calls `network`, and so on. It draws no random number of the caller's. Afterwards it is what it was."""
        pipe, kind, attributes = self.pipe, type(self.pipe), dict(self.pipe.__dict__)
        scheduler = copy.copy(pipe.scheduler)
        scheduler.__class__, scheduler.recorder = _scheduler_class(type(scheduler), no_steps), self
        self.stepped, self.first_latents, self.encoded = stepped, first_latents, encoded
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            pipe.__class__ = _pipeline_class(kind)
            pipe.__dict__ |= {"recorder": self, "scheduler": scheduler, self.family.network: _Network(self.network, network)}
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                yield scheduler
        finally:
            pipe.__class__ = kind
            pipe.__dict__.clear()
            pipe.__dict__.update(attributes)

    @torch.no_grad()
    def _call(self, prompts: list[str], asked: Asked, output_type: str) -> Tensor:
        """What the pipeline's call returns for these prompts."""
        family, arguments = self.family, {**self.arguments, self.family.guidance: asked.guidance_scale}
        negative = arguments.pop("negative_prompt", family.negative_prompt)
        if negative is not None and asked.guidance_scale > family.no_guidance:
            arguments["negative_prompt"] = [negative] * len(prompts)
        arguments |= {key: size for key, size in (("height", asked.height), ("width", asked.width)) if size is not None}
        return self.pipe(prompt=list(prompts), num_inference_steps=asked.num_steps, output_type=output_type, **arguments)[0]

    def _encode(self, keep: list | None = None) -> Callable:
        def encoded(encode: Callable, args: tuple, kwargs: dict):
            asked = inspect.signature(encode).bind(*args, **kwargs)
            asked.arguments["device"] = self.encodes_on
            found = tree_map_only(Tensor, lambda leaf: leaf.to(self.device), encode(*asked.args, **asked.kwargs))
            if self.family.encoded is not None:
                found = self.family.encoded(found, self.arguments)
            if keep is not None:
                keep.append(found)
            return found

        return encoded

    def _trace(self, num_samples: int, asked: Asked, keep: list | None = None) -> _Trace:
        """Runs the pipeline on probes with a network that answers noise. The first two, the middle and the last step are shown.

        Of the others only numbers are kept: a regression's recording has a thousand steps.
        """
        trace, shown = _Trace([], [], [], [], 0, None), {0, 1, asked.num_steps // 2, asked.num_steps - 1}

        def network(*args, **kwargs):
            x, call = _latents_of(args, kwargs), _Call.of(args, kwargs)
            out = torch.randn((len(x), *x[0].shape), device=self.device)
            if trace.num_steps in shown:
                trace.outputs.append(out)
            else:
                call.leaves = [leaf if isinstance(leaf, Tensor) and leaf.dim() <= 1 else None for leaf in call.leaves]
            trace.calls.append(call)
            return (list(out.unbind()) if isinstance(x, list) else out,)

        def stepped(out: Tensor, x: Tensor) -> Tensor:
            if trace.num_steps in shown:
                trace.guided.append(out)
                trace.latents.append(x)
            trace.num_steps += 1
            return 0.9 * x  # other ones, which shows where in a call the latents are

        with self._replaced(network, stepped, lambda x: x, self._encode(keep), False) as scheduler:
            self._call(list(PROBES[:num_samples]), asked, "latent")
            sigmas = getattr(scheduler, "sigmas", None)
        trace.sigmas = None if sigmas is None else sigmas.detach().cpu().double()
        return trace

    def record(self, asked: Asked) -> Recording:
        """What the pipeline gives its network when it is called as asked. Raises ValueError for a pipeline that does not fit."""
        answers: tuple[list, list] = [], []
        with _silent():
            whole = self._trace(2, asked)
            two, three = (self._trace(2 + more, replace(asked, num_steps=2), answers[more]) for more in (0, 1))
        self.answers[asked] = [_Answer.of(*pair) for pair in zip(*answers)]
        calls_per_step, rest = divmod(len(whole.calls), asked.num_steps)
        if rest or calls_per_step not in (1, 2) or whole.num_steps != asked.num_steps or len(two.calls) != 2 * calls_per_step:
            raise ValueError(
                f"it calls its network {len(whole.calls)} times in {asked.num_steps} steps; valid is once or twice in every step"
            )
        slots = [_slot(two, three, number, calls_per_step) for number in range(calls_per_step)]
        template, branches = _joined(slots)
        times = torch.stack([call.leaves[template.time].reshape(-1)[0] for call in whole.calls[::calls_per_step]]).cpu()
        sign, scale, rescaled = _guidance(whole, calls_per_step, branches, asked.guidance_scale)
        sigmas = whole.sigmas if self.family.process == "flow" else None
        return Recording(asked, template, branches, times, sigmas, sign, scale, rescaled, tuple(whole.latents[0].shape[1:]))

    def texts_of(self, prompt: str, recording: Recording) -> list[list[Row]]:
        """What the template's leaves have of a prompt: for each branch the leaves' rows, the unconditional branch first.

        What is too long for a tokenizer is in `cut` afterwards.
        """
        calls: list[_Call] = []

        def network(*args, **kwargs):
            calls.append(_Call.of(args, kwargs))
            return (_latents_of(args, kwargs),)

        def stepped(out: Tensor, x: Tensor) -> Tensor:
            raise _Reached

        with self._replaced(network, stepped, lambda x: x, self._encode(), False), self._finding_cuts(prompt):
            try:
                self._call([prompt], recording.asked, "latent")
            except _Reached:
                pass
        template = recording.template
        return [[_row(calls[call].leaves[i], template.dims[i], number) for i in template.texts] for call, number in recording.branches]

    @contextmanager
    def _finding_cuts(self, prompt: str) -> Iterator[None]:
        """Inside, tokenizers say which tokens of the prompt they cut; afterwards that is in `cut`."""
        tokenizers = {name: part for name, part in self.pipe.components.items() if isinstance(part, PreTrainedTokenizerBase)}
        start = getattr(self.pipe, "prompt_template_encode_start_idx", None)  # Qwen-Image cuts what its text encoder gives
        limit = math.inf if start is None else start + self.arguments.get("max_sequence_length", math.inf)
        words, found = prompt.strip().lower(), {}

        def tokenized(tokenizer: PreTrainedTokenizerBase, text: str, length: int, kept: int) -> None:
            if (place := text.lower().rfind(words)) >= 0:  # not the text of the unconditional branch
                template = text[place + len(words) :]  # what is behind the prompt is lost first
                lost = length - min(kept, limit) - (len(tokenizer.tokenize(template)) if template else 0)
                if lost > 0:
                    found[next(name for name, part in tokenizers.items() if part is tokenizer)] = lost, len(tokenizer.tokenize(prompt))

        self.tokenized = tokenized
        kinds = {name: type(part) for name, part in tokenizers.items()}
        try:
            for part in tokenizers.values():
                part.__class__, part.recorder = _tokenizer_class(type(part)), self
            with _silent():
                yield
        finally:
            for name, part in tokenizers.items():
                part.__class__ = kinds[name]
                vars(part).pop("recorder", None)
        if found:
            self.cut[prompt] = ", ".join(f"{name} cuts {lost} of its {length} tokens" for name, (lost, length) in found.items())

    def own_outputs(self, prompt: str, recording: Recording) -> list[tuple[int, Tensor, list[Tensor]]]:
        """What the network gives in the first and the last step of the pipeline's own call: the step, latents and each branch's output.

        Both are (1, *shape). The steps between them run without the network.
        """
        shown, found, outputs, step = {0, recording.asked.num_steps - 1}, [], [], 0

        def network(*args, **kwargs):
            if step not in shown:
                return (_latents_of(args, kwargs),)
            out = self.network(*args, **kwargs)
            outputs.append(out[0])
            return out

        def stepped(out: Tensor, x: Tensor) -> Tensor:
            nonlocal step
            if step in shown:
                found.append((step, x, [outputs[call][block].reshape(x.shape) for call, block in recording.branches]))
            outputs.clear()
            step += 1
            return 0.9 * x

        with self._replaced(network, stepped, lambda x: x, self._encode(), False):
            self._call([prompt], recording.asked, "latent")
        return found

    def decode(self, x: Tensor, recording: Recording) -> Tensor:
        """Pictures (B, 3, H, W) fp32 in [0, 1] of final latents (B, *shape), by the pipeline without a step."""
        answers = iter(self.answers[recording.asked])
        latents = x.to(self.pipe.vae.dtype)
        with self._replaced(_not_called, _not_called, lambda _: latents, lambda *_: next(answers).rows(len(x)), True):
            pictures = self._call([""] * len(x), recording.asked, "pt").float()
        return pictures.contiguous(memory_format=torch.channels_last)  # some pipelines copy: a reward's sums shall round alike for all

    def decoded_shape(self, recording: Recording) -> tuple[int, ...]:
        """What the pipeline gives its VAE's decoder of one sample, which is not run."""
        vae, shapes = self.pipe.vae, []

        def decode(latents: Tensor, *args, **kwargs):
            shapes.append(tuple(latents.shape[1:]))
            raise _Reached

        vae.decode = decode
        try:
            self.decode(torch.zeros(1, *recording.shape), recording)
        except _Reached:
            pass
        finally:
            del vae.decode
        return shapes[0]


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, diffusers says nothing of prompts that are too long for a tokenizer: some pipelines would, others not; and not of probes."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _latents_of(args: tuple, kwargs: dict) -> Tensor | list[Tensor]:
    """The latents among a network's arguments: the output has their shape."""
    return args[0] if args else kwargs["hidden_states"]


def _not_called(*args):
    raise AssertionError("a pipeline without steps has called its network")


@functools.cache
def _pipeline_class(kind: type) -> type:
    return type(kind.__name__, (_Replaced, kind), {"__module__": kind.__module__})


@functools.cache
def _tokenizer_class(kind: type) -> type:
    return type(kind.__name__, (_Tokenizer, kind), {"__module__": kind.__module__})


@functools.cache
def _scheduler_class(kind: type, no_steps: bool) -> type:
    @functools.wraps(kind.set_timesteps)  # pipelines look at its signature
    def set_timesteps(self, *args, **kwargs):
        kind.set_timesteps(self, *args, **kwargs)
        if no_steps:
            self.timesteps = self.timesteps[:0]

    return type(kind.__name__, (_Steps, kind), {"__module__": kind.__module__, "set_timesteps": set_timesteps})


@dataclass
class _Slot:
    """One of a step's calls: a template of its own, and which of its blocks of rows depend on the prompt."""

    template: Template
    depends: list[bool]


def _slot(two: _Trace, three: _Trace, number: int, calls_per_step: int) -> _Slot:
    """Of runs with two and with three samples, two steps each."""
    call, other, later = two.calls[number], three.calls[number], two.calls[calls_per_step + number]
    if not call.spec == other.spec == later.spec:
        raise ValueError("the arguments of its network change their number from call to call")
    dims = [_row_dim(a, b) for a, b in zip(call.leaves, other.leaves)]
    varying = [i for i, (a, b) in enumerate(zip(call.leaves, later.leaves)) if not _equal(a, b)]
    times = [i for i in varying if isinstance(call.leaves[i], Tensor) and call.leaves[i].dim() <= 1]
    if len(varying) != 2 or len(times) != 1:
        raise ValueError(
            f"{len(varying)} arguments of its network vary with the step, {len(times)} of them times; valid is latents and a time"
        )
    (time,), (latents,) = times, [i for i in varying if i not in times]
    changed = [i for i, dim in enumerate(dims) if dim is None and i != time and not _equal(call.leaves[i], other.leaves[i])]
    if changed:
        raise ValueError("an argument of its network that has no rows depends on the prompts")
    x = call.leaves[latents]
    rows = torch.stack(x) if isinstance(x, list) else x
    num_blocks, rest = divmod(len(rows), 2)
    if rest or not all(torch.equal(block.reshape(two.latents[0].shape), two.latents[0].to(rows.dtype)) for block in rows.split(2)):
        raise ValueError("the latents that its network is given are not the scheduler's")
    template = Template(call.spec, call.leaves, dims, latents, time, tuple(rows.shape[1:]))
    texts = [(call.leaves[i], dims[i]) for i in template.texts]
    depends = [any(not _equal(*(_row(leaf, dim, 2 * b + n) for n in range(2))) for leaf, dim in texts) for b in range(num_blocks)]
    return _Slot(template, depends)


def _joined(slots: list[_Slot]) -> tuple[Template, tuple[tuple[int, int], ...]]:
    """One template for all of a step's calls, and its branches, the unconditional one first: each a call and a block of the call's rows."""
    blocks = sorted((depends, call, number) for call, slot in enumerate(slots) for number, depends in enumerate(slot.depends))
    if [depends for depends, *_ in blocks] not in ([True], [False, True]):
        with_prompt = sum(depends for depends, *_ in blocks)
        raise ValueError(f"a step has {len(blocks)} branches, {with_prompt} of them with the prompt; valid is one with it, and one without")
    template, *others = (slot.template for slot in slots)
    for other in others:
        same = (
            template.spec == other.spec and template.dims == other.dims and (template.latents, template.time) == (other.latents, other.time)
        )
        alike = same and all(
            _alike(a, b, d) for i, (a, b, d) in enumerate(zip(template.leaves, other.leaves, template.dims)) if i != template.time
        )
        if not alike:
            raise ValueError("the two calls of its guidance have arguments of other shapes")
    return template, tuple((call, number) for _, call, number in blocks)


def _guidance(trace: _Trace, calls_per_step: int, branches: tuple, asked: float) -> tuple[float, float, bool]:
    """Sign, scale w and whether it is rescaled, of the guided output that the scheduler was given.

    It is sign (uncond + w (cond - uncond)), in the branches' order, or that times norm(cond) / norm(itself).
    """
    rows: list[list[Tensor]] = [[] for _ in branches]
    for k, guided in enumerate(trace.guided):
        for found, (call, number) in zip(rows, branches):
            found.append(trace.outputs[k * calls_per_step + call].split(len(guided))[number].reshape(guided.shape).double())
    *unconditional, cond = (torch.cat(found) for found in rows)
    guided = torch.cat(trace.guided).double()
    basis = torch.stack([part.flatten() for part in (*unconditional, cond)], 1)
    weights = torch.linalg.lstsq(basis, guided.flatten()[:, None]).solution[:, 0]
    sign = 1.0 if weights.sum() > 0 else -1.0
    if (basis @ weights - guided.flatten()).norm() <= TOLERANCE * guided.norm() and abs(weights.sum() - sign) <= 1e-4:
        scale = sign * weights[-1].item()  # less the last bits of the fit, where it is a number that was asked for
        return sign, next((near for near in (1.0, asked, asked + 1) if abs(near - scale) <= 1e-4 * max(1, scale)), scale), False
    if unconditional:
        (uncond,) = unconditional
        both = uncond + asked * (cond - uncond)
        both *= cond.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)
        for sign in (1.0, -1.0):
            if (sign * both - guided).norm() <= TOLERANCE * guided.norm():
                return sign, asked, True
    raise ValueError(
        "its guided output is no weighted sum of its network's outputs, nor one that is rescaled to the conditional one's norm"
    )


def _row_dim(a: object, b: object) -> int | None:
    """The dimension in which an argument for two samples differs from one for three."""
    if isinstance(a, list):
        return LIST if len(a) != len(b) else None
    if not isinstance(a, Tensor) or a.shape == b.shape:
        return None
    dims = [i for i, (m, n) in enumerate(zip(a.shape, b.shape)) if m != n]
    if a.dim() != b.dim() or len(dims) != 1 or a.shape[dims[0]] * 3 != b.shape[dims[0]] * 2:
        raise ValueError(
            f"an argument of its network is {tuple(a.shape)} for two prompts and {tuple(b.shape)} for three: its size depends on them"
        )
    return dims[0]


def _row(leaf: Tensor | list, dim: int, number: int) -> Row:
    return leaf[number] if dim == LIST else leaf.narrow(dim, number, 1)


def _alike(a: object, b: object, dim: int | None) -> bool:
    """Whether two calls' arguments can be rows of one call's."""
    if dim is None:
        return _equal(a, b)
    return dim == LIST or a.shape == b.shape and a.dtype == b.dtype


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_equal, a, b))
    return a == b
