"""Memory of a producer that consumers map."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.accelerators.shared_memory import SharedMemory
from ray.experimental.rdt.accelerators.sharing import CannotShare
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import CallError, Session
from ray.experimental.rdt.transports.base import Route, TransportUnavailable
from ray.experimental.rdt.transports.cuda_ipc import layouts
from ray.experimental.rdt.transports.cuda_ipc.loans import Loans

if TYPE_CHECKING:
    import torch

Buffers = Sequence["torch.Tensor"]

#: Memory on loan from this process, also by sessions that have ended.
_loans: WeakKeyDictionary[SharedMemory, Loans] = WeakKeyDictionary()


class Exports:
    """The memory that one process shows to consumers. Thread-safe.

    Args:
        session: Carries requests to consumers and from them.
        name: The name of the transport.
        device_type: The type of the devices.
        memory: The shared memory of this process.
        domain: The sharing domain of this process.

    Attributes:
        loans: The memory that consumers use now.
    """

    def __init__(
        self, session: Session, name: str, device_type: str, memory: SharedMemory, domain: str
    ):
        self._session = session
        self._name = name
        self._device_type = device_type
        self._memory = memory
        self._domain = domain
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._exposed: dict[int, Buffers] = {}
        # By exposure, the agents of the consumers that have it mapped, and their addresses.
        self._consumers: defaultdict[int, dict[bytes, bytes]] = defaultdict(dict)
        self.loans = _loans.setdefault(memory, Loans())
        session.serve(protocol.of_transport(protocol.MEMORY_SHARE, name), self._on_share)
        session.serve(protocol.of_transport(protocol.MEMORY_KEEP, name), self._on_keep)
        session.serve(protocol.of_transport(protocol.MEMORY_CLOSE, name), self._on_close)

    def expose(self, buffers: Buffers) -> Route:
        """See ``OneSided``. Nothing is shared before a consumer of this host asks."""
        self._check_devices(buffers)
        with self._lock:
            number = next(self._numbers)
            self._exposed[number] = buffers
        return {"exposure": number, "place": self._domain}

    def withdraw(self, exposed: Route) -> None:
        """See ``OneSided``. The memory is kept until its consumers have unmapped it."""
        number = exposed["exposure"]
        with self._lock:
            self._exposed.pop(number, None)
            consumers = self._consumers.pop(number, {})
        for address in consumers.values():
            op = protocol.of_transport(protocol.MEMORY_GONE, self._name)
            self._session.send_oneway(address, op, protocol.MemoryGone(exposure=number))

    def lend(
        self,
        peer_id: bytes,
        asked: Route,
        buffers: Buffers,
        events: Sequence[Event],
        deadline: Deadline,
    ) -> Route:
        """See ``Lending``."""
        if asked["place"] != self._domain:
            raise TransportUnavailable("the consumer is on another host or in another container")
        self._check_devices(buffers)
        devices = {buffer.device for buffer in buffers}
        others = {self._memory.identity(device) for device in devices} - {asked["device"]}
        if others:
            raise TransportUnavailable(f"the memory is on {sorted(others)}, the consumer is not")
        described = self._describe(buffers)
        pending = [event for event in events if not event.is_reached()]
        try:
            exported = [self._memory.export_event(event) for event in pending]
        except CannotShare as error:
            raise TransportUnavailable(f"events cannot be shared: {error}") from error
        kept = [*buffers, *(kept for _, kept in exported)]
        self.loans.add(asked["loan"], peer_id, asked["pid"], kept, deadline)
        return {**described, "events": [handle for handle, _ in exported]}

    def close(self) -> None:
        """Drop all exposures. Loans stay, because tensors of consumers outlive the session."""
        with self._lock:
            self._exposed.clear()
            self._consumers.clear()

    def _on_share(self, peer_id: bytes, body: protocol.MemoryShare) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        with self._lock:
            buffers = self._exposed.get(body["exposure"])
        if buffers is None:
            raise _not_exposed()
        deadline = Deadline.after(float(body["timeout_s"]))
        described = self._describe(buffers)
        self.loans.add(body["loan"], peer_id, body["pid"], buffers, deadline)
        with self._lock:
            is_exposed = body["exposure"] in self._exposed
            if is_exposed:
                self._consumers[body["exposure"]][peer_id] = body["address"]
        if not is_exposed:
            self.loans.end(body["loan"])
            raise _not_exposed()
        return described

    def _on_keep(self, peer_id: bytes, body: protocol.MemoryLoan) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        self.loans.confirm(body["loan"])
        return {}

    def _on_close(self, peer_id: bytes, body: protocol.MemoryLoan) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        self.loans.end(body["loan"])
        return {}

    def _check_devices(self, buffers: Buffers) -> None:
        if any(buffer.device.type != self._device_type for buffer in buffers):
            raise TransportUnavailable(f"{self._name} carries {self._device_type} memory only")

    def _describe(self, buffers: Buffers) -> Route:
        try:
            layout = self._memory.describe(buffers)
        except CannotShare as error:
            raise TransportUnavailable(f"this memory cannot be shared: {error}") from error
        return layouts.encode(layout)


def _not_exposed() -> CallError:
    return CallError("the object is not exposed here any more", "not_found")
