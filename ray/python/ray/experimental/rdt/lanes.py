"""The ways in which one object's tensors reach this process, each with the same two methods.

``finish(deadline)`` waits and gives the tensors, ``abandon()`` gives up. Runs on: consumer, the
thread that deserializes.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Protocol, Sequence, cast

from ray.experimental.rdt.capture import Envelope, Table, build_tensors
from ray.experimental.rdt.config import settings
from ray.experimental.rdt.descriptor import Descriptor
from ray.experimental.rdt.errors import RDTError
from ray.experimental.rdt.session import agent_id_of
from ray.experimental.rdt.transports.base import (
    OneSided,
    Peer,
    Route,
    Transport,
    TransportUnavailable,
    TwoSided,
)
from ray.experimental.rdt.transports.registry import Transports

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.session import Session

Targets = Sequence["torch.Tensor"]

#: A region of at least this many bytes gets a block of its own, so that keeping one large tensor
#: does not keep the memory of all the others.
_OWN_BLOCK_BYTES = 1 << 20

_ALIGNMENT = 64


class Transfer(Protocol):
    """One object under way. ``lane`` is for error messages."""

    @property
    def lane(self) -> str: ...

    def finish(self, deadline: float) -> Targets:
        """Waits for the tensors. Raises AgentError, TimeoutError or what a transport raises."""

    def abandon(self) -> None:
        """Gives the transfer up; no byte is written afterwards. Idempotent."""


class Here:
    """The object was made by this process: the very tensors."""

    lane = "inproc"

    def __init__(self, tensors: Targets, targets: Targets | None):
        self._tensors = tensors
        self._targets = targets

    def finish(self, deadline: float) -> Targets:
        return self._tensors if self._targets is None else fill(self._targets, self._tensors)

    def abandon(self) -> None:
        """Nothing is under way."""


class Eager:
    """The bytes came with the value."""

    lane = "eager"

    def __init__(self, envelope: Envelope, targets: Targets | None):
        self._envelope = envelope
        self._targets = targets

    def finish(self, deadline: float) -> Targets:
        table = self._envelope.table
        memory = bytearray(self._envelope.eager or b"")
        places, at = [], 0
        for nbytes in table.regions:
            places.append((memory, at))
            at += nbytes
        tensors = build_tensors(table, places)
        return tensors if self._targets is None else fill(self._targets, tensors)

    def abandon(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True)
class Landing:
    """Where a pull's bytes land.

    Attributes:
        places: For each region its buffer and the offset in it.
        addresses: For each region its address, as uint64.
        lengths: For each region its bytes, as uint64.
    """

    places: list[tuple[Any, int]]
    addresses: "array[int]"
    lengths: "array[int]"

    def flat(self, direct: dict[int, "torch.Tensor"]) -> list["torch.Tensor"]:
        """The regions as flat uint8 tensors, for a transport to fill."""
        import torch

        empty = torch.empty(0, dtype=torch.uint8)
        return [
            direct[region].view(-1).view(torch.uint8)
            if region in direct
            else torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=offset)
            if nbytes
            else empty
            for region, ((buffer, offset), nbytes) in enumerate(zip(self.places, self.lengths))
        ]

    def deliver(
        self, table: Table, targets: Targets | None, direct: dict[int, "torch.Tensor"]
    ) -> Targets:
        """The object's tensors over the memory, now that the bytes are there."""
        if targets is None:
            return build_tensors(table, self.places)
        if len(direct) == len(table.regions):
            return targets
        return fill(targets, build_tensors(table, self.places, direct))


class AgentPull:
    """The agent pulls into blocks of the receive pool, or straight into the user's tensors."""

    def __init__(self, session: "Session", envelope: Envelope, targets: Targets | None):
        self._table = envelope.table
        self._targets = targets
        self._direct = direct_targets(envelope.table, targets) if targets is not None else {}
        self._landing = allocate(session, envelope.table, self._direct)
        self._pull = session.agent.pull(
            envelope.head.address,
            envelope.head.key,
            self._landing.addresses,
            self._landing.lengths,
        )
        self._pull.keep = (self._landing, self._direct)

    @property
    def lane(self) -> str:
        return self._pull.lane or ""

    def finish(self, deadline: float) -> Targets:
        self._pull.wait(max(0.0, deadline - time.monotonic()))
        return self._landing.deliver(self._table, self._targets, self._direct)

    def abandon(self) -> None:
        if not self._pull.done:
            self._pull.cancel()


