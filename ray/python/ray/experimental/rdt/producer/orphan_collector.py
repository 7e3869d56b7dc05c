"""Frees objects that no owner will ever free.

An owner claims an object as soon as it hears of it (``Agent.own``). If it has died before that, or
the reply that told of the object was lost and the task ran again, nobody claims it. So a producer
asks every process of the cluster that uses RDT whether an unclaimed object is its own, and frees
the object once all have said no. A process that does not answer keeps it, while Ray counts its
worker as alive.

Runs on: producer, the rdt-call and reaper threads; the answer, at each process that is asked.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.producer.owner_monitor import (
    ask_all,
    forget_worker,
    is_worker_alive,
    known_agents,
)
from ray.experimental.rdt.rpc.session import Session, agent_id_of

logger = logging.getLogger("ray.rdt")

#: An object that is not claimed for so long is asked about.
_GRACE_S = 3.0

#: How long a process may take to answer.
_ANSWER_S = 2.0

#: The most objects that one request names.
_MOST = 10_000


class Unclaimed(NamedTuple):
    """An object without an owner so far: its id in hex, its key, and when it was stored."""

    object_id: str
    key: bytes
    since: float


class ClaimWatch:
    """The objects of this process that nobody has claimed yet.

    Args:
        session: Asks and answers.
        is_stored: Whether an object of this key is still here.
        may_own: Whether this process owns, or may yet come to own, the object of this id and key.
    """

    def __init__(
        self,
        session: Session,
        is_stored: Callable[[bytes], bool],
        may_own: Callable[[str, bytes], bool],
    ):
        self._session = session
        self._is_stored = is_stored
        self._may_own = may_own
        self._young: deque[Unclaimed] = deque()
        self._asking = threading.Lock()
        session.serve("rdt.claims", self._on_claims)
        session.on_tick(self._on_tick)

    def add(self, object_id: str, key: bytes) -> None:
        """Watches an object that was made for another process. Runs on: the thread of the task."""
        self._young.append(Unclaimed(object_id, key, time.monotonic()))

    def _on_tick(self) -> None:
        """Runs on: the reaper thread."""
        if self._young and self._young[0].since + _GRACE_S < time.monotonic():
            self._session.run_in_background(self._look)

    def _look(self) -> None:
        """Runs on: an rdt-call thread; one at a time."""
        if not self._asking.acquire(blocking=False):
            return
        old: list[Unclaimed] = []
        try:
            old = self._old()
            orphans = self._ask(old)
        except BaseException:  # nobody could be asked: they are asked about again
            now = time.monotonic()
            self._young.extend(one._replace(since=now) for one in old)
            raise
        finally:
            self._asking.release()
        count = self._session.agent.release_unowned([one.key for one in orphans])
        if count:
            logger.info("RDT freed %d objects that no process owns", count)

    def _old(self) -> list[Unclaimed]:
        """Takes those that nobody has claimed in time."""
        latest = time.monotonic() - _GRACE_S
        old: list[Unclaimed] = []
        while self._young and self._young[0].since < latest and len(old) < _MOST:
            one = self._young.popleft()
            if self._is_stored(one.key):
                old.append(one)
        unowned = set(self._session.agent.unowned([one.key for one in old]))
        return [one for one in old if one.key in unowned]

    def _ask(self, objects: list[Unclaimed]) -> list[Unclaimed]:
        """Those that no process wants; the others are watched on."""
        if not objects:
            return []
        body = {"objects": [[one.object_id, one.key.hex()] for one in objects]}
        wanted: set[bytes] = set()
        for address, answer in ask_all(
            self._session, known_agents(), "rdt.claims", body, _ANSWER_S
        ):
            wanted.update(_wanted(address, answer, objects))
        now = time.monotonic()
        self._young.extend(one._replace(since=now) for one in objects if one.key in wanted)
        return [one for one in objects if one.key not in wanted]

    def _on_claims(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: an rdt-call thread of the process that is asked."""
        objects = [(object_id, key) for object_id, key in body["objects"]]
        return {"keys": [key for name, key in objects if self._may_own(name, bytes.fromhex(key))]}


def _wanted(
    address: bytes, answer: dict[str, Any] | Exception, objects: Iterable[Unclaimed]
) -> Iterable[bytes]:
    """The keys of what a process that was asked may own."""
    if not isinstance(answer, Exception):
        return [bytes.fromhex(key) for key in answer["keys"]]
    agent_id = agent_id_of(address)
    if is_worker_alive(agent_id):
        logger.debug("RDT keeps objects that agent %s may own: %s", agent_id.hex(), answer)
        return [one.key for one in objects]
    forget_worker(agent_id)
    return []
