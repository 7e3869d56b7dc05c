"""The memory pool that exposed objects are copied into."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray.experimental.rdt.transports.nixl_pool import FreeList, MemoryPool


def filled(*sizes):
    return [torch.full((size,), 1 + i, dtype=torch.uint8) for i, size in enumerate(sizes)]


def contents(pool, copies, buffers):
    return [pool.memory[o : o + b.numel()].tolist() for o, b in zip(offsets(pool, copies), buffers)]


def offsets(pool, copies):
    return [address - pool.memory.data_ptr() for address in copies.spans.rows[:, 0].tolist()]


def soon():
    return time.monotonic() + 10


def test_copies_do_not_overlap():
    pool = MemoryPool(1024, "cpu")
    buffers = filled(1, 100, 0, 64, 65)
    copies = pool.copy(buffers, soon())
    assert contents(pool, copies, buffers) == [buffer.tolist() for buffer in buffers]
    assert len(copies.parts) == 1


def test_an_object_is_spread_over_free_parts():
    pool = MemoryPool(4 * 64, "cpu")
    kept = [pool.copy(filled(64), soon()) for _ in range(4)]
    pool.free(kept[0])
    pool.free(kept[2])
    buffers = filled(64, 0, 60)
    copies = pool.copy(buffers, soon())
    assert sorted(offsets(pool, copies)) == [0, 0, 128]
    assert contents(pool, copies, buffers) == [buffer.tolist() for buffer in buffers]


def test_a_full_pool_waits_for_room():
    pool = MemoryPool(128, "cpu")
    first = pool.copy(filled(128), soon())
    threading.Timer(0.05, pool.free, [first]).start()
    second = pool.copy(filled(100), soon())
    assert offsets(pool, second) == [0]


def test_a_pool_that_stays_full_says_so():
    pool = MemoryPool(128, "cpu")
    pool.copy(filled(64), soon())
    with pytest.raises(TimeoutError, match=r"no room for 128 bytes in time \(64 of 128 are free\)"):
        pool.copy(filled(65), time.monotonic() + 0.01)
    assert offsets(pool, pool.copy(filled(64), soon())) == [64]


def test_close_ends_the_wait():
    pool = MemoryPool(64, "cpu")
    pool.copy(filled(64), soon())
    threading.Timer(0.05, pool.close).start()
    with pytest.raises(TimeoutError):
        pool.copy(filled(64), soon())


def test_what_can_never_fit_is_known():
    pool = MemoryPool(128, "cpu")
    assert pool.can_hold(filled(64, 64))
    assert not pool.can_hold(filled(65, 64))


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
