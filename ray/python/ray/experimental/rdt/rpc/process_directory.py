"""Agents of the cluster's processes, kept in Ray's GCS: by actor, and for each agent its worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import raise_if_interrupt
from ray.experimental.rdt.rpc.session import KV_NAMESPACE, Session

_WORKER_PREFIX = b"worker:"
_WORKER_ID_BYTES = 28


def publish_actor(actor_id: bytes, address: bytes) -> None:
    """Publish the agent's address of this process's actor. A restarted actor replaces it."""
    ray_core.kv_put(_actor_key(actor_id), address, KV_NAMESPACE)


def find_actor(actor_id: bytes) -> bytes | None:
    """Return the address of an actor's agent, None if the actor has published none. Blocks."""
    return ray_core.kv_get(_actor_key(actor_id), KV_NAMESPACE)


def publish_worker(session: Session, worker_id: bytes) -> None:
    key = _worker_key(session.agent.agent_id)
    ray_core.kv_put(key, worker_id + session.address, KV_NAMESPACE)


def known_agents(worker_id: bytes | None = None) -> list[bytes]:
    """Return the addresses of the agents, or of this worker's, not known to be dead. Blocks."""
    keys = ray_core.kv_keys(_WORKER_PREFIX, KV_NAMESPACE)
    entries = [ray_core.kv_get(key, KV_NAMESPACE) for key in keys]
    return [
        entry[_WORKER_ID_BYTES:]
        for entry in entries
        if entry is not None and worker_id in (None, entry[:_WORKER_ID_BYTES])
    ]


def forget_worker(agent_id: bytes) -> None:
    """Remove the entry of an agent whose worker is dead."""
    ray_core.kv_delete(_worker_key(agent_id), KV_NAMESPACE)


def is_worker_alive(agent_id: bytes) -> bool:
    """Tell whether Ray's GCS counts the worker of an agent, and its node, as alive. Blocks."""
    entry = ray_core.kv_get(_worker_key(agent_id), KV_NAMESPACE)
    return entry is not None and ray_core.is_worker_alive(entry[:_WORKER_ID_BYTES])


def ask_all(
    session: Session, addresses: Iterable[bytes], op: str, body: dict[str, Any], timeout_s: float
) -> Iterator[tuple[bytes, dict[str, Any] | Exception]]:
    """Send a request to several processes at the same time.

    Runs on: any thread that may block.

    Yields:
        The address of each process, and its answer or the error of the request.
    """
    asked = [(address, session.start_call(address, op, body)) for address in addresses]
    deadline = Deadline.after(timeout_s)
    for address, wait in asked:
        answer: dict[str, Any] | Exception
        try:
            answer = wait(deadline.left_s())
        except Exception as error:  # of any kind: the caller handles each process by itself
            raise_if_interrupt(error)
            answer = error
        yield address, answer


def _actor_key(actor_id: bytes) -> bytes:
    return b"agent:" + actor_id.hex().encode()


def _worker_key(agent_id: bytes) -> bytes:
    return _WORKER_PREFIX + agent_id.hex().encode()
