"""The interface between RDT and the transports that a user names.

A transport moves the bytes of one RDT object from the producer's tensors into memory that the
consumer has prepared. It sees flat byte buffers only, not tensors and their lifetime. There are two
kinds:

* one-sided: the producer describes its memory once (``expose``), and consumers read it (``read``).
* two-sided: both act. The consumer gets a route, asks the producer's process to ``send`` along it,
  and calls ``receive``.

A transport that a user wrote is neither: it moves whole objects. ``user/transport.py`` adapts it.

The agent's own lanes (in-process, map, cma, shm, tcp) are not transports. They are the fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import TransferFailed

if TYPE_CHECKING:
    import torch

Buffers = Sequence["torch.Tensor"]
Events = Sequence[Event]

#: A description that both sides understand, carried between them in msgpack.
Route = dict[str, Any]


class TransportUnavailable(TransferFailed):
    """This transport cannot serve this pair or this object; nothing has been sent.

    The fetch then tries the next candidate and logs the reason once, or, with
    ``RAY_RDT_STRICT_TRANSPORT=1``, raises it to the user. Raised in the producer's process, it
    reaches the consumer by its ``code``. One that is ``retryable`` is followed by another try.
    """

    code = "unavailable"


def check_clear_allowed(limit: str) -> None:
    """Raise TransportUnavailable, with the library's ``limit``, if all bytes must be encrypted."""
    if not settings().clear_tcp:
        raise TransportUnavailable(
            f"RAY_USE_TLS=1 is set, and {limit}; RAY_RDT_ALLOW_CLEAR_TCP=1 allows it"
        )


@dataclass(frozen=True)
class Capabilities:
    """The properties of a transport.

    Attributes:
        name: The lower-case name that users write.
        devices: torch device types that it moves bytes from and into. Empty: all.
        two_sided: Whether the producer's process has to act for each transfer.
        abortable: Whether a transfer in progress can be aborted while both processes go on.
        is_user_defined: Whether a user wrote it. It then moves whole objects.
        sends_from_host: Whether device memory that was copied to the host is sent from there.
        lends: Whether it is a ``Lending`` as well: consumers can get the producer's own memory.
    """

    name: str
    devices: frozenset[str]
    two_sided: bool
    abortable: bool = True
    is_user_defined: bool = False
    sends_from_host: bool = False
    lends: bool = False

    def carries(self, device_type: str) -> bool:
        """Tell whether it moves bytes from and into memory of a device type."""
        return not self.devices or device_type in self.devices


@dataclass(frozen=True)
class Peer:
    """The other process of a transfer.

    Attributes:
        address: The endpoint of its agent, as ``Session.call`` takes it.
        agent_id: Its agent's 16 random bytes; new for every process and every ``ray.init``.
    """

    address: bytes
    agent_id: bytes


@dataclass(frozen=True)
class UserObject:
    """An object at its producer, for a transport that a user wrote.

    Attributes:
        object_id: Its id for the user's code: 56 hexadecimal digits, not Ray's own id.
        metadata: The metadata that the user's code extracted.
        tensors: The tensors to move.
    """

    object_id: str
    metadata: Any
    tensors: list[Any]


class UserDescription(NamedTuple):
    """The description of a user object that a consumer needs. Part of the Ray value, pickled.

    Attributes:
        object_id: As in the user object.
        metadata: As in the user object.
        size: The number of tensors in the user object.
        producer: The serialized handle of the actor that made it, None without an actor.
        has_regions: Whether the agent's lanes can move it as well.
    """

    object_id: str
    metadata: Any
    size: int
    producer: bytes | None
    has_regions: bool


