"""Frees the objects of owners that died, and objects that have no owner.

Owners tell each producer's agent which objects they own (``Agent.own``). When the connection to an
owner breaks, the producer asks Ray's GCS. It keeps the objects until the GCS reports that the
owner's worker is dead. An owner that only lost its connection keeps its objects.

Runs on: producer, the ``rdt-call`` and reaper threads. Questions about unclaimed objects are
answered at each process that is asked.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.producer.streams import ProducedStreams
from ray.experimental.rdt.rpc import process_directory, protocol
from ray.experimental.rdt.rpc.session import Session, agent_id_of

logger = logging.getLogger("ray.rdt")

#: Time for the owner to claim an object.
_GRACE_S = 3.0

#: Time for a process to answer.
_ANSWER_S = 2.0

#: The most objects in one request.
_MAX_OBJECTS = 10_000


class OwnerMonitor:
    """Monitors the owners of this process's objects, and the callers of its streams."""

    def __init__(self, session: Session, streams: ProducedStreams):
        self._session = session
        self._streams = streams
        self._lock = threading.Lock()
        self._disconnected: set[bytes] = set()
        session.on_peer_lost(self._on_peer_lost)
        session.on_tick(self._on_tick)

    def _on_peer_lost(self, agent_id: bytes) -> None:
        if self._is_needed_by(agent_id):
            with self._lock:
                self._disconnected.add(agent_id)
            self._session.run_in_background(self._check, agent_id)

    def _on_tick(self) -> None:
        for agent_id in list(self._disconnected):
            self._session.run_in_background(self._check, agent_id)

    def _check(self, agent_id: bytes) -> None:
        """Runs on: an rdt-call thread."""
        if self._is_needed_by(agent_id) and process_directory.is_worker_alive(agent_id):
            return
        with self._lock:
            if agent_id not in self._disconnected:
                return
            self._disconnected.discard(agent_id)
        self._streams.close_of(agent_id)
        count = self._session.agent.release_owned(agent_id)
        if count:
            logger.info(
                "RDT freed %d objects of agent %s: its worker died", count, agent_id.hex()[:8]
            )

    def _is_needed_by(self, agent_id: bytes) -> bool:
        return bool(self._session.agent.owned(agent_id)) or self._streams.has_caller(agent_id)


class UnclaimedObject(NamedTuple):
    """An object without an owner so far: its id in hex, its key, and when its grace began."""

    object_id: str
    key: bytes
    since: float


class OrphanCollector:
    """Frees the objects of this process that no owner claims.

    An owner claims an object as soon as the task's reply arrives (``Agent.own``). Nobody claims the
    object if the owner died before that, or if the reply was lost and the task ran again. The
    producer therefore asks every process of the cluster that uses RDT about an unclaimed object. It
    frees the object when all processes deny it. A process that does not answer keeps the object as
    long as Ray counts its worker as alive.

    Args:
        may_own: Tells whether this process owns, or may still come to own, the object of this id
            and key.
    """

    def __init__(
        self,
        session: Session,
        is_stored: Callable[[bytes], bool],
        may_own: Callable[[str, bytes], bool],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._session = session
        self._is_stored = is_stored
        self._may_own = may_own
        self._clock = clock
        # In the order of ``since``.
        self._unclaimed: deque[UnclaimedObject] = deque()
        self._asking = threading.Lock()
        session.serve(protocol.MAY_OWN, self._on_may_own)
        session.on_tick(self._on_tick)

    def add(self, object_id: str, key: bytes) -> None:
        """Add an object that was made for another process. Runs on: the thread of the task."""
        self._unclaimed.append(UnclaimedObject(object_id, key, self._clock()))

    def _on_tick(self) -> None:
        """Runs on: the reaper thread."""
        if self._unclaimed and self._unclaimed[0].since + _GRACE_S < self._clock():
            self._session.run_in_background(self._collect)

    def _collect(self) -> None:
        """Runs on: an rdt-call thread; one at a time."""
        if not self._asking.acquire(blocking=False):
            return
        overdue: list[UnclaimedObject] = []
        try:
            overdue = self._take_overdue()
            orphans = self._orphans_among(overdue)
        except BaseException:  # the processes could not be asked: try again
            self._keep(overdue)
            raise
        finally:
            self._asking.release()
        count = self._session.agent.release_unowned([each.key for each in orphans])
        if count:
            logger.info("RDT freed %d objects that no process owns", count)

    def _take_overdue(self) -> list[UnclaimedObject]:
        """Remove and return the stored objects that were not claimed in time."""
        latest = self._clock() - _GRACE_S
        overdue: list[UnclaimedObject] = []
        while self._unclaimed and self._unclaimed[0].since < latest and len(overdue) < _MAX_OBJECTS:
            each = self._unclaimed.popleft()
            if self._is_stored(each.key):
                overdue.append(each)
        unowned = set(self._session.agent.unowned([each.key for each in overdue]))
        return [each for each in overdue if each.key in unowned]

    def _orphans_among(self, objects: list[UnclaimedObject]) -> list[UnclaimedObject]:
        """Return the objects that all processes deny; keep the others."""
        if not objects:
            return []
        body = {"objects": [[each.object_id, each.key] for each in objects]}
        wanted: set[bytes] = set()
        agents = process_directory.known_agents()
        for address, answer in process_directory.ask_all(
            self._session, agents, protocol.MAY_OWN, body, _ANSWER_S
        ):
            wanted.update(_wanted(address, answer, objects))
        self._keep(each for each in objects if each.key in wanted)
        return [each for each in objects if each.key not in wanted]

    def _keep(self, objects: Iterable[UnclaimedObject]) -> None:
        """Grant another grace period."""
        now = self._clock()
        self._unclaimed.extend(each._replace(since=now) for each in objects)

    def _on_may_own(self, peer_id: bytes, body: protocol.MayOwn) -> dict[str, Any]:
        """Runs on: an rdt-call thread of the process that is asked."""
        objects = body["objects"]
        return {"keys": [key for name, key in objects if self._may_own(name, key)]}


def _wanted(
    address: bytes, answer: dict[str, Any] | Exception, objects: Iterable[UnclaimedObject]
) -> Iterable[bytes]:
    """Return the keys of the objects that a process may own, from its answer."""
    if not isinstance(answer, Exception):
        keys: list[bytes] = answer["keys"]
        return keys
    agent_id = agent_id_of(address)
    if process_directory.is_worker_alive(agent_id):
        logger.debug("RDT keeps objects that agent %s may own: %s", agent_id.hex(), answer)
        return [each.key for each in objects]
    process_directory.forget_worker(agent_id)
    return []
