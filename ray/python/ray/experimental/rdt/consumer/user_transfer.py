"""Transfers by a transport that a user wrote.

Runs on: consumer, the thread that deserializes.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, cast

from ray import cloudpickle
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.thread_role import without_turn
from ray.experimental.rdt.consumer.receive_buffers import (
    Targets,
    direct_targets,
    fill,
    note_written,
    writable,
)
from ray.experimental.rdt.consumer.transport_transfer import ProducerRequests, retry_broken
from ray.experimental.rdt.rpc import checksums
from ray.experimental.rdt.serialization.envelope import Envelope
from ray.experimental.rdt.serialization.layout import unpack_carriers
from ray.experimental.rdt.transports.base import Route, UserDescription

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.consumer.transfer import TransferServices
    from ray.experimental.rdt.transports.user.transport import UserTransport


class UserTransfer:
    """The code of a user moves a whole object. See ``transfer.Transfer``.

    Nothing is asked before ``finish``.
    """

    def __init__(self, services: TransferServices, envelope: Envelope, targets: Targets | None):
        self.lane = envelope.head.transport
        self._services = services
        self._envelope = envelope
        self._targets = targets
        self._producer = ProducerRequests(services.session, envelope.head, self.lane, "cpu")

    def start(self, deadline: Deadline) -> None:
        """Nothing is in flight."""

    def finish(self, deadline: Deadline) -> Targets:
        with without_turn():  # this runs code of the user's
            user_description: UserDescription = cloudpickle.loads(self._envelope.user_description)
            return retry_broken(lambda: self._move(user_description, deadline), deadline)

    def _move(self, user_description: UserDescription, deadline: Deadline) -> Targets:
        table, head = self._envelope.table, self._envelope.head
        transport = cast("UserTransport", self._services.transports.get(self.lane))
        direct = direct_targets(table, self._targets)
        filled = [region for region, nbytes in enumerate(table.regions) if nbytes]
        is_direct = self._targets is not None and all(region in direct for region in filled)
        targets = [writable(direct[region]) for region in filled] if is_direct else None
        expected = None
        if user_description.has_regions:
            expected = checksums.expected(self._services.session, head.address, head.key)

        def ask(op: str, route: Route) -> Route:
            return self._producer.start(op, route, deadline)(deadline)

        received = transport.pull(self._producer.peer, user_description, targets, ask, deadline)
        if not table.rows:
            return received
        if targets is not None:
            fill(targets, received)
            note_written(direct.values())
        if expected is not None:
            _verify(expected, received, deadline)
        if self._targets is not None and is_direct:
            return self._targets
        tensors = unpack_carriers(table, received)
        return tensors if self._targets is None else fill(self._targets, tensors)

    def abandon(self) -> None:
        self._producer.done()


def _verify(expected: checksums.Expected, received: list[torch.Tensor], deadline: Deadline) -> None:
    """Raise ChecksumMismatch if the bytes that arrived are not the producer's."""
    dense = [carrier.detach().cpu().contiguous() for carrier in received]
    addresses = array("Q", [carrier.data_ptr() for carrier in dense])
    lengths = array("Q", [carrier.nbytes for carrier in dense])
    expected.check_memory(addresses, lengths, deadline)
