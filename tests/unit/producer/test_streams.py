"""Streams at their producer: items live until they are adopted, or until the caller is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ray.experimental.rdt.producer.streams import ProducedStreams, StreamItem, StreamSpec
from ray.experimental.rdt.rpc import protocol
from tests.unit.fakes import FakeRay, FakeSession

FIRST, SECOND = b"first", b"second"


@pytest.fixture
def producer(process: Callable[[int], FakeSession]) -> FakeSession:
    return process(1)


@pytest.fixture
def caller(process: Callable[[int], FakeSession]) -> FakeSession:
    caller = process(2)
    caller.serve(protocol.STREAM_OPEN, lambda peer, body: {})
    return caller


@pytest.fixture
def streams(producer: FakeSession, fake_ray: FakeRay) -> ProducedStreams:
    streams = ProducedStreams(producer)  # type: ignore[arg-type]

    def serialize_item(context: Any, value: Any, spec: StreamSpec) -> Any:
        return context, value, spec

    part = SimpleNamespace(streams=streams, serialize_item=serialize_item)
    fake_ray.rdt_manager = SimpleNamespace(producer=part)
    return streams


@pytest.fixture
def spec(caller: FakeSession) -> StreamSpec:
    return StreamSpec("stream", "auto", caller.address)


def store(producer: FakeSession, streams: ProducedStreams, key: bytes) -> None:
    producer.agent.owner_of[key] = b""
    streams.add("stream", key)


def close(caller: FakeSession, producer: FakeSession) -> None:
    caller.send_oneway(producer.address, protocol.STREAM_CLOSE, {"stream": "stream"})


def test_the_caller_learns_the_producers_address(
    producer: FakeSession, caller: FakeSession, streams: ProducedStreams, spec: StreamSpec
) -> None:
    streams.begin(spec)
    assert producer.requests == [
        (
            caller.address,
            protocol.STREAM_OPEN,
            {"stream": "stream", "address": producer.address},
        )
    ]


def test_closing_frees_the_items_that_were_not_adopted(
    producer: FakeSession, caller: FakeSession, streams: ProducedStreams, spec: StreamSpec
) -> None:
    streams.begin(spec)
    store(producer, streams, FIRST)
    store(producer, streams, SECOND)
    producer.agent.owner_of[FIRST] = caller.agent.agent_id
    close(caller, producer)
    assert list(producer.agent.owner_of) == [FIRST]


def test_items_of_a_closed_stream_are_freed_at_once(
    producer: FakeSession, caller: FakeSession, streams: ProducedStreams, spec: StreamSpec
) -> None:
    streams.begin(spec)
    close(caller, producer)
    store(producer, streams, FIRST)
    assert not producer.agent.owner_of


def test_only_the_caller_closes_a_stream(
    producer: FakeSession,
    process: Callable[[int], FakeSession],
    streams: ProducedStreams,
    spec: StreamSpec,
) -> None:
    streams.begin(spec)
    store(producer, streams, FIRST)
    close(process(3), producer)
    assert list(producer.agent.owner_of) == [FIRST]


def test_a_stream_is_forgotten_after_its_tasks_and_its_items(
    producer: FakeSession, streams: ProducedStreams, spec: StreamSpec
) -> None:
    streams.begin(spec)
    streams.begin(spec)
    store(producer, streams, FIRST)
    streams.end("stream")
    streams.dropped(FIRST)
    assert len(streams) == 1
    streams.end("stream")
    assert len(streams) == 0
    assert not streams.has_caller(b"caller")


def test_a_stream_is_open_while_its_generator_runs(
    streams: ProducedStreams, spec: StreamSpec
) -> None:
    def numbers() -> Iterator[int]:
        received = yield 1
        yield received

    items = spec.items_of(numbers())
    assert len(streams) == 0
    first = next(items)
    assert len(streams) == 1
    assert isinstance(first, StreamItem)
    assert first.__ray_rdt_serialize__("context") == ("context", 1, spec)
    assert items.send(2).__ray_rdt_serialize__("context") == ("context", 2, spec)
    assert list(items) == []
    assert len(streams) == 0


def test_a_generator_that_raises_ends_its_stream(
    streams: ProducedStreams, spec: StreamSpec
) -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise ValueError("on purpose")

    items = spec.items_of(fail())
    next(items)
    with pytest.raises(ValueError, match="on purpose"):
        next(items)
    assert len(streams) == 0


def test_async_generators_are_wrapped_as_well(streams: ProducedStreams, spec: StreamSpec) -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        yield 2

    async def take() -> list[Any]:
        return [item async for item in spec.items_of(numbers())]

    items = asyncio.run(take())
    assert [item.__ray_rdt_serialize__(None)[1] for item in items] == [1, 2]
    assert len(streams) == 0


def test_several_objects_of_one_yield_are_items_each(spec: StreamSpec) -> None:
    pair = spec._replace(objects_per_yield=2)
    assert [type(item) for item in pair.wrap([1, 2])] == [StreamItem, StreamItem]
    assert pair.wrap(3) == 3


def test_results_that_are_no_generators_stay(spec: StreamSpec) -> None:
    assert spec.items_of(7) == 7
