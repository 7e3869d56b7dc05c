"""The plan that both sides of a transfer compute, and the header they compare."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray.experimental.rdt.transports.process_group import packing
from ray.experimental.rdt.transports.process_group.packing import Header, Message, plan

KB, MB = 1 << 10, 1 << 20

sizes = st.lists(
    st.one_of(
        st.integers(0, 64),
        st.integers(0, 300 * KB),
        st.sampled_from([packing.SMALL_NBYTES - 1, packing.SMALL_NBYTES, packing.SLOT_NBYTES]),
        st.integers(15 * MB, 40 * MB),
    ),
    max_size=60,
)


def covered(message, sizes):
    if not message.is_packed:
        return [(message.first, message.start, message.start + message.nbytes)]
    return [(i, 0, sizes[i]) for i in range(message.first, message.last) if sizes[i]]


@given(sizes)
def test_every_byte_moves_once_and_in_order(sizes):
    parts = [part for message in plan(sizes) for part in covered(message, sizes)]
    expected = 0
    for index, size in enumerate(sizes):
        mine = [(start, stop) for i, start, stop in parts if i == index]
        assert sum(stop - start for start, stop in mine) == size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(mine))
        expected += size
    assert sum(stop - start for _, start, stop in parts) == expected
    assert parts == sorted(parts)


@given(sizes)
def test_messages_keep_their_limits(sizes):
    for message in plan(sizes):
        if not message.is_packed:
            assert 0 < message.nbytes <= packing.SEGMENT_NBYTES
        else:
            members = sizes[message.first : message.last]
            assert sum(members) == message.nbytes <= packing.SLOT_NBYTES
            assert all(n < packing.SMALL_NBYTES for n in members)


def test_small_buffers_share_messages():
    assert len(list(plan([20_000] * 10_000))) == -(-10_000 // (packing.SLOT_NBYTES // 20_000))


def test_lone_small_buffer_goes_straight():
    expected = [Message(1, 2, 0, MB), Message(2, 3, 0, 5), Message(3, 4, 0, MB)]
    assert list(plan([0, MB, 5, MB, 0])) == expected


def test_nothing_needs_no_message():
    assert list(plan([])) == list(plan([0, 0])) == []


def test_mixed_runs():
    expected = [Message(0, 2, 0, 3), Message(2, 3, 0, MB), Message(3, 5, 0, 7)]
    assert list(plan([1, 2, MB, 3, 4])) == expected


@given(sizes, st.integers(1, 2**31 - 1))
def test_header_survives_the_wire(sizes, tag):
    header = Header.describing(tag, sizes)
    assert len(header.encode()) == packing.HEADER_NBYTES
    assert Header.decode(header.encode()) == header


def test_header_tells_other_sizes_apart():
    assert Header.describing(1, [3, 4]) != Header.describing(1, [4, 3])
    assert Header.describing(1, [7]) != Header.describing(2, [7])


def test_refusal_is_cut_to_the_header():
    decoded = Header.decode(Header.refusing(9, "no " + "é" * 500).encode())
    assert decoded.tag == 9
    assert decoded.refusal.startswith("no éé")


def test_other_bytes_are_no_header():
    with pytest.raises(ValueError, match="header"):
        Header.decode(b"x" * packing.HEADER_NBYTES)
