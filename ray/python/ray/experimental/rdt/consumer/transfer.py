"""The ways in which one object's tensors reach this process, each with the same two methods.

``finish(deadline)`` waits and gives the tensors, ``abandon()`` gives up. Runs on: consumer, the
thread that deserializes.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from ray.exceptions import RayError

from ray import cloudpickle
from ray.experimental.rdt._tensors import Table, build_tensors
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.common.interrupts import raise_if_interrupt
from ray.experimental.rdt.common.thread_role import without_turn
from ray.experimental.rdt.consumer.receive_buffers import (
    ReceiveBuffers,
    Targets,
    allocate,
    direct_targets,
    fill,
    note_written,
    writable,
)
from ray.experimental.rdt.consumer.target_spans import find_spreads
from ray.experimental.rdt.rpc import checksums
from ray.experimental.rdt.rpc.checksums import ChecksumMismatch
from ray.experimental.rdt.rpc.session import CallError, agent_id_of
from ray.experimental.rdt.serialization.envelope import Envelope
from ray.experimental.rdt.serialization.layout import Captured, unpack_carriers
from ray.experimental.rdt.transports.base import (
    OneSided,
    Peer,
    Route,
    Shipment,
    Transport,
    TransportUnavailable,
    TwoSided,
)
from ray.experimental.rdt.transports.selection import STAGED, ways

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.base import Event
    from ray.experimental.rdt.consumer.prefetcher import Prefetcher
    from ray.experimental.rdt.rpc.session import Session
    from ray.experimental.rdt.session_services import Links
    from ray.experimental.rdt.transports.user.transport import UserTransport


logger = logging.getLogger("ray.rdt")

_ALIGNMENT = 64
_TRIES = 4  # of a transfer whose way ends and whose producer lives

_Moved = TypeVar("_Moved")


class Transfer(Protocol):
    """One object under way. ``lane`` is for error messages."""

    @property
    def lane(self) -> str: ...

    def finish(self, deadline: Deadline) -> Targets:
        """Waits for the tensors. Raises AgentError, TimeoutError or what a transport raises."""

    def abandon(self) -> None:
        """Gives the transfer up; no byte is written afterwards. Idempotent."""


class Here:
    """The object was made by this process: the very tensors."""

    lane = "inproc"

    def __init__(self, captured: Captured, targets: Targets | None):
        self._captured = captured
        self._targets = targets

    def finish(self, deadline: Deadline) -> Targets:
        if self._targets is None:
            return self._captured.tensors
        self._captured.require_unchanged()
        return fill(self._targets, self._captured.tensors)

    def abandon(self) -> None:
        """Nothing is under way."""


class Eager:
    """The bytes came with the value."""

    lane = "eager"

    def __init__(self, envelope: Envelope, targets: Targets | None):
        self._envelope = envelope
        self._targets = targets

    def finish(self, deadline: Deadline) -> Targets:
        table, bytes_ = self._envelope.table, memoryview(self._envelope.eager or b"")
        # Each region begins where any dtype may: vector instructions fault elsewhere.
        memory = bytearray(len(bytes_) + (len(table.regions) + 1) * _ALIGNMENT)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        places, at, to = [], 0, -start % _ALIGNMENT
        for nbytes in table.regions:
            memory[to : to + nbytes] = bytes_[at : at + nbytes]
            places.append((memory, to))
            at += nbytes
            to += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        tensors = build_tensors(table, places)
        return tensors if self._targets is None else fill(self._targets, tensors)

    def abandon(self) -> None:
        """Nothing is under way."""


class AgentPull:
    """The agent moves the bytes of one object into receive buffers, from this moment on."""

    def __init__(self, session: Session, address: bytes, key: bytes, buffers: ReceiveBuffers):
        self.buffers = buffers
        self._pull = checksums.pull(
            session, address, key, buffers.addresses, buffers.lengths, buffers
        )

    @property
    def lane(self) -> str:
        return self._pull.lane or ""

    def wait(self, deadline: Deadline) -> None:
        with without_turn():
            self._pull.wait(deadline.left_s())

    def abandon(self) -> None:
        if not self._pull.done:
            self._pull.cancel()


class FromAgent:
    """The object comes over one of the agent's own lanes."""

    def __init__(self, pull: AgentPull, table: Table, targets: Targets | None):
        self._pull = pull
        self._table = table
        self._targets = targets
        self._is_left = False

    @property
    def lane(self) -> str:
        return self._pull.lane

    def finish(self, deadline: Deadline) -> Targets:
        self._pull.wait(deadline)
        return self._pull.buffers.deliver(self._table, self._targets)

    def leave_to(self, hinted: Prefetcher, head: Descriptor) -> None:
        """Lets the pull go on for whoever asks next; one into tensors of the user's ends here."""
        if not self._pull.buffers.has_user_memory:
            self._is_left = hinted.park(head.key, self._pull, head.nbytes)

    def abandon(self) -> None:
        if not self._is_left:
            self._pull.abandon()


