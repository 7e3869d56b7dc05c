"""The producer of RDT objects: serializes values and stores their tensors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayTaskError

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.descriptor import KEY_BYTES, PRODUCER_BYTES, Descriptor, Location
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.producer.frozen import STORAGES
from ray.experimental.rdt.producer.snapshots import Snapshots
from ray.experimental.rdt.producer.tensor_store import AdmissionControl, TensorStore
from ray.experimental.rdt.serialization import capture
from ray.experimental.rdt.serialization.capture import Skeleton, Wanted
from ray.experimental.rdt.serialization.envelope import pack
from ray.experimental.rdt.serialization.layout import Captured, carriers
from ray.experimental.rdt.transports.base import TransportUnavailable, UserDescription
from ray.experimental.rdt.transports.user import registered
from ray.experimental.rdt.transports.user.transfers import own_actor_handle
from ray.experimental.rdt.transports.user.transport import UserTransport

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt._tensors import Table
    from ray.experimental.rdt.producer.owner_monitor import OrphanCollector
    from ray.experimental.rdt.producer.streams import ProducedStreams, StreamSpec
    from ray.experimental.rdt.rpc.session import Session
    from ray.experimental.rdt.transports.nixl.transport import NixlTransport
    from ray.experimental.rdt.transports.registry import Transports

#: A smaller pull takes less time than its hint.
_MIN_HINTED_BYTES = 1 << 20

#: The hint lists the sizes of all regions. With more regions it costs more than it saves.
_MAX_HINTED_REGIONS = 256


@dataclass(frozen=True)
class ProducerServices:
    """Services of one session that a producer uses."""

    session: Session
    transports: Transports
    streams: ProducedStreams
    orphans: OrphanCollector


@dataclass(frozen=True)
class PendingObject:
    """The tensors of a value that is serialized and not stored yet."""

    captured: Captured
    descriptor: Descriptor


class Producer:
    """The producer side of one process.

    Args:
        services: Returns the services of this process's session; begins a session if there is none.
        find_nixl: Returns this process's nixl transport, None if it has not been used.
        record_put: Records an object that this process owns: its id (hex), transport and location.
    """

    def __init__(
        self,
        services: Callable[[], ProducerServices],
        find_nixl: Callable[[], NixlTransport | None],
        record_put: Callable[[str, str, Location], None],
    ):
        self.store = TensorStore()
        self.admission = AdmissionControl(self.store)
        self.snapshots = Snapshots(self.admission, find_nixl)
        self._services = services
        self._record_put = record_put

    @property
    def streams(self) -> ProducedStreams:
        """The streams that this process makes items for."""
        return self._services().streams

    def serialize(
        self, context: Any, value: Any, transport: str, task_return: bytes = b""
    ) -> tuple[Any, PendingObject | None]:
        """Serialize a method's return, a put value, or a return of a normal task.

        Runs on: producer, the thread of the task.

        Args:
            transport: The transport's name, any case.
            task_return: The id of a normal task's return. Its value then contains a guard, which
                keeps the object; see ``hooks/task_returns.py``.

        Returns:
            The serialized object for Ray, and the argument of ``keep`` or ``put_object`` once the
            object has an id. None if the value has no tensors.
        """
        if isinstance(value, (bytes, RayTaskError)):
            return context.serialize(value), None
        users = self.user_transport(transport)
        skeleton, captured = capture.take(context, value, _wanted(users))
        # Without room, Ray's object store takes the value.
        is_admitted = self.admission.admit(captured)
        if not is_admitted or (transport.upper() == "NIXL" and not self.snapshots.take(captured)):
            return context.serialize(value), None
        if not captured:
            return pack(skeleton, captured, None), None
        user_description = b"" if users is None else _ship(users, context, skeleton, captured)
        pending = self._describe(captured, transport, task_return)
        if task_return:
            skeleton.contained_refs.add(self._guard(context, pending, transport))
        return pack(skeleton, captured, pending.descriptor, user_description), pending

    def serialize_item(self, context: Any, value: Any, spec: StreamSpec) -> Any:
        """Serialize an item of a generator; see ``streams``.

        Runs on: producer, the thread that reports the item.
        """
        serialized, pending = self.serialize(context, value, spec.transport)
        if pending is not None and not pending.descriptor.is_eager:
            self._store(f"an item of stream {spec.stream}", pending)
            self.streams.add(spec.stream, pending.descriptor.key)
        return serialized

    def user_transport(self, transport: str) -> UserTransport | None:
        """Return a user-defined transport, None for a built-in one.

        Raises:
            RDTError: The transport cannot be used here.
        """
        if transport.upper() in registered.BUILT_IN_TRANSPORTS:
            return None
        registered.refresh(transport.upper())
        try:
            return self._services().transports.users(transport.lower())
        except TransportUnavailable as error:
            raise RDTError(str(error)) from error

    def _describe(self, captured: Captured, transport: str, origin: bytes = b"") -> PendingObject:
        nbytes, is_user_defined = captured.table.nbytes, captured.user_object is not None
        is_small = nbytes <= settings().eager_bytes and not captured.table.devices
        descriptor = Descriptor(
            key=os.urandom(KEY_BYTES),
            nbytes=nbytes,
            producer=(ray_core.actor_id() or ray_core.worker_id())[:PRODUCER_BYTES],
            transport=transport.lower(),
            address=self._services().session.address,
            is_eager=is_small and not is_user_defined,
            is_user_defined=is_user_defined,
            origin=origin,
        )
        return PendingObject(captured, descriptor)

    def _guard(self, context: Any, pending: PendingObject, transport: str) -> Any:
        """Store an object under a new put of this process, which the value then contains."""
        guard = ray_core.put_object(context.serialize(b""), transport)
        # Tells the core that the guard leaves this process inside another object.
        ray_core.export_ref(guard)
        self.put_object(guard, pending)
        return guard

    def keep(self, object_id: str, pending: PendingObject | None) -> bytes:
        """Store the tensors of a method's return until the owner frees them.

        Runs on: producer, the thread of the task.

        Returns:
            The pickled ``Location`` for the task's reply; of None for a value without tensors.
        """
        if pending is None:
            return pickle.dumps(None)
        location = self._store(object_id, pending)
        self._services().orphans.add(object_id, location.key)
        return pickle.dumps(location)

    def put_object(self, ref: Any, pending: PendingObject | None) -> None:
        """Store and record a put object. Runs on: producer, the user's thread."""
        if pending is not None:
            location = self._store(ref.hex(), pending)
            self._record_put(ref.hex(), pending.descriptor.transport, location)

    def put_tensors(self, object_id: str, tensors: list[torch.Tensor], transport: str) -> Location:
        """Store a list of tensors under an object's id (hex)."""
        users = self.user_transport(transport)
        captured = capture.arrange(tensors, wanted=_wanted(users))
        if users is not None:
            captured.user_object = users.describe(carriers(captured))
        return self._store(object_id, self._describe(captured, transport))

    def _store(self, object_id: str, pending: PendingObject) -> Location:
        captured, descriptor = pending.captured, pending.descriptor
        stored = self.store.add(descriptor.key, object_id, captured, descriptor.transport)
        self._services().session.agent.register(
            descriptor.key,
            *captured.host_spans(),
            stored.token,
            captured.guards,
            captured.copies is None and STORAGES.contain(captured.layout.storages),
        )
        return Location(
            descriptor.address,
            descriptor.key,
            descriptor.nbytes,
            _regions_to_hint(descriptor, captured.table),
            descriptor.is_eager,
        )

    def allocate_shareable(self, nbytes: int) -> Any:
        """Return writable memory that consumers of this host can map."""
        return self._services().session.agent.allocate(nbytes, is_shareable=True)

    def release(self, key: bytes) -> None:
        """Free an object as its owner would."""
        self._services().session.agent.release(key)

    def stats(self) -> dict[str, int]:
        return {
            "stored_objects": len(self.store),
            "stored_bytes": self.store.nbytes,
            "plain_objects": self.admission.refused,
        }

    def close(self) -> None:
        """Drop all objects and the memory pool. Runs on: the thread that shuts Ray down."""
        self.store.clear()
        self.snapshots.drop_pool()


