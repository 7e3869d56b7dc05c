"""The descriptor's bytes."""

from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray.experimental.rdt.common import descriptor
from ray.experimental.rdt.common.descriptor import Descriptor, DescriptorError

descriptors = st.builds(
    Descriptor,
    key=st.binary(min_size=16, max_size=16),
    nbytes=st.integers(0, 2**64 - 1),
    producer=st.binary(min_size=16, max_size=16),
    transport=st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=255),
    address=st.binary(max_size=500),
    is_eager=st.booleans(),
    origin=st.sampled_from([b"", bytes(28)]),
)


@given(descriptors)
def test_round_trip(head: Descriptor):
    metadata = descriptor.encode(head)
    assert descriptor.is_rdt(metadata)
    assert descriptor.decode(metadata) == head


@given(descriptors)
def test_ray_can_add_fields_and_split_at_commas(head: Descriptor):
    metadata = descriptor.encode(head) + b",DEBUG:1234"
    assert metadata.split(b",")[0] == b"PYTHON"
    assert len(metadata.split(b",")) == 3
    assert descriptor.decode(metadata) == head


def test_plain_values_are_not_ours():
    assert not descriptor.is_rdt(b"PYTHON")
    assert not descriptor.is_rdt(b"")
    assert not descriptor.is_rdt(None)


@given(descriptors, st.data())
def test_truncation_is_an_error(head: Descriptor, data: st.DataObject):
    raw = base64.b64decode(descriptor.encode(head)[len(descriptor.PREFIX) :])
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(DescriptorError):
        descriptor.unpack(raw[:cut])


@given(st.binary(max_size=200))
def test_garbage_is_an_error_or_a_descriptor(raw: bytes):
    with contextlib.suppress(DescriptorError):
        assert isinstance(descriptor.unpack(raw), Descriptor)


def test_another_version_is_named():
    with pytest.raises(DescriptorError, match="version 9, this process reads 2"):
        descriptor.unpack(bytes([9]) + bytes(60))


def test_text_that_is_no_base64():
    with pytest.raises(DescriptorError, match="base64"):
        descriptor.decode(b"PYTHON,RDT!!!")