class FromHint(FromAgent):
    """The object comes by a pull that began before it was asked for.

    That one may have failed long ago, for a reason that has passed: then another is made.
    """

    def __init__(self, links: Links, pull: AgentPull, envelope: Envelope, targets: Targets | None):
        super().__init__(pull, envelope.table, targets)
        self._links = links
        self._envelope = envelope

    def finish(self, deadline: Deadline) -> Targets:
        try:
            return super().finish(deadline)
        except Exception as error:
            raise_if_interrupt(error)
            if isinstance(error, TimeoutError) or deadline.has_passed():
                raise
            logger.debug("RDT pulls an object anew whose earlier pull failed", exc_info=True)
            return _finish_on_agent(self._links, self._envelope, self._targets, deadline)


class Exchange:
    """A transport moves those regions of one object that are on one type of device.

    One-sided: the producer is asked at once to expose them. Two-sided: nothing is asked before
    ``move``. A sender and a link are busy until their consumer receives, and a process has few of
    both: consumers of large batches that wait for each other's producers would stop for good.
    """

    def __init__(
        self,
        links: Links,
        name: str,
        head: Descriptor,
        deadline: Deadline,
        device_type: str = "cpu",
    ):
        session = links.session
        transport = links.transports.get(name)
        if name != STAGED:
            check_carries(transport, device_type)
        self.lane = name
        self._session = session
        self._transport = transport
        self._head = head
        self._device_type = device_type
        self._peer = Peer(head.address, agent_id_of(head.address))
        self._is_reading = not transport.capabilities.two_sided
        self._exposed = self._ask("rdt.expose", {}, deadline) if self._is_reading else None

    def _ask(self, op: str, route: Route, deadline: Deadline) -> Callable[[float], dict[str, Any]]:
        return _start_asking(
            self._session, self._head, self.lane, self._device_type, op, route, deadline
        )

    def move(self, buffers: ReceiveBuffers, deadline: Deadline) -> None:
        """Returns when the bytes are in place. Raises TransportUnavailable, or that it failed.

        Where they are to be verified, ChecksumMismatch as well; device memory is not.
        """
        head, expected = self._head, None
        if self._device_type == "cpu":
            expected = checksums.expected(self._session, head.address, head.key)
        self._move(buffers, deadline)
        if self._device_type == "cpu":
            self._session.agent.note_pulled(buffers.addresses, buffers.lengths)
        if expected is not None:
            expected.check_memory(buffers.addresses, buffers.lengths, deadline)

    def _move(self, buffers: ReceiveBuffers, deadline: Deadline) -> None:
        flat, after = buffers.flat(self._device_type), buffers.after
        if self._exposed is None:
            retry_stale(lambda: self._receive(flat, deadline, after), deadline)
        else:
            exposed = self._await_exposed(self._exposed, deadline)
            cast(OneSided, self._transport).read(self._peer, exposed, flat, deadline, after)
            self.abandon()

    def _receive(
        self, buffers: list[torch.Tensor], deadline: Deadline, after: Sequence[Event]
    ) -> None:
        transport = cast(TwoSided, self._transport)
        route = transport.route(self._peer, deadline)
        try:
            _answer_of(self._ask("rdt.send", route, deadline), deadline)
        except BaseException as error:
            is_refused = isinstance(error, (CallError, TransportUnavailable))
            transport.give_up(route, may_send=not is_refused)
            raise
        transport.receive(route, buffers, deadline, after)

    def _await_exposed(self, asked: Callable[[float], dict[str, Any]], deadline: Deadline) -> Route:
        try:
            return _answer_of(asked, deadline)
        except (CallError, TransportUnavailable):
            self._is_reading = False  # nothing was exposed to us that could be done with
            raise

    def abandon(self) -> None:
        """Tells the producer that nobody reads any more; the transfer itself ends by itself."""
        if self._is_reading:
            self._is_reading = False
            body = {"key": self._head.key.hex()}
            self._session.send_oneway(self._peer.address, "rdt.done", body, idempotent=False)


