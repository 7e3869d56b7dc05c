"""Device memory that processes of one host map from each other.

A segment is one allocation that the vendor's allocator got from the driver; all tensors in it share
a handle. This process maps a segment once for all objects in it, and unmaps it after the last one.
Memory of a third process is passed on by the handle of that process, because a driver cannot export
imported memory.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ray.experimental.rdt._tensors import tensor_over
from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.common.once import Once
from ray.experimental.rdt.common.processes import Process

if TYPE_CHECKING:
    import torch


class CannotShare(RuntimeError):
    """Memory that another process cannot open; says why."""


class Sharing(Protocol):
    """The calls of a vendor's driver that share device memory with other processes of the host."""

    #: The number of the device type in DLPack.
    dlpack_type: int

    def identity(self, device: torch.device) -> str:
        """Return an ID of a device that is the same in all processes that can see it."""

    def unreachable_reason(self, device: torch.device, identity: str) -> str:
        """Return why ``device`` cannot map memory of another device, "" if it probably can."""

    def export(self, address: int, device: torch.device) -> tuple[bytes, int, int]:
        """Return the allocation that contains an address: handle, first address, bytes.

        Raises CannotShare if other processes cannot open it.
        """

    def map(self, handle: bytes, device: torch.device) -> int:
        """Map an allocation of another process for ``device``; return its first address.

        Raises CannotShare if it cannot be opened.
        """

    def unmap(self, address: int, device: torch.device) -> None:
        """Undo ``map``. May block until work over the memory has ended; holds no GIL."""

    def export_event(self, event: Event) -> tuple[bytes, Any]:
        """Return an event that another process can wait for; it is reached after ``event``.

        With its handle comes an object to keep for as long as the other process uses it. Raises
        CannotShare.
        """

    def import_event(self, handle: bytes, device: torch.device) -> Event:
        """Return an event of another process. Raises CannotShare."""


class Segment(NamedTuple):
    """One allocation of a device, for other processes.

    Attributes:
        handle: The driver's.
        owner: The ID of the process that allocated it.
        pid: The PID of that process.
        address: Its first address in that process.
        nbytes: Its size.
        device: The identity of its device.
    """

    handle: bytes
    owner: bytes
    pid: int
    address: int
    nbytes: int
    device: str


class MemoryLost(TransferFailed, RuntimeError):
    """The process that allocated memory has ended; the contents of the memory are undefined."""

    code = "peer_lost"

    def __init__(self, segment: Segment):
        super().__init__(
            f"process {segment.pid} has ended, which had allocated the device memory that this "
            "process shares with it"
        )


@dataclass(frozen=True)
class Layout:
    """The places of buffers in segments.

    Attributes:
        segments: The segments that hold at least one buffer.
        indices: The segment of each buffer, as uint32; 0 for empty buffers.
        offsets: The offset of each buffer in its segment, as uint64.
    """

    segments: list[Segment]
    indices: array[int]
    offsets: array[int]

    def encode(self) -> dict[str, Any]:
        """Return the layout for another process."""
        return {
            "segments": [list(segment) for segment in self.segments],
            "indices": self.indices.tobytes(),
            "offsets": self.offsets.tobytes(),
        }

    @classmethod
    def decode(cls, encoded: dict[str, Any]) -> Layout:
        """Return the layout that ``encode`` described."""
        segments = [Segment(*fields) for fields in encoded["segments"]]
        return cls(segments, array("I", encoded["indices"]), array("Q", encoded["offsets"]))


@dataclass
class _Mapped:
    """A segment of another process that is mapped here, and the number of its uses."""

    segment: Segment
    device: torch.device
    process: Process
    address: Once[int] = field(default_factory=Once)
    uses: int = 0
    is_logged: bool = False


class Mapping:
    """One use of a mapped segment, whose first address in this process is ``address``."""

    def __init__(self, address: int, end: Callable[[], None] | None):
        self.address = address
        self._end = end

    def release(self) -> None:
        """End the use; the last one unmaps the segment, which may block. Idempotent."""
        end, self._end = self._end, None
        if end is not None:
            end()


