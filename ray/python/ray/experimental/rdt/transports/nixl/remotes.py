"""The agents of other processes that this process's nixl agent knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import Route, TransportUnavailable
from ray.experimental.rdt.transports.nixl.engine import NixlEngine, NixlError

#: nixl cannot forget single exposures of a peer. After this many, the peer is attached again.
_MAX_EXPOSURES = 4096

#: Peers known at once. The least recently read one is forgotten first.
_MAX_PEERS = 1024


@dataclass
class _Remote:
    """The state of one peer's agent.

    Attributes:
        version: The newest known version of its GPU registrations.
        exposures: Its exposures that our agent knows.
        readers: Reads from it in progress.
        is_broken: Whether the connection broke: no new read uses it.
    """

    version: int
    exposures: set[int] = field(default_factory=set)
    readers: int = 0
    is_broken: bool = False


class Remotes:
    """The agents that ``engine``, our agent, knows. None is forgotten during reads. Thread-safe."""

    def __init__(self, engine: NixlEngine):
        self._engine = engine
        self._changed = threading.Condition()
        self._known: dict[str, _Remote] = {}  # least recently used first

    @contextlib.contextmanager
    def reading(self, exposed: Route, deadline: Deadline) -> Iterator[None]:
        """Make memory that a producer exposed known to our agent while the context lasts.

        After a NixlError in the context, the next read attaches the peer again.

        Raises:
            TransportUnavailable: Our agent cannot reach the memory.
            TimeoutError: The peer has to be forgotten first, and reads from it did not end in time.
        """
        remote = self._enter(exposed, deadline)
        try:
            yield
        except NixlError:
            remote.is_broken = True
            raise
        finally:
            with self._changed:
                remote.readers -= 1
                self._changed.notify_all()

    def _enter(self, exposed: Route, deadline: Deadline) -> _Remote:
        with self._changed:
            while (remote := self._current(exposed)) is None:
                if not self._changed.wait(deadline.left_s()):
                    raise TimeoutError("other reads from this peer did not end in time")
            if exposed["number"] not in remote.exposures:
                self._learn(remote, exposed)
            remote.readers += 1
            return remote

    def _current(self, exposed: Route) -> _Remote | None:
        """Return the up-to-date peer; None if it has to be forgotten first and reads still run."""
        name, version = exposed["agent"], exposed["version"]
        remote = self._known.pop(name, None)
        if remote is None:
            self._make_room()
            remote = _Remote(version)
        is_stale = remote.is_broken or version > remote.version
        if not remote.readers and (is_stale or len(remote.exposures) >= _MAX_EXPOSURES):
            self._engine.detach(name)
            remote, is_stale = _Remote(max(version, remote.version)), False
        self._known[name] = remote
        return None if is_stale else remote

    def _learn(self, remote: _Remote, exposed: Route) -> None:
        try:
            for metadata in exposed["metadata"]:
                self._engine.attach(metadata)
            remote.exposures.add(exposed["number"])
        except NixlError as error:
            remote.is_broken = True
            raise TransportUnavailable(
                f"nixl cannot reach the producer's memory: {error}"
            ) from error

    def _make_room(self) -> None:
        idle = [name for name, remote in self._known.items() if not remote.readers]
        for name in idle[: max(0, len(self._known) + 1 - _MAX_PEERS)]:
            del self._known[name]
            self._engine.detach(name)