class _RuledOut(TransportUnavailable):
    """Nothing was tried."""


class Exchanges:
    """The transports that are tried for the regions on one type of device, one after the other.

    The first that can be begun is. One that fails although nobody named it is passed over, as one
    that cannot serve is; the error of a named one is the object's.

    Attributes:
        current: The one under way, None if there is none: the agent's lanes are left.

    Args:
        links: This process's parts.
        head: The object.
        device_type: The regions that are meant.
        deadline: When the fetch gives up.

    Raises:
        RDTError: the named transport cannot serve it, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """

    def __init__(self, links: Links, head: Descriptor, device_type: str, deadline: Deadline):
        self._links = links
        self._head = head
        self._device_type = device_type
        self._left = ways(head.transport, device_type)
        self.current: Exchange | None = None
        self._begin_next(deadline)

    def move(self, buffers: ReceiveBuffers, deadline: Deadline) -> bool:
        """Waits for the bytes. False: no transport serves, the agent's lanes have to."""
        while self.current is not None:
            lane, until = self.current.lane, self._until(self.current.lane, deadline)
            try:
                self.current.move(buffers, until)
            except Exception as error:
                raise_if_interrupt(error)
                if not self._may_pass_over(lane, error, deadline):
                    raise
                self.current.abandon()
                self._pass_over(lane, error)
            else:
                say_used(self._links.session, self._head, lane, self._device_type)
                return True
            self._begin_next(deadline)
        return False

    def abandon(self) -> None:
        """Gives up the one under way."""
        if self.current is not None:
            self.current.abandon()

    def _begin_next(self, deadline: Deadline) -> None:
        self.current = None
        while self._left and self.current is None:
            name = self._left.pop(0)
            try:
                self._check_allowed(name)
                self.current = Exchange(
                    self._links, name, self._head, self._until(name, deadline), self._device_type
                )
            except TransportUnavailable as error:
                if name == STAGED:
                    raise
                self._pass_over(name, error)

    def _is_unnamed(self, name: str) -> bool:
        return name not in (self._head.transport, STAGED)

    def _check_allowed(self, name: str) -> None:
        unavailable_reason = ""
        if self._is_unnamed(name):
            unavailable_reason = self._links.policy.unavailable_reason(name, self._head.address)
        if unavailable_reason:
            raise _RuledOut(unavailable_reason)

    def _until(self, name: str, deadline: Deadline) -> Deadline:
        """One that nobody named leaves half of the time to those after it."""
        return deadline.halfway() if self._is_unnamed(name) else deadline

    def _may_pass_over(self, lane: str, error: Exception, deadline: Deadline) -> bool:
        if lane == STAGED:
            return False
        if isinstance(error, TransportUnavailable):
            return True
        if not self._is_unnamed(lane) or deadline.has_passed():
            return False
        is_final = isinstance(error, (MemoryError, RayError, ChecksumMismatch))
        if isinstance(error, TransferFailed):
            is_gone = error.code in ("not_found", "changed")
            is_final = is_final or is_gone or error.may_still_write
        return not is_final

    def _pass_over(self, name: str, error: Exception) -> None:
        if not self._is_unnamed(name):
            fall_back(self._links.session, self._head, error)
            return
        is_ruled_out = isinstance(error, _RuledOut)
        if not is_ruled_out:
            self._links.policy.failed(name, self._head.address, error)
        if not is_ruled_out or self._device_type != "cpu":
            why = f"RDT lane {name} does not serve {describe_peer(self._head)}: {error}"
            self._links.session.log_once(why, logging.INFO)


