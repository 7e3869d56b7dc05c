"""Transfers over a transport, and the requests to the producer that they make.

Runs on: consumer, the thread that deserializes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.failures import TransferFailed, raise_if_interrupt
from ray.experimental.rdt.common.thread_role import without_turn
from ray.experimental.rdt.consumer.receive_buffers import Destination, ReceiveBuffers, Targets
from ray.experimental.rdt.rpc import checksums, protocol
from ray.experimental.rdt.rpc.session import CallError, Session, agent_id_of
from ray.experimental.rdt.transports import base

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.events import Event
    from ray.experimental.rdt.consumer.transfer import TransferServices

logger = logging.getLogger("ray.rdt")

#: Attempts of a transfer whose connection breaks while its producer lives.
_TRIES = 4

#: Requests that may be repeated.
_IDEMPOTENT = (protocol.EXPOSE, protocol.LEND)

_Result = TypeVar("_Result")


class ProducerRequests:
    """Requests to the process that holds an object, for its memory of one device type.

    Args:
        device_type: The device type of the memory at the producer.
    """

    def __init__(self, session: Session, head: Descriptor, transport: str, device_type: str):
        self.peer = base.Peer(head.address, agent_id_of(head.address))
        self._session = session
        self._key = head.key
        self._transport = transport
        self._device_type = device_type
        self._is_exposed = False

    def start(
        self, op: str, route: base.Route, deadline: Deadline
    ) -> Callable[[Deadline], base.Route]:
        """Send a request; the result waits for its answer.

        The result raises TransportUnavailable if the producer cannot use the transport.
        """
        self._is_exposed = self._is_exposed or op == protocol.EXPOSE
        body = protocol.Pull(
            key=self._key,
            transport=self._transport,
            device=self._device_type,
            route=route,
            timeout_s=deadline.left_s(),
        )
        asked = self._session.start_call(self.peer.address, op, body, idempotent=op in _IDEMPOTENT)

        def answer(until: Deadline) -> base.Route:
            try:
                return asked(until.left_s())
            except CallError as error:
                # A producer that refuses to expose memory does not keep it for this process.
                self._is_exposed = self._is_exposed and op != protocol.EXPOSE
                if error.code == base.TransportUnavailable.code:
                    raise base.TransportUnavailable(str(error)) from error
                raise

        return answer

    def done(self) -> None:
        """Tell the producer that this process does not read the memory any more. Idempotent."""
        if self._is_exposed:
            self._is_exposed = False
            body = protocol.Done(key=self._key)
            self._session.send_oneway(self.peer.address, protocol.DONE, body, idempotent=False)


class TransportAttempt:
    """A transport moves the memory of one device type. See ``transfer.Transfer``.

    One-sided: ``start`` asks the producer to expose the memory. Two-sided: nothing is asked before
    ``finish``. A sender and a link are in use until their consumer receives, and a process has few
    of both: consumers of large batches that wait for each other's producers would deadlock.
    """

    def __init__(
        self,
        services: TransferServices,
        name: str,
        head: Descriptor,
        device_type: str,
        destination: Destination,
    ):
        self.lane = name
        self._session = services.session
        self._transports = services.transports
        self._head = head
        self._device_type = device_type
        self._destination = destination
        self._producer = ProducerRequests(services.session, head, name, device_type)
        self._transport: base.Transport | None = None
        self._exposed: Callable[[Deadline], base.Route] | None = None

    def start(self, deadline: Deadline) -> None:
        """See ``Transfer``. Raises TransportUnavailable if it cannot be used here."""
        self._transport = self._transports.usable(self.lane, self._device_type)
        if not self._transport.capabilities.two_sided:
            self._exposed = self._producer.start(protocol.EXPOSE, {}, deadline)

    def finish(self, deadline: Deadline) -> Targets:
        """See ``Transfer``. Raises ChecksumMismatch as well; memory on devices is not verified."""
        with without_turn():
            buffers = self._destination.buffers(may_split=False)
            self._move_and_verify(buffers, deadline)
        return self._destination.deliver(buffers)

    def _move_and_verify(self, buffers: ReceiveBuffers, deadline: Deadline) -> None:
        if self._device_type != "cpu":
            self._move(buffers, deadline)
            return
        expected = checksums.expected(self._session, self._head.address, self._head.key)
        self._move(buffers, deadline)
        self._session.agent.note_pulled(buffers.addresses, buffers.lengths)
        if expected is not None:
            expected.check_memory(buffers.addresses, buffers.lengths, deadline)

    def _move(self, buffers: ReceiveBuffers, deadline: Deadline) -> None:
        flat, after = buffers.flat(self._device_type), buffers.after
        if self._exposed is None:
            retry_broken(lambda: self._receive(flat, deadline, after), deadline)
        else:
            exposed = self._exposed(deadline)
            transport = cast(base.OneSided, self._transport)
            transport.read(self._producer.peer, exposed, flat, deadline, after)
            self._producer.done()

    def _receive(
        self, flat: list[torch.Tensor], deadline: Deadline, after: Sequence[Event]
    ) -> None:
        transport = cast(base.TwoSided, self._transport)
        route = transport.route(self._producer.peer, deadline)
        try:
            self._producer.start(protocol.SEND, route, deadline)(deadline)
        except BaseException as error:  # also if the task was cancelled: the route is in use
            is_refused = isinstance(error, (CallError, base.TransportUnavailable))
            transport.abandon(route, may_send=not is_refused)
            raise
        transport.receive(route, flat, deadline, after)

    def abandon(self) -> None:
        """Tell the producer that nothing is read any more. The transfer ends by itself."""
        self._producer.done()


def retry_broken(move: Callable[[], _Result], deadline: Deadline) -> _Result:
    """Repeat a transfer, up to ``_TRIES`` times, that failed only because its connection broke.

    A broken connection does not tell whether the producer lives: the next attempt finds out.
    """
    for left in reversed(range(_TRIES)):
        try:
            return move()
        except Exception as error:  # a transport's library, or the user's, may raise any
            raise_if_interrupt(error)
            is_retryable = isinstance(error, TransferFailed) and error.retryable
            if not is_retryable or not left or deadline.has_passed():
                raise
            logger.debug("RDT repeats a transfer whose connection broke", exc_info=True)
    raise AssertionError("the last attempt returns or raises")
