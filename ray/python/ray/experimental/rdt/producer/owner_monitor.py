"""Frees what an owner leaves behind when its process dies.

Owners tell each producer's agent which objects they own (``Agent.own``). When the connection of an
owner breaks, its objects stay until Ray's GCS says that its worker is dead: a process that is only
cut off keeps what is its own. Runs on: producer, the ``rdt-call`` and reaper threads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.interrupts import raise_if_interrupt
from ray.experimental.rdt.producer.streams import ProducedStreams
from ray.experimental.rdt.rpc.session import KV_NAMESPACE, Session

logger = logging.getLogger("ray.rdt")

_WORKER_PREFIX = b"worker:"
_WORKER_ID_BYTES = 28


def publish_worker(session: Session, worker_id: bytes) -> None:
    """Lets producers find out which worker an agent belongs to, and the agent."""
    key = _worker_key(session.agent.agent_id)
    entry = worker_id + session.address
    ray_core.kv_put(key, entry, KV_NAMESPACE)


def known_agents(worker_id: bytes | None = None) -> list[bytes]:
    """The addresses of all agents that were ever published, but for those found dead.

    Args:
        worker_id: Only those of this worker.
    """
    keys = ray_core.kv_keys(_WORKER_PREFIX, KV_NAMESPACE)
    entries = [ray_core.kv_get(key, KV_NAMESPACE) for key in keys]
    return [
        entry[_WORKER_ID_BYTES:]
        for entry in entries
        if entry is not None and worker_id in (None, entry[:_WORKER_ID_BYTES])
    ]


def ask_all(
    session: Session, addresses: Iterable[bytes], op: str, body: dict[str, Any], timeout_s: float
) -> Iterator[tuple[bytes, dict[str, Any] | Exception]]:
    """Asks processes, all at once.

    Runs on: any thread that may block.

    Yields:
        The address of each, and its answer, or why there is none.
    """
    asked = [(address, session.start_call(address, op, body)) for address in addresses]
    deadline = Deadline.after(timeout_s)
    for address, wait in asked:
        answer: dict[str, Any] | Exception
        try:
            answer = wait(deadline.left_s())
        except Exception as error:
            raise_if_interrupt(error)
            answer = error
        yield address, answer


def forget_worker(agent_id: bytes) -> None:
    """Takes the entry of an agent away whose worker is dead."""
    ray_core.kv_delete(_worker_key(agent_id), KV_NAMESPACE)


class OwnerWatch:
    """Watches the owners of this process's objects.

    Args:
        session: Tells of lost connections.
        streams: The streams whose callers are watched as well.
    """

    def __init__(self, session: Session, streams: ProducedStreams):
        self._session = session
        self._streams = streams
        self._lock = threading.Lock()
        self._lost: set[bytes] = set()
        session.on_peer_lost(self._on_peer_lost)
        session.on_tick(self._on_tick)

    def _on_peer_lost(self, agent_id: bytes) -> None:
        if self._has_something_of(agent_id):
            with self._lock:
                self._lost.add(agent_id)
            self._session.run_in_background(self._check, agent_id)

    def _on_tick(self) -> None:
        for agent_id in list(self._lost):
            self._session.run_in_background(self._check, agent_id)

    def _check(self, agent_id: bytes) -> None:
        """Runs on: an rdt-call thread."""
        if self._has_something_of(agent_id) and is_worker_alive(agent_id):
            return
        with self._lock:
            if agent_id not in self._lost:
                return
            self._lost.discard(agent_id)
        self._streams.close_of(agent_id)
        count = self._session.agent.release_owned(agent_id)
        if count:
            logger.info(
                "RDT freed %d objects of agent %s: its worker died", count, agent_id.hex()[:8]
            )

    def _has_something_of(self, agent_id: bytes) -> bool:
        return bool(self._session.agent.owned(agent_id)) or self._streams.has_caller(agent_id)


def is_worker_alive(agent_id: bytes) -> bool:
    """Whether Ray's GCS counts the worker of an agent, and its node, as alive.

    Blocks for answers of the GCS. Nobody tells the GCS of the workers of a node that died.
    """
    entry = ray_core.kv_get(_worker_key(agent_id), KV_NAMESPACE)
    return entry is not None and ray_core.is_worker_alive(entry[:_WORKER_ID_BYTES])


def _worker_key(agent_id: bytes) -> bytes:
    return _WORKER_PREFIX + agent_id.hex().encode()