class TransportPull:
    """A transport moves the bytes of an object in host memory; if none can, the agent does.

    Args:
        links: This process's parts.
        exchanges: With the transports that are tried.
        envelope: The object.
        targets: The user's.
    """

    def __init__(
        self, links: Links, exchanges: Exchanges, envelope: Envelope, targets: Targets | None
    ):
        self.abandon = exchanges.abandon
        self._links = links
        self._exchanges = exchanges
        self._envelope = envelope
        self._targets = targets

    @property
    def lane(self) -> str:
        under_way = self._exchanges.current
        return under_way.lane if under_way is not None else ""

    def finish(self, deadline: Deadline) -> Targets:
        try:
            with without_turn():
                tensors = self._move(deadline)
            if tensors is not None:
                return tensors
        except ChecksumMismatch as error:
            pull_again(self._links.session, self._envelope.head, self.lane, error)
            self.abandon()
        return _finish_on_agent(self._links, self._envelope, self._targets, deadline)

    def _move(self, deadline: Deadline) -> Targets | None:
        table = self._envelope.table
        direct = direct_targets(table, self._targets)
        buffers = allocate(self._links.session, table.regions, direct)
        if not self._exchanges.move(buffers, deadline):
            return None
        return buffers.deliver(table, self._targets)


class UserPull:
    """The code of a user moves the object. Nothing is asked before ``finish``."""

    def __init__(self, links: Links, envelope: Envelope, targets: Targets | None):
        self.lane = envelope.head.transport
        self._links = links
        self._envelope = envelope
        self._targets = targets
        address = envelope.head.address
        self._peer = Peer(address, agent_id_of(address))
        self._is_reading = False

    def finish(self, deadline: Deadline) -> Targets:
        with without_turn():  # what runs here is the user's code
            shipment: Shipment = cloudpickle.loads(self._envelope.shipment)
        try:
            with without_turn():
                return retry_stale(lambda: self._move(shipment, deadline), deadline)
        except TransportUnavailable as error:
            if not shipment.has_regions:
                raise
            fall_back(self._links.session, self._envelope.head, error)
        except ChecksumMismatch as error:
            pull_again(self._links.session, self._envelope.head, self.lane, error)
        return _finish_on_agent(self._links, self._envelope, self._targets, deadline)

    def _move(self, shipment: Shipment, deadline: Deadline) -> Targets:
        table = self._envelope.table
        transport = cast("UserTransport", self._links.transports.get(self.lane))
        direct = direct_targets(table, self._targets)
        filled = [region for region, nbytes in enumerate(table.regions) if nbytes]
        is_direct = self._targets is not None and all(region in direct for region in filled)
        targets = [writable(direct[region]) for region in filled] if is_direct else None
        expected = None
        if shipment.has_regions:
            head = self._envelope.head
            expected = checksums.expected(self._links.session, head.address, head.key)
        received = transport.pull(self._peer, shipment, targets, self._ask(deadline), deadline)
        say_used(self._links.session, self._envelope.head, self.lane)
        if not table.rows:
            return received
        if targets is not None:
            fill(targets, received)
            note_written(direct.values())
        if expected is not None:
            dense = [carrier.detach().cpu().contiguous() for carrier in received]
            addresses = array("Q", [carrier.data_ptr() for carrier in dense])
            lengths = array("Q", [carrier.nbytes for carrier in dense])
            expected.check_memory(addresses, lengths, deadline)
        if self._targets is not None and is_direct:
            return self._targets
        tensors = unpack_carriers(table, received)
        return tensors if self._targets is None else fill(self._targets, tensors)

    def _ask(self, deadline: Deadline) -> Callable[[str, Route], Route]:
        def ask(op: str, route: Route) -> Route:
            head = self._envelope.head
            session = self._links.session
            asked = _start_asking(session, head, self.lane, "cpu", op, route, deadline)
            self._is_reading = op == "rdt.expose"
            return _answer_of(asked, deadline)

        return ask

    def abandon(self) -> None:
        """Tells the producer that nobody reads any more."""
        if self._is_reading:
            self._is_reading = False
            body = {"key": self._envelope.head.key.hex()}
            self._links.session.send_oneway(self._peer.address, "rdt.done", body, idempotent=False)


def _start_asking(
    session: Session,
    head: Descriptor,
    transport: str,
    device_type: str,
    op: str,
    route: Route,
    deadline: Deadline,
) -> Callable[[float], dict[str, Any]]:
    body = {
        "key": head.key.hex(),
        "transport": transport,
        "device": device_type,
        "route": route,
        "timeout_s": deadline.left_s(),
    }
    return session.start_call(head.address, op, body, idempotent=op == "rdt.expose")


