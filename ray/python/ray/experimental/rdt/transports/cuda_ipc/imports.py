"""Memory of producers that a consumer has mapped, tensors over it, and its unmapping thread."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators.base import Accelerator
from ray.experimental.rdt.accelerators.events import Event, have_ended
from ray.experimental.rdt.accelerators.shared_memory import (
    CannotShare,
    Layout,
    Mapping,
    SharedMemory,
)
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.real_threads import Empty, SimpleQueue
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.base import Events, Peer, Route, TransportUnavailable

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ray.rdt")

#: How often the unmapping thread looks whether work over unused memory has ended.
_POLL_S = 0.05


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
