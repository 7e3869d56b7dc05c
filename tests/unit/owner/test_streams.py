"""Streams at their caller: items are adopted, and the producer learns when no more are taken."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import ray
from ray.experimental.rdt.common.ray_core import STREAM_KEYWORD
from ray.experimental.rdt.owner import streams
from ray.experimental.rdt.owner.streams import TakenStreams
from ray.experimental.rdt.rpc import protocol
from tests.unit.fakes import FakeRay, FakeSession, rdt_value


@pytest.fixture
def closed(process: Callable[[int], FakeSession]) -> list[str]:
    """The streams that the producer has been told to close."""
    names: list[str] = []
    process(2).serve(protocol.STREAM_CLOSE, lambda peer, body: names.append(body["stream"]))
    return names


@pytest.fixture
def caller(process: Callable[[int], FakeSession], closed: list[str]) -> FakeSession:
    return process(1)


@pytest.fixture
def producer(caller: FakeSession) -> FakeSession:
    return next(each for each in caller._network.values() if each is not caller)


@pytest.fixture
def taken(caller: FakeSession) -> TakenStreams:
    return TakenStreams(caller)  # type: ignore[arg-type]


def report(producer: FakeSession, caller: FakeSession, stream: str) -> None:
    body = {"stream": stream, "address": producer.address}
    producer.send_oneway(caller.address, protocol.STREAM_OPEN, body)


def test_the_call_carries_the_spec(taken: TakenStreams, caller: FakeSession) -> None:
    stream = taken.begin("AUTO", 2)
    assert stream.spec[1:] == ("auto", caller.address, 2)
    assert stream.add_to([1]) == [1, STREAM_KEYWORD, stream.spec]


def test_producers_learn_when_the_generator_is_gone(
    taken: TakenStreams, caller: FakeSession, producer: FakeSession, closed: list[str]
) -> None:
    stream = taken.begin("auto", 1)
    name = stream.spec.stream
    report(producer, caller, name)
    caller.tick()
    assert not closed
    assert len(taken) == 1
    del stream
    gc.collect()
    caller.tick()
    assert closed == [name]
    assert len(taken) == 0


def test_a_producer_that_reports_too_late_is_told_to_close(
    taken: TakenStreams, caller: FakeSession, producer: FakeSession, closed: list[str]
) -> None:
    stream = taken.begin("auto", 1)
    name = stream.spec.stream
    del stream
    gc.collect()
    caller.tick()
    assert not closed
    report(producer, caller, name)
    assert closed == [name]


class Owner:
    def __init__(self) -> None:
        self.adopted: list[tuple[Any, bytes, Any]] = []

    def adopt(self, ref: Any, head: Any, actor: Any) -> None:
        self.adopted.append((ref, head.key.strip(), actor))


@pytest.fixture
def owner(fake_ray: FakeRay) -> Owner:
    owner = Owner()
    fake_ray.rdt_manager = SimpleNamespace(owner=owner)
    return owner


def test_items_are_adopted(fake_ray: FakeRay, owner: Owner) -> None:
    value = rdt_value(b"key", 2)
    item = fake_ray.create(1, value)
    adopted = streams._adopt(item, "gloo", "the actor")
    assert adopted != item
    assert owner.adopted == [(adopted, b"key", "the actor")]
    ((put, transport),) = fake_ray.puts
    assert transport == "GLOO"
    assert put.metadata == value[1]
    assert put.contained_object_refs == [item]


@pytest.mark.parametrize("value", [(b"", b"PYTHON", None), (b"", b"", None), (b"", None, None)])
def test_plain_values_stay(fake_ray: FakeRay, owner: Owner, value: Any) -> None:
    item = fake_ray.create(1, value)
    assert streams._adopt(item, "auto", None) is item
    assert not owner.adopted


def test_inline_objects_stay(fake_ray: FakeRay, owner: Owner) -> None:
    from ray.experimental.rdt.common.descriptor import Descriptor, encode

    head = Descriptor(b"k" * 16, 8, bytes(16), "auto", b"address", True)
    item = fake_ray.create(1, (b"", encode(head), None))
    assert streams._adopt(item, "auto", None) is item
    assert not owner.adopted


def test_a_nil_item_stays(fake_ray: FakeRay, owner: Owner) -> None:
    nil = ray.ObjectRef.nil()
    assert streams._adopt(nil, "auto", None) is nil
