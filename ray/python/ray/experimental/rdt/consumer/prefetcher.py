"""Prefetch: objects are pulled when their owner hints them, before a task asks for them.

Prefetched objects stay within a memory budget, ``RAY_RDT_HINT_BYTES``. A refused hint costs
nothing: the fetch pulls the object itself.
"""

from __future__ import annotations

import base64
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.consumer.receive_buffers import allocate
from ray.experimental.rdt.consumer.transfer import AgentPull
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.selection import AutoTransportPolicy, ways

#: This many fetched objects are remembered, so that a late hint pulls none of them again.
_REMEMBERED_KEYS = 4096


@dataclass
class _Hinted:
    pull: AgentPull
    nbytes: int
    until: Deadline


class Prefetcher:
    """The consumer's side: objects pulled before their task asks.

    Args:
        session: Brings the hints and pulls.
        policy: Says where the agent's lanes are not the first choice: there, hints are let go.
    """

    def __init__(self, session: Session, policy: AutoTransportPolicy):
        self._session = session
        self._policy = policy
        self._lock = threading.Lock()
        self._pulls: dict[bytes, _Hinted] = {}
        self._asked: OrderedDict[bytes, None] = OrderedDict()
        session.serve("rdt.hint", self._on_hint)
        session.on_close(self.clear)

    @property
    def nbytes(self) -> int:
        """Memory that hinted objects take now."""
        return sum(hinted.nbytes for hinted in list(self._pulls.values()))

    def take(self, key: bytes) -> AgentPull | None:
        """The pull of an object that was hinted, which the caller finishes. Runs on: any thread.

        A hint that comes later is too late, and is passed over.
        """
        with self._lock:
            self._asked[key] = None
            if len(self._asked) > _REMEMBERED_KEYS:
                self._asked.popitem(last=False)
            hinted = self._pulls.pop(key, None)
        return hinted.pull if hinted is not None else None

    def park(self, key: bytes, pull: AgentPull, nbytes: int) -> bool:
        """Keeps a pull whose user has run out of patience, for the next who asks.

        Runs on: consumer, the fetching thread.

        Returns:
            Whether there was room for it.
        """
        until = Deadline.after(settings().fetch_timeout_s)
        with self._lock:
            has_room = self.nbytes + nbytes <= settings().hint_bytes
            if has_room and key not in self._pulls:
                self._pulls[key] = _Hinted(pull, nbytes, until)
                return True
        return False

    def clear(self) -> None:
        """Gives all up. Runs on: whoever shuts Ray down."""
        self._drop(list(self._pulls))

    def drop_stale(self) -> None:
        """Gives up what no task has asked for. Runs on: the reaper thread, now and then."""
        self._drop([key for key, hinted in list(self._pulls.items()) if hinted.until.has_passed()])

    def _drop(self, keys: list[bytes]) -> None:
        for key in keys:
            pull = self.take(key)
            if pull is not None:
                pull.abandon()

    def _on_hint(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: an rdt-call thread."""
        key = bytes.fromhex(body["key"])
        address = base64.b64decode(body["address"])
        if not all(self._policy.unavailable_reason(name, address) for name in ways("auto", "cpu")):
            return {}
        regions = array("Q", body["regions"])
        nbytes = sum(regions)
        with self._lock:
            is_room = self.nbytes + nbytes <= settings().hint_bytes
            if key not in self._pulls and key not in self._asked and is_room:
                buffers = allocate(self._session, regions)
                pull = AgentPull(self._session, address, key, buffers)
                until = Deadline.after(settings().fetch_timeout_s)
                self._pulls[key] = _Hinted(pull, nbytes, until)
        return {}
