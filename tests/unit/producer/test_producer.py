"""The producer: what it serializes, stores and reports, without a cluster."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray.experimental.rdt.common.descriptor import Descriptor, Location, decode, is_rdt
from ray.experimental.rdt.producer.producer import PendingObject, Producer, StoreByObjectId
from tests.unit.fakes import FakeRay, address, object_id
from tests.unit.serialization.test_capture import Context as CaptureContext

LARGE = 1 << 18  # elements: an object that is hinted


class Context(CaptureContext):
    """Ray's serialization context; plain values are returned unchanged."""

    def serialize(self, value: Any) -> Any:
        return value


class Agent:
    """A fake agent that records the registered keys."""

    def __init__(self) -> None:
        self.registered: list[bytes] = []
        self.released: list[bytes] = []

    def register(self, key: bytes, *spans: Any) -> None:
        self.registered.append(key)

    def release(self, key: bytes) -> None:
        self.released.append(key)


class Process:
    """A producer and the services of its session."""

    def __init__(self) -> None:
        self.agent = Agent()
        self.unclaimed: list[tuple[str, bytes]] = []
        self.items: list[tuple[str, bytes]] = []
        self.puts: list[tuple[str, str, Location]] = []
        services: Any = SimpleNamespace(
            session=SimpleNamespace(agent=self.agent, address=address(1)),
            transports=None,
            orphans=SimpleNamespace(add=lambda name, key: self.unclaimed.append((name, key))),
            streams=SimpleNamespace(add=lambda name, key: self.items.append((name, key))),
        )
        self.producer = Producer(lambda: services, lambda: None, lambda *put: self.puts.append(put))

    def serialize(self, value: Any) -> tuple[Any, PendingObject | None]:
        return self.producer.serialize(Context(), value, "AUTO")

    def keep(self, value: Any) -> Location | None:
        location: Location | None = pickle.loads(
            self.producer.keep(object_id(1), self.serialize(value)[1])
        )
        return location


@pytest.fixture
def process(fake_ray: FakeRay) -> Process:
    return Process()


def descriptor_of(serialized: Any) -> Descriptor:
    assert is_rdt(serialized.metadata)
    return decode(serialized.metadata)


@pytest.mark.parametrize("value", [b"bytes", 7, [None]])
def test_a_value_without_tensors_is_plain(process: Process, value: Any) -> None:
    serialized, pending = process.serialize(value)
    assert pending is None
    assert serialized == value or not is_rdt(serialized.metadata)
    assert pickle.loads(process.producer.keep(object_id(1), pending)) is None
    process.producer.put_object(None, pending)
    assert not len(process.producer.store)
    assert not process.puts


def test_a_return_is_stored_registered_and_watched_until_it_is_claimed(process: Process) -> None:
    location = process.keep(torch.ones(LARGE))
    assert location is not None
    assert (location.address, location.nbytes) == (address(1), 4 * LARGE)
    assert process.agent.registered == [location.key]
    assert process.unclaimed == [(object_id(1), location.key)]
    assert process.producer.stats()["stored_bytes"] == 4 * LARGE


def test_a_put_is_recorded_by_its_owner_and_claimed_at_once(
    process: Process, fake_ray: FakeRay
) -> None:
    serialized, pending = process.serialize(torch.ones(LARGE))
    process.producer.put_object(fake_ray.ref(object_id(2)), pending)
    ((name, transport, location),) = process.puts
    assert (name, transport) == (object_id(2), "auto")
    assert location.key == descriptor_of(serialized).key
    assert not process.unclaimed


def test_only_large_host_objects_of_auto_are_hinted(process: Process) -> None:
    large, small = process.keep(torch.ones(LARGE)), process.keep(torch.ones(LARGE - 1))
    many = process.keep([torch.ones(LARGE // 200) for _ in range(257)])
    assert large is not None
    assert small is not None
    assert many is not None
    assert large.regions == (4 * LARGE,)
    assert small.regions is many.regions is None


def test_small_objects_have_their_bytes_in_the_value(process: Process) -> None:
    serialized, _ = process.serialize(torch.ones(4))
    assert descriptor_of(serialized).is_eager


def test_a_tasks_return_contains_the_put_that_keeps_it(process: Process, fake_ray: FakeRay) -> None:
    serialized, _ = process.producer.serialize(Context(), torch.ones(LARGE), "auto", b"o" * 28)
    assert descriptor_of(serialized).origin == b"o" * 28
    ((_, transport),) = fake_ray.puts
    ((name, _, location),) = process.puts
    assert transport == "auto"
    assert location.key == descriptor_of(serialized).key
    assert [ref.hex() for ref in serialized.contained_object_refs] == [name]


def test_an_item_is_stored_under_its_stream_unless_it_is_small(process: Process) -> None:
    spec: Any = SimpleNamespace(transport="auto", stream="s")
    serialized = process.producer.serialize_item(Context(), torch.ones(LARGE), spec)
    assert process.items == [("s", descriptor_of(serialized).key)]
    process.producer.serialize_item(Context(), torch.ones(1), spec)
    assert len(process.items) == len(process.producer.store) == 1


def test_without_room_the_value_is_plain(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.producer.admission, "admit", lambda captured: False)
    value = torch.ones(LARGE)
    serialized, pending = process.serialize(value)
    assert serialized is value
    assert pending is None


def test_the_store_by_object_id_keeps_and_pops_tensors(process: Process) -> None:
    store, tensor = StoreByObjectId(process.producer), torch.ones(3)
    location = store.add_object_primary(object_id(3), [tensor], "auto")
    assert store.has_object(object_id(3))
    assert store.has_tensor(tensor)
    assert store.get_num_objects() == 1
    assert store.wait_and_get_object(object_id(3), 0) == [tensor]
    assert store.pop_object(object_id(3)) == [tensor]
    assert process.agent.released == [location.key]
    with pytest.raises(KeyError):
        store.pop_object(object_id(4))


def test_close_drops_all_objects(process: Process) -> None:
    process.keep(torch.ones(LARGE))
    process.producer.close()
    assert process.producer.stats()["stored_objects"] == 0