class TransportPull:
    """A named transport moves the bytes. Its link to the peer is settled when this is made.

    Raises:
        TransportUnavailable: by the constructor; nothing has been asked of the producer.
    """

    def __init__(
        self,
        session: "Session",
        transport: Transport,
        envelope: Envelope,
        targets: Targets | None,
        deadline: float,
    ):
        self.lane = transport.capabilities.name
        self._session = session
        self._transport = transport
        self._envelope = envelope
        self._targets = targets
        address = envelope.head.address
        self._peer = Peer(address, agent_id_of(address))
        self._route: Route = {}
        if transport.capabilities.two_sided:
            two_sided = cast(TwoSided, transport)
            self._route = two_sided.route(self._peer, deadline)
        self._asked = self._ask(deadline)

    def _ask(self, deadline: float) -> Callable[[float], dict[str, Any]]:
        op = "rdt.send" if self._transport.capabilities.two_sided else "rdt.expose"
        body = {
            "key": self._envelope.head.key.hex(),
            "transport": self.lane,
            "route": self._route,
            "timeout_s": max(0.0, deadline - time.monotonic()),
        }
        return self._session.start_call(self._peer.address, op, body)

    def finish(self, deadline: float) -> Targets:
        table = self._envelope.table
        direct = direct_targets(table, self._targets) if self._targets is not None else {}
        landing = allocate(self._session, table, direct)
        buffers = landing.flat(direct)
        answer = self._asked(max(0.0, deadline - time.monotonic()))
        if self._transport.capabilities.two_sided:
            cast(TwoSided, self._transport).receive(self._route, buffers, deadline)
        else:
            self._read(answer, buffers, deadline)
        return landing.deliver(table, self._targets, direct)

    def _read(self, exposed: Route, buffers: list["torch.Tensor"], deadline: float) -> None:
        try:
            cast(OneSided, self._transport).read(self._peer, exposed, buffers, deadline)
        finally:
            body = {"key": self._envelope.head.key.hex()}
            self._session.start_call(self._peer.address, "rdt.done", body)

    def abandon(self) -> None:
        """The transport ends it at its deadline: ``receive`` and ``read`` leave nothing behind."""


def choose(
    session: "Session",
    transports: Transports,
    envelope: Envelope,
    targets: Targets | None,
    deadline: float,
) -> Transfer:
    """Starts the transfer of an object that another process holds.

    Raises:
        RDTError: the named transport cannot serve it, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """
    name = envelope.head.transport
    if name != "auto" and envelope.head.nbytes:
        try:
            transport = transports.get(name)
            return TransportPull(session, transport, envelope, targets, deadline)
        except TransportUnavailable as error:
            _fall_back(session, envelope.head, error)
    return AgentPull(session, envelope, targets)


def _fall_back(session: "Session", head: Descriptor, error: TransportUnavailable) -> None:
    if settings().strict_transport:
        raise RDTError(
            f"transport {head.transport!r} cannot serve this object ({error}), and "
            "RAY_RDT_STRICT_TRANSPORT=1 forbids any other lane."
        ) from error
    session.say_once(
        f"RDT transport {head.transport!r} cannot serve {describe_peer(head)}: {error}. "
        "The best other lane is used."
    )


def allocate(session: "Session", table: Table, direct: dict[int, "torch.Tensor"]) -> Landing:
    """Memory for all regions of an object.

    Args:
        session: Its agent's receive pool gives the blocks.
        table: The object's layout.
        direct: Regions that go straight into a tensor of the user's.
    """
    places: list[tuple[Any, int]] = []
    addresses, packed = array("Q"), 0
    for region, nbytes in enumerate(table.regions):
        if region in direct or nbytes >= _OWN_BLOCK_BYTES:
            continue
        packed += _round_up(nbytes)
    shared = session.agent.allocate(packed) if packed else None
    at = 0
    for region, nbytes in enumerate(table.regions):
        if region in direct:
            places.append((None, 0))
            addresses.append(direct[region].data_ptr())
        elif nbytes >= _OWN_BLOCK_BYTES:
            block = session.agent.allocate(nbytes)
            places.append((block, 0))
            addresses.append(block.address)
        else:
            places.append((shared, at))
            addresses.append(shared.address + at if shared is not None else 0)
            at += _round_up(nbytes)
    return Landing(places, addresses, array("Q", table.regions))


def direct_targets(table: Table, targets: Targets) -> dict[int, "torch.Tensor"]:
    """Regions that are exactly one contiguous target's bytes, and that target."""
    users: dict[int, list[int]] = {}
    for index, row in enumerate(table.rows):
        users.setdefault(row[0], []).append(index)
    direct = {}
    for region, (first, *others) in users.items():
        target, row = targets[first], table.rows[first]
        is_exact = row[4] is None and target.nbytes == table.regions[region]
        is_plain = target.is_contiguous() and target.device.type == "cpu" and not row[5] & ~1
        if not others and is_exact and is_plain:
            direct[region] = target
    return direct


def fill(targets: Targets, tensors: Targets) -> Targets:
    """Copies the tensors into the user's."""
    import torch

    with torch.no_grad():
        for target, tensor in zip(targets, tensors):
            if target is not tensor:
                target.copy_(tensor)
    return targets


def describe_peer(head: Descriptor) -> str:
    """The producer of an object, for people."""
    return f"producer {head.producer.hex()}"


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
