"""Connecting two processes by a link, at both ends.

Requests of ``rpc/protocol.py``:

* ``LINK_OPEN``: the producer joins a new link.
* ``LINK_SET``: a rank has set a key of the rendezvous.
* ``LINK_CLOSE``: the other end has closed a link, or dropped one under construction.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.base import Peer
from ray.experimental.rdt.transports.process_group.link import CONSUMER, PRODUCER, Backend, Link
from ray.experimental.rdt.transports.process_group.peer_links import CLOSE_GRACE_S, Links
from ray.experimental.rdt.transports.process_group.rendezvous import PendingGroups

logger = logging.getLogger("ray.rdt")

_OPEN_TIMEOUT_S = 30.0  # the producer may have to import torch first


class Connector:
    """Factory of the links and process groups of one process over one backend. Thread-safe.

    ``check_open`` raises TransportUnavailable if no link may be made in a scope.
    """

    def __init__(self, backend: Backend, session: Session, check_open: Callable[[str], None]):
        self._backend = backend
        self._session = session
        self._check_open = check_open
        self.links = Links(backend, self._connect, check_open)
        self.pending = PendingGroups(self._publish)

    def make_group(
        self, name: str, rank: int, size: int, timeout_s: float, has_collectives: bool
    ) -> tuple[Any, Any]:
        """Join a process group. See ``Backend.make``.

        Runs on: any thread but an rdt-call one; blocks until all ranks have joined.

        Args:
            name: The ID of a collective group, or the name of a pair of its members.

        Returns:
            The process group, and the store that has to live as long.

        Raises:
            TransportUnavailable: The other ranks did not join, or the group was destroyed.
        """
        store = self.pending.store(name, timeout_s)
        return self._backend.make(store, rank, size, timeout_s, has_collectives), store

    def _connect(self, peer: Peer, scope: str) -> Link:
        """Make a link. Runs on: consumer, a thread of its own."""
        link_id = uuid.uuid4().hex
        self.pending.begin(link_id, (peer,), scope)
        request = protocol.LinkOpen(
            transport=self._backend.capabilities.name,
            link=link_id,
            scope=scope,
            address=self._session.address,
        )
        try:
            self._session.call(
                peer.address, protocol.LINK_OPEN, request, _OPEN_TIMEOUT_S, idempotent=False
            )
            return self._join(link_id, peer, scope, CONSUMER)
        except Exception as error:  # whatever failed, the producer waits for the link
            self._send((peer,), protocol.LINK_CLOSE, link_id, reason=str(error))
            raise
        finally:
            self.pending.end(link_id)

    def on_open(self, peer_id: bytes, body: protocol.LinkOpen) -> dict[str, Any]:
        """Answer ``LINK_OPEN``. Runs on: producer, an rdt-call thread.

        A thread of its own makes the link, so that requests of other peers need not wait.
        """
        self._backend.check_available()
        self._check_open(body["scope"])
        peer = Peer(body["address"], peer_id)
        self.pending.begin(body["link"], (peer,), body["scope"])
        name = f"rdt-{self._backend.capabilities.name}-connect"
        arguments = (peer, body["link"], body["scope"])
        threading.Thread(target=self._accept, args=arguments, name=name).start()
        return {}

    def _accept(self, peer: Peer, link_id: str, scope: str) -> None:
        """Runs on: producer, a thread of its own."""
        try:
            self._join(link_id, peer, scope, PRODUCER)
        except Exception as error:  # reported to the consumer, whose thread waits for the link
            self._send((peer,), protocol.LINK_CLOSE, link_id, reason=str(error))
        finally:
            self.pending.end(link_id)

    def on_set(self, peer_id: bytes, body: protocol.LinkSet) -> dict[str, Any]:
        """Answer ``LINK_SET``. Runs on: either side, an rdt-call thread."""
        group = self.pending.find(body["link"], peer_id)
        if group is not None:
            group.put(body["key"], body["value"])
        return {}

    def on_close(self, peer_id: bytes, body: protocol.LinkClose) -> dict[str, Any]:
        """Answer ``LINK_CLOSE``. Runs on: either side, an rdt-call thread."""
        reason = f"the other end closed the connection: {body['reason']}"
        group = self.pending.find(body["link"], peer_id)
        if group is not None:
            group.fail(reason)
        link = self.links.find(body["link"])
        if link is not None and link.peer.agent_id == peer_id:
            link.close(reason, CLOSE_GRACE_S)
        return {}

    def _join(self, link_id: str, peer: Peer, scope: str, rank: int) -> Link:
        timeout_s = 2 * settings().connect_timeout_s
        group, store = self.make_group(link_id, rank, 2, timeout_s, False)
        link = Link(link_id, peer, scope, rank, self._backend, group, store, self._on_closed)
        # Known before it is proven: either end may close it meanwhile, and the consumer uses it at
        # once when the proof has come.
        self.links.add(link)
        try:
            link.handshake(timeout_s)
            self._check_open(scope)  # its group may have been destroyed meanwhile
        except Exception as error:  # a link that is not proven must not stay open
            link.close(f"the connection could not be made: {error}")
            raise
        return link

    def _on_closed(self, link: Link, reason: str) -> None:
        """Drop a link and tell the other end, whose transfers would wait for long otherwise."""
        self.links.discard(link)
        self._send((link.peer,), protocol.LINK_CLOSE, link.id, reason=reason)

    def _publish(self, peers: Iterable[Peer], name: str, key: str, value: bytes) -> None:
        self._send(peers, protocol.LINK_SET, name, key=key, value=value)

    def _send(self, peers: Iterable[Peer], op: str, link_id: str, **body: str | bytes) -> None:
        """Send a request to peers without waiting for their answers."""
        body |= {"transport": self._backend.capabilities.name, "link": link_id}
        for peer in peers:
            try:
                self._session.send_oneway(peer.address, op, body)
            except Exception:  # the session is ending: the peer sees that by itself
                logger.debug("RDT could not send %s", op, exc_info=True)
