"""Prefetch: objects are pulled when their owner hints them, before a task asks for them.

Prefetched objects stay within a memory budget, ``RAY_RDT_HINT_BYTES``. A refused hint costs
nothing: the fetch pulls the object itself.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.consumer.agent_transfer import AgentPull
from ray.experimental.rdt.consumer.planner import Kind, TransferObject, plan_transfer
from ray.experimental.rdt.consumer.receive_buffers import allocate
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.selection import AutoTransportPolicy, default_transports

#: This many fetched objects are remembered, so that a late hint pulls none of them again.
_REMEMBERED_KEYS = 4096


@dataclass
class _Prefetch:
    pull: AgentPull
    nbytes: int
    until: Deadline = field(default_factory=lambda: Deadline.after(settings().fetch_timeout_s))


class Prefetcher:
    """The pulls of one process that no fetch has taken yet.

    Args:
        policy: Tells where the agent's lanes are not the first choice. Hints are refused there.
    """

    def __init__(self, session: Session, policy: AutoTransportPolicy):
        self._session = session
        self._policy = policy
        self._lock = threading.Lock()
        self._pulls: dict[bytes, _Prefetch] = {}
        self._asked: OrderedDict[bytes, None] = OrderedDict()
        session.serve(protocol.HINT, self._on_hint)
        session.on_close(self.clear)

    @property
    def nbytes(self) -> int:
        """The memory that prefetched objects take now."""
        return sum(prefetch.nbytes for prefetch in list(self._pulls.values()))

    def take(self, key: bytes) -> AgentPull | None:
        """Return the pull of a prefetched object, which the caller finishes. Runs on: any thread.

        A hint that comes later is refused.
        """
        with self._lock:
            self._asked[key] = None
            if len(self._asked) > _REMEMBERED_KEYS:
                self._asked.popitem(last=False)
            prefetch = self._pulls.pop(key, None)
        return prefetch.pull if prefetch is not None else None

    def park(self, key: bytes, pull: AgentPull, nbytes: int) -> bool:
        """Keep the pull of a fetch that ended with the user's timeout, if the budget allows it.

        Runs on: consumer, the fetching thread.
        """
        with self._lock:
            is_kept = self._has_room(nbytes) and key not in self._pulls
            if is_kept:
                self._pulls[key] = _Prefetch(pull, nbytes)
        return is_kept

    def clear(self) -> None:
        """Abandon all pulls. Runs on: the thread that shuts Ray down."""
        self._drop(list(self._pulls))

    def drop_stale(self) -> None:
        """Abandon pulls that no task has asked for. Runs on: the reaper thread, periodically."""
        self._drop(
            [key for key, prefetch in list(self._pulls.items()) if prefetch.until.has_passed()]
        )

    def _drop(self, keys: list[bytes]) -> None:
        for key in keys:
            pull = self.take(key)
            if pull is not None:
                pull.abandon()

    def _on_hint(self, peer_id: bytes, body: protocol.Hint) -> dict[str, Any]:
        """Runs on: an rdt-call thread."""
        key, address = body["key"], body["address"]
        if not self._is_agent_first(address):
            return {}
        regions = array("Q", body["regions"])
        nbytes = sum(regions)
        with self._lock:
            is_new = key not in self._pulls and key not in self._asked
            if is_new and self._has_room(nbytes):
                buffers = allocate(self._session, regions)
                pull = AgentPull(self._session, address, key, buffers)
                self._pulls[key] = _Prefetch(pull, nbytes)
        return {}

    def _has_room(self, nbytes: int) -> bool:
        return self.nbytes + nbytes <= settings().hint_bytes

    def _is_agent_first(self, address: bytes) -> bool:
        """Tell whether the agent's lanes are the first choice for objects of a producer."""
        obj = TransferObject(default_transports=default_transports("cpu"))
        plan = plan_transfer(obj, self._policy.pair(address))
        return next(candidate for candidate in plan if candidate.serves).kind is Kind.AGENT
