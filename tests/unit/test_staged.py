"""Device memory through host memory, between two real agents of this process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from ray.experimental.rdt.session import CallError, Session
from ray.experimental.rdt.transports import staged
from ray.experimental.rdt.transports.base import Peer
from ray.experimental.rdt.transports.staged import StagedTransport
from tests.fake_device import TYPE, accelerator
from tests.support import wait_until

CHUNK = 1000


class Side:
    """One end."""

    def __init__(self, secret: bytes) -> None:
        self.session = Session(secret, "127.0.0.1")
        self.transport = StagedTransport(self.session)
        self.peer = Peer(self.session.address, self.session.agent.agent_id)


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Side, Side]]:
    monkeypatch.setattr(staged, "CHUNK_NBYTES", CHUNK)
    secret = os.urandom(32)
    made = Side(secret), Side(secret)
    yield made
    for side in made:
        side.transport.close()
        side.session.close()


def sources(*sizes: int) -> list[torch.Tensor]:
    return [
        (torch.arange(size) * 7 % (index + 200)).to(torch.uint8).to(f"{TYPE}:{index % 2}")
        for index, size in enumerate(sizes)
    ]


def read(sides, exposed, targets, timeout_s=10.0):
    producer, consumer = sides
    consumer.transport.read(producer.peer, exposed, targets, time.monotonic() + timeout_s)


def served(side: Side) -> int:
    return side.session.agent.stats()["regions"]


@pytest.mark.parametrize("device", ["cpu", f"{TYPE}:0", f"{TYPE}:1"])
@pytest.mark.parametrize(
    "sizes",
    [[1], [CHUNK], [CHUNK + 1], [0, 3, 0, 5 * CHUNK + 1, 10, 0], [30] * 200, [CHUNK, CHUNK]],
    ids=lambda sizes: f"{len(sizes)}x{max(sizes)}",
)
def test_bytes_arrive_and_no_chunk_stays(sides, sizes, device):
    given = sources(*sizes)
    exposed = sides[0].transport.expose(given)
    got = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
    read(sides, exposed, got)
    assert [g.tolist() for g in got] == [s.tolist() for s in given]
    wait_until(lambda: not sides[0].transport._chunks and not served(sides[0]), "all freed")


def test_read_returns_when_the_device_has_the_bytes(sides, monkeypatch):
    exposed = sides[0].transport.expose(sources(5 * CHUNK))
    begun, ended, copy = [], [], accelerator.copy

    class Watched:
        def __init__(self, event):
            self.event = event

        def wait(self, timeout_s):
            self.event.wait(timeout_s)
            ended.append(self)

    def watched(*args):
        begun.append(Watched(copy(*args)))
        return begun[-1]

    monkeypatch.setattr(accelerator, "copy", watched)
    read(sides, exposed, [torch.zeros(5 * CHUNK, dtype=torch.uint8, device=TYPE)])
    assert len(begun) == 10
    assert set(begun) == set(ended)


def test_host_memory_is_written_without_a_copy_between(sides):
    exposed = sides[0].transport.expose(sources(10 * CHUNK))
    copies = accelerator.copies
    read(sides, exposed, [torch.zeros(10 * CHUNK, dtype=torch.uint8)])
    assert accelerator.copies - copies == 10


def test_few_chunks_are_asked_for_at_once(sides, monkeypatch):
    producer, consumer = sides
    exposed = producer.transport.expose(sources(30 * CHUNK))
    asked, start_call = [], consumer.session.start_call

    def watched(*args):
        wait = start_call(*args)
        asked.append(1)

        def answered(timeout_s):
            unanswered.append(sum(asked))
            asked.pop()
            return wait(timeout_s)

        return answered

    unanswered: list[int] = []
    monkeypatch.setattr(consumer.session, "start_call", watched)
    read(sides, exposed, [torch.zeros(30 * CHUNK, dtype=torch.uint8)])
    assert len(unanswered) == 30
    assert max(unanswered) == 3


def test_failure_leaves_nothing_behind(sides):
    exposed = sides[0].transport.expose(sources(5 * CHUNK))
    target = torch.zeros(5 * CHUNK, dtype=torch.uint8)
    sides[0].transport.withdraw(exposed)
    with pytest.raises(CallError, match="not exposed here any more") as caught:
        read(sides, exposed, [target])
    assert caught.value.code == "not_found"
    assert target.eq(0).all()


def test_deadline_while_the_producers_device_is_busy(sides, monkeypatch):
    exposed = sides[0].transport.expose(sources(CHUNK))
    gate = threading.Event()
    monkeypatch.setattr(accelerator, "gate", gate)
    with pytest.raises((TimeoutError, CallError)):
        read(sides, exposed, [torch.zeros(CHUNK, dtype=torch.uint8)], timeout_s=0.3)
    gate.set()
    read(sides, exposed, [torch.zeros(CHUNK, dtype=torch.uint8)])


@pytest.mark.parametrize("is_late", [False, True])
def test_failure_waits_once_for_all_copies_and_says_if_one_goes_on(sides, monkeypatch, is_late):
    monkeypatch.setattr(staged, "_GRACE_S", 0.5)
    exposed = sides[0].transport.expose(sources(5 * CHUNK))
    begun, ended, copy = [], threading.Event(), accelerator.copy

    class Copy:
        def wait(self, timeout_s):
            if not ended.wait(timeout_s):
                raise TimeoutError("not this one")

    def slow_then_broken(pairs, device, after=()):
        if pairs[0][0].is_cpu:  # the producer's
            return copy(pairs, device)
        if len(begun) == 3:
            if not is_late:
                ended.set()
            raise ValueError("the device broke")
        begun.append(Copy())
        return begun[-1]

    monkeypatch.setattr(accelerator, "copy", slow_then_broken)
    started = time.monotonic()
    with pytest.raises(ValueError, match="the device broke") as failure:
        read(sides, exposed, [torch.zeros(5 * CHUNK, dtype=torch.uint8, device=TYPE)])
    assert failure.value.may_still_write is is_late
    assert time.monotonic() - started < 1.4


def test_deadline_while_the_last_copy_runs_says_that_it_goes_on(sides, monkeypatch):
    monkeypatch.setattr(staged, "_GRACE_S", 0.1)
    exposed = sides[0].transport.expose(sources(5))
    copy = accelerator.copy

    class Copy:
        def wait(self, timeout_s):
            raise TimeoutError("the device is busy")

    def endless(pairs, device, after=()):
        return copy(pairs, device) if pairs[0][0].is_cpu else Copy()

    monkeypatch.setattr(accelerator, "copy", endless)
    with pytest.raises(TimeoutError, match="busy") as failure:
        read(sides, exposed, [torch.zeros(5, dtype=torch.uint8, device=TYPE)])
    assert failure.value.may_still_write


def test_chunks_of_a_lost_reader_are_released(sides):
    producer, consumer = sides
    exposed = producer.transport.expose(sources(CHUNK))
    body = {"exposure": exposed["exposure"], "start": 0, "stop": CHUNK, "timeout_s": 5}
    consumer.session.call(producer.peer.address, "rdt.staged.chunk", body, 5)
    assert served(producer) == 1
    consumer.session.close()
    wait_until(lambda: not producer.transport._chunks and not served(producer), "released")


def test_chunks_are_released_when_their_reader_has_given_up(sides, monkeypatch):
    producer, consumer = sides
    monkeypatch.setattr(staged, "_READER_SLACK_S", 0.1)
    exposed = producer.transport.expose(sources(CHUNK))
    for timeout_s in (0.5, 60):
        body = {"exposure": exposed["exposure"], "start": 0, "stop": CHUNK, "timeout_s": timeout_s}
        consumer.session.call(producer.peer.address, "rdt.staged.chunk", body, 5)
    assert served(producer) == 2
    wait_until(lambda: len(producer.transport._chunks) == served(producer) == 1, "released")
    (kept,) = producer.transport._chunks.values()
    assert kept.until > time.monotonic()


def test_withdraw_releases_what_nobody_took(sides):
    producer, consumer = sides
    exposed = producer.transport.expose(sources(CHUNK))
    body = {"exposure": exposed["exposure"], "start": 0, "stop": CHUNK, "timeout_s": 5}
    consumer.session.call(producer.peer.address, "rdt.staged.chunk", body, 5)
    producer.transport.withdraw(exposed)
    wait_until(lambda: not producer.transport._chunks and not served(producer), "released")