class SharedMemory:
    """One process's shared memory of one kind of device, by the vendor's driver. Thread-safe."""

    def __init__(self, driver: Sharing):
        self.driver = driver
        self._owner = os.urandom(16)
        self._lock = threading.Lock()
        self._mapped: dict[tuple[bytes, torch.device], _Mapped] = {}

    def __len__(self) -> int:
        """Return how many segments of other processes are mapped."""
        return len(self._mapped)

    def describe(self, buffers: Sequence[torch.Tensor]) -> Layout:
        """Return the places of flat buffers, for another process. Each segment is exported once.

        Raises CannotShare if other processes cannot open one of them.
        """
        indices = array("I", bytes(4 * len(buffers)))
        offsets = array("Q", bytes(8 * len(buffers)))
        segments: list[Segment] = []
        starts: list[int] = []  # of the segments in this process
        spans = sorted(
            (buffer.data_ptr(), index) for index, buffer in enumerate(buffers) if buffer.numel()
        )
        for address, index in spans:
            if not segments or address >= starts[-1] + segments[-1].nbytes:
                segment, start = self._find(address, buffers[index].device)
                segments.append(segment)
                starts.append(start)
            indices[index] = len(segments) - 1
            offsets[index] = address - starts[-1]
        return Layout(segments, indices, offsets)

    def _find(self, address: int, device: torch.device) -> tuple[Segment, int]:
        """Return the segment of an address, and its first address in this process."""
        for entry, start in self._entries():
            if start <= address < start + entry.segment.nbytes:
                return entry.segment, start
        handle, start, nbytes = self.driver.export(address, device)
        identity = self.driver.identity(device)
        return Segment(handle, self._owner, os.getpid(), start, nbytes, identity), start

    def _entries(self) -> list[tuple[_Mapped, int]]:
        """Return the mapped segments, and their first addresses in this process."""
        with self._lock:
            entries = [(entry, entry.address.peek()) for entry in self._mapped.values()]
        return [(entry, start) for entry, start in entries if start is not None]

    def check_owners(self, buffers: Sequence[torch.Tensor]) -> None:
        """Raise MemoryLost if the process that allocated one of the buffers has ended."""
        for entry, start in self._entries():
            is_used = any(0 <= b.data_ptr() - start < entry.segment.nbytes for b in buffers)
            if is_used and entry.process.has_ended():
                raise MemoryLost(entry.segment)

    def lost(self) -> list[int]:
        """Return the PIDs of processes that ended since the last call while mapped here."""
        ended = [e for e, _ in self._entries() if not e.is_logged and e.process.has_ended()]
        for entry in ended:
            entry.is_logged = True
        return sorted({entry.segment.pid for entry in ended})

    def map(self, segment: Segment, device: torch.device) -> Mapping:
        """Map a segment for a device of this process, or use the existing mapping.

        Raises CannotShare if it cannot be opened.
        """
        if segment.owner == self._owner:
            return Mapping(segment.address, None)
        unreachable_reason = self.driver.unreachable_reason(device, segment.device)
        if unreachable_reason:
            raise CannotShare(unreachable_reason)
        key = segment.handle, device
        with self._lock:
            entry = self._mapped.get(key)
            if entry is None:
                entry = self._mapped[key] = _Mapped(segment, device, Process(segment.pid))
            entry.uses += 1
        try:
            address = entry.address.get(lambda: self.driver.map(segment.handle, device))
        except BaseException:  # also Ctrl-C: the use ends, whatever failed
            self._leave(key, entry)
            raise
        return Mapping(address, lambda: self._leave(key, entry))

    def _leave(self, key: tuple[bytes, torch.device], entry: _Mapped) -> None:
        with self._lock:
            entry.uses -= 1
            if entry.uses:
                return
            del self._mapped[key]
        address = entry.address.peek()
        if address is not None:
            self.driver.unmap(address, entry.device)

    def tensor(self, address: int, nbytes: int, device: torch.device, owner: Any) -> torch.Tensor:
        """Return a flat uint8 tensor over mapped memory. Its storage keeps ``owner`` alive."""
        return tensor_over(address, nbytes, self.driver.dlpack_type, device.index, owner)
