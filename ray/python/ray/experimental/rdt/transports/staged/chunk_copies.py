"""Copies between devices and one chunk of host memory.

A copy between a device and the host costs some microseconds, however small it is. So small pieces
that follow each other go together: they are packed in memory of the device, or unpacked there.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.base import Accelerator
from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.transports.base import TransportUnavailable

if TYPE_CHECKING:
    import torch

#: Pieces below this are packed.
_SMALL_NBYTES = 256 << 10

Pairs = list[tuple["torch.Tensor", "torch.Tensor"]]


@dataclass
class _Plan:
    """The copies of a chunk to or from one device.

    Attributes:
        direct: Parts of the chunk and the pieces on the device that they go straight to or from.
        runs: Parts of the chunk, and the memory of the device that they are packed in.
        packed: Parts of that memory, and the pieces.
    """

    direct: Pairs = field(default_factory=list)
    runs: Pairs = field(default_factory=list)
    packed: Pairs = field(default_factory=list)


class ChunkCopies:
    """Begins copies. Thread-safe.

    Memory for packing small pieces has a stream of its own. On a user's stream it could be used
    only after the work on that stream.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[torch.device, Any] = {}

    def to_host(
        self, memory: torch.Tensor, pieces: Sequence[torch.Tensor], begun: list[Event]
    ) -> None:
        """Copy finished pieces on devices to a chunk.

        Args:
            memory: The chunk, as long as all pieces.
            pieces: In their order.
            begun: Gets an event for each copy.
        """
        for device, plan in self._plans(memory, pieces):
            copy = accelerator_of(device).copy
            if plan.direct:
                begun.append(copy(plan.direct, device))
            if plan.packed:
                begun.append(copy(plan.packed, device))
                begun.append(copy(plan.runs, device, begun[-1:]))

    def to_devices(
        self,
        memory: torch.Tensor,
        pieces: Sequence[torch.Tensor],
        after: Sequence[Event],
        begun: list[Event],
    ) -> None:
        """Copy a chunk to pieces on devices, after some events.

        Args:
            memory: The chunk, as long as all pieces.
            pieces: In their order.
            after: The events.
            begun: Gets an event for each copy.
        """
        for device, plan in self._plans(memory, pieces):
            copy = accelerator_of(device).copy
            if plan.direct:
                begun.append(copy(_reversed(plan.direct), device, after))
            if plan.packed:
                begun.append(copy(_reversed(plan.runs), device))
                begun.append(copy(_reversed(plan.packed), device, [begun[-1], *after]))

    def _plans(
        self, memory: torch.Tensor, pieces: Sequence[torch.Tensor]
    ) -> Iterator[tuple[torch.device, _Plan]]:
        plans: dict[torch.device, _Plan] = {}
        runs: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        for part, run in _runs(memory, pieces):
            plan = plans.setdefault(run[0].device, _Plan())
            if len(run) == 1:
                plan.direct.append((part, run[0]))
            else:
                runs.append((part, run))
        for device, plan in plans.items():
            self._pack(plan, [(part, run) for part, run in runs if run[0].device == device])
            yield device, plan

    def _pack(self, plan: _Plan, runs: list[tuple[torch.Tensor, list[torch.Tensor]]]) -> None:
        """Add runs of small pieces; if the device has no memory for packing, one by one."""
        if not runs:
            return
        scratch = self._scratch(runs[0][1][0].device, sum(part.numel() for part, _ in runs))
        at = 0
        for part, run in runs:
            parts = scratch[at : at + part.numel()] if scratch is not None else part
            pairs = list(zip(cut(parts, [piece.numel() for piece in run]), run))
            if scratch is None:
                plan.direct += pairs
                continue
            plan.packed += pairs
            plan.runs.append((part, parts))
            at += part.numel()

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


def pieces_of(buffers: Sequence[torch.Tensor], start: int, stop: int) -> Iterator[torch.Tensor]:
    """Yield the pieces of bytes ``start`` to ``stop`` of the concatenated buffers."""
    starts = [0, *itertools.accumulate(buffer.numel() for buffer in buffers)]
    for index in range(bisect_right(starts, start) - 1, len(buffers)):
        first = starts[index]
        if first >= stop:
            return
        piece = buffers[index][max(start - first, 0) : stop - first]
        if piece.numel():
            yield piece


def _runs(
    memory: torch.Tensor, pieces: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
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
