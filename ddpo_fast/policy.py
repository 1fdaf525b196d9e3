"""The model as a policy: its texts, its network's output for any rows, its pictures, its trained weights.

Shape letters: R network rows, B samples, *shape one sample's latents.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ddpo_fast.config.options import LoraConfig
from ddpo_fast.distributed.partition import Partition
from ddpo_fast.dtypes import DTYPES, autocast
from ddpo_fast.files import new_folder
from ddpo_fast.memory import num_kept_prompts
from ddpo_fast.networks.gradient_checkpointing import checkpoint_gradients
from ddpo_fast.networks.lora import set_trainable
from ddpo_fast.networks.merged_lora import merge
from ddpo_fast.networks.shared_guidance import SharedGuidance
from ddpo_fast.pipelines.folders import Model, open_pipeline
from ddpo_fast.pipelines.recorder import PROBES, Recorder
from ddpo_fast.pipelines.template import Asked, Conditions, Recording, Row, Texts
from ddpo_fast.schedule import Denoising

logger = logging.getLogger("ddpo_fast")
SHOWN = 60
"""Letters of a prompt in a warning, at most."""
SAME_CALL = 16
"""Roundings between the network's output in the pipeline's own call and in ours, at most: none where kernels give the same every time."""
SAME_NETWORK = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""What merging, fusing, layouts and an engine may change of the network's output, see `difference`."""


