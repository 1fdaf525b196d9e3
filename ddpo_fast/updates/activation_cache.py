"""What the network computes before its first trained layer, kept across PPO epochs: read instead of computed again.

Filled by the rollout at no extra network call, in the dtype that it computes in, so reading it back is exact. Shape letters: B samples of
this rank, S denoising steps, G network rows a transition (2 with guidance), M transitions of a micro-batch.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ddpo_fast.memory import free_host_mib, free_mib, local_ranks
from ddpo_fast.networks.split import Split, resized, stored_bytes
from ddpo_fast.planning.counts import MIB, flop_counter
from ddpo_fast.planning.plan import FRACTIONS, WORTH, matmul_flops
from ddpo_fast.policy import Policy
from ddpo_fast.updates.transitions import MicroBatch, Update

DEVICE, HOST = 0, 1
"""The tiers."""


@dataclass(frozen=True)
class _Segment:
    """Where a slot holds one kept tensor of a network row."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Its dimensions (without the rows) in the order in which they lie in memory."""
    order: tuple[int, ...]
    """Which dimensions of the tensor, rows first, these are: (0, 2, 3, 1) for channels_last."""

    def physical(self, rows: Tensor) -> Tensor:
        """The memory of it in (N, row bytes) uint8, as (N, *shape)."""
        return rows[:, self.start : self.start + self.num_bytes].view(self.dtype).view(len(rows), *self.shape)

    def logical(self, tensor: Tensor) -> Tensor:
        """(N, *shape) as the network has it, of the same memory."""
        return tensor.permute(*np.argsort(self.order).tolist())


def _segments(examples: list[Tensor]) -> tuple[list[_Segment], int]:
    """Of kept tensors (1, ...), in their memory format, and the bytes that they take together."""
    segments, end = [], 0
    for example in examples:
        order = (0, *sorted(range(1, example.dim()), key=lambda d: (-example.stride(d), d)))
        shape = tuple(example.shape[d] for d in order[1:])
        segments.append(_Segment(end, example.nbytes, example.dtype, shape, order))
        end += stored_bytes(example)
    return segments, end


def _pinned(size: tuple[int, int]) -> Tensor:
    """uint8 in pinned host memory of exactly this size: torch's own pinned memory is rounded up to a power of two."""
    store, cuda = torch.empty(size, dtype=torch.uint8), torch.cuda.cudart()
    if store.nbytes:
        torch.cuda.check_error(int(cuda.cudaHostRegister(store.data_ptr(), store.nbytes, 0)))
        weakref.finalize(store, cuda.cudaHostUnregister, store.data_ptr())
    return store


def _rows(chosen: np.ndarray, count: int, num_rows: int) -> Tensor:
    """The rows of some of `count` transitions, of which each has num_rows: all transitions' first come first."""
    return torch.from_numpy((chosen + count * np.arange(num_rows)[:, None]).ravel())


