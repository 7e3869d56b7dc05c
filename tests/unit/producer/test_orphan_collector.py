"""Objects that no process owns are freed, after a grace period and with everybody's consent."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ray.experimental.rdt.producer.owner_monitor import OrphanCollector
from tests.unit.fakes import Clock, FakeRay, FakeSession

KEY = b"k" * 16


class Process:
    """A process with a collector; it may own the objects in ``owns``."""

    def __init__(self, session: FakeSession, clock: Clock):
        self.session = session
        self.owns: set[str] = set()
        self.collector = OrphanCollector(
            session,  # type: ignore[arg-type]
            lambda key: key in session.agent.owner_of,
            lambda object_id, key: object_id in self.owns,
            clock,
        )

    @property
    def stored(self) -> list[bytes]:
        return list(self.session.agent.owner_of)

    @property
    def asked(self) -> list[bytes]:
        return [peer for peer, _, _ in self.session.requests]


@pytest.fixture
def producer(process: Callable[[int], FakeSession], clock: Clock) -> Process:
    made = Process(process(1), clock)
    made.session.agent.owner_of[KEY] = b""
    made.collector.add("object", KEY)
    return made


@pytest.fixture
def other(process: Callable[[int], FakeSession], clock: Clock) -> Process:
    return Process(process(2), clock)


def test_an_orphan_is_freed_after_the_grace_period(
    producer: Process, other: Process, clock: Clock
) -> None:
    clock.sleep(3.0)
    producer.session.tick()
    assert producer.stored == [KEY]
    assert not producer.asked
    clock.sleep(0.1)
    producer.session.tick()
    assert set(producer.asked) == {producer.session.address, other.session.address}
    assert not producer.stored


def test_an_object_that_a_process_may_own_gets_another_grace_period(
    producer: Process, other: Process, clock: Clock
) -> None:
    other.owns.add("object")
    clock.sleep(3.1)
    producer.session.tick()
    assert producer.stored == [KEY]
    questions = len(producer.asked)
    clock.sleep(2.9)
    producer.session.tick()
    assert len(producer.asked) == questions
    other.owns.clear()
    clock.sleep(0.2)
    producer.session.tick()
    assert not producer.stored


def test_a_claimed_object_is_asked_about_no_more(producer: Process, clock: Clock) -> None:
    producer.session.agent.owner_of[KEY] = b"its owner"
    clock.sleep(3.1)
    producer.session.tick()
    assert producer.stored == [KEY]
    assert not producer.asked


def test_a_freed_object_is_asked_about_no_more(producer: Process, clock: Clock) -> None:
    producer.session.agent.owner_of.clear()
    clock.sleep(3.1)
    producer.session.tick()
    assert not producer.asked


def test_a_process_that_does_not_answer_keeps_the_object_while_it_lives(
    producer: Process, other: Process, clock: Clock, fake_ray: FakeRay
) -> None:
    producer.session.silent[other.session.address] = TimeoutError("no answer")
    clock.sleep(3.1)
    producer.session.tick()
    assert producer.stored == [KEY]
    fake_ray.dead.add(other.session.worker_id)
    clock.sleep(3.1)
    producer.session.tick()
    assert not producer.stored


def test_a_dead_process_is_asked_once(
    producer: Process, other: Process, clock: Clock, fake_ray: FakeRay
) -> None:
    producer.session.silent[other.session.address] = TimeoutError("no answer")
    fake_ray.dead.add(other.session.worker_id)
    clock.sleep(3.1)
    producer.session.tick()
    producer.session.agent.owner_of[b"second"] = b""
    producer.collector.add("second", b"second")
    clock.sleep(3.1)
    producer.session.tick()
    assert producer.asked.count(other.session.address) == 1
    assert not producer.stored


def test_objects_are_asked_about_again_if_nobody_could_be_asked(
    producer: Process, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("the GCS does not answer")

    clock.sleep(3.1)
    with monkeypatch.context() as patch:
        patch.setattr("ray.experimental.rdt.rpc.process_directory.known_agents", fail)
        with pytest.raises(RuntimeError):
            producer.session.tick()
    assert producer.stored == [KEY]
    clock.sleep(3.1)
    producer.session.tick()
    assert not producer.stored
