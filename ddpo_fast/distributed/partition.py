"""ZeRO 3 from the first byte: weights are partitioned one after the other as they are read, so that no rank ever has them all.

DeepSpeed is imported where it is needed, because what only opens a model does without.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import nn
from torch.utils.hooks import RemovableHandle


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether a rank has a part of a weight alone."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A weight's, also where it is partitioned."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def whole(parameter: nn.Parameter) -> AbstractContextManager:
    """Inside, a weight is whole, also where it is partitioned; then all ranks have to enter."""
    if not is_partitioned(parameter):
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters([parameter])


@dataclass
class Partition:
    """How a network's weights are partitioned over the ranks. All ranks make the same calls."""

    on_host: bool
    """Whether a rank's parts are in host memory."""
    fp32: bool
    """Whether the weights are trained ones, which are fp32 whatever they are read in."""
    _hooks: list[RemovableHandle] = field(default_factory=list)

    def take(self, parameter: nn.Parameter) -> None:
        """Leaves this rank its part of a weight, as rank 0 has it."""
        from deepspeed.runtime.zero.partition_parameters import Init

        if self.fp32:
            parameter.data = parameter.data.float()
        Init(module=nn.ParameterList([parameter]), remote_device="cpu" if self.on_host else None)

    @contextmanager
    def shown(self, network: nn.Module) -> Iterator[None]:
        """Inside, weights that have been taken have their shapes, and no numbers."""
        taken = [parameter for parameter in network.parameters() if is_partitioned(parameter)]
        for parameter in taken:
            parameter.data = parameter.data.new_empty(()).expand(parameter.ds_shape)
        try:
            yield
        finally:
            for parameter in taken:
                parameter.data = parameter.data.new_empty(0)

    def gather_for_calls(self, network: nn.Module) -> None:
        """Makes a module's own weights whole while it is called, until `leave`: an engine does so, and there is none yet."""
        for module in network.modules():
            own = [parameter for parameter in module.parameters(recurse=False) if is_partitioned(parameter)]
            if own:
                self._hooks.append(module.register_forward_pre_hook(lambda _, args, own=own: own[0].all_gather(own)))
                self._hooks.append(module.register_forward_hook(lambda _, args, out, own=own: own[0].partition(own), always_call=True))

    def leave(self) -> None:
        """Leaves the gathering to an engine."""
        while self._hooks:
            self._hooks.pop().remove()
