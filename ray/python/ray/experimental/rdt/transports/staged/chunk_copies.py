"""Copies between devices and one chunk of host memory.

A copy between a device and the host costs some microseconds, however small it is. So small pieces
that follow each other go together: they are packed in memory of the device, or unpacked there.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.base import Accelerator
from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.transports.base import Buffers, Events, TransportUnavailable

if TYPE_CHECKING:
    import torch

#: Pieces below this are packed.
_SMALL_NBYTES = 256 << 10

Pairs = list[tuple["torch.Tensor", "torch.Tensor"]]

#: A part of the chunk, and the pieces that are copied from or to it at once.
_Run = tuple["torch.Tensor", list["torch.Tensor"]]


class _Plan(NamedTuple):
    """The copies of a chunk to or from one device.

    Attributes:
        direct: Parts of the chunk and the pieces on the device that they go straight to or from.
        runs: Parts of the chunk, and the memory of the device that they are packed in.
        packed: Parts of that memory, and the pieces.
    """

    direct: Pairs
    runs: Pairs
    packed: Pairs


class ChunkCopies:
    """Begins copies. Thread-safe.

    Memory for packing small pieces has a stream of its own. On a user's stream it could be used
    only after the work on that stream.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[torch.device, Any] = {}

    def to_host(self, memory: torch.Tensor, pieces: Buffers, begun: list[Event]) -> None:
        """Copy finished pieces on devices to a chunk of their size; add events to ``begun``."""
        for device, plan in self._plans(memory, pieces):
            copy = accelerator_of(device).copy
            if plan.direct:
                begun.append(copy(plan.direct, device))
            if plan.packed:
                begun.append(copy(plan.packed, device))
                begun.append(copy(plan.runs, device, begun[-1:]))

    def to_devices(
        self, memory: torch.Tensor, pieces: Buffers, after: Events, begun: list[Event]
    ) -> None:
        """Copy a chunk to pieces on devices after some events; add events to ``begun``."""
        for device, plan in self._plans(memory, pieces):
            copy = accelerator_of(device).copy
            if plan.direct:
                begun.append(copy(_reversed(plan.direct), device, after))
            if plan.packed:
                begun.append(copy(_reversed(plan.runs), device))
                begun.append(copy(_reversed(plan.packed), device, [begun[-1], *after]))

    def _plans(self, memory: torch.Tensor, pieces: Buffers) -> Iterator[tuple[torch.device, _Plan]]:
        runs = list(_runs(memory, pieces))
        for device in dict.fromkeys(run[0].device for _, run in runs):
            yield device, self._plan(device, [each for each in runs if each[1][0].device == device])

    def _plan(self, device: torch.device, runs: list[_Run]) -> _Plan:
        """Plan runs of one device. If it has no memory for packing, small pieces go one by one."""
        direct = [(part, run[0]) for part, run in runs if len(run) == 1]
        small = [(part, run) for part, run in runs if len(run) > 1]
        parts = [part for part, _ in small]
        sizes = [part.numel() for part in parts]
        scratch = self._scratch(device, sum(sizes)) if small else None
        packed_in = parts if scratch is None else cut(scratch, sizes)
        pairs: Pairs = []
        for memory, (_, run) in zip(packed_in, small):
            pairs += zip(cut(memory, [piece.numel() for piece in run]), run)
        if scratch is None:
            return _Plan(direct + pairs, [], [])
        return _Plan(direct, list(zip(parts, packed_in)), pairs)

    def _scratch(self, device: torch.device, nbytes: int) -> torch.Tensor | None:
        import torch

        accelerator = accelerator_of(device)
        stream = self._streams.get(device)
        if stream is None:
            made = accelerator.new_stream(device)
            with self._lock:
                stream = self._streams.setdefault(device, made)
        try:
            with accelerator.on(stream):
                return accelerator.empty(nbytes, device)
        except torch.OutOfMemoryError:
            return None


def pieces_of(buffers: Buffers, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Yield the pieces of bytes ``start`` to ``stop`` of the concatenated buffers."""
    starts = [0, *itertools.accumulate(buffer.numel() for buffer in buffers)]
    for index in range(bisect_right(starts, start) - 1, len(buffers)):
        first = starts[index]
        if first >= stop:
            return
        piece = buffers[index][max(start - first, 0) : stop - first]
        if piece.numel():
            yield piece


def _runs(memory: torch.Tensor, pieces: Buffers) -> Iterator[_Run]:
    """Yield the pieces of each copy, with their part of the chunk."""
    keys = (
        (piece.device, None if piece.numel() < _SMALL_NBYTES else index)
        for index, piece in enumerate(pieces)
    )
    start = 0
    for _, group in itertools.groupby(zip(keys, pieces), key=lambda item: item[0]):
        run = [piece for _, piece in group]
        stop = start + sum(piece.numel() for piece in run)
        yield memory[start:stop], run
        start = stop


def cut(memory: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Cut memory into consecutive parts of these sizes."""
    ends = list(itertools.accumulate(sizes))
    return [memory[end - size : end] for size, end in zip(sizes, ends)]


def _reversed(pairs: Pairs) -> Pairs:
    return [(source, target) for target, source in pairs]


def accelerator_of(device: torch.device) -> Accelerator:
    """Return the accelerator of a device. Raises TransportUnavailable if there is none here."""
    accelerator = accelerators.usable(device.type)
    if accelerator is None:
        raise TransportUnavailable(f"this process cannot work with memory on {device}")
    return accelerator
