"""The two-sided transports that move bytes through torch process groups: gloo and nccl.

They never use torch's default process group. Two processes connect at their first transfer, by one
link for each direction, which the consumer makes. Members of a collective group have links of that
group, which are made and closed with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.groups.membership import Group, Membership, membership
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.transports import base
from ray.experimental.rdt.transports.process_group.connector import Connector
from ray.experimental.rdt.transports.process_group.link import Backend, Link, LinkClosed
from ray.experimental.rdt.transports.process_group.peer_links import CLOSE_GRACE_S

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.rpc.session import Session

_CLOSE_WAIT_S = 2.0  # for links under construction when Ray is shut down


class ProcessGroupTransport:
    """A ``TwoSided`` transport over process groups of one backend.

    Attributes:
        connector: Makes its links; answers the requests of peers for them.
    """

    def __init__(self, backend: Backend, session: Session, groups: Membership | None = None):
        self.capabilities = backend.capabilities
        self._backend = backend
        self._groups = groups if groups is not None else membership()
        self._is_closed = False
        self.connector = Connector(backend, session, self._check_open)
        self._links = self.connector.links
        self._pending = self.connector.pending
        session.on_peer_lost(self._on_peer_lost)

    def check_available(self) -> None:
        self._backend.check_available()

    # Transfers.

    def route(self, peer: base.Peer, deadline: Deadline) -> base.Route:
        self.check_available()
        group = self._groups.find_common(self.capabilities.name, peer.agent_id)
        link = self._links.acquire(peer, group.id if group is not None else "", deadline)
        return {"link": link.id, "tag": link.next_tag()}

    def send(self, route: base.Route, buffers: base.Buffers, deadline: Deadline) -> None:
        self._find(route).send(route["tag"], buffers, deadline)

    def receive(
        self, route: base.Route, buffers: base.Buffers, deadline: Deadline, after: base.Events = ()
    ) -> None:
        link = self._find(route)
        try:
            link.receive(route["tag"], buffers, deadline, after)
        finally:
            self._links.release(link)

    def abandon(self, route: base.Route, may_send: bool) -> None:
        link = self._links.find(route["link"])
        if link is None:
            return
        if may_send:
            link.close("the consumer gave a transfer up before it received", CLOSE_GRACE_S)
        else:
            self._links.release(link)

    def _find(self, route: base.Route) -> Link:
        link = self._links.find(route["link"])
        if link is None:
            raise LinkClosed("the connection was closed before the transfer began")
        return link

    # Collective groups.

    def join(self, group: Group) -> None:
        """Begin to collect the keys that members set for the operations of a group.

        Runs on: member, any thread, before ``connect`` is called at any member.
        """
        peers = {m.agent_id: base.Peer(m.address, m.agent_id) for m in group.others}
        self._pending.begin(group.id, tuple(peers.values()), group.id, is_link=False)
        for rank, member in enumerate(group.members):
            if rank != group.rank:
                pair = (peers[member.agent_id],)
                self._pending.begin(group.pair_name(rank), pair, group.id, is_link=False)

    def connect(self, group: Group, deadline: Deadline) -> None:
        """Make the links of a group from all its other members to this process.

        Runs on: member, any thread; blocks.

        Raises:
            TransportUnavailable: A member cannot be reached; names its actor.
        """
        self.check_available()
        peers = [(m, base.Peer(m.address, m.agent_id)) for m in group.others]
        self._links.start_connecting([peer for _, peer in peers], group.id)
        for member, peer in peers:
            try:
                self._links.release(self._links.acquire(peer, group.id, deadline))
            except base.TransportUnavailable as error:
                raise base.TransportUnavailable(f"actor {member.actor_id}: {error}") from error

    def disconnect(self, scope: str, reason: str) -> None:
        """Close the links of a collective group. Runs on: member, any thread; blocks briefly."""
        self._links.close_scope(scope, reason)
        self._pending.fail_scope(scope, reason)

    def end_group(self, group: Any) -> None:
        """End a process group of ``Connector.make_group``. Runs on: any thread."""
        self._backend.kill(group)

    def byte(self) -> torch.Tensor:
        """Return one byte of memory that the backend can carry."""
        return self._backend.empty(1)

    # Ends.

    def close(self) -> None:
        self._is_closed = True
        self._pending.fail("Ray was shut down")
        self._links.close_all("Ray was shut down")
        self._pending.wait_until_none_connects(_CLOSE_WAIT_S)

    def _check_open(self, scope: str) -> None:
        if self._is_closed:
            raise base.TransportUnavailable(f"{self.capabilities.name} was shut down")
        if scope and self._groups.get(scope) is None:
            raise base.TransportUnavailable("the collective group was destroyed")

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: the reaper thread, which must not wait."""
        self._links.close_peer(peer_id, "the connection to its agent broke")
        self._pending.fail("the other process is gone", lambda group: group.has_peer(peer_id))


def serve_links(session: Session, transport: Callable[[str], ProcessGroupTransport]) -> None:
    """Let peers make links to this process. The first request makes the transport that it names."""

    def serve(op: str, answer: Callable[[Connector, bytes, Any], dict[str, Any]]) -> None:
        def on_request(peer_id: bytes, body: Any) -> dict[str, Any]:
            return answer(transport(body["transport"]).connector, peer_id, body)

        session.serve(op, on_request)

    serve(protocol.LINK_OPEN, Connector.on_open)
    serve(protocol.LINK_SET, Connector.on_set)
    serve(protocol.LINK_CLOSE, Connector.on_close)
