"""The seam between RDT and the transports that a user names.

A transport moves the bytes of one RDT object from the producer's tensors into memory that the
consumer has prepared. It sees flat byte buffers only: what the tensors look like, where they are
kept and when they are freed is decided elsewhere. There are two kinds; a transport is one of them:

* one-sided: the producer describes its memory once (``expose``), consumers read it (``read``);
* two-sided: both act. The consumer agrees on a route, asks the producer's process to ``send``
  along it, and calls ``receive`` itself.

A transport that a user wrote is neither: it moves whole objects; ``user.py`` adapts it.

The agent's own lanes (in-process, cma, shm, tcp) are no transports: they serve what these cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import TransferFailed

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.base import Event


class TransportUnavailable(TransferFailed):
    """This transport cannot serve this pair or this object; nothing has been sent.

    The fetch then takes the best other lane and logs the reason once, or, with
    ``RAY_RDT_STRICT_TRANSPORT=1``, raises it to the user. Raised in the producer's process, it
    reaches the consumer by its ``code``. One that is ``retryable`` is followed by another try.
    """

    code = "unavailable"


@dataclass(frozen=True)
class Capabilities:
    """What a transport can do, as data.

    Attributes:
        name: The lower-case name that users write.
        devices: torch device types that it moves bytes from and into.
        two_sided: Whether the producer's process has to act for each pull.
        abortable: Whether a transfer in progress can be given up without ending either process.
        is_user_defined: Whether a user wrote it: it moves whole objects.
        lends: Whether it can give consumers the producer's own memory: it is a ``Lending``, too.
    """

    name: str
    devices: frozenset[str]
    two_sided: bool
    abortable: bool = True
    is_user_defined: bool = False
    lends: bool = False


@dataclass(frozen=True)
class Peer:
    """The other process of a pull, as both kinds of transport see it.

    Attributes:
        address: The endpoint of its agent, as ``Session.call`` takes it.
        agent_id: Its agent's 16 random bytes; new for every process and every ``ray.init``.
    """

    address: bytes
    agent_id: bytes


@dataclass(frozen=True)
class Parcel:
    """An object at its producer, as a transport of the user's knows it.

    Attributes:
        object_id: Names it to the user's code: 56 hexadecimal digits, not Ray's own id.
        metadata: What the user's code extracted.
        tensors: What it moves.
    """

    object_id: str
    metadata: Any
    tensors: list[Any]


class Shipment(NamedTuple):
    """What a consumer needs to receive a parcel. Travels in the Ray value, pickled.

    Attributes:
        object_id: As in the parcel.
        metadata: As in the parcel.
        size: How many tensors the parcel has.
        producer: The handle of the actor that made it as Ray serializes it, None for no actor.
        has_regions: Whether the agent's lanes could move it as well.
    """

    object_id: str
    metadata: Any
    size: int
    producer: bytes | None
    has_regions: bool


#: A description that both sides understand, carried between them as JSON.
Route = dict[str, Any]


class OneSided(Protocol):
    """Consumer reads what the producer has exposed."""

    capabilities: Capabilities

    def expose(self, buffers: Sequence[torch.Tensor]) -> Route:
        """Describes flat uint8 ``buffers`` so that ``read`` in another process can reach them.

        Runs on: producer, an ``rdt-call`` thread, at an object's first pull over this transport.
        The buffers stay the object's; they live until ``withdraw`` has returned.

        Raises:
            TransportUnavailable: it cannot expose these.
        """

    def read(
        self,
        peer: Peer,
        exposed: Route,
        buffers: Sequence[torch.Tensor],
        deadline: Deadline,
        after: Sequence[Event] = (),
    ) -> None:
        """Fills flat uint8 ``buffers``, which match the exposed ones one to one.

        Buffers on devices may be written after the events in ``after``.

        Runs on: consumer, the fetching thread; may block until ``deadline`` (``time.monotonic``).
        Returns only once all bytes are in place; after an error none is written any more, unless
        it is a ``TransferFailed`` with ``may_still_write``.

        Raises:
            TransportUnavailable: nothing was sent, another lane may be tried.
            Exception: the transfer failed; the fetch error carries it as its cause.
        """

    def withdraw(self, exposed: Route) -> None:
        """Ends what ``expose`` began. Runs on: producer, the reaper thread. Never raises."""

    def close(self) -> None:
        """Gives everything back. Runs on: whoever shuts Ray down. Idempotent."""


class Lending(Protocol):
    """A transport whose consumers may get the producer's own memory instead of a copy.

    Its name alone has to be asked for by the user: what one side writes, the other one sees.
    """

    capabilities: Capabilities

    def lend(
        self,
        peer_id: bytes,
        asked: Route,
        buffers: Sequence[torch.Tensor],
        events: Sequence[Event],
        deadline: Deadline,
    ) -> Route:
        """Keeps flat buffers for a consumer and describes them; what ``borrow`` gives answers.

        Runs on: producer, an ``rdt-call`` thread. Does not wait for the events: the consumer's
        stream does.

        Raises:
            TransportUnavailable: it cannot lend these to this consumer.
        """

    def borrow(self, device: torch.device) -> Borrowing:
        """Begins to get an object's memory for a device of this process. Runs on: consumer."""


class Borrowing(Protocol):
    """One object's memory on its way to a consumer that borrows it."""

    #: What the producer is told; its ``lend`` gets it.
    asked: Route

    def take(self, peer: Peer, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Tensors over the producer's memory, which it keeps until the last of them has died.

        Runs on: consumer, the fetching thread, whose current stream waits for what writes them.

        Args:
            peer: The producer.
            lent: What ``lend`` gave.
            sizes: The bytes of each buffer.

        Raises:
            TransportUnavailable: the memory cannot be opened here.
        """

    def abandon(self, peer: Peer) -> None:
        """Gives back what may have been lent. Idempotent; nothing happens after ``take``."""


class TwoSided(Protocol):
    """Producer sends, consumer receives."""

    capabilities: Capabilities

    def route(self, peer: Peer, deadline: Deadline) -> Route:
        """Settles how ``peer`` will send to this process; makes the connection if there is none.

        Runs on: consumer, the fetching thread. Each call gives a route for one transfer: two
        transfers of one pair at once never mix.

        Raises:
            TransportUnavailable: no route to this peer.
        """

    def send(self, route: Route, buffers: Sequence[torch.Tensor], deadline: Deadline) -> None:
        """Sends flat uint8 ``buffers`` along ``route``.

        Runs on: producer, an ``rdt-send`` thread; returns when the buffers may change again. A send
        that fails also ends the consumer's ``receive`` on this route.
        """

    def receive(
        self,
        route: Route,
        buffers: Sequence[torch.Tensor],
        deadline: Deadline,
        after: Sequence[Event] = (),
    ) -> None:
        """Fills flat uint8 ``buffers``, which match the sent ones one to one, along ``route``.

        Buffers on devices may be written after the events in ``after``.

        Runs on: consumer, the fetching thread. After an error none is written any more.
        """

    def give_up(self, route: Route, may_send: bool) -> None:
        """Gives back a ``route`` along which ``receive`` will not be called.

        Runs on: consumer, the fetching thread; blocks briefly. Never raises, also for a route whose
        connection is gone.

        Args:
            route: What ``route`` gave.
            may_send: Whether the producer may have been told to send along it. False where it was
                not asked or has refused: the connection serves the next transfer. True where it was
                asked and its answer is not known: the connection is closed, which ends its
                ``send``.
        """

    def close(self) -> None:
        """Gives everything back. Runs on: whoever shuts Ray down. Idempotent."""


Transport = OneSided | TwoSided