def difference(a: Tensor, b: Tensor) -> float:
    """norm(a - b) / norm(b)."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Policy:
    """A pipeline whose network is trained, by LoRA or whole. What the network is given is recorded from the pipeline's own call.

    The network is called directly until `attach` gives it the engine's wrapper, after which rollout and update both run through that.
    Trainable weights are fp32, frozen ones in the compute dtype; autocast joins them in a UNet.
    """

    decode_batch = 16
    """Pictures that the VAE decodes together."""
    offload_text_encoder = False
    """Whether the text encoders are on the device only while they are needed."""
    offload_vae = False
    """Whether the VAE is there only while it decodes."""

    def __init__(
        self,
        model: Model,
        dtype: str,
        device: torch.device,
        lora: LoraConfig,
        encodes_on: torch.device | None = None,
        partition: Partition | None = None,
    ):
        """encodes_on: where the text encoders run; None: on the device.

        partition: how the network's weights are partitioned as they are read, for an engine that does so.
        """
        self.device, self.dtype, self.family, self.option = device, DTYPES[dtype], model.family, model.option
        self.pipe, self.notes = open_pipeline(model, self.dtype, device, partition), model.notes
        self.variant = next((weights.variant for weights in model.weights.values() if weights.variant is not None), None)
        self.pipe.set_progress_bar_config(disable=True)
        self.network = self.forward = getattr(self.pipe, self.family.network)
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        self.text_encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
        for part in parts.values():
            part.to((encodes_on or device) if part in self.text_encoders else device).requires_grad_(False).eval()
        self.full = lora.scope == "none"
        self.partition = partition
        with nullcontext() if partition is None else partition.shown(self.network):
            set_trainable(self.network, lora.scope, lora.targets, lora.rank, lora.alpha)
        if partition is not None:
            partition.gather_for_calls(self.network)
        self.merged_layers: list[nn.Module] = []
        self.guidance: AbstractContextManager = nullcontext()
        self.recorder = Recorder(self.pipe, self.family, device, model.arguments, encodes_on)
        self._encodes = False
        self._recordings: dict[Asked, Recording] = {}
        self._unconditional: dict[tuple, list[list[Row]]] = {}
        """The unconditional branch's rows, if there is one, by `Asked.texts`."""
        self._texts: dict[tuple[tuple, str], list[Row]] = {}
        """Prompts' rows, on the host. The last used is last, see `num_kept_prompts`."""

    def record(self, asked: Asked) -> Recording:
        """How the pipeline calls its network if it is called as asked. Raises ValueError for a pipeline that cannot be trained."""
        if asked not in self._recordings:
            with self._encoding(), self._named():
                self._recordings[asked] = self.recorder.record(asked)
                if all(other.texts != asked.texts for other in self._recordings if other != asked):
                    self._prove(self._recordings[asked])
        return self._recordings[asked]

    @torch.no_grad()
    def _prove(self, recording: Recording) -> None:
        """Raises ValueError if the network does not give what it gives in the pipeline's own call, in the first and the last step.

        The rows are as many as the pipeline's, so the outputs are equal bit for bit where a kernel gives the same every time.
        """
        texts, rows = self.texts(recording, [PROBES[0]])
        rows = [0] * (recording.num_branches - 1) + rows.tolist()
        with self._autocast():
            for step, x, own in self.recorder.own_outputs(PROBES[0], recording):
                for call in dict(recording.branches):
                    numbers = sorted((block, number) for number, (of, block) in enumerate(recording.branches) if of == call)
                    index = torch.tensor([rows[number] for _, number in numbers], device=self.device)
                    times = recording.times[step].to(self.device).expand(len(index))
                    ours = recording.template.call(self.network, torch.cat([x] * len(index)), times, texts.gather(index))
                    expected = torch.cat([own[number] for _, number in numbers])
                    if not expected.isfinite().all():
                        raise ValueError(f"its network's output is not finite in {self.dtype}; valid is model.dtype=bf16 or fp32")
                    error = difference(ours, expected)
                    if not error <= SAME_CALL * torch.finfo(self.dtype).eps:
                        raise ValueError(
                            f"in step {step} its network gives numbers that are not its pipeline's, by {error:.1g} of their norm"
                        )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Inside, a fault of the pipeline's becomes a ValueError that names the model."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the pipeline's own faults are of any kind
            raise ValueError(f"{self.option}: {' '.join(str(error).split())}") from None

    def denoising(self, options) -> Denoising:
        """How the pictures are made that `options`, config.sample or config.evaluation, ask for."""
        return Denoising.of(options, self.record(Asked.of(options)), self.pipe.scheduler, self.device)

    def attach(self, forward: nn.Module, partitioned: bool = False) -> None:
        """Runs the network through `forward`, an engine's wrapper of it, from now on, frozen convolutions in channels_last layout.

        That layout takes 5 % off an iteration of the embedded model on a CPU (bench.waterfall). DeepSpeed's start wants the ordinary one,
        and so do weights that are partitioned, which are gathered anew for every call.
        """
        self.forward = forward
        for parameter in self.network.parameters():
            if parameter.dim() == 4 and not parameter.requires_grad and not partitioned:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def merge_lora(self) -> None:
        """Makes the network compute with LoRA's update merged into a copy of its weights, see `merged_lora.merge`, from now on."""
        self.merged_layers = merge(self.network)

    def checkpoint_gradients(self) -> None:
        """Makes the network keep only the inputs of its blocks for backward, which computes them again."""
        checkpoint_gradients(self.network, lambda: self.guidance)

    def share_guidance(self) -> None:
        """Makes `predict`, which must be given both branches from now on, compute once what they have in common.

        Raises ValueError, see `SharedGuidance`.
        """
        self.guidance = SharedGuidance(self.network, partial(self.example_call, 2))

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def texts(self, recording: Recording, prompts: list[str]) -> tuple[Texts, np.ndarray]:
        """What the network is given of these prompts, and in which of its rows each one is, (B,) int64 on the host.

        Each prompt is encoded alone: no batch changes its text.
        """
        distinct, way, kept = list(dict.fromkeys(prompts)), recording.asked.texts, self._texts
        if new := [prompt for prompt in distinct if (way, prompt) not in kept]:
            self._encode(recording, new)
        for prompt in distinct:
            kept[way, prompt] = kept.pop((way, prompt))  # a dict is in the order of insertion
        rows = [kept[way, prompt] for prompt in distinct]
        most = num_kept_prompts(sum(row.nbytes for row in rows[-1] if isinstance(row, Tensor)), len(distinct))
        for dropped in list(kept)[:-most]:
            del kept[dropped]
        rows = self._unconditional[way] + rows
        places = {prompt: len(rows) - len(distinct) + number for number, prompt in enumerate(distinct)}
        index = np.array([places[prompt] for prompt in prompts])
        return Texts.of(recording, rows, self.device), index

    def _encode(self, recording: Recording, prompts: list[str]) -> None:
        with self._encoding():
            for prompt in prompts:
                known = prompt in self.recorder.cut  # it has been here before, and was dropped
                branches = self.recorder.texts_of(prompt, recording)
                if not known and prompt in self.recorder.cut:
                    shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
                    logger.warning("the prompt %r is too long: %s", shown, self.recorder.cut[prompt])
                # copies: a view would keep both branches' rows in memory
                branches = [[row.to("cpu", copy=True) if isinstance(row, Tensor) else row for row in rows] for rows in branches]
                *self._unconditional[recording.asked.texts], self._texts[recording.asked.texts, prompt] = branches

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Inside, the text encoders are where they encode, until the outermost of such contexts ends."""
        if self._encodes:
            yield
            return
        for encoder in self.text_encoders:
            encoder.to(self.recorder.encodes_on)
        self._encodes = True
        try:
            yield
        finally:
            self._encodes = False
            for encoder in self.text_encoders if self.offload_text_encoder else ():
                encoder.to("cpu")

    def predict(self, x: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        """The network's output for every row, in rollout and update alike, before guidance.

        x (R, *shape) latents in the compute dtype, times (R,) of the schedule. Returns (R, *shape): what it predicts (noise, v, picture,
        velocity) is in the schedule. With guidance the first half of the rows are unconditional; `ddim_step` and `ppo_loss` combine the
        halves.
        """
        for layer in self.merged_layers:
            layer.refresh()  # here, because a compiled network cannot
        with self.guidance, self._autocast():
            return conditions.call(self.forward, x, times)

    def _autocast(self) -> torch.autocast:
        return autocast(self.device.type, self.dtype, self.family.network == "unet", self.full)

    @torch.no_grad()
    def predict_under(self, anchor: str, *inputs) -> Tensor:
        """`predict` under other weights, without a gradient.

        "reference": the bare model. LoRA is switched off, merged or not, also what lora.init put there.
        """
        assert anchor == "reference", anchor
        self.network.disable_adapters()
        try:
            return self.predict(*inputs)
        finally:
            self.network.enable_adapters()

    @torch.no_grad()
    def example_call(self, num_rows: int, prompt: str = PROBES[0]) -> Tensor:
        """The network's output for the same arbitrary rows every time, an even number: the same latents without the prompt and with it.

        They are as in the recording that was made first, a run's of sampling.
        """
        recording, half = next(iter(self._recordings.values())), num_rows // 2
        texts, (row,) = self.texts(recording, [prompt])
        index = torch.tensor([0] * half + [int(row)] * half, device=self.device)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(half, *recording.shape, generator=generator).repeat(2, *[1] * len(recording.shape)).to(self.device, self.dtype)
        times = recording.times[recording.asked.num_steps // 2].to(self.device).expand(num_rows)
        for layer in self.merged_layers:
            layer.refresh()
        with self.guidance, self._autocast():
            return recording.template.call(self.forward, x, times, texts.gather(index))

    def remember_output(self) -> None:
        """Keeps what the network gives before it is made ready for a run, for `check_output`."""
        self._output = self.example_call(2)

    def check_output(self) -> None:
        """Raises ValueError if the network does not give to rounding, see `SAME_NETWORK`, what it gave before."""
        if not (error := difference(self.example_call(2), self._output)) <= SAME_NETWORK[self.dtype]:
            raise ValueError(f"{self.option}: made ready for the run, its network gives numbers that it did not before, by {error:.1g}")

    def decode(self, x: Tensor, recording: Recording) -> Tensor:
        """Pictures (B, 3, H, W) fp32 in [0, 1] of final latents (B, *shape), made by the pipeline itself."""
        self.pipe.vae.to(self.device)
        try:
            return torch.cat([self.recorder.decode(part, recording) for part in x.split(self.decode_batch)])
        finally:
            if self.offload_vae:
                self.pipe.vae.to("cpu")

    @property
    def exported_as(self) -> str:
        """The folder that `export` writes."""
        return self.family.network if self.full else "lora"

    def export(self, folder: Path) -> None:
        """Writes <folder>/lora for `pipe.load_lora_weights`, or, fully fine-tuned, <folder>/unet or transformer for its own class."""
        with new_folder(folder / self.exported_as) as target:
            if self.full:
                self.network.save_pretrained(target)
                return
            name, kind = self.family.network, type(self.network)
            of = {"base_model_class": kind.__name__, "parent_library": kind.__module__.partition(".")[0]}  # names of layers do not tell
            metadata = self.network.peft_config["default"].to_dict() | {"auto_mapping": of}
            layers = {f"{name}_lora_layers": get_peft_model_state_dict(self.network), f"{name}_lora_adapter_metadata": metadata}
            self.pipe.save_lora_weights(target, **layers)

    def load_exported(self, folder: Path) -> None:
        """Takes the trained weights that `export` wrote to `folder`. Raises ValueError if there are none, or others."""
        path = folder / self.exported_as / ("diffusion_pytorch_model.safetensors" if self.full else "pytorch_lora_weights.safetensors")
        try:
            if self.full:
                self.network.load_state_dict(type(self.network).from_pretrained(path.parent).state_dict())
            else:
                tensors = {name.removeprefix(f"{self.family.network}."): tensor for name, tensor in load_file(path).items()}
                unknown = set_peft_model_state_dict(self.network, tensors).unexpected_keys
                if unknown or len(tensors) != len(self.trainable_parameters()):
                    raise ValueError(f"it has {len(tensors)} tensors, not the {len(self.trainable_parameters())} of this LoRA")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be loaded: {' '.join(str(error).split())}") from None
