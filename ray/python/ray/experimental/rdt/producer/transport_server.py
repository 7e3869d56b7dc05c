"""The producer's side of a pull over a transport: consumers ask, this process sends or exposes.

The agent's own lanes need none of this; they read registered regions without Python.

Requests (``rpc/protocol.py``):

* ``rdt.send`` {key, transport, device, route, timeout_s}: checks, waits until the memory is
  written, answers, then sends, on the same thread: one that hands over to another waits once more
  for the producer's GIL. (gloo and nccl have a thread for each transfer all the same: link.py says
  why.) What fails before the answer is the answer. A send that fails afterwards ends the consumer's
  receive through the transport's own connection; others are left alone.
* ``rdt.expose`` {key, transport, device, timeout_s}: answers with what ``OneSided.expose`` gave;
  the object stays borrowed until ``rdt.done``, the consumer's loss, or soon after its deadline.
* ``rdt.lend`` {key, transport, device, asked, timeout_s}: answers with what ``Lending.lend`` gave.
* ``rdt.done`` {key}: the consumer has read.

``device`` is a torch device type: the regions on such devices are meant. What makes them is waited
for first, so that a transport sees finished memory.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.once import Once, StillBeingMade
from ray.experimental.rdt.common.thread_pool import DaemonThreads
from ray.experimental.rdt.producer.streams import ProducedStreams
from ray.experimental.rdt.producer.tensor_store import StoredObject, TensorStore
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import CallError, Reply, Session
from ray.experimental.rdt.serialization.layout import region_bytes, tenants
from ray.experimental.rdt.transports.base import Lending, OneSided, Transport, TwoSided
from ray.experimental.rdt.transports.registry import Transports
from ray.experimental.rdt.transports.user.transport import UserTransport

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ray.rdt")

_SEND_THREADS = 8
_EXPOSE_THREADS = 8
#: A reader gives up at its deadline. What was borrowed for it may stay for so much longer, if the
#: word that it has is lost with a connection.
_READER_SLACK_S = 5.0


class _Exposure(NamedTuple):
    """An object that readers of a one-sided transport know of.

    Attributes:
        described: What they need to read it.
        buffers: Its memory, some of it a copy that is there for them alone.
    """

    described: dict[str, Any]
    buffers: list[torch.Tensor]


class Server:
    """Serves one process's stored objects over its transports.

    Args:
        session: Brings the requests.
        store: What this process produced.
        transports: How to send it.
        streams: Hears of items that are not stored any more.
    """

    def __init__(
        self, session: Session, store: TensorStore, transports: Transports, streams: ProducedStreams
    ):
        self._session = session
        self._streams = streams
        self._store = store
        self._transports = transports
        self._lock = threading.Lock()
        self._exposed: dict[tuple[bytes, str, str], Once[_Exposure]] = {}
        # By consumer and key, the deadline of each reader.
        self._readers: defaultdict[tuple[bytes, bytes], list[Deadline]] = defaultdict(list)
        self._senders = DaemonThreads(_SEND_THREADS, "rdt-send")
        session.serve(protocol.SEND, self._on_send, self._senders)
        # Exposing may wait, for devices or for room: what makes room comes on other threads.
        self._exposers = DaemonThreads(_EXPOSE_THREADS, "rdt-expose")
        session.serve(protocol.EXPOSE, self._on_expose, self._exposers)
        session.serve(protocol.LEND, self._on_lend)
        session.serve(protocol.DONE, self._on_done)
        session.on_peer_lost(self._on_peer_lost)
        session.on_tick(self._drop_late_readers)
        session.on_close(self._end_threads)

    def _end_threads(self) -> None:
        for threads in (self._senders, self._exposers):
            threads.close()

    @property
    def exposed(self) -> int:
        """How many objects are described to readers of one-sided transports."""
        with self._lock:
            return sum(exposed.peek() is not None for exposed in self._exposed.values())

    def withdraw(self, stored: StoredObject) -> None:
        """Ends all that was made for an object that is not stored any more.

        Runs on: producer, the thread that dropped it.
        """
        self._streams.dropped(stored.key)
        if stored.captured.parcel is not None:
            users = self._transports.users(stored.transport)
            assert users is not None
            users.withdraw(stored.captured.parcel)
        with self._lock:
            ended = [key for key in self._exposed if key[0] == stored.key]
            exposures = [(key[1], self._exposed.pop(key)) for key in ended]
        for name, exposed in exposures:
            # No thread is exposing it any more: that thread would have borrowed it.
            exposure = exposed.peek()
            if exposure is not None:
                one_sided: OneSided = self._transports.get(name)  # type: ignore[assignment]
                one_sided.withdraw(exposure.described)

    def _on_send(self, peer_id: bytes, body: protocol.Pull) -> Reply:
        """Runs on: producer, an rdt-send thread. What fails here is the consumer's answer."""
        transport: TwoSided = self._transports.get(body["transport"])  # type: ignore[assignment]
        deadline = Deadline.after(float(body["timeout_s"]))
        stored = self._borrow(body["key"])
        try:
            send = self._prepare(transport, stored, body, deadline)
        except BaseException:
            self._give_back(stored.key)
            raise
        return Reply({}, partial(self._send, send, stored, transport.capabilities.name, peer_id))

    def _prepare(
        self, transport: TwoSided, stored: StoredObject, body: protocol.Pull, deadline: Deadline
    ) -> Callable[[], None]:
        """Waits until an object's memory is written; returns what sends it."""
        device_type, route = body["device"], body["route"]
        parcel = stored.captured.parcel
        if parcel is not None and transport.capabilities.is_user_defined:
            stored.captured.require_unchanged()
            await_events(stored, deadline)
            return partial(cast(UserTransport, transport).send, route, parcel, deadline)
        await_writers(stored, device_type, deadline)
        buffers = buffers_for(transport, stored, device_type, deadline)

        def send() -> None:
            transport.send(route, buffers, deadline)
            if device_type == "cpu":
                self._session.agent.note_pulled(*stored.captured.host_spans())

        return send

    def _send(
        self, send: Callable[[], None], stored: StoredObject, name: str, peer_id: bytes
    ) -> None:
        """Runs on: an rdt-send thread. A transport tells the consumer of a send that fails."""
        try:
            send()
        except Exception as error:
            logger.warning(
                "RDT object %s could not be sent over %s to agent %s: %s",
                *(stored.object_id, name, peer_id.hex()[:8], error),
            )
        finally:
            self._give_back(stored.key)

    def _on_expose(self, peer_id: bytes, body: protocol.Pull) -> dict[str, Any]:
        transport: OneSided = self._transports.get(body["transport"])  # type: ignore[assignment]
        if transport.capabilities.two_sided:
            raise CallError(f"transport {body['transport']!r} exposes nothing")
        deadline = Deadline.after(float(body["timeout_s"]))
        stored = self._borrow(body["key"])
        try:
            # A user's transport has described the object when it was made.
            if transport.capabilities.is_user_defined:
                stored.captured.require_unchanged()
                await_events(stored, deadline)
                exposed: dict[str, Any] = {}
            else:
                exposed = self._expose_once(transport, stored, body, deadline)
        except BaseException:
            self._give_back(stored.key)
            raise
        with self._lock:
            # A reader that was lost meanwhile asks again if it lives.
            is_lost = self._session.is_asker_lost()
            if not is_lost:
                self._readers[peer_id, stored.key].append(deadline.later(_READER_SLACK_S))
        if is_lost:
            self._give_back(stored.key)
        return exposed

    def _on_lend(self, peer_id: bytes, body: protocol.Lend) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread. The transport keeps the memory that it lends."""
        transport: Lending = self._transports.get(body["transport"])  # type: ignore[assignment]
        deadline = Deadline.after(float(body["timeout_s"]))
        stored = self._borrow(body["key"])
        try:
            events = stored.captured.events
            buffers = buffers_for(transport, stored, body["device"], deadline)  # type: ignore[arg-type]
            return transport.lend(peer_id, body["asked"], buffers, events, deadline)
        finally:
            self._give_back(stored.key)

    def _expose_once(
        self, transport: OneSided, stored: StoredObject, body: protocol.Pull, deadline: Deadline
    ) -> dict[str, Any]:
        """Exposes an object at its first reader's request; others wait for that. May block."""
        device_type = body["device"]
        if device_type not in {"cpu", *stored.captured.table.devices.values()}:
            raise CallError(f"the object has no tensors on {device_type!r}")
        stored.captured.require_unchanged()

        def expose() -> _Exposure:
            await_writers(stored, device_type, deadline)
            buffers = buffers_for(transport, stored, device_type, deadline)
            return _Exposure(transport.expose(buffers), buffers)

        with self._lock:
            entry = (stored.key, body["transport"], device_type)
            exposed = self._exposed.setdefault(entry, Once())
        try:
            return exposed.get(expose, deadline).described
        except StillBeingMade as error:
            raise CallError(
                f"exposing the object over {body['transport']} for another reader has not ended"
            ) from error

    def _on_done(self, peer_id: bytes, body: protocol.Done) -> dict[str, Any]:
        key = body["key"]
        with self._lock:
            readers = self._readers.pop((peer_id, key), [])
            if readers[1:]:
                self._readers[peer_id, key] = readers[1:]
        if readers:
            self._give_back(key)
        return {}

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: the reaper thread."""
        self._drop_readers(lambda peer, deadline: peer == peer_id)

    def _drop_late_readers(self) -> None:
        self._drop_readers(lambda peer, until: until.has_passed())

    def _drop_readers(self, is_over: Callable[[bytes, Deadline], bool]) -> None:
        """Runs on: the reaper thread."""
        dropped = []
        with self._lock:
            for (peer, key), deadlines in list(self._readers.items()):
                left = [deadline for deadline in deadlines if not is_over(peer, deadline)]
                dropped += [key] * (len(deadlines) - len(left))
                if left:
                    self._readers[peer, key] = left
                else:
                    del self._readers[peer, key]
        for key in dropped:
            self._give_back(key)

    def _borrow(self, key: bytes) -> StoredObject:
        stored = self._store.borrow(key)
        if stored is None:
            raise CallError("the object is not stored here any more", "not_found")
        return stored

    def _give_back(self, key: bytes) -> None:
        for stored in self._store.give_back(key):
            self.withdraw(stored)


def await_writers(stored: StoredObject, device_type: str, deadline: Deadline) -> None:
    """Waits for what writes an object's tensors on such devices. Raises TimeoutError."""
    if device_type != "cpu":
        await_events(stored, deadline)


