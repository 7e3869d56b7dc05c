"""The memory pool that objects are copied into."""

from __future__ import annotations

import threading
import time

import torch
from hypothesis import given
from hypothesis import strategies as st

from ray.experimental.rdt.transports.nixl.pool import FreeList, MemoryPool


def offsets(pool, copies):
    """Return the offsets of the copies that have bytes."""
    filled = [copy for copy in copies.buffers if copy.numel()]
    return [copy.data_ptr() - pool.memory.data_ptr() for copy in filled]


def test_copies_do_not_overlap_and_begin_where_any_dtype_may():
    pool = MemoryPool(1024, "cpu")
    copies = pool.take([1, 100, 0, 64, 65], 0)
    assert [copy.numel() for copy in copies.buffers] == [1, 100, 0, 64, 65]
    assert offsets(pool, copies) == [0, 64, 192, 256]


def test_an_object_is_spread_over_free_parts():
    pool = MemoryPool(4 * 64, "cpu")
    kept = [pool.take([64], 0) for _ in range(4)]
    kept[0] = kept[2] = None
    assert sorted(offsets(pool, pool.take([64, 0, 60], 0))) == [0, 128]


def test_a_full_pool_waits_for_room():
    pool = MemoryPool(128, "cpu")
    held = [pool.take([128], 0)]
    threading.Timer(0.05, held.clear).start()
    assert offsets(pool, pool.take([100], 10)) == [0]


def test_a_pool_that_stays_full_holds_up_one_object_only():
    pool = MemoryPool(128, "cpu")
    kept = pool.take([64], 0)
    assert pool.take([65], 0.02) is None
    began = time.monotonic()
    assert pool.take([65], 0.02) is None
    assert time.monotonic() - began < 0.02
    assert offsets(pool, pool.take([64], 0)) == [64]
    del kept


def test_what_can_never_fit_waits_for_nothing():
    began = time.monotonic()
    assert MemoryPool(128, "cpu").take([64, 65], 10) is None
    assert time.monotonic() - began < 5


def test_room_comes_back_from_within_a_call_of_the_pool():
    """As where the collector ends copies in a cycle while the pool is locked."""
    pool = MemoryPool(128, "cpu")
    copies = pool.take([128], 0)
    with pool._freed:
        del copies
    assert pool.take([128], 0) is not None


def test_threads_in_inference_mode_may_write_a_pool_and_others_one_of_theirs():
    with torch.inference_mode():
        pool = MemoryPool(64, "cpu")
        pool.take([64], 0).buffers[0].fill_(1)
    pool.take([64], 0).buffers[0].fill_(2)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60))
def test_free_parts_never_overlap_and_all_come_back(steps):
    free, taken = FreeList(100), []
    for is_take, number in steps:
        if is_take:
            offset = free.take(number)
            if offset is not None and number:
                assert all(offset + number <= o or o + n <= offset for o, n in taken)
                assert offset + number <= 100
                taken.append((offset, number))
        elif taken:
            free.give_back(*taken.pop(number % len(taken)))
        assert free.nbytes + sum(n for _, n in taken) == 100
    for part in taken:
        free.give_back(*part)
    assert free.take(100) == 0
