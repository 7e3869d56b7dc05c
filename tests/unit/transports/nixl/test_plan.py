"""The memory that one nixl transfer moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray.experimental.rdt.transports.nixl.plan import Spans, cover, plan, spans_of
from tests.unit.transports.nixl.nixl_fakes import host_spans

BIG = 1 << 40


def rows(*values):
    return np.array(values, np.uint64).reshape(-1, 3)


def planned(local, remote, nbytes=BIG, count=BIG):
    return [
        (batch.local.tolist(), batch.remote.tolist())
        for batch in plan(local, remote, nbytes, nbytes, count)
    ]


def test_spans_of_tensors_are_their_memory():
    tensors = [torch.zeros(7, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
    spans = spans_of(tensors)
    assert spans.rows[:, 1].tolist() == [7, 0]
    assert spans.rows[0, 0] == tensors[0].data_ptr()
    assert spans.nbytes == 7
    assert not spans.has_device_memory


def test_spans_survive_their_encoding():
    spans = host_spans((4096, 10), (1 << 47, 0))
    spans.starts.extend([7, 1 << 47])
    decoded = Spans.decode(spans.encode())
    assert decoded.starts == spans.starts
    assert np.array_equal(decoded.rows, spans.rows)
    assert np.array_equal(decoded.kinds, spans.kinds)


def test_malformed_spans_are_refused():
    encoded = host_spans((4096, 10)).encode()
    with pytest.raises(ValueError, match="malformed"):
        Spans.decode({**encoded, "kinds": b"\0\0"})
    with pytest.raises(ValueError, match="malformed"):
        Spans.decode({**encoded, "kinds": b"\7"})
    with pytest.raises(ValueError, match="multiple"):
        Spans.decode({**encoded, "starts": b"\0\0"})


@pytest.mark.parametrize(
    ("gap", "count"), [(0, 1), (100, 1), (4096, 1), (3 * 4096, 2), (1 << 30, 2)]
)
def test_host_spans_near_each_other_are_covered_by_one_stretch(gap, count):
    first, second = (40960, 100, 0), (40960 + 100 + gap, 50, 0)
    covering = cover(rows(second, first))
    assert len(covering) == count
    assert covering[0, 0] == first[0]
    assert covering[-1, 0] + covering[-1, 1] == second[0] + second[1]


def test_empty_spans_need_no_cover():
    assert len(cover(rows((5, 0, 0)))) == 0


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 20_000)), max_size=30))
def test_every_span_lies_in_one_stretch_and_every_page_of_it_is_used(spans):
    given_rows = rows(*[(start, nbytes, 0) for start, nbytes in spans])
    covering = cover(given_rows).tolist()
    for start, nbytes in spans:
        inside = [at <= start and start + nbytes <= at + size for at, size, _ in covering]
        assert not nbytes or inside.count(True) == 1
    used = {p for s, n in spans if n for p in range(s // 4096, (s + n - 1) // 4096 + 1)}
    for at, size, _ in covering:
        assert set(range(at // 4096, (at + size - 1) // 4096 + 1)) <= used


def test_neighbours_on_both_sides_become_one_span():
    local = host_spans((0, 10), (10, 10), (20, 10))
    remote = host_spans((100, 10), (110, 10), (200, 10))
    assert planned(local, remote) == [
        ([[0, 20, 0], [20, 10, 0]], [[100, 20, 0], [200, 10, 0]]),
    ]


@pytest.mark.parametrize("side", [0, 1])
def test_neighbours_in_different_registrations_stay_apart(side):
    sides = host_spans((0, 10), (10, 10), (20, 10)), host_spans((50, 10), (60, 10), (70, 10))
    for spans in sides:
        spans.kinds[:] = 1
    sides[side].starts.append(int(sides[side].rows[2, 0]))
    assert planned(*sides) == [([[0, 20, 0], [20, 10, 0]], [[50, 20, 0], [70, 10, 0]])]


def test_large_spans_are_cut_and_requests_are_bounded():
    local, remote = host_spans((0, 25), (100, 1)), host_spans((1000, 25), (2000, 1))
    assert [batch[0] for batch in planned(local, remote, nbytes=10)] == [
        [[0, 10, 0]],
        [[10, 10, 0]],
        [[20, 5, 0], [100, 1, 0]],
    ]
    assert [len(batch[0]) for batch in planned(local, remote, count=1)] == [1, 1]


def test_each_pair_of_kinds_has_its_own_requests():
    local, remote = host_spans((0, 1), (10, 1)), host_spans((20, 1), (30, 1))
    remote.kinds[1] = 1
    kinds = [(b.local_kind, b.remote_kind) for b in plan(local, remote, BIG, BIG, BIG)]
    assert kinds == [("DRAM", "DRAM"), ("DRAM", "VRAM")]


@pytest.mark.parametrize(
    ("here", "there", "size"), [(0, 0, 10), (1, 0, 40), (0, 1, 40), (1, 1, 40)]
)
def test_requests_for_device_memory_are_larger(here, there, size):
    local, remote = host_spans((0, 80)), host_spans((1000, 80))
    local.kinds[0], remote.kinds[0] = here, there
    sizes = {int(b.local[:, 1].sum()) for b in plan(local, remote, 10, 40, BIG)}
    assert sizes == {size}


def test_empty_buffers_move_nothing():
    assert planned(host_spans((0, 0)), host_spans((0, 0))) == []
    assert planned(host_spans(), host_spans()) == []


def test_buffers_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="exposes 1 buffers, 2 are given"):
        planned(host_spans((0, 1), (2, 1)), host_spans((0, 1)))
    with pytest.raises(ValueError, match="buffer 1 has 3 bytes, the peer's has 4"):
        planned(host_spans((0, 1), (2, 3)), host_spans((0, 1), (2, 4)))


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 100)), max_size=20),
    st.integers(1, 3000),
    st.integers(1, 5),
)
def test_every_byte_is_read_once_from_its_place(spans, nbytes, count):
    here = there = 0
    local, remote = [], []
    for size, gap in spans:
        local.append((here, size))
        remote.append((there, size))
        here, there = here + size, there + size + gap
    pairs = {}
    for batch in plan(host_spans(*local), host_spans(*remote), nbytes, nbytes, count):
        assert len(batch.local) <= count
        assert batch.local[:, 1].sum() <= nbytes
        for (at, size, _), (source, same, _) in zip(batch.local.tolist(), batch.remote.tolist()):
            assert size == same
            pairs.update({at + i: source + i for i in range(size)})
    expected = {
        at + i: source + i for (at, size), (source, _) in zip(local, remote) for i in range(size)
    }
    assert pairs == expected
