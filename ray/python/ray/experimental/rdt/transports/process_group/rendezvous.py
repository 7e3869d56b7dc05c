"""Rendezvous of the ranks of a process group under construction.

Torch needs a key-value store for this. Each rank keeps a copy of the keys, and the agents carry
each new key to the other ranks. So no port is opened and no name is looked up (torch's TCPStore
looks up the names of its clients), and a rank that fails reports this to the others at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import Peer, TransportUnavailable


@dataclass(eq=False)
class Rendezvous:
    """One rank's copy of the keys of a process group under construction. Thread-safe.

    Attributes:
        publish: Sends a key and its value to the other ranks; must not block.
        peers: The other processes that take part.
        scope: The ID of the collective group that it belongs to, "" for none.
        is_link: Whether it becomes a link. The others run the operations of a collective group.
    """

    publish: Callable[[str, bytes], None]
    peers: tuple[Peer, ...]
    scope: str
    is_link: bool
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _values: dict[str, bytes] = field(default_factory=dict)
    _failure: str = ""

    def has_peer(self, peer_id: bytes) -> bool:
        """Tell whether a process takes part."""
        return any(peer.agent_id == peer_id for peer in self.peers)

    def set(self, key: str, value: bytes) -> None:
        """Store a key in all ranks."""
        self.put(key, value)
        self.publish(key, value)

    def put(self, key: str, value: bytes) -> None:
        """Store a key that another rank has set."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def has(self, keys: list[str]) -> bool:
        """Tell whether all these keys are set."""
        with self._changed:
            return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout_s: float) -> list[bytes]:
        """Return the values of these keys once all are set.

        Raises TransportUnavailable if a rank failed, or the time has passed.
        """
        deadline = Deadline.after(timeout_s)
        with self._changed:
            while not self.has(keys):
                if self._failure:
                    raise TransportUnavailable(self._failure)
                if deadline.has_passed():
                    raise TransportUnavailable("the other processes did not join in time")
                self._changed.wait(deadline.left_s())
            return [self._values[key] for key in keys]

    def fail(self, reason: str) -> None:
        """End all waits with an error."""
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()


def as_store(rendezvous: Rendezvous, timeout_s: float) -> Any:
    """Return a ``torch.distributed.Store`` over a rendezvous.

    Torch calls it from its own threads, with the GIL.
    """
    import torch.distributed

    store: Any = torch.distributed.Store  # type: ignore[attr-defined]

    class AgentStore(store):
        def set(self, key: str, value: bytes) -> None:
            rendezvous.set(key, value)

        def get(self, key: str) -> bytes:
            return rendezvous.wait([key], timeout_s)[0]

        def check(self, keys: list[str]) -> bool:
            return rendezvous.has(keys)

        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            rendezvous.wait(keys, timeout.total_seconds() if timeout else timeout_s)

        def has_extended_api(self) -> bool:
            return False

    return AgentStore()


class PendingGroups:
    """The process groups under construction in this process, by name. Thread-safe.

    ``publish`` sends a key to the peers of a group: peers, name, key and value. Must not block.
    """

    def __init__(self, publish: Callable[[tuple[Peer, ...], str, str, bytes], None]):
        self._publish = publish
        self._changed = threading.Condition()
        self._groups: dict[str, Rendezvous] = {}

    def begin(
        self, name: str, peers: tuple[Peer, ...], scope: str = "", is_link: bool = True
    ) -> None:
        """Begin to collect the keys that the other ranks set."""
        publish = partial(self._publish, peers, name)
        with self._changed:
            self._groups[name] = Rendezvous(publish, peers, scope, is_link)

    def end(self, name: str) -> None:
        """Drop a group that is complete or has failed."""
        with self._changed:
            self._groups.pop(name, None)
            self._changed.notify_all()

    def store(self, name: str, timeout_s: float) -> Any:
        """Return the torch store of a group. Raises TransportUnavailable if there is none."""
        with self._changed:
            group = self._groups.get(name)
        if group is None:
            raise TransportUnavailable("the collective group was destroyed")
        return as_store(group, timeout_s)

    def find(self, name: str, peer_id: bytes) -> Rendezvous | None:
        """Return the rendezvous of a group that a peer takes part in."""
        with self._changed:
            group = self._groups.get(name)
        return group if group is not None and group.has_peer(peer_id) else None

    def fail(
        self, reason: str, is_meant: Callable[[Rendezvous], bool] = lambda group: True
    ) -> None:
        """Fail all groups, or those that are meant."""
        with self._changed:
            failed = [group for group in self._groups.values() if is_meant(group)]
        for group in failed:
            group.fail(reason)

    def fail_scope(self, scope: str, reason: str) -> None:
        """Fail the groups of a collective group that is destroyed, and drop them."""
        self.fail(reason, lambda group: group.scope == scope)
        with self._changed:  # the thread that makes a link ends its own entry
            groups = self._groups.items()
            self._groups = {name: g for name, g in groups if g.scope != scope or g.is_link}

    def wait_until_none_connects(self, timeout_s: float) -> None:
        """Wait until no thread makes a link: Python must not end while one is in torch."""
        with self._changed:
            self._changed.wait_for(
                lambda: not any(group.is_link for group in self._groups.values()), timeout_s
            )