class ActivationCache:
    """The kept tensors of transitions, in slots of fixed size: so many on the device, so many in pinned host memory, the rest recomputed.

    An iteration `begin`s with which transitions are trained on; the rollout runs the network inside of `filling`, the update inside of
    `reading`. Host memory reaches the device on a stream of its own, one micro-batch ahead.
    """

    def __init__(
        self, split: Split, call: Callable[[int], Tensor], num_rows: int, device: torch.device, device_mib: float, host_mib: float
    ):
        """`call`: as `split` was given. `num_rows`: G. The budgets are this rank's, and no slot lies beyond them even in part."""
        self.split, self.num_rows, self.device = split, num_rows, device
        call(2)  # after the engine's start merged weights are formed anew, which must not be counted
        with flop_counter() as flops:
            self.segments, self.row_bytes = _segments([tensor[:1] for tensor in split.run_prefix(partial(call, 2))])
        self.prefix_flop = flops.get_total_flops() / 2
        """Of a network row: what reading it saves."""
        self.slot_bytes = num_rows * self.row_bytes
        self.budgets_mib = device_mib, host_mib
        self.budgets = [int(mib * MIB) // self.slot_bytes for mib in self.budgets_mib]
        """Slots on the device and on the host at most."""
        self.stores = [self._store(0), self._store(0)]
        self.slots = np.empty((0, 0), np.int64)
        """(B, S): each transition's slot, device slots first, -1 where there is none."""
        self.hits = self.reads = 0
        """Transitions read from a slot, and all that were read, since `begin`."""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        """What has been fetched, by the id of its micro-batch."""

    def _store(self, num_slots: int, tier: int = DEVICE) -> Tensor:
        """(slots G, row bytes) uint8."""
        size = num_slots * self.num_rows, self.row_bytes
        if tier == DEVICE or self.device.type != "cuda":
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        return _pinned(size)

    @property
    def num_slots(self) -> list[int]:
        """On the device and on the host."""
        return [len(store) // self.num_rows for store in self.stores]

    def tiers(self, num_transitions: int) -> list[int]:
        """How many of so many transitions are held on the device, held on the host, and recomputed."""
        on_device = min(num_transitions, self.budgets[0])
        on_host = min(num_transitions - on_device, self.budgets[1])
        return [on_device, on_host, num_transitions - on_device - on_host]

    def begin(self, num_samples: int, num_steps: int, updates: list[Update]) -> None:
        """Clears the cache and gives slots to the transitions that `updates` will train on, the most used ones first."""
        uses = np.zeros((num_samples, num_steps), np.int64)
        for update in updates:
            uses[update.rows, update.steps] += 1
        order = np.argsort(-uses, axis=None, kind="stable")[: np.count_nonzero(uses)]
        on_device, on_host, _ = self.tiers(len(order))
        for tier, count in ((DEVICE, on_device), (HOST, on_host)):
            if self.num_slots[tier] < count:
                self.stores[tier] = self._store(0)  # before there are two
                self.stores[tier] = self._store(count, tier)
        self._ahead.clear()
        numbers = np.arange(on_device + on_host)
        self.slots = np.full(uses.shape, -1)
        self.slots.flat[order[: len(numbers)]] = np.where(numbers < on_device, numbers, numbers - on_device + self.num_slots[DEVICE])
        self.hits = self.reads = 0

    @contextmanager
    def filling(self, rows: slice, step: int) -> Iterator[None]:
        """Inside, a call of the network on the samples `rows` at `step`, G times over, fills their slots.

        They lose the slots if the longest text among them makes more tokens than a slot has room for.
        """
        slots = self.slots[rows, step]
        if (slots < 0).all():
            yield
            return
        with self.split.recording() as kept:
            yield
        kept = [tensor.permute(segment.order) for segment, tensor in zip(self.segments, kept)]
        if any(size > room for segment, tensor in zip(self.segments, kept) for size, room in zip(tensor.shape[1:], segment.shape)):
            self.slots[rows, step] = -1
            return
        kept = [resized(tensor, segment.shape) for segment, tensor in zip(self.segments, kept)]
        for tier, chosen in self._by_tier(slots):
            places, network_rows = self._places(slots[chosen], tier), self._network_rows(chosen, len(slots)).to(self.device)
            if len(chosen) < len(slots):
                kept_rows = [tensor.index_select(0, network_rows) for tensor in kept]
            else:
                kept_rows = kept
            if tier == HOST and self.stream is not None:
                self._to_host(kept_rows, places)
                continue
            for segment, tensor in zip(self.segments, kept_rows):
                segment.physical(self.stores[tier]).index_copy_(0, places.to(self.device), tensor)

    def forget(self, rows: slice, bad: Tensor) -> None:
        """Gives up the slots of those of the samples `rows` that are `bad`: they are not finite."""
        self.slots[rows][bad.cpu().numpy()] = -1

    @contextmanager
    def reading(self, part: MicroBatch, next_part: MicroBatch | None, run_network: Callable[[Tensor], object]) -> Iterator[None]:
        """Inside, a call of the network on a micro-batch takes up where its trained layers begin.

        `run_network(rows)` calls it on some of the rows that it is given of the micro-batch: what has no slot is recomputed so, less its
        trained part. These are G M, or M where guidance is rescaled: then a row given is one of each branch.
        Meanwhile the next micro-batch's tensors are copied from host memory to the GPU.
        """
        with self.split.replaying(self._load(part, run_network)):
            if next_part is not None:
                self._fetch(next_part)
            yield

    def forget_fetched(self) -> None:
        """Gives up what was fetched for micro-batches that will not come: an update begins anew, and ids are used again."""
        self._ahead.clear()

    def _fetch(self, part: MicroBatch) -> None:
        """Starts to copy what a micro-batch needs from host memory to the GPU. Without one there is nothing to do."""
        slots = self.slots[part.pairs]
        chosen = dict(self._by_tier(slots)).get(HOST)
        if self.stream is None or chosen is None:
            return
        places = self._places(slots[chosen], HOST)
        staged = torch.empty(len(places), self.row_bytes, dtype=torch.uint8, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream())  # until now the memory may have been another tensor's
        with torch.cuda.stream(self.stream):
            for row, place in zip(staged, places.tolist()):
                row.copy_(self.stores[HOST][place], non_blocking=True)
            self._ahead[id(part)] = staged, self.stream.record_event()
        staged.record_stream(self.stream)

    def _to_host(self, kept: list[Tensor], places: Tensor) -> None:
        staged = torch.empty(len(places), self.row_bytes, dtype=torch.uint8, device=self.device)
        for segment, tensor in zip(self.segments, kept):
            segment.physical(staged).copy_(tensor)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for row, place in zip(staged, places.tolist()):
                self.stores[HOST][place].copy_(row, non_blocking=True)
        staged.record_stream(self.stream)

    def _load(self, part: MicroBatch, run_network: Callable[[Tensor], object]) -> list[Tensor]:
        slots = self.slots[part.pairs]
        self.reads += len(slots)
        self.hits += int((slots >= 0).sum())
        sources = []  # rows of the micro-batch, and their kept tensors
        for tier, chosen in self._by_tier(slots):
            sources.append((self._network_rows(chosen, len(slots)), self._read(part, tier, self._places(slots[chosen], tier))))
        missing = np.flatnonzero(slots < 0)
        if len(missing):
            given = _rows(missing, len(slots), len(part.times) // len(slots)).to(self.device)
            sources.append((self._network_rows(missing, len(slots)), self.split.run_prefix(lambda: run_network(given))))
        if len(sources) == 1:
            return sources[0][1]
        return [self._joined(number, sources, self.num_rows * len(slots)) for number in range(len(self.segments))]

    def _joined(self, number: int, sources: list[tuple[Tensor, list[Tensor]]], num_rows: int) -> Tensor:
        """One of the kept tensors, of all rows, from those of some rows each."""
        segment = self.segments[number]
        parts = [tensors[number].permute(segment.order) for _, tensors in sources]
        shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts))]
        whole = torch.empty(num_rows, *shape, dtype=segment.dtype, device=self.device)
        for (rows, _), part in zip(sources, parts):
            whole.index_copy_(0, rows.to(self.device), resized(part, shape))
        return segment.logical(whole)

    def _read(self, part: MicroBatch, tier: int, places: Tensor) -> list[Tensor]:
        if tier == HOST and self.stream is not None:
            if id(part) not in self._ahead:
                self._fetch(part)
            staged, done = self._ahead.pop(id(part))
            torch.cuda.current_stream().wait_event(done)
            return [segment.logical(segment.physical(staged).contiguous()) for segment in self.segments]
        places = places.to(self.device)
        return [segment.logical(segment.physical(self.stores[tier]).index_select(0, places)) for segment in self.segments]

    def _by_tier(self, slots: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Which of the slots are on the device and which on the host, without a tier that has none of them."""
        on_device = slots < self.num_slots[DEVICE]
        chosen = [(DEVICE, np.flatnonzero((slots >= 0) & on_device)), (HOST, np.flatnonzero(~on_device))]
        return [(tier, which) for tier, which in chosen if len(which)]

    def _places(self, slots: np.ndarray, tier: int) -> Tensor:
        """Rows of a tier's store in the order of the network's rows: all slots' first branch, then all their second."""
        first = (slots - (self.num_slots[DEVICE] if tier == HOST else 0)) * self.num_rows
        return torch.from_numpy((first + np.arange(self.num_rows)[:, None]).ravel())

    def _network_rows(self, chosen: np.ndarray, count: int) -> Tensor:
        """The network's rows of some of `count` transitions."""
        return _rows(chosen, count, self.num_rows)

    def plan_text(self, updates: list[Update], dtype: torch.dtype) -> str:
        """One iteration's use of it: MiB and transitions of each tier, and what reading saves, in operations and estimated seconds."""
        uses = Counter(pair for update in updates for pair in zip(update.rows.tolist(), update.steps.tolist()))
        held = self.tiers(len(uses))
        reads = sum(count for _, count in uses.most_common(sum(held[:2])))
        flop = reads * self.num_rows * self.prefix_flop
        seconds = flop / (FRACTIONS[self.device.type][0] * matmul_flops(dtype, self.device))
        slot_mib, names = self.slot_bytes / MIB, ("on the device", "on the host")
        tiers = [f"{count:,} {name} ({count * slot_mib:,.0f} MiB)" for count, name in zip(held, names)]
        small = [
            f"; {mib:g} MiB {name} cannot hold one" for mib, count, name in zip(self.budgets_mib, self.budgets, names) if mib and not count
        ]
        return (
            f"activation cache of each rank: {slot_mib:.3g} MiB a transition; {', '.join(tiers)}, {held[2]:,} recomputed{''.join(small)}; "
            f"an iteration's update is spared {flop / 1e12:,.3g} TFLOP, about {seconds:,.2g} s"
        )


class NoCache:
    """Holds nothing: the network runs as it is."""

    hits = reads = 0

    def begin(self, num_samples: int, num_steps: int, updates: list[Update]) -> None:
        pass

    def filling(self, rows: slice, step: int) -> nullcontext:
        return nullcontext()

    def forget(self, rows: slice, bad: Tensor) -> None:
        pass

    def plan_text(self, updates: list[Update], dtype: torch.dtype) -> str:
        return ""

    def forget_fetched(self) -> None:
        pass

    def reading(self, part: MicroBatch, next_part: MicroBatch | None, run_network: Callable[[Tensor], object]) -> nullcontext:
        return nullcontext()


NO_CACHE = NoCache()
Cache = ActivationCache | NoCache


def split(mode: str, policy: Policy) -> Split | None:
    """Splits the policy's network where its first trained layer is, if cache.mode wants that: on, or auto and the prefix is worth it.

    Raises ValueError for cache.mode=on and a network without a prefix, or one that cannot be split.
    """
    if mode == "off":
        return None
    try:
        split = Split(policy.network, policy.example_call)
    except ValueError as error:
        raise ValueError(f"cache.mode={mode}: {error}; valid is off") from None
    if split.wanted:
        with flop_counter() as whole:
            policy.example_call(2)
        with flop_counter() as prefix:
            split.run_prefix(partial(policy.example_call, 2))
        if mode == "on" or prefix.get_total_flops() >= WORTH * whole.get_total_flops():
            return split
    split.undo()
    if mode == "on":
        raise ValueError(
            "cache.mode=on: valid is auto or off with this lora.scope, which leaves nothing frozen before the first trained layer"
        )
    return None


def open_cache(split: Split | None, policy: Policy, num_rows: int, prompt: str, options) -> Cache:
    """A run's cache, by `options`, config.cache; where the network is not split, one that never holds anything.

    num_rows: G. prompt: a slot has room for as many tokens as this one makes.
    """
    if split is None:
        return NO_CACHE
    device_mib, host_mib = budgets_mib(options.device_mib, options.host_mib, policy.device)
    return ActivationCache(split, partial(policy.example_call, prompt=prompt), num_rows, policy.device, device_mib, host_mib)


def budgets_mib(device_mib: float | None, host_mib: float | None, device: torch.device) -> tuple[float, float]:
    """What the cache may take of a rank's device and host: as given, or half of what is free now, shared by this machine's ranks."""
    if device_mib is None:
        device_mib = free_mib(device, local_ranks()) / 2
    if host_mib is None:
        host_mib = free_host_mib() / local_ranks() / 2 if device.type == "cuda" else 0.0
    return device_mib, host_mib
