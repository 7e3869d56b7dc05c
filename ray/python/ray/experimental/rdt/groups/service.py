"""Requests between processes that create and destroy a collective group.

Any process that knows the members' agents can create a group. Members answer on their ``rdt-call``
threads, so that a busy actor can leave a group. A handler never waits for another handler, so
groups that are created at the same time do not block each other. Each member registers its group
with RDT's backend for ``ray.experimental.collective.allreduce`` and the others.

The creator sends ``rdt.group.join`` to all members, then ``rdt.group.connect``. Each member
connects to all others on a thread of its own and then answers with ``rdt.group.report``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import raise_if_interrupt
from ray.experimental.rdt.groups import entered_groups, membership
from ray.experimental.rdt.groups.entered_groups import BACKEND
from ray.experimental.rdt.groups.membership import Group, Member, Membership
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.transports.process_group import transport as process_group

if TYPE_CHECKING:
    from ray.experimental.collective.communicator import CommunicatorHandle

    from ray.experimental.rdt.rpc.session import Handler, Session

logger = logging.getLogger("ray.rdt")

_LEAVE_TIMEOUT_S = 5.0
_REPORT_TIMEOUT_S = 10.0

#: Held while a group is registered for ``ray.util.collective`` or unregistered.
_register_lock = threading.Lock()

Answer = Callable[[float], dict[str, Any]]


class MemberFailed(Exception):
    """A member could not join or connect."""

    def __init__(self, rank: int, reason: str):
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason


@dataclass
class _Forming:
    """A group that this process is creating, and the reports of its members."""

    members: Sequence[Member]
    changed: threading.Condition = field(default_factory=threading.Condition)
    reports: dict[int, str] = field(default_factory=dict)

    def report(self, rank: int, error: str) -> None:
        with self.changed:
            self.reports.setdefault(rank, error)
            self.changed.notify_all()

    def wait(self, deadline: Deadline) -> None:
        """Wait until all members are connected.

        Raises:
            MemberFailed: A member failed, or has not reported by the deadline.
        """
        ranks = set(range(len(self.members)))
        with self.changed:
            self.changed.wait_for(
                lambda: any(self.reports.values()) or ranks == set(self.reports), deadline.left_s()
            )
            for rank, error in self.reports.items():
                if error:
                    raise MemberFailed(rank, error)
            missing = ranks - set(self.reports)
        if missing:
            raise MemberFailed(min(missing), "it was not connected in time")


class GroupService:
    """The group requests of one process, as a member and as a creator.

    Args:
        transport: Returns this process's transport by backend name.

    Attributes:
        handles: By id, the handles to the groups that this process created. They keep the actors
            alive.
    """

    def __init__(
        self,
        session: Session,
        transport: Callable[[str], process_group.ProcessGroupTransport],
        groups: Membership | None = None,
    ):
        self._session = session
        self._transport = transport
        self._groups = groups if groups is not None else membership.membership()
        self._lock = threading.Lock()
        self._forming: dict[str, _Forming] = {}
        self.handles: dict[str, CommunicatorHandle] = {}
        self._handlers: dict[str, Handler] = {
            protocol.GROUP_JOIN: self._on_join,
            protocol.GROUP_CONNECT: self._on_connect,
            protocol.GROUP_REPORT: self._on_report,
            protocol.GROUP_LEAVE: self._on_leave,
        }
        process_group.serve_links(session, transport)
        for op, handler in self._handlers.items():
            session.serve(op, handler)
        session.on_peer_lost(self._on_peer_lost)
        session.on_close(self._groups.clear)

    def introduce(self, backend: str) -> Member:
        """Return how other processes reach this actor, after a check of the backend.

        Raises:
            TransportUnavailable: This process cannot use the backend.
        """
        self._transport(backend).check_available()
        actor_id = (ray_core.actor_id() or b"").hex()
        return Member(self._session.agent.agent_id, self._session.address, actor_id)

    # Creator.

    def form(
        self, group_id: str, name: str, backend: str, members: Sequence[Member], deadline: Deadline
    ) -> None:
        """Create a group; return when every member is connected to every other.

        Runs on: creator, the user's thread; blocks until ``deadline`` at most.

        Raises:
            MemberFailed: A member failed. The others have left the group.
        """
        forming = _Forming(members)
        with self._lock:
            self._forming[group_id] = forming
        try:
            joins: list[dict[str, Any]] = [
                {"id": group_id, "name": name, "backend": backend, "rank": rank, "members": members}
                for rank in range(len(members))
            ]
            self._ask_all(members, protocol.GROUP_JOIN, joins, deadline)
            creator = self._session.address
            body = {"id": group_id, "timeout_s": deadline.left_s(), "creator": creator}
            self._ask_all(members, protocol.GROUP_CONNECT, [body] * len(members), deadline)
            forming.wait(deadline)
        except BaseException:  # also after an interrupt: the members must not stay in the group
            self.dissolve(group_id, members, f"collective group {name!r} could not be made")
            raise
        finally:
            with self._lock:
                del self._forming[group_id]

    def dissolve(self, group_id: str, members: Sequence[Member], reason: str) -> None:
        """Make all living members leave. Runs on: any process, any thread."""
        body = {"id": group_id, "reason": reason}
        answers = []
        for member in members:
            with suppress(Exception):  # of any kind: a member that is gone has left as well
                answers.append(self._ask(member, protocol.GROUP_LEAVE, body))
        deadline = Deadline.after(_LEAVE_TIMEOUT_S)
        for answer in answers:
            try:
                answer(deadline.left_s())
            except Exception as error:  # of any kind: the other members still have to leave
                raise_if_interrupt(error)
                logger.debug("RDT had no answer from a member that leaves", exc_info=True)

    def _ask_all(
        self, members: Sequence[Member], op: str, bodies: list[dict[str, Any]], deadline: Deadline
    ) -> None:
        answers: list[Answer] = []
        for rank, (member, body) in enumerate(zip(members, bodies)):
            try:
                answers.append(self._ask(member, op, body))
            except Exception as error:  # of any kind: the creator's error names the member
                raise_if_interrupt(error)
                raise MemberFailed(rank, str(error)) from error
        for rank, answer in enumerate(answers):
            try:
                answer(deadline.left_s())
            except Exception as error:  # of any kind, as above
                raise_if_interrupt(error)
                raise MemberFailed(rank, str(error)) from error

    def _ask(self, member: Member, op: str, body: dict[str, Any]) -> Answer:
        """Send a request; return a function that waits for the answer.

        A request of this process to itself runs here.
        """
        own_id = self._session.agent.agent_id
        if member.agent_id != own_id:
            return self._session.start_call(member.address, op, body, idempotent=False)
        answer = self._handlers[op](own_id, body)
        return lambda timeout_s: answer

    def _on_report(self, peer_id: bytes, body: protocol.GroupReport) -> dict[str, Any]:
        with self._lock:
            forming = self._forming.get(body["id"])
        if forming is not None and forming.members[body["rank"]].agent_id == peer_id:
            forming.report(body["rank"], body["error"])
        return {}

    def _on_peer_lost(self, peer_id: bytes) -> None:
        with self._lock:
            all_forming = list(self._forming.values())
        for forming in all_forming:
            for rank, member in enumerate(forming.members):
                if member.agent_id == peer_id:
                    forming.report(rank, "its process is gone")

    # Member. All run on rdt-call threads.

    def _on_join(self, peer_id: bytes, body: protocol.GroupJoin) -> dict[str, Any]:
        members = tuple(map(Member.of, body["members"]))
        group = Group(body["id"], body["name"], body["backend"], body["rank"], members)
        self._groups.add(group)
        transport = self._transport(group.backend)
        transport.check_available()
        transport.join(group)
        return {}

    def _on_connect(self, peer_id: bytes, body: protocol.GroupConnect) -> dict[str, Any]:
        group = self._groups.get(body["id"])
        if group is None:
            raise LookupError("the group was destroyed meanwhile")
        deadline = Deadline.after(float(body["timeout_s"]))
        args = (group, deadline, Member(peer_id, body["creator"], ""))
        threading.Thread(target=self._connect, args=args, name="rdt-group").start()
        return {}

    def _connect(self, group: Group, deadline: Deadline, creator: Member) -> None:
        """Runs on: member, a thread of its own."""
        error = ""
        try:
            transport = self._transport(group.backend)
            transport.connect(group, deadline)
            register_collectives(group, transport)
            if self._groups.get(group.id) is None:
                unregister_collectives(group)  # ``_on_leave`` may have run before
                raise LookupError("the group was destroyed meanwhile")
        except Exception as failure:  # of any kind: the creator gets its text
            error = str(failure)
        report = {"id": group.id, "rank": group.rank, "error": error}
        try:
            self._ask(creator, protocol.GROUP_REPORT, report)(_REPORT_TIMEOUT_S)
        except Exception:  # of any kind: the creator is gone. The group's record remains.
            logger.debug("RDT found no creator of group %r", group.name, exc_info=True)

    def _on_leave(self, peer_id: bytes, body: protocol.GroupLeave) -> dict[str, Any]:
        group = self._groups.remove(body["id"])
        if group is not None:
            # First disconnect: it ends a wait in a collective operation, which ``leave`` waits for.
            self._transport(group.backend).disconnect(group.id, body["reason"])
            unregister_collectives(group)
        return {}


def register_collectives(group: Group, transport: process_group.ProcessGroupTransport) -> None:
    """Register a group for ``ray.util.collective``. Runs on: member, any thread.

    Raises:
        RuntimeError: The actor has registered a group of that name itself.
    """
    ray_collective = _ray_collective()
    if ray_collective is None:
        return
    with _register_lock:
        entered_groups.by_name[group.name] = (group, transport)
        try:
            size = len(group.members)
            ray_collective.init_collective_group(size, group.rank, BACKEND, group.name)
        except BaseException:
            # The actor's own group: ``unregister_collectives`` must not destroy it.
            del entered_groups.by_name[group.name]
            raise


def unregister_collectives(group: Group) -> None:
    """Reverse ``register_collectives``, also for a group that was never registered.

    Runs on: any thread, after the transport was disconnected from the group. Before that, a
    collective operation that waits for another member would block this call.
    """
    with _register_lock:
        entered = entered_groups.by_name.get(group.name)
        if entered is None or entered[0] != group:
            return
        ray_collective = _ray_collective()
        if ray_collective.is_group_initialized(group.name):
            ray_collective.destroy_collective_group(group.name)
        del entered_groups.by_name[group.name]


@functools.cache
def _ray_collective() -> Any:
    """Return Ray's module with RDT's backend; None if a module that it needs is missing."""
    try:
        from ray.util.collective import collective
        from ray.util.collective.backend_registry import register_collective_backend

        from ray.experimental.rdt.groups.ray_group import RDTGroup
    except ImportError as error:
        logger.info("groups have no collective operations in this process: %s", error)
        return None
    register_collective_backend(BACKEND, RDTGroup)
    return collective
