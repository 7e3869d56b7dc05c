"""The collective groups of this process. Pure data: no I/O, no Ray, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray.experimental.rdt.common import real_threads as threading


class Member(NamedTuple):
    """One actor of a group, and the address of its process.

    Attributes:
        agent_id: The id of its process's agent; a restarted actor has another one.
    """

    agent_id: bytes
    address: bytes
    actor_id: str

    @classmethod
    def of(cls, fields: Sequence[Any]) -> Member:
        """Return the member that another process sent as a list. Raises ValueError."""
        if [type(field) for field in fields] != [bytes, bytes, str]:
            raise ValueError(f"a member of a group has three fields, not {fields!r}")
        return cls(*fields)


@dataclass(frozen=True)
class Group:
    """A group that this process is in.

    Attributes:
        id: A new one for each creation, also under the same name.
        rank: The index of this process in ``members``.
        members: All members in rank order, this process included.
    """

    id: str
    name: str
    backend: str
    rank: int
    members: tuple[Member, ...]

    @property
    def others(self) -> tuple[Member, ...]:
        """All members except this process."""
        return tuple(m for rank, m in enumerate(self.members) if rank != self.rank)

    def pair_name(self, rank: int) -> str:
        """Return a name for this process and another member. Both members get the same name."""
        return f"{self.id}/{min(rank, self.rank)}-{max(rank, self.rank)}"

    def has(self, agent_id: bytes) -> bool:
        """Tell whether another process of this group has this agent."""
        return any(m.agent_id == agent_id for m in self.others)


class GroupEnded(Exception):
    """The group was destroyed before this process could join it."""


class Membership:
    """The groups of one process, oldest first. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: dict[str, Group] = {}
        self._ended: set[str] = set()

    def add(self, group: Group) -> None:
        """Add a group.

        Raises:
            GroupEnded: ``remove`` was called before: a request to leave overtook this one.
            ValueError: This process is in another group of that name.
        """
        with self._lock:
            if group.id in self._ended:
                raise GroupEnded(f"collective group {group.name!r} was destroyed meanwhile")
            if any(g.name == group.name and g.id != group.id for g in self._groups.values()):
                raise ValueError(f"already in a collective group named {group.name!r}")
            self._groups[group.id] = group

    def remove(self, group_id: str) -> Group | None:
        """Remove a group for ever; return it if this process was in it."""
        with self._lock:
            self._ended.add(group_id)
            return self._groups.pop(group_id, None)

    def get(self, group_id: str) -> Group | None:
        with self._lock:
            return self._groups.get(group_id)

    def find_common(self, backend: str, agent_id: bytes) -> Group | None:
        """Return the oldest group of ``backend`` that this agent's process is in as well."""
        with self._lock:
            groups = (g for g in self._groups.values() if g.backend == backend)
            return next((g for g in groups if g.has(agent_id)), None)

    def all(self) -> list[Group]:
        with self._lock:
            return list(self._groups.values())

    def clear(self) -> None:
        """Remove all groups. Runs on: the thread that shuts Ray down."""
        with self._lock:
            self._groups.clear()
            self._ended.clear()


_membership = Membership()


def membership() -> Membership:
    return _membership
