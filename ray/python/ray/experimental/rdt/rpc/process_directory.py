"""Agent addresses of the cluster's processes, kept in Ray's GCS."""

from __future__ import annotations

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.rpc.session import KV_NAMESPACE


def publish_actor(actor_id: bytes, address: bytes) -> None:
    """Publish the agent's address of this process's actor. A restarted actor replaces it."""
    ray_core.kv_put(_actor_key(actor_id), address, KV_NAMESPACE)


def find_actor(actor_id: bytes) -> bytes | None:
    """Return the address of an actor's agent, None if the actor has published none. Blocks."""
    return ray_core.kv_get(_actor_key(actor_id), KV_NAMESPACE)


def _actor_key(actor_id: bytes) -> bytes:
    return b"agent:" + actor_id.hex().encode()
