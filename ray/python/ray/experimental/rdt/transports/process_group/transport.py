"""The two-sided transports that move bytes through torch process groups: gloo and nccl.

They never touch torch's default process group. Each pair of processes connects by itself at the
first transfer, one link per direction, made by the consumer. Members of a collective group have
links of that group, made with it and closed with it.

Requests (JSON, through the session):

* ``rdt.link.open`` {transport, link, scope, address}: the producer joins a new link.
* ``rdt.link.set`` {transport, link, key, value}: a rank has set a key of the rendezvous.
* ``rdt.link.close`` {transport, link, reason}: the other end has closed a link, or given it up.
"""

from __future__ import annotations

import logging
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.groups.membership import Group, Membership, membership
from ray.experimental.rdt.transports.base import Peer, Route, TransportUnavailable
from ray.experimental.rdt.transports.process_group.link import (
    CONSUMER,
    PRODUCER,
    Backend,
    Buffers,
    Link,
    LinkClosed,
)
from ray.experimental.rdt.transports.process_group.rendezvous import Rendezvous, as_store

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.base import Event
    from ray.experimental.rdt.rpc.session import Session

logger = logging.getLogger("ray.rdt")

_OPEN_TIMEOUT_S = 30.0  # the producer may have to import torch first
_FAILURE_KEPT_S = 10.0  # a peer that could not be reached is not tried again before
_CLOSE_GRACE_S = 0.2
_CLOSE_WAIT_S = 2.0  # for links under construction when Ray is shut down
_MAX_LINKS = 4  # per peer, where a link carries one transfer at a time
_MAX_DIALS = 16  # links under construction at once
_SLICE_S = 0.2


@dataclass
class _Lines:
    """This process's links from one producer, in one scope. Guarded by the transport's lock."""

    links: list[Link] = field(default_factory=list)
    dials: int = 0
    failed_until: Deadline | None = None
    failure: str = ""
    cause: Exception | None = None


@dataclass(frozen=True)
class _Meeting:
    """A process group under construction.

    Attributes:
        rendezvous: What its ranks set.
        peers: The processes that take part beside this one.
        scope: The id of the collective group it belongs to, "" for none.
        is_link: Whether it is a link, and not for the operations of a collective group.
    """

    rendezvous: Rendezvous
    peers: tuple[Peer, ...]
    scope: str
    is_link: bool


