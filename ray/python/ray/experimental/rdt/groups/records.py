"""What every process can know about collective groups: their records in Ray's key-value store.

A name belongs to one Ray namespace, as the names of actors do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.groups.membership import Member
from ray.experimental.rdt.rpc import protocol

_NAMESPACE = b"ray_rdt_groups"


@dataclass(frozen=True)
class Record:
    """One group.

    Attributes:
        id: New for each creation.
        name: What users call it.
        backend: "gloo" or "nccl".
        actor_ids: The members' actor ids in hex, in rank order.
        handles: Their serialized handles.
        members: Their processes; empty while the group is being made.
    """

    id: str
    name: str
    backend: str
    actor_ids: tuple[str, ...]
    handles: tuple[bytes, ...]
    members: tuple[Member, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether the group has been made."""
        return bool(self.members)

    def encode(self) -> bytes:
        """Return the record's bytes."""
        body = {
            "id": self.id,
            "name": self.name,
            "backend": self.backend,
            "actors": self.actor_ids,
            "handles": self.handles,
            "members": self.members,
        }
        return protocol.pack(body)

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """The reverse of ``encode``."""
        body = protocol.unpack(data)
        return cls(
            id=body["id"],
            name=body["name"],
            backend=body["backend"],
            actor_ids=tuple(body["actors"]),
            handles=tuple(body["handles"]),
            members=tuple(map(Member.of, body["members"])),
        )


def reserve(record: Record) -> bool:
    """Takes the name for a group that is being made; False if it is taken."""
    return ray_core.kv_put(_key(record.name), record.encode(), _NAMESPACE, overwrite=False)


def publish(record: Record) -> None:
    """Makes a group known that is ready."""
    ray_core.kv_put(_key(record.name), record.encode(), _NAMESPACE)


def read(name: str) -> Record | None:
    """The record of this name."""
    data = ray_core.kv_get(_key(name), _NAMESPACE)
    return Record.decode(data) if data else None


def remove(name: str) -> bool:
    """Gives the name back; False if it was not taken."""
    return ray_core.kv_delete(_key(name), _NAMESPACE)


def ready() -> Iterator[Record]:
    """All groups that can be used."""
    for key in ray_core.kv_keys(_prefix(), _NAMESPACE):
        data = ray_core.kv_get(key, _NAMESPACE)
        if data and (record := Record.decode(data)).is_ready:
            yield record


def is_any_alive(actor_ids: Sequence[str]) -> bool:
    """Whether Ray knows any of these actors to be alive, or to come."""
    return any(ray_core.actor_state(actor_id) not in ("DEAD", "") for actor_id in actor_ids)


def _prefix() -> bytes:
    import ray

    namespace: str = ray.get_runtime_context().namespace
    return f"{namespace.encode().hex()}:".encode()


def _key(name: str) -> bytes:
    return _prefix() + name.encode()
