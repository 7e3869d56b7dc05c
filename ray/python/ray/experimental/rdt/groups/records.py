"""Records of collective groups in Ray's key-value store, for every process of the cluster.

A name belongs to one Ray namespace, as the names of actors do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.groups.membership import Member
from ray.experimental.rdt.rpc import protocol

_NAMESPACE = b"ray_rdt_groups"


@dataclass(frozen=True)
class Record:
    """One group.

    Attributes:
        id: A new one for each creation.
        actor_ids: The members' actor ids in hex, in rank order.
        members: Their processes; empty while the group is being created.
    """

    id: str
    name: str
    backend: str
    actor_ids: tuple[str, ...]
    handles: tuple[bytes, ...]
    members: tuple[Member, ...] = ()

    @property
    def is_ready(self) -> bool:
        return bool(self.members)

    def may_live(self) -> bool:
        """Tell whether any of the actors is alive, or will be, as far as Ray knows."""
        return any(ray_core.actor_state(each) not in ("DEAD", "") for each in self.actor_ids)

    def encode(self) -> bytes:
        return protocol.pack(vars(self))

    @classmethod
    def decode(cls, data: bytes) -> Record:
        body = protocol.unpack(data)
        members = tuple(map(Member.of, body["members"]))
        actor_ids, handles = tuple(body["actor_ids"]), tuple(body["handles"])
        return cls(**body | {"actor_ids": actor_ids, "handles": handles, "members": members})


def reserve(record: Record) -> bool:
    """Reserve the name of a group that is being created; return False if it is in use."""
    return ray_core.kv_put(_key(record.name), record.encode(), _NAMESPACE, overwrite=False)


def publish(record: Record) -> None:
    ray_core.kv_put(_key(record.name), record.encode(), _NAMESPACE)


def read(name: str) -> Record | None:
    """Return the record of this name, None if there is none."""
    data = ray_core.kv_get(_key(name), _NAMESPACE)
    return Record.decode(data) if data else None


def remove(name: str) -> bool:
    """Delete the record of this name; return False if there was none."""
    return ray_core.kv_delete(_key(name), _NAMESPACE)


def ready() -> Iterator[Record]:
    """Yield the records of all groups that are ready."""
    for key in ray_core.kv_keys(_prefix(), _NAMESPACE):
        data = ray_core.kv_get(key, _NAMESPACE)
        if data and (record := Record.decode(data)).is_ready:
            yield record


def _prefix() -> bytes:
    import ray

    namespace: str = ray.get_runtime_context().namespace
    return f"{namespace.encode().hex()}:".encode()


def _key(name: str) -> bytes:
    return _prefix() + name.encode()