class ProcessGroupTransport:
    """A transport over process groups of one backend.

    Args:
        backend: The kind of process group.
        session: What peers are asked through.
        groups: The collective groups of this process.
    """

    def __init__(
        self,
        backend: Backend,
        session: Session,
        groups: Membership | None = None,
    ):
        self.capabilities = backend.capabilities
        self._backend = backend
        self._session = session
        self._groups = groups if groups is not None else membership()
        self._changed = threading.Condition()
        self._lines: dict[tuple[str, bytes], _Lines] = {}
        self._links: dict[str, Link] = {}
        self._meetings: dict[str, _Meeting] = {}
        self._is_closed = False
        self._dialing = threading.Semaphore(_MAX_DIALS)
        session.on_peer_lost(self._on_peer_lost)

    # Consumer.

    def route(self, peer: Peer, deadline: Deadline) -> Route:
        """See ``TwoSided.route``."""
        self.check_available()
        group = self._groups.find_common(self.capabilities.name, peer.agent_id)
        link = self._acquire(peer, group.id if group is not None else "", deadline)
        return {"link": link.id, "tag": link.next_tag()}

    def receive(
        self, route: Route, buffers: Buffers, deadline: Deadline, after: Sequence[Event] = ()
    ) -> None:
        """See ``TwoSided.receive``."""
        link = self._find(route)
        try:
            link.receive(route["tag"], buffers, deadline, after)
        finally:
            self._release(link)

    def give_up(self, route: Route, may_send: bool) -> None:
        """See ``TwoSided.give_up``."""
        with self._changed:
            link = self._links.get(route["link"])
        if link is None:
            return
        if may_send:
            self._close([link], "the consumer gave a transfer up before it received")
        else:
            self._release(link)

    def join(self, group: Group) -> None:
        """Begins to collect what the members set for the operations of a group.

        Runs on: member, any thread, before ``connect`` is called at any member.
        """
        peers = {m.agent_id: Peer(m.address, m.agent_id) for m in group.others}
        self._meet(group.id, tuple(peers.values()), group.id, is_link=False)
        for rank, member in enumerate(group.members):
            if rank != group.rank:
                pair = (peers[member.agent_id],)
                self._meet(group.pair_name(rank), pair, group.id, is_link=False)

    def connect(self, group: Group, deadline: Deadline) -> None:
        """Makes the links of a group from all its other members to this process.

        Runs on: member, any thread; blocks.

        Raises:
            TransportUnavailable: a member cannot be reached; names its actor.
        """
        self.check_available()
        peers = [(m, Peer(m.address, m.agent_id)) for m in group.others]
        with self._changed:
            for _, peer in peers:
                self._dial_if_needed(peer, group.id)
        for member, peer in peers:
            try:
                self._release(self._acquire(peer, group.id, deadline))
            except TransportUnavailable as error:
                raise TransportUnavailable(f"actor {member.actor_id}: {error}") from error

    def _acquire(self, peer: Peer, scope: str, deadline: Deadline) -> Link:
        """A link from ``peer``; makes one if there is none, once however many threads ask."""
        with self._changed:
            while True:
                self._check_open(scope)
                lines = self._dial_if_needed(peer, scope)
                link = self._pick(lines, deadline)
                if link is not None:
                    return link
                if not _has_passed(lines.failed_until):
                    raise TransportUnavailable(lines.failure) from lines.cause
                left = deadline.left_s()
                if left <= 0:
                    raise TransportUnavailable("the connection was not made in time")
                self._changed.wait(min(_SLICE_S, left))
                raise_if_cancelled()

    def _dial_if_needed(self, peer: Peer, scope: str) -> _Lines:
        """Begins to make a link if none is free. Called with the lock held."""
        lines = self._lines.setdefault((scope, peer.agent_id), _Lines())
        lines.links = [link for link in lines.links if not link.is_closed]
        limit = 1 if self._backend.has_tags else _MAX_LINKS
        is_free = any(self._is_free(link) for link in lines.links)
        is_full = lines.dials or len(lines.links) >= limit
        if not is_free and not is_full and _has_passed(lines.failed_until):
            lines.dials += 1
            name = f"rdt-{self.capabilities.name}-dial"
            arguments = (peer, scope, lines)
            threading.Thread(target=self._dial, args=arguments, name=name).start()
        return lines

    def _is_free(self, link: Link) -> bool:
        return self._backend.has_tags or link.leased_until is None

    def _pick(self, lines: _Lines, deadline: Deadline) -> Link | None:
        """A link that may carry one more transfer. Called with the lock held."""
        for link in lines.links:
            if self._is_free(link):
                link.leased_until = deadline
                return link
            if link.leased_until is not None and link.leased_until.has_passed():
                # Its transfer never began: the other end may wait in it, so it cannot be reused.
                self._close_soon([link], "a transfer that was agreed on never began")
        return None

    def _release(self, link: Link) -> None:
        with self._changed:
            link.leased_until = None
            self._changed.notify_all()

    def _dial(self, peer: Peer, scope: str, lines: _Lines) -> None:
        """Runs on: consumer, a thread of its own."""
        link, failure, cause = None, "", None
        try:
            with self._dialing:
                link = self._open(peer, scope)
        except Exception as error:  # stored for those who wait for the link
            failure, cause = f"no {self.capabilities.name} connection: {error}", error
            logger.debug("RDT could not connect", exc_info=True)
        with self._changed:
            lines.dials -= 1
            is_wanted = self._lines.get((scope, peer.agent_id)) is lines
            if link is not None and is_wanted:
                lines.links.append(link)
            elif failure:
                lines.failure, lines.cause = failure, cause
                lines.failed_until = Deadline.after(_FAILURE_KEPT_S)
            self._changed.notify_all()
        if link is not None and not is_wanted:
            link.close("it was given up while it was being made")

    def _open(self, peer: Peer, scope: str) -> Link:
        """Makes a link. Runs on: consumer."""
        link_id = uuid.uuid4().hex
        self._meet(link_id, (peer,), scope)
        request = {
            "transport": self.capabilities.name,
            "link": link_id,
            "scope": scope,
            "address": b64encode(self._session.address).decode(),
        }
        try:
            self._session.call(
                peer.address, "rdt.link.open", request, _OPEN_TIMEOUT_S, idempotent=False
            )
            return self._join(link_id, peer, scope, CONSUMER)
        except Exception as error:
            self._tell((peer,), "rdt.link.close", link_id, reason=str(error))
            raise
        finally:
            self._part(link_id)

    # Producer.

    def send(self, route: Route, buffers: Buffers, deadline: Deadline) -> None:
        """See ``TwoSided.send``."""
        self._find(route).send(route["tag"], buffers, deadline)

    def on_open(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Answers ``rdt.link.open``. Runs on: producer, an rdt-call thread.

        The link itself is made on a thread of its own, so that no request of another peer waits.
        """
        self.check_available()
        self._check_open(body["scope"])
        peer = Peer(b64decode(body["address"]), peer_id)
        self._meet(body["link"], (peer,), body["scope"])
        name = f"rdt-{self.capabilities.name}-dial"
        arguments = (peer, body["link"], body["scope"])
        threading.Thread(target=self._answer, args=arguments, name=name).start()
        return {}

    def _answer(self, peer: Peer, link_id: str, scope: str) -> None:
        """Runs on: producer, a thread of its own."""
        try:
            self._join(link_id, peer, scope, PRODUCER)
        except Exception as error:  # told to the consumer, whose thread waits for the link
            self._tell((peer,), "rdt.link.close", link_id, reason=str(error))
        finally:
            self._part(link_id)

    def on_set(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Answers ``rdt.link.set``. Runs on: either side, an rdt-call thread."""
        meeting = self._meeting(body["link"], peer_id)
        if meeting is not None:
            meeting.rendezvous.put(body["key"], b64decode(body["value"]))
        return {}

    def on_close(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Answers ``rdt.link.close``. Runs on: either side, an rdt-call thread."""
        reason = f"the other end closed the connection: {body['reason']}"
        meeting = self._meeting(body["link"], peer_id)
        if meeting is not None:
            meeting.rendezvous.fail(reason)
        with self._changed:
            link = self._links.get(body["link"])
        if link is not None and link.peer.agent_id == peer_id:
            link.close(reason, _CLOSE_GRACE_S)
        return {}

    # Both.

    def check_available(self) -> None:
        """Raises TransportUnavailable, with the reason, if this process cannot use the backend."""
        reason = self._backend.unavailable()
        if reason:
            raise TransportUnavailable(reason)

    def _join(self, link_id: str, peer: Peer, scope: str, rank: int) -> Link:
        timeout_s = 2 * settings().connect_timeout_s
        group, store = self.make_group(link_id, rank, 2, timeout_s, False)
        link = Link(link_id, peer, scope, rank, self._backend, group, store, self._on_link_closed)
        # Known before it is proven: either end may close it meanwhile, and the consumer uses it at
        # once when the proof has come.
        with self._changed:
            self._links[link_id] = link
        try:
            link.prove(timeout_s)
            self._check_open(scope)  # its group may have been destroyed meanwhile
        except Exception as error:
            link.close(f"the connection could not be made: {error}")
            raise
        return link

    def make_group(
        self, name: str, rank: int, size: int, timeout_s: float, has_collectives: bool
    ) -> tuple[Any, Any]:
        """Joins a process group whose ranks meet under ``name``.

        Runs on: any thread but an rdt-call one; blocks until all ranks are there, without the GIL.

        Args:
            name: A link's id, a collective group's id, or the name of a pair of its members.
            rank: This process's rank.
            size: How many ranks there are.
            timeout_s: How long to wait for the other ranks.
            has_collectives: Whether it runs more than send and receive.

        Returns:
            The process group, and the store that has to live as long.

        Raises:
            TransportUnavailable: the other ranks did not come, or the group was destroyed.
        """
        with self._changed:
            meeting = self._meetings.get(name)
        if meeting is None:
            raise TransportUnavailable("the collective group was destroyed")
        store = as_store(meeting.rendezvous, timeout_s)
        return self._backend.make(store, rank, size, timeout_s, has_collectives), store

    def end_group(self, group: Any) -> None:
        """Ends what ``make_group`` made. Runs on: any thread."""
        self._backend.kill(group)

    def byte(self) -> torch.Tensor:
        """One byte of memory that the backend can carry."""
        return self._backend.empty(1)

    def _meet(self, name: str, peers: tuple[Peer, ...], scope: str, is_link: bool = True) -> None:
        """Begins to collect what the other ranks of a process group set."""

        def publish(key: str, value: bytes) -> None:
            text = b64encode(value).decode()
            self._tell(peers, "rdt.link.set", name, key=key, value=text)

        with self._changed:
            self._meetings[name] = _Meeting(Rendezvous(publish), peers, scope, is_link)

    def _part(self, name: str) -> None:
        """Ends what ``_meet`` began."""
        with self._changed:
            self._meetings.pop(name, None)
            self._changed.notify_all()

    def _meeting(self, name: str, peer_id: bytes) -> _Meeting | None:
        with self._changed:
            meeting = self._meetings.get(name)
        is_member = meeting is not None and any(p.agent_id == peer_id for p in meeting.peers)
        return meeting if is_member else None

    def _tell(self, peers: Iterable[Peer], op: str, link_id: str, **body: str) -> None:
        """Sends a request to peers and does not wait for their answers."""
        body |= {"transport": self.capabilities.name, "link": link_id}
        for peer in peers:
            try:
                self._session.send_oneway(peer.address, op, body)
            except Exception:  # the session is ending: nobody is left to tell
                logger.debug("RDT could not send %s", op, exc_info=True)

    def _find(self, route: Route) -> Link:
        with self._changed:
            link = self._links.get(route["link"])
        if link is None:
            raise LinkClosed("the connection was closed before the transfer began")
        return link

    def _check_open(self, scope: str) -> None:
        if self._is_closed:
            raise TransportUnavailable(f"{self.capabilities.name} was shut down")
        if scope and self._groups.get(scope) is None:
            raise TransportUnavailable("the collective group was destroyed")

    # Ends.

    def disconnect(self, scope: str, reason: str) -> None:
        """Closes the links of a collective group. Runs on: member, any thread; blocks briefly."""
        self._close([link for link in self._known() if link.scope == scope], reason)
        with self._changed:
            names = [name for name, m in self._meetings.items() if m.scope == scope]
            meetings = [self._meetings[name] for name in names]
            for name, meeting in zip(names, meetings):
                if not meeting.is_link:  # what makes a link takes its own away
                    del self._meetings[name]
            for key in [key for key in self._lines if key[0] == scope]:
                del self._lines[key]
            self._changed.notify_all()
        for meeting in meetings:
            meeting.rendezvous.fail(reason)

    def reset(self, peer_id: bytes) -> None:
        """See ``TwoSided.reset``."""
        self._forget(peer_id)
        self._close(self._with_peer(peer_id), "the connection was reset after a failure")

    def close(self) -> None:
        """See ``TwoSided.close``."""
        with self._changed:
            self._is_closed = True
            self._lines.clear()
            meetings = list(self._meetings.values())
            self._changed.notify_all()
        for meeting in meetings:
            meeting.rendezvous.fail("Ray was shut down")
        self._close(self._known(), "Ray was shut down")
        with self._changed:
            self._changed.wait_for(self._is_no_link_made, _CLOSE_WAIT_S)

    def _is_no_link_made(self) -> bool:
        """Whether no thread is in torch any more, where the end of Python would end it badly."""
        return not any(meeting.is_link for meeting in self._meetings.values())

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: the reaper thread, which must not wait."""
        self._forget(peer_id)
        links = self._with_peer(peer_id)
        if links:
            self._close_soon(links, "the connection to its agent broke")

    def _forget(self, peer_id: bytes) -> None:
        """Gives up links under construction; the next transfer tries anew."""
        with self._changed:
            for key in [key for key in self._lines if key[1] == peer_id]:
                del self._lines[key]
            meetings = list(self._meetings.values())
            self._changed.notify_all()
        for meeting in meetings:
            if any(peer.agent_id == peer_id for peer in meeting.peers):
                meeting.rendezvous.fail("the other process is gone or was reset")

    def _known(self) -> list[Link]:
        with self._changed:
            return list(self._links.values())

    def _with_peer(self, peer_id: bytes) -> list[Link]:
        return [link for link in self._known() if link.peer.agent_id == peer_id]

    def _close_soon(self, links: list[Link], reason: str) -> None:
        name = f"rdt-{self.capabilities.name}-close"
        arguments = (links, reason)
        threading.Thread(target=self._close, args=arguments, name=name).start()

    def _close(self, links: list[Link], reason: str) -> None:
        for link in links:
            link.close(reason, _CLOSE_GRACE_S)

    def _on_link_closed(self, link: Link, reason: str) -> None:
        """Forgets a link and tells the other end, whose transfers would wait for long otherwise."""
        with self._changed:
            self._links.pop(link.id, None)
            self._changed.notify_all()
        self._tell((link.peer,), "rdt.link.close", link.id, reason=reason)


def serve_links(session: Session, transport: Callable[[str], ProcessGroupTransport]) -> None:
    """Lets peers make links to this process, from the session's begin on.

    Args:
        session: Brings the requests.
        transport: Gives this process's transport by name, made at the first request.
    """

    def on_open(peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        return transport(body["transport"]).on_open(peer_id, body)

    def on_set(peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        return transport(body["transport"]).on_set(peer_id, body)

    def on_close(peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        return transport(body["transport"]).on_close(peer_id, body)

    session.serve("rdt.link.open", on_open)
    session.serve("rdt.link.set", on_set)
    session.serve("rdt.link.close", on_close)


def _has_passed(moment: Deadline | None) -> bool:
    return moment is None or moment.has_passed()
