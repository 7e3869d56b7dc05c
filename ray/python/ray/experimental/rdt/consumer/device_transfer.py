"""Transfers of objects that have tensors on devices: one chain of candidates for each device type.

Runs on: consumer, the thread that deserializes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.thread_role import is_on_pull_thread, without_turn
from ray.experimental.rdt.consumer import receive_buffers
from ray.experimental.rdt.consumer.agent_transfer import AgentTransfer
from ray.experimental.rdt.consumer.fallback import TransportFallbackChain
from ray.experimental.rdt.consumer.planner import Candidate, Kind, TransferObject, plan_transfer
from ray.experimental.rdt.consumer.targets import Target
from ray.experimental.rdt.consumer.transport_transfer import ProducerRequests, TransportAttempt
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.serialization.envelope import Envelope
from ray.experimental.rdt.transports.base import Borrowing, Lending, Route, TransportUnavailable
from ray.experimental.rdt.transports.selection import default_transports

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt._tensors import Table
    from ray.experimental.rdt.consumer.transfer import Transfer, TransferServices
    from ray.experimental.rdt.rpc.session import Session


class DeviceTransfer:
    """An object with tensors on devices. See ``transfer.Transfer``.

    If the named transport lends (``base.Lending``) and the user gave no target tensors, the
    producer is first asked for its own memory.
    """

    def __init__(self, services: TransferServices, envelope: Envelope, target: Target):
        self._services = services
        self._head = envelope.head
        self._table = envelope.table
        self._target = target
        self._buffers: receive_buffers.ReceiveBuffers | None = None
        self._chains: list[TransportFallbackChain] = []

    def start(self, deadline: Deadline) -> None:
        import torch

        table, target = self._table, self._target
        device = torch.device(target.device) if target.device is not None else None
        session, direct = (
            self._services.session,
            receive_buffers.direct_targets(table, target.tensors),
        )
        buffers = self._buffers = receive_buffers.allocate_with_devices(session, table, direct)
        hosted = receive_buffers.hosted_regions(table, target.tensors)
        # Regions without bytes are not transferred.
        filled = {
            table.devices.get(region, "cpu")
            for region, nbytes in enumerate(table.regions)
            if nbytes
        }
        for name in sorted(filled.union(table.devices.values())):
            lending = self._lending(name, device) if name in filled else None
            destination = _SharedDestination(session, table, buffers, name, device, hosted)
            if lending is None:
                destination.buffers(may_split=False)
            if name in filled:
                chain = self._chain(name, destination, lending)
                self._chains.append(chain)
                chain.start(deadline)

    @property
    def lane(self) -> str:
        return "+".join(chain.lane for chain in self._chains)

    def finish(self, deadline: Deadline) -> receive_buffers.Targets:
        assert self._buffers is not None, "start comes before finish"
        for chain in self._chains:
            chain.finish(deadline)
        return self._buffers.deliver(self._table, self._target.tensors)

    def abandon(self) -> None:
        for chain in self._chains:
            chain.abandon()

    def _chain(
        self, device_type: str, destination: _SharedDestination, lending: Lending | None
    ) -> TransportFallbackChain:
        services, head = self._services, self._head
        obj = TransferObject(
            transport=head.transport,
            device_type=device_type,
            default_transports=default_transports(device_type),
            nbytes=head.nbytes,
            is_shareable=lending is not None,
        )

        def make(candidate: Candidate) -> Transfer:
            if candidate.kind is Kind.SHARED:
                assert lending is not None
                return BorrowTransfer(services.session, head, lending, destination)
            if candidate.kind is Kind.AGENT:
                return AgentTransfer(services.session, head, destination)
            return TransportAttempt(services, candidate.name, head, device_type, destination)

        plan = plan_transfer(obj, services.policy.pair(head.address))
        return TransportFallbackChain(services, head, device_type, plan, make)

    def _lending(self, device_type: str, target_device: torch.device | None) -> Lending | None:
        """Return the named transport if it can lend the memory of such devices to this process."""
        head = self._head
        if self._target.tensors is not None or head.transport == "auto" or device_type == "cpu":
            return None
        device = receive_buffers.receive_device(device_type, target_device)
        if device is None or device.type != device_type:
            return None
        try:
            transport = self._services.transports.get(head.transport)
        except TransportUnavailable:
            return None  # the attempt to use it says why
        capabilities = transport.capabilities
        is_able = capabilities.lends and capabilities.carries(device_type)
        return cast(Lending, transport) if is_able else None


@dataclass
class _SharedDestination:
    """The part of one object's buffers for its memory of one device type. See ``Destination``.

    Attributes:
        whole: The buffers for the whole object.
        hosted: Regions that are received into host memory in any case.
    """

    session: Session
    table: Table
    whole: receive_buffers.ReceiveBuffers
    device_type: str
    target_device: torch.device | None
    hosted: Collection[int]
    has_memory: bool = False

    @property
    def sizes(self) -> dict[int, int]:
        """The bytes of each of its regions."""
        devices = sorted(self.table.devices.items())
        return {r: self.table.regions[r] for r, name in devices if name == self.device_type}

    def buffers(self, may_split: bool) -> receive_buffers.ReceiveBuffers:
        if not self.has_memory:
            self.has_memory = True
            device, hosted = self.target_device, self.hosted
            receive_buffers.take_memory(
                self.session, self.table, self.whole, self.device_type, device, hosted
            )
        return self.whole

    def deliver(self, buffers: receive_buffers.ReceiveBuffers) -> receive_buffers.Targets:
        """The tensors are built once all device types have arrived."""
        return ()


class BorrowTransfer:
    """The producer's device memory becomes this process's tensors. See ``transfer.Transfer``."""

    def __init__(
        self, session: Session, head: Descriptor, lending: Lending, destination: _SharedDestination
    ):
        self.lane = f"{head.transport} (shared)"
        self._lending = lending
        self._destination = destination
        device_type = destination.device_type
        self._producer = ProducerRequests(session, head, head.transport, device_type)
        self._borrowing: Borrowing | None = None
        self._answer: Callable[[Deadline], Route] | None = None

    def start(self, deadline: Deadline) -> None:
        destination = self._destination
        device = receive_buffers.receive_device(destination.device_type, destination.target_device)
        assert device is not None, "only memory of a device that is here is lent"
        self._borrowing = self._lending.borrow(device)
        self._answer = self._producer.start(protocol.LEND, self._borrowing.asked, deadline)

    def finish(self, deadline: Deadline) -> receive_buffers.Targets:
        assert self._borrowing is not None, "start comes before finish"
        assert self._answer is not None, "start comes before finish"
        with without_turn():
            lent = self._answer(deadline)
        sizes = self._destination.sizes
        tensors = self._borrowing.take(self._producer.peer, lent, list(sizes.values()))
        self._destination.whole.put(dict(zip(sizes, tensors)))
        if is_on_pull_thread():
            # The stream that waits for the producer is this thread's and not the user's.
            with without_turn():
                for event in accelerators.record(tensors):
                    event.wait(deadline.left_s())
        return ()

    def abandon(self) -> None:
        if self._borrowing is not None:
            self._borrowing.abandon(self._producer.peer)
