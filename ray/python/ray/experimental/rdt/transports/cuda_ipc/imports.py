"""Memory of producers that a consumer has mapped: reads of it, tensors over it, its unmapping."""

from __future__ import annotations

import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.base import Accelerator
from ray.experimental.rdt.accelerators.events import Event, have_ended
from ray.experimental.rdt.accelerators.shared_memory import (
    CannotShare,
    Layout,
    Mapping,
    SharedMemory,
)
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import note_still_writing
from ray.experimental.rdt.common.real_threads import Empty, SimpleQueue
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import CallError, Session
from ray.experimental.rdt.transports.base import Buffers, Events, Peer, Route, TransportUnavailable

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ray.rdt")

#: How often the unmapping thread looks whether work over unused memory has ended.
_POLL_S = 0.05

#: How long a failed read waits for its copies.
_GRACE_S = 5.0


@dataclass
class Import:
    """Memory of a producer that this process uses.

    Attributes:
        peer: The producer.
        loan: The ID of the producer's duty to keep the memory.
        mappings: The mappings of its segments.
        events: The memory is unused once these are reached.
    """

    peer: Peer
    loan: str = field(default_factory=lambda: os.urandom(16).hex())
    mappings: list[Mapping] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


class Imports:
    """The imported memory of one process, for transport ``name``. Thread-safe."""

    def __init__(self, session: Session, name: str, accelerator: Accelerator, memory: SharedMemory):
        self.session = session
        self.name = name
        self.accelerator = accelerator
        self.memory = memory
        self._lock = threading.Lock()
        self._is_closed = False
        self._count = 0
        self._unused: SimpleQueue[Import | threading.Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def map(
        self,
        imported: Import,
        layout: Layout,
        indices: Sequence[int],
        device: torch.device,
        starts: dict[int, int],
    ) -> None:
        """Map the segments of some buffers, and add to ``starts`` the address of each.

        Segments in ``starts`` are mapped already. Raises TransportUnavailable if one cannot be.
        """
        for index in sorted({layout.indices[i] for i in indices} - starts.keys()):
            try:
                mapping = self.memory.map(layout.segments[index], device)
            except CannotShare as error:
                raise TransportUnavailable(
                    f"the producer's memory cannot be opened: {error}"
                ) from error
            imported.mappings.append(mapping)
            starts[index] = mapping.address

    def keep(self, imported: Import) -> None:
        """Tell the producer that its memory is used beyond the deadline."""
        self._tell(protocol.MEMORY_KEEP, imported)

    def _tell(self, request: str, imported: Import) -> None:
        op = protocol.of_transport(request, self.name)
        self.session.send_oneway(imported.peer.address, op, {"loan": imported.loan})

    def expect_release(self) -> None:
        """Keep the unmapping thread running until one more import is released."""
        with self._lock:
            self._count += 1
            if self._thread is None:
                name = f"rdt-{self.name}-close"
                self._thread = threading.Thread(target=self._unmap_unused, name=name)
                self._thread.start()

    def put_released(self, imported: Import) -> None:
        """Release memory after ``expect_release``. Takes no lock, so a finalizer may call it."""
        self._unused.put(imported)

    def release(self, imported: Import) -> None:
        """Unmap memory and tell the producer. Runs on: consumer, any thread; returns at once."""
        self.expect_release()
        self.put_released(imported)

    def wait(self, timeout_s: float) -> None:
        """Wait until released memory is unmapped, if no work over it is left."""
        if self._thread is not None and not self._is_closed:
            is_unmapped = threading.Event()
            self._unused.put(is_unmapped)
            is_unmapped.wait(timeout_s)

    def close(self) -> None:
        """End the unmapping thread once the last tensor over borrowed memory is gone."""
        self._is_closed = True
        self._unused.put(None)

    def _unmap_unused(self) -> None:
        """Unmap released memory once the work over it has ended.

        Runs on: the unmapping thread, because unmapping may block until a device is idle.
        """
        waiting: list[Import] = []
        while not (self._is_closed and self._count == 0):
            item = None
            with suppress(Empty):
                item = self._unused.get(timeout=_POLL_S if waiting else None)
            if isinstance(item, Import):
                waiting.append(item)
            waiting = [imported for imported in waiting if not self._try_to_unmap(imported)]
            if isinstance(item, threading.Event):
                item.set()

    def _try_to_unmap(self, imported: Import) -> bool:
        if not have_ended(imported.events, 0):
            return False
        imported.events.clear()
        try:
            for mapping in imported.mappings:
                mapping.release()
        except Exception:  # the producer is told all the same: this process uses it no more
            logger.warning("RDT could not unmap device memory", exc_info=True)
        imported.mappings.clear()
        if not self._is_closed:
            self._tell(protocol.MEMORY_CLOSE, imported)
        with self._lock:
            self._count -= 1
        return True


class Borrowing:
    """See ``base.Borrowing``. ``domain`` is this process's ``pid_domain``."""

    def __init__(self, imports: Imports, domain: str, device: torch.device):
        self._imports = imports
        self._device = device
        self._is_over = False
        self.asked: Route = {
            "place": domain,
            "device": imports.memory.driver.identity(device),
            "pid": os.getpid(),
            "loan": os.urandom(16).hex(),
        }

    def take(self, peer: Peer, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        self._is_over = True
        imported = Import(peer, self.asked["loan"])
        try:
            return self._tensors(imported, lent, sizes)
        except BaseException:  # also Ctrl-C: the producer keeps the memory until it is released
            self._imports.release(imported)
            raise

    def abandon(self, peer: Peer) -> None:
        if not self._is_over:
            self._is_over = True
            self._imports.release(Import(peer, self.asked["loan"]))

    def _tensors(self, imported: Import, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        memory, device = self._imports.memory, self._device
        layout = Layout.decode(lent)
        starts: dict[int, int] = {}
        filled = [i for i, nbytes in enumerate(sizes) if nbytes]
        self._imports.map(imported, layout, filled, device, starts)
        try:
            events = [memory.driver.import_event(handle, device) for handle in lent["events"]]
        except CannotShare as error:
            raise TransportUnavailable(f"the producer's event cannot be opened: {error}") from error
        for event in events:
            event.make_stream_wait()
        self._imports.keep(imported)
        self._imports.expect_release()
        lease = _Lease(self._imports, imported, device, events)
        tensors = []
        for nbytes, index, offset in zip(sizes, layout.indices, layout.offsets):
            if nbytes:
                tensors.append(memory.tensor(starts[index] + offset, nbytes, device, lease))
            else:
                tensors.append(self._imports.accelerator.empty(0, device))
        memory.check_owners(tensors)
        return tensors


@dataclass(eq=False)
class _Lease:
    """Borrowed memory, kept until the last tensor over it is gone.

    ``events`` are the producer's, which streams here wait for.
    """

    imports: Imports
    imported: Import
    device: torch.device
    events: Events

    def __del__(self) -> None:
        """Release the memory after the work that the current stream has.

        Runs on: the thread that dropped the last tensor. It may be anywhere in its code and hold
        any lock, so this takes none.
        """
        if not sys.is_finalizing():
            self.imported.events = [self.imports.accelerator.record(self.device)]
            self.imports.put_released(self.imported)


@dataclass
class _MappedObject:
    """An object of a producer that is mapped here, for all reads until the object is freed.

    Attributes:
        key: The producer's agent, and its number for the object.
        imported: Its memory.
        layout: Where its buffers lie.
        starts: For each device of this process, the addresses at which its segments are mapped.
        readers: How many reads use it now.
        is_ended: Whether the last of them releases it.
    """

    key: tuple[bytes, int]
    imported: Import
    layout: Layout
    starts: defaultdict[torch.device, dict[int, int]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    readers: int = 0
    is_ended: bool = False


class Reads:
    """The reads of one process. Thread-safe."""

    def __init__(self, imports: Imports):
        self._imports = imports
        self._session = imports.session
        self._lock = threading.Lock()
        self._objects: dict[tuple[bytes, int], _MappedObject] = {}
        op = protocol.of_transport(protocol.MEMORY_GONE, imports.name)
        self._session.serve(op, self._on_gone)

    def read(
        self, peer: Peer, exposure: int, buffers: Buffers, deadline: Deadline, after: Events
    ) -> None:
        """See ``OneSided``. Memory stays mapped until the last copy from it has ended."""
        mapped = self._acquire(peer, exposure, deadline)
        copies: list[Event] = []
        try:
            self._copy(mapped, copies, buffers, deadline, after)
        except BaseException as error:  # also Ctrl-C: copies may still write the targets
            mapped.is_ended = True
            if not have_ended(copies, _GRACE_S):
                note_still_writing(error)
            raise
        finally:
            self._release(mapped, copies, deadline)

    def forget(self, producer: bytes | None = None) -> None:
        """Unmap the objects of a producer, None for all, once no read uses them."""
        with self._lock:
            keys = [key for key in self._objects if producer in (None, key[0])]
        self._forget(keys)

    def _forget(self, keys: Iterable[tuple[bytes, int]]) -> None:
        with self._lock:
            ended = [self._objects.pop(key) for key in keys if key in self._objects]
            for mapped in ended:
                mapped.is_ended = True
            unused = [mapped.imported for mapped in ended if not mapped.readers]
        for imported in unused:
            self._imports.release(imported)

    def _acquire(self, peer: Peer, exposure: int, deadline: Deadline) -> _MappedObject:
        """Return the object for one more read. The first read asks the producer for its layout."""
        key = peer.agent_id, exposure
        with self._lock:
            known = self._objects.get(key)
            if known is not None:
                known.readers += 1
                return known
        imported = Import(peer)
        body = protocol.MemoryShare(
            exposure=exposure,
            loan=imported.loan,
            pid=os.getpid(),
            address=self._session.address,
            timeout_s=deadline.left_s(),
        )
        try:
            op = protocol.of_transport(protocol.MEMORY_SHARE, self._imports.name)
            answer = self._session.call(peer.address, op, body, deadline.left_s())
        except BaseException as error:  # also Ctrl-C: the producer may have begun the loan
            self._imports.release(imported)
            if isinstance(error, CallError) and error.code == TransportUnavailable.code:
                raise TransportUnavailable(str(error)) from error
            raise
        self._imports.keep(imported)
        mapped = _MappedObject(key, imported, Layout.decode(answer), readers=1)
        with self._lock:
            # Of two threads that asked at once, one keeps its own for this read alone.
            mapped.is_ended = self._objects.setdefault(key, mapped) is not mapped
        return mapped

    def _release(self, mapped: _MappedObject, copies: Sequence[Event], deadline: Deadline) -> None:
        """End one read.

        After the deadline, the producer may already have reported that the object is freed.
        """
        pending = [copy for copy in copies if not have_ended([copy], 0)]
        with self._lock:
            mapped.readers -= 1
            mapped.imported.events += pending
            mapped.is_ended = mapped.is_ended or deadline.has_passed()
            if mapped.is_ended and self._objects.get(mapped.key) is mapped:
                del self._objects[mapped.key]
            is_last = mapped.is_ended and not mapped.readers
        if is_last:
            self._imports.release(mapped.imported)

    def _copy(
        self,
        mapped: _MappedObject,
        copies: list[Event],
        buffers: Buffers,
        deadline: Deadline,
        after: Events,
    ) -> None:
        """Copy an object into buffers; add each copy to ``copies`` when it is started."""
        memory, layout, copied = self._imports.memory, mapped.layout, []
        for device in {buffer.device for buffer in buffers}:
            local = [i for i, b in enumerate(buffers) if b.device == device and b.numel()]
            starts = mapped.starts[device]
            self._imports.map(mapped.imported, layout, local, device, starts)
            pairs = []
            for i in local:
                address = starts[layout.indices[i]] + layout.offsets[i]
                source = memory.tensor(address, buffers[i].numel(), device, mapped.imported)
                pairs.append((buffers[i], source))
            copied += pairs
            if pairs:
                copies.append(self._imports.accelerator.copy(pairs, device, after))
        for copy in copies:
            copy.wait(deadline.left_s())
        memory.check_owners([source for _, source in copied])

    def _on_gone(self, peer_id: bytes, body: protocol.MemoryGone) -> dict[str, Any]:
        """Runs on: consumer, an rdt-call thread."""
        self._forget([(peer_id, body["exposure"])])
        return {}
