"""The memory that is registered with nixl, and the time of its deregistration."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ray.experimental.rdt.transports.nixl.engine import NixlError
from ray.experimental.rdt.transports.nixl.plan import KINDS, spans_of
from ray.experimental.rdt.transports.nixl.registration import LARGE_NBYTES, Registrations
from tests.fake_device import TYPE
from tests.unit.transports.nixl.nixl_fakes import Fabric


@pytest.fixture
def engine():
    return Fabric().engine()


@pytest.fixture
def registrations(engine):
    return Registrations(engine, lambda tensor: None)


@pytest.fixture
def segment():
    """Device tensors that were cut from one allocation."""
    storages = [torch.zeros(100, dtype=torch.uint8, device=TYPE) for _ in range(50)]
    addresses = [storage.data_ptr() for storage in storages]
    return SimpleNamespace(
        storages=storages, extent=(min(addresses), max(addresses) + 100 - min(addresses))
    )


@pytest.fixture
def on_device(engine, segment):
    return Registrations(engine, lambda tensor: segment.extent)


def blank(nbytes):
    return torch.empty(nbytes, dtype=torch.uint8)


def acquire(registrations, *buffers):
    return registrations.acquire(spans_of(buffers), buffers)


def check(engine, lease, kind="DRAM"):
    engine.check(kind, lease.spans.rows[lease.spans.rows[:, 1] > 0])


def test_small_buffers_share_a_registration_that_ends_with_the_lease(engine, registrations):
    buffers = [blank(100) for _ in range(50)]
    lease = acquire(registrations, *buffers, blank(0))
    check(engine, lease)
    assert len(engine.registered) == 1
    registrations.release(lease)
    assert not engine.registered


def test_a_large_storage_is_registered_once_and_found_again(engine, registrations):
    tensor = blank(3 * LARGE_NBYTES)
    first = acquire(registrations, tensor[:LARGE_NBYTES])
    second = acquire(registrations, tensor[10:], tensor[:5])
    check(engine, first)
    check(engine, second)
    assert len(engine.registered) == 1
    registrations.release(first)
    registrations.release(second)
    assert len(engine.registered) == 1
    check(engine, acquire(registrations, tensor))
    assert len(engine.registered) == 1


def test_a_kept_registration_ends_with_its_storage(engine, registrations):
    tensor = blank(LARGE_NBYTES)
    registrations.release(acquire(registrations, tensor))
    view = tensor[5:]
    del tensor
    gc.collect()
    assert len(engine.registered) == 1
    del view
    gc.collect()
    assert not engine.registered


def test_memory_that_was_freed_and_taken_again_is_registered_anew(engine, registrations):
    memory = np.empty(LARGE_NBYTES, np.uint8)
    tensor = torch.from_numpy(memory)
    lease = acquire(registrations, tensor)
    registrations.release(lease)
    del tensor
    again = acquire(registrations, torch.from_numpy(memory))
    assert again.spans.rows[0, 0] == lease.spans.rows[0, 0]
    assert again.spans.rows[0, 2] != lease.spans.rows[0, 2]
    check(engine, again)
    with pytest.raises(NixlError, match="not registered"):
        engine.check("DRAM", lease.spans.rows)


def test_a_storage_that_was_resized_is_registered_anew(engine, registrations):
    tensor = blank(LARGE_NBYTES)
    registrations.release(acquire(registrations, tensor))
    tensor.untyped_storage().resize_(2 * LARGE_NBYTES)
    lease = acquire(registrations, tensor.set_(tensor.untyped_storage()))
    check(engine, lease)
    assert len(engine.registered) == 1


def test_a_storage_that_dies_while_leased_stays_registered(engine, registrations):
    tensor = blank(LARGE_NBYTES)
    lease = acquire(registrations, tensor)
    del tensor
    gc.collect()
    check(engine, lease)
    registrations.release(lease)
    assert not engine.registered


def test_pins_count(engine, registrations):
    tensor = blank(100)
    registrations.pin(tensor)
    registrations.pin(tensor[3:])
    lease = acquire(registrations, tensor[50:])
    assert len(engine.registered) == 1
    assert registrations.has_pinned(spans_of([tensor[9:10]]))
    assert not registrations.has_pinned(spans_of([blank(1)]))
    registrations.release(lease)
    registrations.unpin(tensor)
    assert len(engine.registered) == 1
    registrations.unpin(tensor)
    assert not engine.registered
    with pytest.raises(ValueError, match="not registered"):
        registrations.unpin(tensor)


def test_a_lease_outlives_the_pin(engine, registrations):
    tensor = blank(100)
    registrations.pin(tensor)
    lease = acquire(registrations, tensor)
    registrations.unpin(tensor)
    check(engine, lease)
    check(engine, lease)
    registrations.release(lease)
    assert not engine.registered


def test_each_registration_of_host_memory_has_its_own_number(registrations):
    large, small = blank(LARGE_NBYTES), blank(10)
    leases = [acquire(registrations, large, small) for _ in range(3)]
    numbers = [lease.spans.rows[:, 2].tolist() for lease in leases]
    assert len({large for large, _ in numbers}) == 1
    assert len({small for _, small in numbers}) == 3
    assert all(lease.version == 0 for lease in leases)


def test_the_registered_rows_of_a_lease_cover_it(engine, registrations):
    buffers = [blank(LARGE_NBYTES), blank(10), blank(20)]
    lease = acquire(registrations, *buffers)
    engine.registered = {0: ("DRAM", lease.registered(KINDS.index("DRAM")))}
    check(engine, lease)
    assert len(lease.registered(KINDS.index("VRAM"))) == 0


def test_a_refused_registration_leaves_no_lease_behind(engine, registrations):
    tensor = blank(LARGE_NBYTES)
    registrations.pin(tensor)
    engine.refusal = NixlError("no")
    with pytest.raises(NixlError):
        acquire(registrations, tensor, blank(10))
    registrations.unpin(tensor)
    assert not engine.registered


def test_device_memory_is_registered_by_segment(engine, segment, on_device):
    lease = acquire(on_device, *segment.storages)
    check(engine, lease, "VRAM")
    ((kind, rows),) = engine.registered.values()
    assert (kind, rows.tolist()) == ("VRAM", [[*segment.extent, 0]])
    version = lease.version
    on_device.release(lease)
    again = acquire(on_device, *segment.storages[10:])
    assert len(engine.registered) == 1
    assert again.version == version  # peers go on with what they know


def test_a_segment_stays_registered_while_a_tensor_lives_that_was_used(engine, segment, on_device):
    on_device.release(acquire(on_device, segment.storages[0]))
    on_device.release(acquire(on_device, segment.storages[1]))
    del segment.storages[0]
    gc.collect()
    assert len(engine.registered) == 1
    del segment.storages[0]
    gc.collect()
    assert not engine.registered
    lease = acquire(on_device, *segment.storages)
    check(engine, lease, "VRAM")


def test_a_segment_that_a_lease_keeps_is_not_registered_twice(engine, segment, on_device):
    on_device.pin(segment.storages[0])
    lease = acquire(on_device, segment.storages[0])
    on_device.unpin(segment.storages[0])
    again = acquire(on_device, segment.storages[1])
    assert len(engine.registered) == 1
    on_device.release(lease)
    check(engine, again, "VRAM")


def test_a_pin_in_a_segment_pins_its_own_storage_only(engine, segment, on_device):
    first, second = segment.storages[:2]
    on_device.pin(first)
    assert on_device.has_pinned(spans_of([first[10:20]]))
    assert not on_device.has_pinned(spans_of([second]))
    with pytest.raises(ValueError, match="not registered"):
        on_device.unpin(second)
    on_device.unpin(first)
    assert not engine.registered


@pytest.mark.parametrize("extent", [None, (0, 10)])
def test_device_memory_of_an_unknown_segment_is_registered_by_storage(engine, segment, extent):
    registrations = Registrations(engine, lambda tensor: extent)
    lease = acquire(registrations, *segment.storages)
    check(engine, lease, "VRAM")
    assert len(engine.registered) == 50
