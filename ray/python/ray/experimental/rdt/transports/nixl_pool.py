"""Memory registered with nixl once, which exposed objects are copied into."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.experimental.rdt.transports.nixl_plan import Spans, spans_of

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64


#: The offsets of an object's buffers in the pool, and what it takes up: offset and bytes.
_Place = tuple[list[int], list[tuple[int, int]]]


class FreeList:
    """The free parts of a stretch of memory. Pure; not thread-safe.

    Args:
        nbytes: The size of the whole.
    """

    def __init__(self, nbytes: int):
        self._free = [(0, nbytes)] if nbytes else []

    @property
    def nbytes(self) -> int:
        """What is free."""
        return sum(nbytes for _, nbytes in self._free)

    def take(self, nbytes: int) -> int | None:
        """The offset of the first free part that is large enough, None if none is."""
        if not nbytes:
            return 0
        for index, (offset, size) in enumerate(self._free):
            if size >= nbytes:
                rest = [(offset + nbytes, size - nbytes)] if size > nbytes else []
                self._free[index : index + 1] = rest
                return offset
        return None

    def give_back(self, offset: int, nbytes: int) -> None:
        """Frees what ``take`` gave."""
        if not nbytes:
            return
        insort(self._free, (offset, nbytes))
        joined: list[tuple[int, int]] = []
        for start, size in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        self._free = joined


@dataclass(frozen=True)
class Copies:
    """Copies of buffers in the pool.

    Attributes:
        spans: Their memory.
        parts: What they take up of the pool: offset and bytes.
    """

    spans: Spans
    parts: list[tuple[int, int]]


class MemoryPool:
    """A stretch of memory, and copies in it. Thread-safe.

    Args:
        nbytes: Its size.
        device: Where it is.

    Attributes:
        memory: All of it, as flat uint8.
    """

    def __init__(self, nbytes: int, device: torch.device | str):
        import torch

        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._freed = threading.Condition()
        self._free = FreeList(nbytes)
        self._is_closed = False

    def can_hold(self, buffers: Sequence[torch.Tensor]) -> bool:
        """Whether the buffers fit when all else is gone, and may come to this device."""
        is_near = self.memory.device.type == "cpu" or all(
            buffer.device == self.memory.device for buffer in buffers
        )
        return is_near and sum(_size(buffer) for buffer in buffers) <= self.memory.numel()

    def copy(self, buffers: Sequence[torch.Tensor], deadline: float) -> Copies:
        """Copies flat uint8 buffers into the pool; waits while it is full.

        Raises:
            TimeoutError: it was full until the deadline.
        """
        offsets, parts = self._wait_for([_size(buffer) for buffer in buffers], deadline)
        copies = Copies(self._spans(offsets, buffers), parts)
        try:
            for buffer, offset in zip(buffers, offsets, strict=True):
                self.memory[offset : offset + buffer.numel()].copy_(buffer)
            self._settle()
        except BaseException:
            self.free(copies)
            raise
        return copies

    def free(self, copies: Copies) -> None:
        """Frees copies and wakes those who wait for room."""
        with self._freed:
            for part in copies.parts:
                self._free.give_back(*part)
            self._freed.notify_all()

    def close(self) -> None:
        """Sends those away who wait for room."""
        with self._freed:
            self._is_closed = True
            self._freed.notify_all()

    def _spans(self, offsets: list[int], buffers: Sequence[torch.Tensor]) -> Spans:
        whole = spans_of([self.memory])
        rows = whole.rows.repeat(len(offsets), axis=0)
        rows[:, 0] = [self.memory.data_ptr() + offset for offset in offsets]
        rows[:, 1] = [buffer.numel() for buffer in buffers]
        return Spans(whole.kinds.repeat(len(offsets)), rows)

    def _wait_for(self, sizes: Sequence[int], deadline: float) -> _Place:
        with self._freed:
            while (place := self._place(sizes)) is None:
                left = deadline - time.monotonic()
                if self._is_closed or not self._freed.wait(max(0.0, left)):
                    raise TimeoutError(
                        f"the nixl memory pool had no room for {sum(sizes)} bytes in time "
                        f"({self._free.nbytes} of {self.memory.numel()} are free)"
                    )
            return place

    def _place(self, sizes: Sequence[int]) -> _Place | None:
        """Room for all buffers: in one part where there is one, else each in its own."""
        whole = self._free.take(sum(sizes))
        if whole is not None:
            offsets = [whole]
            for size in sizes[:-1]:
                offsets.append(offsets[-1] + size)
            return offsets, [(whole, sum(sizes))]
        parts: list[tuple[int, int]] = []
        for size in sizes:
            offset = self._free.take(size)
            if offset is None:
                for part in parts:
                    self._free.give_back(*part)
                return None
            parts.append((offset, size))
        return [offset for offset, _ in parts], parts

    def _settle(self) -> None:
        """Waits until a device has carried out the copies: nixl does not see its streams."""
        import torch

        if self.memory.is_cuda:
            torch.cuda.current_stream(self.memory.device).synchronize()


def _size(buffer: torch.Tensor) -> int:
    return -(-buffer.numel() // _ALIGNMENT) * _ALIGNMENT
