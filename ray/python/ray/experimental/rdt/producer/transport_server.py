"""Requests of consumers that pull over a transport: the producer sends or exposes the object.

The agent's own lanes do not use this module. They read registered regions without Python.

Requests (``rpc/protocol.py``):

* ``rdt.send`` {key, transport, device, route, timeout_s}: checks the object, waits until
  the memory is written, answers, then sends on the same thread. A second thread would wait for the
  producer's GIL once more. (gloo and nccl use a thread for each transfer; see link.py.) A failure
  before the answer is the answer. A send that fails later ends the consumer's receive through the
  transport's own connection.
* ``rdt.expose`` {key, transport, device, route, timeout_s}: answers with the result of
  ``OneSided.expose``. The object stays borrowed until ``rdt.done``, the loss of the consumer, or
  soon after its deadline.
* ``rdt.lend`` {key, transport, device, route, timeout_s}: answers with the result of
  ``Lending.lend``. The route is what the consumer's ``Borrowing`` asks for.
* ``rdt.done`` {key}: the consumer has read the object.

``device`` is a torch device type; it selects the regions on such devices. The server waits for the
work that writes them, so that a transport reads finished memory.
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
#: A reader gives up at its deadline. Its object stays borrowed for this much longer if the reader's
#: ``rdt.done`` is lost with a connection.
_READER_SLACK_S = 5.0


class _Exposure(NamedTuple):
    """An object that readers of a one-sided transport can read.

    Attributes:
        described: The description that they need to read it.
        buffers: Its memory. Some of it may be a copy for these readers.
    """

    described: dict[str, Any]
    buffers: list[torch.Tensor]


class Server:
    """Serves one process's stored objects over its transports."""

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
        # Exposing may wait for devices or for room, which requests on other threads free.
        self._exposers = DaemonThreads(_EXPOSE_THREADS, "rdt-expose")
        session.serve(protocol.EXPOSE, self._on_expose, self._exposers)
        session.serve(protocol.LEND, self._on_lend)
        session.serve(protocol.DONE, self._on_done)
        session.on_peer_lost(lambda lost: self._drop_readers(lambda peer, until: peer == lost))
        session.on_tick(lambda: self._drop_readers(lambda peer, until: until.has_passed()))
        session.on_close(self._exposers.close)
        session.on_close(self._senders.close)

    @property
    def exposed(self) -> int:
        """The number of objects that are exposed to readers of one-sided transports."""
        with self._lock:
            return sum(exposed.peek() is not None for exposed in self._exposed.values())

    def withdraw(self, stored: StoredObject) -> None:
        """Withdraw everything that describes an object that is not stored any more.

        Runs on: producer, the thread that dropped it.
        """
        self._streams.dropped(stored.key)
        if stored.captured.user_object is not None:
            users = self._transports.users(stored.transport)
            assert users is not None
            users.withdraw(stored.captured.user_object)
        with self._lock:
            ended = [key for key in self._exposed if key[0] == stored.key]
            exposures = [(key[1], self._exposed.pop(key)) for key in ended]
        for name, exposed in exposures:
            # No thread exposes it now: that thread would have borrowed it.
            exposure = exposed.peek()
            if exposure is not None:
                one_sided: OneSided = self._transports.get(name)  # type: ignore[assignment]
                one_sided.withdraw(exposure.described)

    def _on_send(self, peer_id: bytes, body: protocol.Pull) -> Reply:
        """Runs on: producer, an rdt-send thread. An error here is the consumer's answer."""
        transport: TwoSided = self._transports.get(body["transport"])  # type: ignore[assignment]
        deadline = Deadline.after(float(body["timeout_s"]))
        stored = self._borrow(body["key"])
        try:
            send = self._prepare(transport, stored, body, deadline)
        except BaseException:  # also after an interrupt: the object must not stay borrowed
            self._give_back(stored.key)
            raise
        return Reply({}, partial(self._send, send, stored, transport.capabilities.name, peer_id))

    def _prepare(
        self, transport: TwoSided, stored: StoredObject, body: protocol.Pull, deadline: Deadline
    ) -> Callable[[], None]:
        """Wait until an object's memory is written; return a function that sends it."""
        device_type, route = body["device"], body["route"]
        user_object = stored.captured.user_object
        if user_object is not None and transport.capabilities.is_user_defined:
            stored.captured.require_unchanged()
            await_events(stored, deadline)
            return partial(cast(UserTransport, transport).send, route, user_object, deadline)
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
        except Exception as error:  # of any kind: no caller waits for it
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
            # A user's transport described the object when the object was created.
            if transport.capabilities.is_user_defined:
                stored.captured.require_unchanged()
                await_events(stored, deadline)
                exposed: dict[str, Any] = {}
            else:
                exposed = self._expose_once(transport, stored, body, deadline)
        except BaseException:  # also after an interrupt: the object must not stay borrowed
            self._give_back(stored.key)
            raise
        with self._lock:
            # A reader whose connection was lost meanwhile sends the request again if it is alive.
            is_lost = self._session.is_asker_lost()
            if not is_lost:
                self._readers[peer_id, stored.key].append(deadline.later(_READER_SLACK_S))
        if is_lost:
            self._give_back(stored.key)
        return exposed

    def _on_lend(self, peer_id: bytes, body: protocol.Pull) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread. The transport keeps the memory that it lends."""
        transport: Lending = self._transports.get(body["transport"])  # type: ignore[assignment]
        deadline = Deadline.after(float(body["timeout_s"]))
        stored = self._borrow(body["key"])
        try:
            events = stored.captured.events
            buffers = buffers_for(transport, stored, body["device"], deadline)  # type: ignore[arg-type]
            return transport.lend(peer_id, body["route"], buffers, events, deadline)
        finally:
            self._give_back(stored.key)

    def _expose_once(
        self, transport: OneSided, stored: StoredObject, body: protocol.Pull, deadline: Deadline
    ) -> dict[str, Any]:
        """Expose an object for its first reader; other readers wait for that. May block."""
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
    """Wait for the work that writes an object's tensors on such devices. Raises TimeoutError."""
    if device_type != "cpu":
        await_events(stored, deadline)


def check_owners(buffers: list[torch.Tensor], device_type: str) -> None:
    """Raise MemoryLost if a buffer is in device memory of a process that has ended."""
    accelerator = accelerators.of(device_type) if device_type != "cpu" else None
    if accelerator is not None and accelerator.sharing is not None:
        accelerator.sharing.check_owners(buffers)


def await_events(stored: StoredObject, deadline: Deadline) -> None:
    """Wait for the devices' work that writes an object's tensors. Raises TimeoutError."""
    for event in stored.captured.events:
        event.wait(deadline.left_s())


def flat_buffers(stored: StoredObject, device_type: str = "cpu") -> list[torch.Tensor]:
    """Return an object's regions on one type of device, as flat uint8 tensors.

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
    """Return ``flat_buffers`` in the memory that a transport needs.

    Device memory that was copied to the host is copied back to the device, unless the transport
    sends it from the host. May block.
    """
    buffers = flat_buffers(stored, device_type)
    check_owners(buffers, device_type)
    capabilities = transport.capabilities
    if capabilities.sends_from_host or all(b.device.type == device_type for b in buffers):
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
