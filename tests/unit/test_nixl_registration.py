"""Which memory is registered with nixl, and until when."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from ray.experimental.rdt.transports.nixl_engine import NixlError
from ray.experimental.rdt.transports.nixl_plan import KINDS, spans_of
from ray.experimental.rdt.transports.nixl_registration import LARGE_NBYTES, Registrations
from tests.unit.nixl_fakes import Fabric


@pytest.fixture
def engine():
    return Fabric().engine()


@pytest.fixture
def registrations(engine):
    return Registrations(engine)


def blank(nbytes):
    return torch.empty(nbytes, dtype=torch.uint8)


def acquire(registrations, *buffers):
    return registrations.acquire(spans_of(buffers), buffers)


def check(engine, lease):
    engine.check("DRAM", lease.spans.rows[lease.spans.rows[:, 1] > 0])


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
