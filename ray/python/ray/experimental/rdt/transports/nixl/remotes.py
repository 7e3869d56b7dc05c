"""The agents of other processes that this process's nixl agent knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import TransportUnavailable
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


@dataclass(frozen=True)
class Exposure:
    """A producer's description of exposed memory, besides its spans.

    Attributes:
        agent: The name of its nixl agent.
        number: The ID of the exposure at the producer.
        version: The version of its GPU registrations, 0 if it exposes none.
        metadata: nixl's own description, a blob for each kind of memory.
    """

    agent: str
    number: int
    version: int
    metadata: Sequence[bytes]


class Remotes:
    """The known agents. Thread-safe. An agent is not forgotten during reads from it.

    Args:
        engine: Our agent.
    """

    def __init__(self, engine: NixlEngine):
        self._engine = engine
        self._changed = threading.Condition()
        self._known: dict[str, _Remote] = {}  # least recently used first

    @contextlib.contextmanager
    def reading(self, exposure: Exposure, deadline: Deadline) -> Iterator[None]:
        """Make an exposure known to our agent while the context lasts.

        After a NixlError in the context, the next read attaches the peer again.

        Raises:
            TransportUnavailable: Our agent cannot reach the memory.
            TimeoutError: The peer has to be forgotten first, and reads from it did not end in time.
        """
        remote = self._enter(exposure, deadline)
        try:
            yield
        except NixlError:
            remote.is_broken = True
            raise
        finally:
            with self._changed:
                remote.readers -= 1
                self._changed.notify_all()

    def _enter(self, exposure: Exposure, deadline: Deadline) -> _Remote:
        with self._changed:
            while (remote := self._current(exposure)) is None:
                if not self._changed.wait(deadline.left_s()):
                    raise TimeoutError("other reads from this peer did not end in time")
            if exposure.number not in remote.exposures:
                self._learn(remote, exposure)
            remote.readers += 1
            return remote

    def _current(self, exposure: Exposure) -> _Remote | None:
        """Return the up-to-date peer; None if it has to be forgotten first and reads still run."""
        remote = self._known.pop(exposure.agent, None)
        if remote is None:
            self._make_room()
            remote = _Remote(exposure.version)
        elif remote.is_broken or exposure.version > remote.version:
            self._known[exposure.agent] = remote
            if remote.readers:
                return None
            self._forget(exposure.agent)
            remote = _Remote(exposure.version)
        elif len(remote.exposures) >= _MAX_EXPOSURES and not remote.readers:
            self._engine.detach(exposure.agent)
            remote = _Remote(remote.version)
        self._known[exposure.agent] = remote
        return remote

    def _learn(self, remote: _Remote, exposure: Exposure) -> None:
        try:
            for metadata in exposure.metadata:
                self._engine.attach(metadata)
            remote.exposures.add(exposure.number)
        except NixlError as error:
            remote.is_broken = True
            raise TransportUnavailable(
                f"nixl cannot reach the producer's memory: {error}"
            ) from error

    def _make_room(self) -> None:
        idle = [name for name, remote in self._known.items() if not remote.readers]
        for name in idle[: max(0, len(self._known) + 1 - _MAX_PEERS)]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        del self._known[name]
        self._engine.detach(name)
