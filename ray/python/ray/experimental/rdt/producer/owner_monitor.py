"""Frees the objects of owners that died.

Owners tell each producer's agent which objects they own (``Agent.own``). When the connection to an
owner breaks, the producer asks Ray's GCS. It keeps the objects until the GCS reports that the
owner's worker is dead. An owner that only lost its connection keeps its objects.

Runs on: producer, the ``rdt-call`` and reaper threads.
"""

from __future__ import annotations

import logging

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.producer.streams import ProducedStreams
from ray.experimental.rdt.rpc.process_directory import is_worker_alive
from ray.experimental.rdt.rpc.session import Session

logger = logging.getLogger("ray.rdt")


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
        if self._is_needed_by(agent_id) and is_worker_alive(agent_id):
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
