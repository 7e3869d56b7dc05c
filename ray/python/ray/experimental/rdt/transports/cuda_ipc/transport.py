"""cuda_ipc: GPU memory of one host, mapped by the consumer and copied, or used in place.

The consumer maps the producer's memory on its own GPU and copies it into its own. The mapping stays
until the object is freed, because mapping may take longer than the copy. The consumer need not see
the producer's GPU. A consumer that named this transport and uses the producer's GPU gets the memory
itself (``Lending``): each side sees what the other writes. The producer keeps the memory until the
consumer's last tensor over it is gone, or the consumer's process has ended; see ``Loans``.

The vendor's calls are in ``accelerators.cuda_sharing``. Not run on a GPU so far.

Requests of ``rpc/protocol.py``:

* ``MEMORY_SHARE`` is answered with the layout of the buffers.
* ``MEMORY_GONE``: the object was freed; the consumer unmaps it.
* ``MEMORY_KEEP``: the consumer uses the memory from now on, without a deadline.
* ``MEMORY_CLOSE``: the consumer has unmapped it.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.shared_memory import CannotShare, SharedMemory
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.processes import Process, pid_domain
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import CallError, Session
from ray.experimental.rdt.transports.base import (
    Buffers,
    Capabilities,
    Events,
    Peer,
    Route,
    TransportUnavailable,
)
from ray.experimental.rdt.transports.cuda_ipc.imports import Borrowing, Imports, Reads

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ray.rdt")

#: How long ``close`` waits for memory to be unmapped.
_CLOSE_S = 2.0

#: A consumer gives up at its deadline. Its report of that may take this much longer.
_SLACK_S = 5.0

#: Memory on loan from this process, also by sessions that have ended.
_loans: WeakKeyDictionary[SharedMemory, Loans] = WeakKeyDictionary()


class DeviceIpcTransport:
    """Copies or loans of device memory within one host, for one type of device. Thread-safe.

    See ``base.OneSided`` and ``base.Lending``. Raises TransportUnavailable if this process has no
    such device.
    """

    def __init__(self, session: Session, device_type: str):
        self._session = session
        self._device_type = device_type
        self._name = name = f"{device_type}_ipc"
        self.capabilities = Capabilities(
            name, frozenset({device_type}), two_sided=False, lends=True
        )
        accelerator = accelerators.of(device_type)
        reason = "no such device" if accelerator is None else accelerator.unavailable_reason()
        if reason or accelerator is None or accelerator.sharing is None:
            raise TransportUnavailable(f"{name} cannot be used: {reason or 'nothing to share'}")
        self._memory: SharedMemory = accelerator.sharing
        self._domain = pid_domain()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._exposed: dict[int, Buffers] = {}
        # By exposure, the agents of the consumers that have it mapped, and their addresses.
        self._consumers: defaultdict[int, dict[bytes, bytes]] = defaultdict(dict)
        self._loans = _loans.setdefault(self._memory, Loans())
        self._imports = Imports(session, name, accelerator, self._memory)
        self._reads = Reads(self._imports)
        session.serve(protocol.of_transport(protocol.MEMORY_SHARE, name), self._on_share)
        session.serve(protocol.of_transport(protocol.MEMORY_KEEP, name), self._on_keep)
        session.serve(protocol.of_transport(protocol.MEMORY_CLOSE, name), self._on_close)
        session.on_peer_lost(self._on_peer_lost)
        session.on_tick(self._on_tick)

    # Producer.

    def expose(self, buffers: Buffers) -> Route:
        """See ``OneSided``. Nothing is shared before a consumer of this host asks."""
        self._check_devices(buffers)
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
        self, peer_id: bytes, asked: Route, buffers: Buffers, events: Events, deadline: Deadline
    ) -> Route:
        if asked["place"] != self._domain:
            raise TransportUnavailable("the consumer is on another host or in another container")
        self._check_devices(buffers)
        devices = {buffer.device for buffer in buffers}
        others = {self._memory.driver.identity(device) for device in devices} - {asked["device"]}
        if others:
            raise TransportUnavailable(f"the memory is on {sorted(others)}, the consumer is not")
        described = self._describe(buffers)
        pending = [event for event in events if not event.is_reached()]
        try:
            exported = [self._memory.driver.export_event(event) for event in pending]
        except CannotShare as error:
            raise TransportUnavailable(f"events cannot be shared: {error}") from error
        kept = [*buffers, *(kept for _, kept in exported)]
        self._loans.add(asked["loan"], peer_id, asked["pid"], kept, deadline)
        return {**described, "events": [handle for handle, _ in exported]}

    def _on_share(self, peer_id: bytes, body: protocol.MemoryShare) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        number, loan = body["exposure"], body["loan"]
        buffers = self._exposed.get(number)
        if buffers is not None:
            described = self._describe(buffers)
            deadline = Deadline.after(float(body["timeout_s"]))
            self._loans.add(loan, peer_id, body["pid"], buffers, deadline)
            with self._lock:
                if number in self._exposed:
                    self._consumers[number][peer_id] = body["address"]
                    return described
            self._loans.end(loan)
        raise CallError("the object is not exposed here any more", "not_found")

    def _on_keep(self, peer_id: bytes, body: protocol.MemoryLoan) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        self._loans.confirm(body["loan"])
        return {}

    def _on_close(self, peer_id: bytes, body: protocol.MemoryLoan) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        self._loans.end(body["loan"])
        return {}

    def _check_devices(self, buffers: Buffers) -> None:
        if any(buffer.device.type != self._device_type for buffer in buffers):
            raise TransportUnavailable(f"{self._name} carries {self._device_type} memory only")

    def _describe(self, buffers: Buffers) -> Route:
        try:
            return self._memory.describe(buffers).encode()
        except CannotShare as error:
            raise TransportUnavailable(f"this memory cannot be shared: {error}") from error

    # Consumer.

    def read(
        self, peer: Peer, exposed: Route, buffers: Buffers, deadline: Deadline, after: Events = ()
    ) -> None:
        """See ``OneSided``. Memory stays mapped until the last copy from it has ended."""
        if exposed["place"] != self._domain:
            raise TransportUnavailable("the producer is on another host or in another container")
        if any(buffer.is_cpu for buffer in buffers):
            raise TransportUnavailable(
                f"{self._name} writes device memory only, and the tensors go to host memory"
            )
        self._reads.read(peer, exposed["exposure"], buffers, deadline, after)

    def borrow(self, device: torch.device) -> Borrowing:
        return Borrowing(self._imports, self._domain, device)

    # Ends.

    def close(self) -> None:
        """See ``OneSided``. Lent and borrowed memory stays, because tensors outlive the session.

        Memory that was mapped for copies is unmapped, if that does not take long.
        """
        self._reads.forget()
        self._imports.wait(_CLOSE_S)
        self._imports.close()
        with self._lock:
            self._exposed.clear()
            self._consumers.clear()

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: the reaper thread."""
        self._loans.end_expired()
        self._reads.forget(peer_id)
        self._log_lost_memory()

    def _on_tick(self) -> None:
        """Runs on: the reaper thread."""
        self._loans.end_expired()
        self._log_lost_memory()

    def _log_lost_memory(self) -> None:
        for pid in self._memory.lost():
            logger.error(
                "RDT: process %d has ended. It had allocated device memory that tensors of this "
                "process lie in (transport %r). Their contents are undefined from now on: drop "
                "these tensors.",
                *(pid, self._name),
            )


