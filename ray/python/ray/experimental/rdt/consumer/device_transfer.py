"""The way of an object that has tensors on devices: each type of device goes its own.

What is in the producer's host memory goes as any object: over the named transport if that carries
it, else over the agent's lanes. What is on a device goes over the first of these that serves the
pair: the named transport, those of the device type (``Accelerator.transports``), ``staged``, which
goes through host memory and serves every pair.

Where the named transport lends (``base.Lending``) and the user gave no tensors to receive into, the
producer is asked first for its own memory.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.thread_role import is_on_own_thread, without_turn
from ray.experimental.rdt.consumer.receive_buffers import (
    ReceiveBuffers,
    Targets,
    allocate_on_devices,
    direct_targets,
    hosted_regions,
    receive_device,
    take_memory,
)
from ray.experimental.rdt.consumer.targets import Target
from ray.experimental.rdt.consumer.transfer import AgentPull, Exchanges, describe_peer
from ray.experimental.rdt.rpc.session import CallError, agent_id_of
from ray.experimental.rdt.serialization.envelope import Envelope
from ray.experimental.rdt.transports.base import Lending, Peer, TransportUnavailable

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt._tensors import Table
    from ray.experimental.rdt.rpc.session import Session
    from ray.experimental.rdt.session_services import Links


class PerDevice:
    """An object with tensors on devices, under way. See ``lanes.Transfer``.

    Args:
        links: This process's parts.
        envelope: The object.
        target: The user's target.
        deadline: When the fetch gives up.

    Raises:
        RDTError: the named transport cannot serve it, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """

    def __init__(self, links: Links, envelope: Envelope, target: Target, deadline: Deadline):
        import torch

        table = envelope.table
        self._links = links
        self._head = envelope.head
        self._table = table
        self._targets = target.tensors
        self._target_device = torch.device(target.device) if target.device is not None else None
        direct = direct_targets(table, target.tensors)
        # What has no bytes needs no way.
        types = {
            table.devices.get(region, "cpu")
            for region, nbytes in enumerate(table.regions)
            if nbytes
        }
        self._shares: list[_Share] = []
        self._loans: list[_Loan] = []
        try:
            if target.tensors is None:
                self._begin_loans(types - {"cpu"}, deadline)
            spared = {loan.device_type for loan in self._loans}
            hosted = hosted_regions(table, target.tensors)
            self._buffers = allocate_on_devices(
                links.session, table, direct, self._target_device, spared, hosted
            )
            for device_type in sorted(types - spared):
                self._begin_share(device_type, deadline)
        except BaseException:
            self.abandon()
            raise

    def _begin_loans(self, types: set[str], deadline: Deadline) -> None:
        for device_type in types:
            device = receive_device(device_type, self._target_device)
            if device is not None and device.type == device_type:
                lending = _lending(self._links, self._head, device_type)
                if lending is not None:
                    loan = _Loan(self._links.session, self._head, lending, device, deadline)
                    self._loans.append(loan)

    def _begin_share(self, device_type: str, deadline: Deadline) -> None:
        share = _Share(self._links, self._head, self._buffers, device_type, deadline)
        self._shares.append(share)

    @property
    def lane(self) -> str:
        return "+".join(part.lane for part in self._parts())

    def finish(self, deadline: Deadline) -> Targets:
        for loan in self._loans.copy():
            if not loan.finish(self._table, self._buffers, deadline):
                self._loans.remove(loan)
                session, device_type = self._links.session, loan.device_type
                take_memory(session, self._table, self._buffers, device_type, self._target_device)
                self._begin_share(device_type, deadline)
        for share in self._shares:
            share.finish(deadline)
        return self._buffers.deliver(self._table, self._targets)

    def abandon(self) -> None:
        for part in self._parts():
            part.abandon()

    def _parts(self) -> list[_Loan | _Share]:
        return [*self._loans, *self._shares]


def _lending(links: Links, head: Descriptor, device_type: str) -> Lending | None:
    """The named transport, if it lends memory of such devices."""
    if head.transport == "auto" or head.is_user_defined:
        return None
    try:
        transport = links.transports.get(head.transport)
    except TransportUnavailable:
        return None  # what is tried next says why
    capabilities = transport.capabilities
    is_able = capabilities.lends and device_type in capabilities.devices
    return cast(Lending, transport) if is_able else None


class _Loan:
    """The regions of one object on one type of device, whose memory the producer is asked for."""

    def __init__(
        self,
        session: Session,
        head: Descriptor,
        lending: Lending,
        device: torch.device,
        deadline: Deadline,
    ):
        self.device_type = device.type
        self.lane = f"{head.transport} (shared)"
        self._session = session
        self._head = head
        self._peer = Peer(head.address, agent_id_of(head.address))
        self._borrowing = lending.borrow(device)
        body = {
            "key": head.key.hex(),
            "transport": head.transport,
            "device": device.type,
            "asked": self._borrowing.asked,
            "timeout_s": _left(deadline),
        }
        self._answer = session.start_call(head.address, "rdt.lend", body)

    def finish(self, table: Table, buffers: ReceiveBuffers, deadline: Deadline) -> bool:
        """Puts the producer's memory where the regions land. False: a copy has to do."""
        regions = [r for r, name in sorted(table.devices.items()) if name == self.device_type]
        sizes = [table.regions[region] for region in regions]
        with_peer = f"RDT with {describe_peer(self._head)}, tensors on {self.device_type}"
        try:
            with without_turn():
                lent = self._answer(_left(deadline))
            tensors = self._borrowing.take(self._peer, lent, sizes)
        except (CallError, TransportUnavailable) as error:
            self.abandon()
            if error.code != TransportUnavailable.code:
                raise
            why = f"{with_peer}: memory is copied and not shared: {error}"
            self._session.log_once(why, logging.INFO)
            return False
        for region, tensor in zip(regions, tensors):
            buffers.put(region, tensor)
        if is_on_own_thread():
            # The stream that waits for the producer is this thread's and not the user's.
            with without_turn():
                for event in accelerators.record(tensors):
                    event.wait(_left(deadline))
        self._session.log_once(f"{with_peer}: lane {self.lane}", logging.INFO)
        return True

    def abandon(self) -> None:
        self._borrowing.abandon(self._peer)


class _Share:
    """The regions of one object that are on one type of device at the producer.

    Those in its host memory have the agent's lanes after the transports.
    """

    def __init__(
        self,
        links: Links,
        head: Descriptor,
        buffers: ReceiveBuffers,
        device_type: str,
        deadline: Deadline,
    ):
        self._session = links.session
        self._head = head
        self._buffers = buffers
        self._exchanges = Exchanges(links, head, device_type, deadline)
        self._pull = None if self._exchanges.current is not None else self._begin_pull()

    @property
    def lane(self) -> str:
        under_way = self._exchanges.current or self._pull
        return under_way.lane if under_way is not None else ""

    def finish(self, deadline: Deadline) -> None:
        with without_turn():
            has_moved = self._exchanges.move(self._buffers, deadline)
        if not has_moved:
            self._pull = self._pull or self._begin_pull()
            self._pull.wait(deadline)

    def abandon(self) -> None:
        self._exchanges.abandon()
        if self._pull is not None:
            self._pull.abandon()

    def _begin_pull(self) -> AgentPull:
        return AgentPull(self._session, self._head.address, self._head.key, self._buffers)


def _left(deadline: Deadline) -> float:
    return deadline.left_s()