class OneSided(Protocol):
    """A transport whose consumers read memory that the producer has exposed."""

    capabilities: Capabilities

    def expose(self, buffers: Buffers) -> Route:
        """Describe flat uint8 ``buffers`` so that ``read`` in another process can reach them.

        Runs on: producer, an ``rdt-expose`` thread, at an object's first pull over this transport.
        The buffers belong to the object and live until ``withdraw`` has returned.

        Raises:
            TransportUnavailable: It cannot expose these.
        """

    def read(
        self, peer: Peer, exposed: Route, buffers: Buffers, deadline: Deadline, after: Events = ()
    ) -> None:
        """Fill flat uint8 ``buffers``, which match the exposed ones one to one.

        Runs on: consumer, the fetching thread; may block until ``deadline``. Returns only once all
        bytes are in place. Buffers on devices may be written after the events in ``after``. After
        an error none is written any more, unless it is a ``TransferFailed`` with
        ``may_still_write``.

        Raises:
            TransportUnavailable: nothing was sent, another lane may be tried.
            Exception: the transfer failed; the fetch error carries it as its cause.
        """

    def withdraw(self, exposed: Route) -> None:
        """Undo ``expose``. Runs on: producer, the reaper thread. Never raises."""

    def close(self) -> None:
        """Release everything. Runs on: the thread that shuts Ray down. Idempotent."""


class Lending(Protocol):
    """A transport whose consumers can get the producer's own memory instead of a copy.

    It lends only where the user named it: each side sees what the other one writes.
    """

    capabilities: Capabilities

    def lend(
        self, peer_id: bytes, asked: Route, buffers: Buffers, events: Events, deadline: Deadline
    ) -> Route:
        """Keep flat buffers for a consumer, and describe them for ``Borrowing.take``.

        Runs on: producer, an ``rdt-call`` thread. Does not wait for the events: the consumer's
        stream does.

        Raises:
            TransportUnavailable: it cannot lend these to this consumer.
        """

    def borrow(self, device: torch.device) -> Borrowing:
        """Prepare to borrow an object's memory for a device of this process. Runs on: consumer."""


class Borrowing(Protocol):
    """The transfer of one object's memory to a consumer that borrows it."""

    #: Sent to the producer, whose ``lend`` gets it.
    asked: Route

    def take(self, peer: Peer, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Return tensors of ``sizes`` bytes over the producer's memory.

        The memory is kept until the last of them has died.

        Runs on: consumer, the fetching thread. Its current stream waits for pending writes.

        Raises:
            TransportUnavailable: The memory cannot be opened here.
        """

    def abandon(self, peer: Peer) -> None:
        """Return memory that may have been lent. Idempotent; without effect after ``take``."""


class TwoSided(Protocol):
    """A transport whose producer sends and whose consumer receives."""

    capabilities: Capabilities

    def check_available(self) -> None:
        """Raise TransportUnavailable if this process cannot use it. Runs on: any thread."""

    def route(self, peer: Peer, deadline: Deadline) -> Route:
        """Return a route for ``peer`` to send along to this process; connect if necessary.

        Runs on: consumer, the fetching thread. A route is for one transfer: concurrent transfers of
        one pair never mix.

        Raises:
            TransportUnavailable: There is no route to this peer.
        """

    def send(self, route: Route, buffers: Buffers, deadline: Deadline) -> None:
        """Send flat uint8 ``buffers`` along ``route``.

        Runs on: producer, an ``rdt-send`` thread; returns when the buffers may change again. A send
        that fails also ends the consumer's ``receive`` on this route.
        """

    def receive(
        self, route: Route, buffers: Buffers, deadline: Deadline, after: Events = ()
    ) -> None:
        """Fill flat uint8 ``buffers``, which match the sent ones one to one, along ``route``.

        As ``OneSided.read``, but after an error no byte is written any more.
        """

    def abandon(self, route: Route, may_send: bool) -> None:
        """Release a ``route`` along which ``receive`` will not be called.

        Runs on: consumer, the fetching thread; blocks briefly. Never raises, also for a route whose
        connection is gone.

        Args:
            route: The result of ``route``.
            may_send: Whether the producer was asked to send along it and has not refused. If so,
                the connection is closed, which ends its ``send``. Else it serves the next transfer.
        """

    def close(self) -> None:
        """Release everything. Runs on: the thread that shuts Ray down. Idempotent."""


Transport = OneSided | TwoSided
