"""cuda_ipc: GPU memory of one host, mapped by the consumer and copied, or used in place.

The consumer maps the producer's memory on its own GPU and copies it into its own. The mapping stays
until the object is freed, because mapping may take longer than the copy. The consumer need not see
the producer's GPU. A consumer that named this transport and uses the producer's GPU gets the memory
itself (``Lending``): each side sees what the other writes. The producer keeps the memory until the
consumer's last tensor over it is gone, or the consumer's process has ended; see ``loans``.

The vendor's calls are in ``accelerators.cuda_sharing``.

Requests (``rpc/protocol.py``):

* ``rdt.memory.share/<name>`` {exposure, loan, pid, address, timeout_s}: answers with the layout of
  the buffers.
* ``rdt.memory.gone/<name>`` {exposure}: the object was freed; the consumer unmaps it.
* ``rdt.memory.keep/<name>`` {loan}: the consumer uses the memory from now on, without a deadline.
* ``rdt.memory.close/<name>`` {loan}: the consumer has unmapped it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.accelerators.shared_memory import SharedMemory
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.base import Capabilities, Peer, Route, TransportUnavailable
from ray.experimental.rdt.transports.cuda_ipc import layouts
from ray.experimental.rdt.transports.cuda_ipc.borrowing import Borrower, Borrowing
from ray.experimental.rdt.transports.cuda_ipc.exports import Exports
from ray.experimental.rdt.transports.cuda_ipc.imports import Imports
from ray.experimental.rdt.transports.cuda_ipc.reads import Reads

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ray.rdt")

#: How long ``close`` waits for memory to be unmapped.
_CLOSE_S = 2.0

Buffers = Sequence["torch.Tensor"]


class DeviceIpcTransport:
    """Moves bytes between devices of one type on one host, or lends them. Thread-safe.

    See ``base.OneSided`` and ``base.Lending``.

    Args:
        session: Brings the requests.
        device_type: The type of the devices.

    Raises:
        TransportUnavailable: This process has no such device.
    """

    def __init__(self, session: Session, device_type: str):
        self._name = name = f"{device_type}_ipc"
        self.capabilities = Capabilities(
            name, frozenset({device_type}), two_sided=False, lends=True
        )
        accelerator = accelerators.of(device_type)
        if accelerator is None or accelerator.unavailable_reason() or accelerator.sharing is None:
            reason = (
                accelerator.unavailable_reason() if accelerator is not None else "no such device"
            )
            raise TransportUnavailable(f"{name} cannot be used: {reason or 'nothing to share'}")
        self._memory: SharedMemory = accelerator.sharing
        self._domain = domain = layouts.sharing_domain()
        self._exports = Exports(session, name, device_type, self._memory, domain)
        self._imports = Imports(session, name, self._memory)
        self._reads = Reads(session, name, accelerator, self._memory, self._imports)
        self._borrower = Borrower(accelerator, self._memory, self._imports, domain)
        session.on_peer_lost(self._on_peer_lost)
        session.on_tick(self._on_tick)

    # Producer.

    def expose(self, buffers: Buffers) -> Route:
        """See ``OneSided``. Nothing is shared before a consumer of this host asks."""
        return self._exports.expose(buffers)

    def withdraw(self, exposed: Route) -> None:
        """See ``OneSided``. The memory is kept until its consumers have unmapped it."""
        self._exports.withdraw(exposed)

    def lend(
        self,
        peer_id: bytes,
        asked: Route,
        buffers: Buffers,
        events: Sequence[Event],
        deadline: Deadline,
    ) -> Route:
        """See ``Lending``."""
        return self._exports.lend(peer_id, asked, buffers, events, deadline)

    # Consumer.

    def read(
        self,
        peer: Peer,
        exposed: Route,
        buffers: Buffers,
        deadline: Deadline,
        after: Sequence[Event] = (),
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
        """See ``Lending``."""
        return self._borrower.begin(device)

    # Ends.

    def close(self) -> None:
        """See ``OneSided``. Lent and borrowed memory stays, because tensors outlive the session.

        Memory that was mapped for copies is unmapped, if that does not take long.
        """
        self._reads.forget_all()
        self._imports.wait(_CLOSE_S)
        self._imports.close()
        self._exports.close()

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: the reaper thread."""
        self._exports.loans.on_peer_lost(peer_id)
        self._reads.forget(peer_id)
        self._log_lost_memory()

    def _on_tick(self) -> None:
        """Runs on: the reaper thread."""
        self._exports.loans.end_expired()
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
