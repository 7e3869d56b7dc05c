"""The links of one process: connecting, leasing and closing them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import Peer, TransportUnavailable
from ray.experimental.rdt.transports.process_group.link import Backend, Link

logger = logging.getLogger("ray.rdt")

#: How long a transfer in progress may go on when its link is closed.
CLOSE_GRACE_S = 0.2

_FAILURE_KEPT_S = 10.0  # the next attempt to reach an unreachable peer comes after this
_MAX_LINKS = 4  # from one peer, where a link carries one transfer at a time
_MAX_CONNECTING = 16  # links under construction at once
_SLICE_S = 0.2


@dataclass
class _PeerLinks:
    """The links from one producer in one scope. Guarded by the lock of ``Links``.

    Attributes:
        links: Those that transfers may use.
        connecting: How many are under construction.
        failed_until: No attempt to connect is made before this.
        failure: The error of the last attempt.
    """

    links: list[Link] = field(default_factory=list)
    connecting: int = 0
    failed_until: Deadline = field(default_factory=lambda: Deadline(0))
    failure: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Return whether an attempt to connect failed a moment ago."""
        return not self.failed_until.has_passed()


class Links:
    """The links of one process over one backend. Thread-safe.

    Args:
        connect: Makes a link from a peer in a scope; blocks.
        check_open: Raises TransportUnavailable if no link may be made in a scope.
    """

    def __init__(
        self,
        backend: Backend,
        connect: Callable[[Peer, str], Link],
        check_open: Callable[[str], None],
    ):
        self._name = backend.capabilities.name
        self._has_tags = backend.has_tags
        self._connect = connect
        self._check_open = check_open
        self._changed = threading.Condition()
        self._by_peer: dict[tuple[str, bytes], _PeerLinks] = {}
        self._by_id: dict[str, Link] = {}
        self._slots = threading.Semaphore(_MAX_CONNECTING)

    # Leases.

    def acquire(self, peer: Peer, scope: str, deadline: Deadline) -> Link:
        """Lease a link from a peer for one transfer; connect if there is none.

        Runs on: consumer, any thread; blocks. Threads that ask at once share one connection. Raises
        TransportUnavailable if the peer cannot be reached in time.
        """
        with self._changed:
            while True:
                self._check_open(scope)
                of_peer = self._connect_if_needed(peer, scope)
                link = self._lease(of_peer, deadline)
                if link is not None:
                    return link
                if of_peer.has_failed:
                    reason = f"no {self._name} connection: {of_peer.failure}"
                    raise TransportUnavailable(reason) from of_peer.failure
                if deadline.has_passed():
                    raise TransportUnavailable("the connection was not made in time")
                self._changed.wait(min(_SLICE_S, deadline.left_s()))
                raise_if_cancelled()

    def release(self, link: Link) -> None:
        """End the lease of a link."""
        with self._changed:
            link.leased_until = None
            self._changed.notify_all()

    def start_connecting(self, peers: Iterable[Peer], scope: str) -> None:
        """Begin to connect to peers that have no free link. Does not block."""
        with self._changed:
            for peer in peers:
                self._connect_if_needed(peer, scope)

    def _connect_if_needed(self, peer: Peer, scope: str) -> _PeerLinks:
        """Start a thread that connects, if no link is free. The lock is held."""
        of_peer = self._by_peer.setdefault((scope, peer.agent_id), _PeerLinks())
        of_peer.links = [link for link in of_peer.links if not link.is_closed]
        limit = 1 if self._has_tags else _MAX_LINKS
        is_free = any(self._is_free(link) for link in of_peer.links)
        is_full = of_peer.connecting or len(of_peer.links) >= limit
        if not is_free and not is_full and not of_peer.has_failed:
            of_peer.connecting += 1
            arguments = (peer, scope, of_peer)
            name = f"rdt-{self._name}-connect"
            threading.Thread(target=self._run_connect, args=arguments, name=name).start()
        return of_peer

    def _is_free(self, link: Link) -> bool:
        return self._has_tags or link.leased_until is None

    def _lease(self, of_peer: _PeerLinks, deadline: Deadline) -> Link | None:
        """Lease a link that can carry one more transfer. The lock is held."""
        for link in of_peer.links:
            if self._is_free(link):
                link.leased_until = deadline
                return link
            if link.leased_until is not None and link.leased_until.has_passed():
                # Its transfer never began, and the other end may wait in it: it cannot be reused.
                self._close_soon([link], "a transfer that was agreed on never began")
        return None

    def _run_connect(self, peer: Peer, scope: str, of_peer: _PeerLinks) -> None:
        """Runs on: consumer, a thread of its own."""
        link, failure = None, None
        try:
            with self._slots:
                link = self._connect(peer, scope)
        except Exception as error:  # stored for the threads that wait for the link
            failure = error
            logger.debug("RDT could not connect", exc_info=True)
        with self._changed:
            of_peer.connecting -= 1
            is_wanted = self._by_peer.get((scope, peer.agent_id)) is of_peer
            if link is not None and is_wanted:
                of_peer.links.append(link)
            elif failure is not None:
                of_peer.failure = failure
                of_peer.failed_until = Deadline.after(_FAILURE_KEPT_S)
            self._changed.notify_all()
        if link is not None and not is_wanted:
            link.close("it was no longer needed when it was complete")

    # Links by ID, at both ends.

    def find(self, link_id: str) -> Link | None:
        """Return an open link."""
        with self._changed:
            return self._by_id.get(link_id)

    def add(self, link: Link) -> None:
        """Make a link known to ``find``."""
        with self._changed:
            self._by_id[link.id] = link

    def discard(self, link: Link) -> None:
        """Drop a link that is closed."""
        with self._changed:
            self._by_id.pop(link.id, None)
            self._changed.notify_all()

    # Ends.

    def close_scope(self, scope: str, reason: str) -> None:
        """Close the links of a collective group. Blocks briefly."""
        _close(self._drop(lambda key: key[0] == scope), reason)

    def close_peer(self, peer_id: bytes, reason: str) -> None:
        """Close the links with a lost peer. Does not block."""
        links = self._drop(lambda key: key[1] == peer_id)
        if links:
            self._close_soon(links, reason)

    def close_all(self, reason: str) -> None:
        """Close all links. Blocks briefly."""
        _close(self._drop(lambda key: True), reason)

    def _drop(self, is_over: Callable[[tuple[str, bytes]], bool]) -> list[Link]:
        """Drop links under construction and failures; return the open links to close."""
        with self._changed:
            for key in [key for key in self._by_peer if is_over(key)]:
                del self._by_peer[key]
            self._changed.notify_all()
            links = list(self._by_id.values())
        return [link for link in links if is_over((link.scope, link.peer.agent_id))]

    def _close_soon(self, links: list[Link], reason: str) -> None:
        name = f"rdt-{self._name}-close"
        threading.Thread(target=_close, args=(links, reason), name=name).start()


def _close(links: Iterable[Link], reason: str) -> None:
    for link in links:
        link.close(reason, CLOSE_GRACE_S)