def check_owners(buffers: list[torch.Tensor], device_type: str) -> None:
    """Raises MemoryLost if some are in device memory of a process that has ended."""
    accelerator = accelerators.of(device_type) if device_type != "cpu" else None
    if accelerator is not None and accelerator.sharing is not None:
        accelerator.sharing.check_owners(buffers)


def await_events(stored: StoredObject, deadline: Deadline) -> None:
    """Waits until devices have finished what makes an object's tensors. Raises TimeoutError."""
    for event in stored.captured.events:
        event.wait(deadline.left_s())


def flat_buffers(stored: StoredObject, device_type: str = "cpu") -> list[torch.Tensor]:
    """An object's regions on one type of device, as flat uint8 tensors.

    They share the storages of the user's tensors; see ``region_bytes``. Raises MemoryChanged.
    """
    captured = stored.captured
    devices = captured.table.devices
    captured.require_unchanged()
    return [
        region_bytes(captured, region)
        for region in range(len(captured.table.regions))
        if devices.get(region, "cpu") == device_type
    ]


def buffers_for(
    transport: Transport, stored: StoredObject, device_type: str, deadline: Deadline
) -> list[torch.Tensor]:
    """``flat_buffers`` as a transport takes them.

    Device memory that was copied to the host goes back to the device, unless the transport sends it
    from the host. May block.
    """
    buffers = flat_buffers(stored, device_type)
    check_owners(buffers, device_type)
    capabilities = transport.capabilities
    if capabilities.sends_from_host or not any(_is_away(b, device_type) for b in buffers):
        return buffers
    captured, accelerator = stored.captured, accelerators.of(device_type)
    assert accelerator is not None, f"RDT took a tensor on a device of type {device_type}"
    homes = [
        captured.tensors[rows[0]].device
        for region, rows in sorted(tenants(captured.table).items())
        if captured.table.devices.get(region) == device_type
    ]
    returned = [accelerator.empty(b.numel(), home) for b, home in zip(buffers, homes)]
    for home in set(homes):
        pairs = [pair for pair in zip(returned, buffers) if pair[0].device == home]
        allocated = accelerator.record(home)
        accelerator.copy(pairs, home, [allocated]).wait(deadline.left_s())
    return returned


def _is_away(buffer: torch.Tensor, device_type: str) -> bool:
    return buffer.device.type != device_type