class CudaIpcTransport(DeviceIpcTransport):
    """The transport that users name "cuda_ipc"."""

    def __init__(self, session: Session):
        super().__init__(session, "cuda")


@dataclass
class _Loan:
    """Memory kept for one consumer.

    Attributes:
        consumer: Its agent.
        kept: The memory, and objects that it depends on.
        until: When the loan ends if the consumer has not confirmed it; None if it has.
    """

    consumer: bytes
    kept: Sequence[Any]
    until: Deadline | None

    def is_over(self, ended_consumers: Collection[bytes]) -> bool:
        """Tell whether it ends without a word of the consumer."""
        has_expired = self.until is not None and self.until.has_passed()
        return has_expired or self.consumer in ended_consumers


class Loans:
    """The memory that one process keeps for consumers that have mapped it. Thread-safe.

    The consumer chooses the ID of a loan, so that it can end the loan even if the answer is lost. A
    loan ends when the consumer ends it, when the consumer's process ends, or, if the consumer never
    confirms it, soon after the deadline. A broken connection does not end the loan of a live
    process: both are on one host, and the kernel reports the end of a process. Nothing blocks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loans: dict[str, _Loan] = {}
        self._processes: dict[bytes, Process] = {}
        self._ended_early: dict[str, Deadline] = {}

    def __len__(self) -> int:
        return len(self._loans)

    def add(
        self, name: str, consumer: bytes, pid: int, kept: Sequence[Any], deadline: Deadline
    ) -> None:
        """Keep memory until the loan ends."""
        with self._lock:
            if self._ended_early.pop(name, None) is not None:
                return  # it ended before it began
            self._loans[name] = _Loan(consumer, kept, deadline.later(_SLACK_S))
            if consumer not in self._processes:
                self._processes[consumer] = Process(pid)

    def confirm(self, name: str) -> None:
        """Remove the deadline of a loan: the consumer has mapped the memory."""
        with self._lock:
            loan = self._loans.get(name)
            if loan is not None:
                loan.until = None

    def end(self, name: str) -> None:
        """End a loan."""
        with self._lock:
            loan = self._loans.pop(name, None)
            if loan is None:
                self._ended_early[name] = Deadline.after(_SLACK_S)

    def end_expired(self) -> None:
        """End loans that were not confirmed in time or whose consumers have ended.

        Runs on: the reaper thread.
        """
        with self._lock:
            processes = list(self._processes.items())
        ended = {consumer for consumer, process in processes if process.has_ended()}
        with self._lock:
            over = [name for name, loan in self._loans.items() if loan.is_over(ended)]
            dropped = [self._loans.pop(name) for name in over]
            consumers = {loan.consumer for loan in self._loans.values()}
            self._processes = {c: p for c, p in self._processes.items() if c in consumers}
            self._ended_early = {
                name: until for name, until in self._ended_early.items() if not until.has_passed()
            }
        dropped.clear()  # memory is freed without the lock
