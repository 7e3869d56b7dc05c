"""Copies of producers' objects, whose memory stays mapped between reads."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.events import Event, have_ended
from ray.experimental.rdt.accelerators.shared_memory import Layout
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import note_still_writing
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import CallError
from ray.experimental.rdt.transports.base import Buffers, Events, Peer, TransportUnavailable
from ray.experimental.rdt.transports.cuda_ipc.imports import Import, Imports

if TYPE_CHECKING:
    import torch

#: How long a failed read waits for its copies.
_GRACE_S = 5.0


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