def _answer_of(asked: Callable[[float], dict[str, Any]], deadline: Deadline) -> Route:
    try:
        return asked(deadline.left_s())
    except CallError as error:
        if error.code == TransportUnavailable.code:
            raise TransportUnavailable(str(error)) from error
        raise


def retry_stale(move: Callable[[], _Moved], deadline: Deadline) -> _Moved:
    """Moves the bytes again, up to ``_TRIES`` times, where all that failed was the way they took.

    A connection that breaks says nothing about the process behind it: the next try finds out.
    """
    for left in reversed(range(_TRIES)):
        try:
            return move()
        except Exception as error:
            raise_if_interrupt(error)
            is_retryable = isinstance(error, TransferFailed) and error.retryable
            if not is_retryable or not left or deadline.has_passed():
                raise
            logger.debug("RDT moves an object again", exc_info=True)
    raise AssertionError("the last try returns or raises")


def choose(
    links: Links,
    envelope: Envelope,
    targets: Targets | None,
    deadline: Deadline,
) -> Transfer:
    """Starts the transfer of an object in the host memory of another process.

    Raises:
        RDTError: the named transport cannot serve it, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """
    head, table = envelope.head, envelope.table
    if head.is_user_defined and (head.nbytes or not table.rows):
        return UserPull(links, envelope, targets)
    hinted = links.prefetcher.take(head.key)
    if hinted is not None:
        return FromHint(links, hinted, envelope, targets)
    if head.nbytes:
        exchanges = Exchanges(links, head, "cpu", deadline)
        if exchanges.current is not None:
            return TransportPull(links, exchanges, envelope, targets)
    return FromAgent(_agent_pull(links, envelope, targets), table, targets)


def _finish_on_agent(
    links: Links, envelope: Envelope, targets: Targets | None, deadline: Deadline
) -> Targets:
    pull = _agent_pull(links, envelope, targets)
    try:
        return FromAgent(pull, envelope.table, targets).finish(deadline)
    finally:
        pull.abandon()


def check_carries(transport: Transport, device_type: str) -> None:
    """Raises TransportUnavailable unless it moves bytes from such devices."""
    if device_type not in transport.capabilities.devices:
        name = transport.capabilities.name
        raise TransportUnavailable(f"{name} does not carry tensors on {device_type}")


def _agent_pull(links: Links, envelope: Envelope, targets: Targets | None) -> AgentPull:
    head, table = envelope.head, envelope.table
    direct = direct_targets(table, targets)
    spreads = find_spreads(table, targets, direct)
    buffers = allocate(links.session, table.regions, direct, spreads)
    return AgentPull(links.session, head.address, head.key, buffers)


def fall_back(session: Session, head: Descriptor, error: Exception) -> None:
    """Says once why another lane than the named transport is used.

    Raises:
        RDTError: ``RAY_RDT_STRICT_TRANSPORT=1`` forbids that.
    """
    if settings().strict_transport:
        raise RDTError(
            f"transport {head.transport!r} cannot serve this object ({error}), and "
            "RAY_RDT_STRICT_TRANSPORT=1 forbids any other lane."
        ) from error
    session.log_once(
        f"RDT transport {head.transport!r} cannot serve {describe_peer(head)}: {error}. "
        "The best other lane is used."
    )


def say_used(session: Session, head: Descriptor, lane: str, device_type: str = "cpu") -> None:
    """Says once for a peer that a transport moves what is on a type of device, and why that one.

    The agent says the same of its lanes.
    """
    is_named = lane == head.transport
    why = "the named transport" if is_named else f"the best for {device_type} that serves this pair"
    what = f"RDT with {describe_peer(head)}, tensors on {device_type}"
    session.log_once(f"{what}: lane {lane} ({why})", logging.INFO)


def pull_again(session: Session, head: Descriptor, way: str, error: ChecksumMismatch) -> None:
    """Says why the agent's lanes bring an object that a transport has brought.

    Raises:
        ChecksumMismatch: it is the named one, and ``RAY_RDT_STRICT_TRANSPORT=1`` forbids others.
    """
    if settings().strict_transport and way == head.transport:
        raise error
    checksums.log_retry(session, way, error)


def describe_peer(head: Descriptor) -> str:
    """The producer of an object, for people."""
    return f"producer {head.producer.hex()}"
