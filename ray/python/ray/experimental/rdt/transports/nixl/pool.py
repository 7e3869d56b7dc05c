"""A memory pool for copies of new objects, registered with nixl once."""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.cancellation import raise_if_cancelled

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64
_SLICE_S = 0.25

#: What an object takes up of the pool: offset and bytes of each part.
_Parts = list[tuple[int, int]]

#: The offsets of an object's buffers in the pool, and its parts.
_Place = tuple[list[int], _Parts]


class FreeList:
    """The free parts of a memory range. Not thread-safe."""

    def __init__(self, nbytes: int):
        self._free = [(0, nbytes)] if nbytes else []

    @property
    def nbytes(self) -> int:
        """The number of free bytes."""
        return sum(nbytes for _, nbytes in self._free)

    def take(self, nbytes: int) -> int | None:
        """Return the offset of the first free part that is large enough, None if none is."""
        if not nbytes:
            return 0
        for index, (offset, size) in enumerate(self._free):
            if size >= nbytes:
                rest = [(offset + nbytes, size - nbytes)] if size > nbytes else []
                self._free[index : index + 1] = rest
                return offset
        return None

    def give_back(self, offset: int, nbytes: int) -> None:
        """Free a part."""
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


class Copies:
    """Memory for the copies of one object's buffers. It is freed with this object.

    Args:
        buffers: The memory of each buffer, flat uint8.
        parts: The parts of the pool that they use.
        free: Takes the parts back. Runs on: any thread, also within a call of the pool.
    """

    def __init__(self, buffers: list[torch.Tensor], parts: _Parts, free: Callable[[_Parts], None]):
        self.buffers = buffers
        self._parts = parts
        self._free = free

    def __del__(self) -> None:
        self._free(self._parts)


class MemoryPool:
    """A memory range that is handed out in parts: ``memory``, flat uint8. Thread-safe."""

    def __init__(self, nbytes: int, device: torch.device | str):
        import torch

        # Written by threads in any mode, which could not write an inference tensor.
        with torch.inference_mode(False):
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._freed = threading.Condition()
        self._free = FreeList(nbytes)
        self._returned: deque[_Parts] = deque()
        self._full_since: float | None = None

    def take(self, sizes: Sequence[int], timeout_s: float) -> Copies | None:
        """Return memory for buffers of these sizes; wait for freed memory if the pool is full.

        The timeout counts from the moment the pool was first found full since memory was last
        freed. So a pool that stays full delays one object, not each of many in turn.

        Runs on: producer, the thread of the task; blocks without the GIL.

        Args:
            sizes: Their bytes.
            timeout_s: How long to wait, 0 to look only.

        Returns:
            None if the pool stayed full.
        """
        rounded = [_round_up(size) for size in sizes]
        with self._freed:
            while (place := self._find(rounded)) is None:
                if self._full_since is None:
                    self._full_since = time.monotonic()
                left = self._full_since + timeout_s - time.monotonic()
                if left <= 0 or sum(rounded) > self.memory.numel():
                    return None
                # In slices: canceling a task sets a flag, which does not wake a wait.
                self._freed.wait(min(left, _SLICE_S))
                raise_if_cancelled()
        offsets, parts = place
        buffers = [self.memory[start : start + size] for start, size in zip(offsets, sizes)]
        return Copies(buffers, parts, self._give_back)

    def _give_back(self, parts: _Parts) -> None:
        # The garbage collector may call this within ``take``, so ``take`` itself adds the parts.
        self._returned.append(parts)
        with self._freed:
            self._freed.notify_all()

    def _find(self, sizes: Sequence[int]) -> _Place | None:
        while self._returned:
            for part in self._returned.popleft():
                self._free.give_back(*part)
            self._full_since = None
        return self._place(sizes)

    def _place(self, sizes: Sequence[int]) -> _Place | None:
        """Find memory for all buffers: in one part if possible, else one part for each."""
        whole = self._free.take(sum(sizes))
        if whole is not None:
            offsets = [whole]
            for size in sizes[:-1]:
                offsets.append(offsets[-1] + size)
            return offsets, [(whole, sum(sizes))]
        parts: _Parts = []
        for size in sizes:
            offset = self._free.take(size)
            if offset is None:
                for part in parts:
                    self._free.give_back(*part)
                return None
            parts.append((offset, size))
        return [offset for offset, _ in parts], parts


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
