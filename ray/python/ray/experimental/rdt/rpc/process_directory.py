"""Agent addresses of the cluster's processes, kept in Ray's GCS."""

from __future__ import annotations

from ray.experimental import internal_kv
from ray.experimental.rdt.rpc.session import KV_NAMESPACE


def publish_actor(actor_id: bytes, address: bytes) -> None:
    """Publish the agent's address of this process's actor. A restarted actor replaces it."""
    key = _actor_key(actor_id)
    internal_kv._internal_kv_put(key, address, overwrite=True, namespace=KV_NAMESPACE)


def find_actor(actor_id: bytes) -> bytes | None:
    """Return the address of an actor's agent, None if the actor has published none. Blocks."""
    address: bytes | None = internal_kv._internal_kv_get(
        _actor_key(actor_id), namespace=KV_NAMESPACE
    )
    return address


def _actor_key(actor_id: bytes) -> bytes:
    return b"agent:" + actor_id.hex().encode()
