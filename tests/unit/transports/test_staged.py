"""Device memory through host memory, between two real agents of this process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ray.experimental.rdt._agent import AgentError
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import CallError, Session
from ray.experimental.rdt.transports.base import Peer
from ray.experimental.rdt.transports.staged import reading as staged_reading
from ray.experimental.rdt.transports.staged import transport as staged
from ray.experimental.rdt.transports.staged.shared_slots import SlotLost
from ray.experimental.rdt.transports.staged.transport import StagedTransport
from tests.fake_device import TYPE, accelerator, launch
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
    monkeypatch.setattr(staged_reading, "CHUNK_NBYTES", CHUNK)
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


def blanks(*sizes: int) -> list[torch.Tensor]:
    return [
        torch.zeros(size, dtype=torch.uint8, device=f"{TYPE}:{index % 2}")
        for index, size in enumerate(sizes)
    ]


def read(sides, exposed, targets, timeout_s=10.0):
    producer, consumer = sides
    consumer.transport.read(producer.peer, exposed, targets, Deadline.after(timeout_s))


def served(side: Side) -> int:
    return side.session.agent.stats()["regions"]


def pulls(side: Side) -> int:
    """Return the number of chunks that its agent has copied between host memory."""
    stats = side.session.agent.stats()
    return sum(stats[f"pulls_{lane}"] for lane in ("inproc", "map", "cma", "shm", "tcp"))


def free_slots(side: Side) -> int:
    return len(side.transport._slots[TYPE]._free)


def ask(sides, exposed, timeout_s=5.0):
    """Make the producer copy a chunk that no consumer reads."""
    producer, consumer = sides
    body = {"exposure": exposed["exposure"], "start": 0, "stop": CHUNK, "timeout_s": timeout_s}
    return consumer.session.call(producer.peer.address, protocol.STAGED_CHUNK, body, 5)


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
    assert pulls(sides[1]) == (-(-sum(sizes) // CHUNK) if device == "cpu" else 0)


def test_read_returns_when_the_device_has_the_bytes(sides, monkeypatch):
    exposed = sides[0].transport.expose(sources(5 * CHUNK))
    begun, ended, copy = [], [], accelerator.copy

    class Watched:
        def __init__(self, event):
            self.event = event

        def is_reached(self):
            return self.event.is_reached()

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
    monkeypatch.setattr(staged_reading, "_GRACE_S", 0.5)
    exposed = sides[0].transport.expose(sources(5 * CHUNK))
    begun, ended, copy = [], threading.Event(), accelerator.copy

    class Copy:
        def is_reached(self):
            return ended.is_set()

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
    kind = TransferFailed if is_late else ValueError
    with pytest.raises(kind, match="the device broke") as failure:
        read(sides, exposed, blanks(*[CHUNK // 2] * 10))
    assert getattr(failure.value, "may_still_write", False) is is_late
    assert time.monotonic() - started < 1.4


def test_deadline_while_the_last_copy_runs_says_that_it_goes_on(sides, monkeypatch):
    monkeypatch.setattr(staged_reading, "_GRACE_S", 0.1)
    exposed = sides[0].transport.expose(sources(5))
    copy = accelerator.copy

    class Copy:
        def is_reached(self):
            return False

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
    ask(sides, exposed)
    assert served(producer) == 1
    consumer.session.close()
    wait_until(lambda: not producer.transport._chunks and not served(producer), "released")


def test_chunks_are_released_when_their_reader_has_given_up(sides, monkeypatch):
    producer, _ = sides
    monkeypatch.setattr(staged, "_READER_SLACK_S", 0.1)
    exposed = producer.transport.expose(sources(CHUNK))
    for timeout_s in (0.5, 60):
        ask(sides, exposed, timeout_s)
    assert served(producer) == 2
    wait_until(lambda: len(producer.transport._chunks) == served(producer) == 1, "released")
    (kept,) = producer.transport._chunks.values()
    assert not kept.until.has_passed()


def test_withdraw_releases_what_nobody_took(sides):
    producer, _ = sides
    exposed = producer.transport.expose(sources(CHUNK))
    ask(sides, exposed)
    producer.transport.withdraw(exposed)
    wait_until(lambda: not producer.transport._chunks and not served(producer), "released")


@pytest.mark.parametrize("sizes", [[3 * CHUNK], [10, 20, 30]], ids=["large", "packed"])
def test_a_pull_waits_for_no_later_work_of_either_side(sides, sizes):
    given = [tensor for size in sizes for tensor in sources(size)]
    got = [torch.zeros_like(tensor) for tensor in given]
    exposed, gate = sides[0].transport.expose(given), threading.Event()
    launch(torch.zeros(1, device=TYPE), 1, gate)
    try:
        read(sides, exposed, got)
    finally:
        gate.set()
    assert [g.tolist() for g in got] == [s.tolist() for s in given]


def test_memory_is_written_after_what_it_was_used_for(sides, monkeypatch):
    monkeypatch.setattr(staged_reading, "_GRACE_S", 0.1)
    producer, consumer = sides
    given, got, gate = sources(CHUNK, 10), [*blanks(CHUNK, 10)], threading.Event()
    exposed = producer.transport.expose(given)
    launch(got[0], 7, gate)
    launch(got[1], 7)
    after = [accelerator.record(buffer.device) for buffer in got]
    with pytest.raises(TimeoutError):
        consumer.transport.read(producer.peer, exposed, got, Deadline.after(0.2), after)
    gate.set()
    consumer.transport.read(producer.peer, exposed, got, Deadline.after(10), after)
    assert [g.tolist() for g in got] == [s.tolist() for s in given]


@pytest.mark.parametrize("has_room", [True, False])
def test_small_tensors_cross_to_and_from_the_host_together(sides, monkeypatch, has_room):
    monkeypatch.setattr(staged_reading, "CHUNK_NBYTES", 16 << 20)
    given = [tensor.to(TYPE) for tensor in torch.randint(0, 255, (2000, 4096), dtype=torch.uint8)]
    given.insert(1000, torch.full((1 << 20,), 7, dtype=torch.uint8, device=TYPE))
    got = [torch.zeros_like(tensor) for tensor in given]
    crossings, copy = [], accelerator.copy

    def counted(pairs, *args):
        crossings.extend(target.is_cpu != source.is_cpu for target, source in pairs)
        return copy(pairs, *args)

    def no_room(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(accelerator, "copy", counted)
    if not has_room:
        monkeypatch.setattr(accelerator, "empty", no_room)
    read(sides, sides[0].transport.expose(given), got)
    assert torch.equal(torch.cat(got).cpu(), torch.cat(given).cpu())
    # 1,000 small ones, the large one, 1,000 small ones; there and back.
    assert sum(crossings) == (2 * 3 if has_room else 2 * 2001)


def test_slots_are_used_again_and_few(sides):
    exposed = sides[0].transport.expose(sources(50 * CHUNK))
    for _ in range(3):
        read(sides, exposed, blanks(50 * CHUNK))
    made = sides[0].transport._slots[TYPE]._made
    assert 1 <= made <= staged._SLOTS
    assert len(sides[1].transport._reader._mappings._known) == made
    wait_until(lambda: free_slots(sides[0]) == made, "given back")


def test_when_all_slots_are_read_other_memory_serves(sides, monkeypatch):
    monkeypatch.setattr(staged, "_SLOTS", 1)
    given, got = sources(2 * CHUNK), blanks(2 * CHUNK)
    exposed = sides[0].transport.expose(given)
    answered = ask(sides, exposed, 60)
    assert answered["slot"] is not None
    started = time.monotonic()
    read(sides, exposed, got)
    assert time.monotonic() - started < 5
    assert got[0].tolist() == given[0].tolist()
    assert pulls(sides[1]) == 2
    sides[1].session.agent.free(sides[0].peer.address, answered["key"])
    wait_until(lambda: free_slots(sides[0]) == 1, "given back")
    read(sides, exposed, blanks(CHUNK))
    assert pulls(sides[1]) == 2


def test_a_request_waits_for_a_slot(sides, monkeypatch):
    monkeypatch.setattr(staged, "_SLOTS", 1)
    monkeypatch.setattr(staged, "_SLOT_WAIT_S", 20)
    exposed = sides[0].transport.expose(sources(CHUNK))
    key = ask(sides, exposed, 60)["key"]
    timer = threading.Timer(0.2, sides[1].session.agent.free, [sides[0].peer.address, key])
    timer.start()
    read(sides, exposed, blanks(CHUNK))
    assert pulls(sides[1]) == 0


def test_slots_of_a_lost_reader_are_given_back(sides):
    producer, consumer = sides
    exposed = producer.transport.expose(sources(CHUNK))
    ask(sides, exposed, 60)
    assert free_slots(producer) == 0
    consumer.session.close()
    wait_until(lambda: free_slots(producer) == 1, "given back")


def test_a_slot_that_was_taken_back_while_it_was_read_is_an_error(sides, monkeypatch):
    producer, consumer = sides
    exposed = producer.transport.expose(sources(CHUNK))
    copy = accelerator.copy

    def take_back(pairs, *args):
        if not pairs[0][0].is_cpu:  # the consumer's
            producer.transport._on_peer_lost(consumer.peer.agent_id)
            wait_until(lambda: free_slots(producer) == 1, "given back")
            producer.transport._slots[TYPE].take(0).give_back()
        return copy(pairs, *args)

    monkeypatch.setattr(accelerator, "copy", take_back)
    with pytest.raises(SlotLost, match="took back"):
        read(sides, exposed, blanks(CHUNK))


def test_a_slot_that_a_device_still_writes_is_not_given_out(sides, monkeypatch):
    exposed, gate = sides[0].transport.expose(sources(CHUNK)), threading.Event()
    monkeypatch.setattr(accelerator, "gate", gate)
    with pytest.raises(CallError):
        ask(sides, exposed, 0.2)
    assert free_slots(sides[0]) == 0
    sides[0].transport._on_tick()
    assert free_slots(sides[0]) == 0
    gate.set()
    monkeypatch.setattr(accelerator, "gate", None)
    wait_until(lambda: free_slots(sides[0]) == 1, "given back at a tick")


def refuse_memfd(monkeypatch):
    def refuse(*args):
        raise OSError("memfd is forbidden")

    monkeypatch.setattr(os, "memfd_create", refuse)


def refuse_pinning(monkeypatch):
    monkeypatch.setattr(accelerator, "pin_error", "memory is locked up")


def refuse_opening(monkeypatch):
    def refuse(path):
        raise PermissionError("another user's process")

    monkeypatch.setattr(os, "readlink", refuse)


def show_another_process(monkeypatch):
    monkeypatch.setattr(os, "readlink", lambda path: "/dev/null")


@pytest.mark.parametrize(
    ("refuse", "why"),
    [
        (refuse_memfd, "memfd is forbidden"),
        (refuse_pinning, "memory is locked up"),
        (refuse_opening, "another user's process"),
        (show_another_process, "is not the producer's memory"),
    ],
)
def test_without_shared_memory_the_agent_pulls_and_it_is_said_once(
    sides, monkeypatch, caplog, refuse, why
):
    caplog.set_level(logging.INFO, "ray.rdt")
    given, got = sources(3 * CHUNK), blanks(3 * CHUNK)
    exposed = sides[0].transport.expose(given)
    with monkeypatch.context() as patch:
        refuse(patch)
        for _ in range(2):
            read(sides, exposed, got)
    assert got[0].tolist() == given[0].tolist()
    assert pulls(sides[1]) == 6
    assert sum(why in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("setting", [("RAY_RDT_LANES", "cma,tcp"), ("RAY_RDT_CHECKSUM", "1")])
def test_settings_that_ask_for_the_agents_lanes_are_followed(sides, monkeypatch, setting):
    monkeypatch.setenv(*setting)
    settings.cache_clear()
    try:
        given, got = sources(CHUNK, 10), blanks(CHUNK, 10)
        read(sides, sides[0].transport.expose(given), got)
    finally:
        monkeypatch.undo()
        settings.cache_clear()
    assert [g.tolist() for g in got] == [s.tolist() for s in given]
    assert pulls(sides[1]) == 2


@pytest.fixture
def pinned(monkeypatch):
    """The memory that the test has pinned. Other tests may unpin theirs meanwhile."""
    pinned, pin = [], accelerator.pin

    def watched(memory):
        undo, address = pin(memory), memory.data_ptr()
        pinned.append(address)

        def watched_undo():
            undo()
            pinned.remove(address)

        return watched_undo

    monkeypatch.setattr(accelerator, "pin", watched)
    return pinned


def test_a_consumer_unmaps_what_a_lost_producer_shared(sides, pinned):
    producer, _ = sides
    read(sides, producer.transport.expose(sources(CHUNK)), blanks(CHUNK))
    slot, mapping = pinned
    producer.session.close()
    wait_until(lambda: pinned == [slot], "unmapped")
    assert mapping != slot


def produce(secret: bytes, sizes: list[int], pipe: Any) -> None:
    """Runs on: a process of its own, until it is killed."""
    side = Side(secret)
    pipe.send((side.peer, side.transport.expose(sources(*sizes))))
    pipe.recv()


def ask_for_all(secret: bytes, peer: Peer, exposure: int, pipe: Any) -> None:
    """Runs on: a process of its own, which is killed while chunks are there for it."""
    side = Side(secret)
    body = {"exposure": exposure, "start": 0, "stop": 10, "timeout_s": 60}
    for _ in range(staged._SLOTS):
        side.session.call(peer.address, protocol.STAGED_CHUNK, body, 10)
    pipe.send(True)
    pipe.recv()


def test_slots_of_a_killed_reader_are_given_back():
    secret = os.urandom(32)
    producer = Side(secret)
    exposed = producer.transport.expose(sources(CHUNK))
    here, there = multiprocessing.get_context("spawn").Pipe()
    arguments = (secret, producer.peer, exposed["exposure"], there)
    child = multiprocessing.get_context("spawn").Process(target=ask_for_all, args=arguments)
    child.start()
    try:
        assert here.poll(60)
        assert free_slots(producer) == 0
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: free_slots(producer) == staged._SLOTS, "given back")
    finally:
        child.kill()
        child.join(10)
        producer.transport.close()
        producer.session.close()


def test_another_process_is_read_from_until_it_is_killed(pinned):
    secret, sizes = os.urandom(32), [3 * staged_reading.CHUNK_NBYTES, 10, 20]
    here, there = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=produce, args=(secret, sizes, there)
    )
    child.start()
    consumer = Side(secret)
    try:
        assert here.poll(60)
        peer, exposed = here.recv()
        got = blanks(*sizes)
        consumer.transport.read(peer, exposed, got, Deadline.after(60))
        assert all(torch.equal(g.cpu(), s.cpu()) for g, s in zip(got, sources(*sizes)))
        assert pulls(consumer) == 0
        assert pinned
        os.kill(child.pid, signal.SIGKILL)
        child.join(10)
        with pytest.raises(AgentError) as failure:
            consumer.transport.read(peer, exposed, got, Deadline.after(30))
        assert failure.value.code in ("peer_lost", "unreachable", "broken")
        wait_until(lambda: not pinned, "unmapped")
    finally:
        child.kill()
        consumer.transport.close()
        consumer.session.close()