def _wanted(users: UserTransport | None) -> Wanted | None:
    return None if users is None else Wanted(users.data_type, users.capabilities.devices)


def _ship(users: UserTransport, context: Any, skeleton: Skeleton, captured: Captured) -> bytes:
    """Describe an object to a user-defined transport; return the part for the consumer, pickled."""
    captured.user_object = user_object = users.describe(carriers(captured))
    user_description = UserDescription(
        user_object.object_id,
        user_object.metadata,
        len(user_object.tensors),
        own_actor_handle(),
        bool(captured.addresses),
    )
    try:
        return capture.pickle_user_description(context, skeleton, user_description)
    except BaseException:  # also after an interrupt: the transport must not keep the object
        users.withdraw(user_object)
        raise


def _regions_to_hint(descriptor: Descriptor, table: Table) -> tuple[int, ...] | None:
    """Return the region sizes that a hint of this object carries, None if it is not hinted.

    A hinted object comes over the agent's lanes, which serve no device memory and no other
    transport than "auto".
    """
    is_hinted = (
        descriptor.transport == "auto"
        and descriptor.nbytes >= _MIN_HINTED_BYTES
        and len(table.regions) <= _MAX_HINTED_REGIONS
        and not table.devices
    )
    return tuple(table.regions) if is_hinted else None


class StoreByObjectId:
    """The tensors of one producer by object id (hex), as Ray's own tests use them."""

    def __init__(self, producer: Producer):
        self._producer = producer
        self._store = producer.store

    def has_object(self, object_id: str) -> bool:
        return self._store.by_id(object_id) is not None

    def has_tensor(self, tensor: torch.Tensor) -> bool:
        try:
            self._store.wait_freed(tensor, 0)
        except TimeoutError:
            return True
        return False

    def get_num_objects(self) -> int:
        return len(self._store)

    def wait_and_get_object(
        self, object_id: str, timeout: float | None = None
    ) -> list[torch.Tensor]:
        return self._store.wait_object(object_id, timeout).captured.tensors

    def add_object_primary(
        self, object_id: str, tensors: list[torch.Tensor], transport: str
    ) -> Location:
        return self._producer.put_tensors(object_id, tensors, transport)

    def pop_object(self, object_id: str) -> list[torch.Tensor]:
        stored = self._store.by_id(object_id)
        if stored is None:
            raise KeyError(f"RDT object {object_id} is not stored here")
        self._producer.release(stored.key)
        return stored.captured.tensors
