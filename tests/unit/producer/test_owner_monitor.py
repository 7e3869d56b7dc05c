"""Objects of owners that died are freed; owners that only lost their connection keep theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ray.experimental.rdt.producer.owner_monitor import OwnerMonitor
from ray.experimental.rdt.producer.streams import ProducedStreams, StreamSpec
from ray.experimental.rdt.rpc import protocol
from tests.unit.fakes import FakeRay, FakeSession

KEY, OTHER = b"key", b"other"


@pytest.fixture
def owner(process: Callable[[int], FakeSession]) -> FakeSession:
    owner = process(2)
    owner.serve(protocol.STREAM_OPEN, lambda peer, body: {})
    return owner


@pytest.fixture
def streams(producer: FakeSession) -> ProducedStreams:
    return ProducedStreams(producer)  # type: ignore[arg-type]


@pytest.fixture
def producer(process: Callable[[int], FakeSession]) -> FakeSession:
    return process(1)


@pytest.fixture(autouse=True)
def monitor(producer: FakeSession, streams: ProducedStreams) -> OwnerMonitor:
    return OwnerMonitor(producer, streams)  # type: ignore[arg-type]


def test_objects_of_a_dead_owner_are_freed(
    producer: FakeSession, owner: FakeSession, fake_ray: FakeRay
) -> None:
    producer.agent.owner_of = {KEY: owner.agent.agent_id, OTHER: b"somebody else"}
    fake_ray.dead.add(owner.worker_id)
    producer.lose(owner)
    assert list(producer.agent.owner_of) == [OTHER]


def test_an_owner_that_is_alive_keeps_its_objects_until_it_dies(
    producer: FakeSession, owner: FakeSession, fake_ray: FakeRay
) -> None:
    producer.agent.owner_of = {KEY: owner.agent.agent_id}
    producer.lose(owner)
    producer.tick()
    assert list(producer.agent.owner_of) == [KEY]
    fake_ray.dead.add(owner.worker_id)
    producer.tick()
    assert not producer.agent.owner_of


def test_a_dead_owner_is_checked_no_more(
    producer: FakeSession, owner: FakeSession, fake_ray: FakeRay
) -> None:
    producer.agent.owner_of = {KEY: owner.agent.agent_id}
    fake_ray.dead.add(owner.worker_id)
    producer.lose(owner)
    producer.agent.owner_of = {KEY: owner.agent.agent_id}
    producer.tick()
    assert list(producer.agent.owner_of) == [KEY]


def test_peers_that_own_nothing_cost_no_question(
    producer: FakeSession, owner: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    monkeypatch.setattr("ray.experimental.rdt.rpc.process_directory.is_worker_alive", asked.append)
    producer.lose(owner)
    producer.tick()
    assert not asked


def test_streams_of_a_dead_caller_are_closed(
    producer: FakeSession, owner: FakeSession, streams: ProducedStreams, fake_ray: FakeRay
) -> None:
    streams.begin(StreamSpec("stream", "auto", owner.address))
    streams.add("stream", KEY)
    producer.agent.owner_of = {KEY: b""}
    producer.lose(owner)
    assert list(producer.agent.owner_of) == [KEY]
    fake_ray.dead.add(owner.worker_id)
    producer.tick()
    assert not producer.agent.owner_of
    producer.agent.owner_of = {OTHER: b""}
    streams.add("stream", OTHER)
    assert not producer.agent.owner_of
