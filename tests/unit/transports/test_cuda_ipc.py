"""The transport behind "cuda_ipc", over a fake device, between two sessions of this process."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from ray.experimental.rdt.accelerators.shared_memory import CannotShare, MemoryLost, SharedMemory
from ray.experimental.rdt.common import processes
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.common.processes import Process
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.transports.base import Peer, TransportUnavailable
from ray.experimental.rdt.transports.cuda_ipc import imports
from ray.experimental.rdt.transports.cuda_ipc import transport as cuda_ipc_transport
from ray.experimental.rdt.transports.cuda_ipc.transport import (
    CudaIpcTransport,
    DeviceIpcTransport,
    Loans,
)
from tests.fake_device import TYPE, Sharing, accelerator, launch, on_host
from tests.support import wait_until
from tests.unit.transports.process_group.gloo_peers import CallError, FakeSession

DEVICE = torch.device(TYPE, 0)


class Side:
    """One end, which takes itself for a process of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, process: int) -> None:
        self.driver = Sharing(process)
        self.memory = SharedMemory(self.driver)
        monkeypatch.setattr(accelerator, "sharing", self.memory)
        self.session = FakeSession()
        self.transport = DeviceIpcTransport(self.session, TYPE)  # type: ignore[arg-type]
        self.peer = Peer(self.session.address, self.session.agent.agent_id)

    def borrow(self, other: Side, *sources: torch.Tensor, events=()):
        """Transfer as the consumer's fetch and the producer's server do."""
        borrowing = self.transport.borrow(DEVICE)
        deadline = Deadline.after(5)
        agent = self.session.agent.agent_id
        lent = other.transport.lend(agent, borrowing.asked, sources, events, deadline)
        lent = protocol.unpack(protocol.pack(lent))
        return borrowing.take(other.peer, lent, [source.numel() for source in sources])


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Side, Side, Side]]:
    made = tuple(Side(monkeypatch, 1000 + i) for i in range(3))
    yield made
    for side in made:
        side.transport.close()
        side.session.close()


def bytes_on(device: str | torch.device, count: int = 100) -> torch.Tensor:
    return (torch.arange(count) % 251).to(torch.uint8).to(device)


def read(sides, exposed, *targets, timeout_s=5.0, after=()):
    producer, consumer, _ = sides
    consumer.transport.read(producer.peer, exposed, targets, Deadline.after(timeout_s), after)


def await_tick(sides, is_reached, what: str) -> None:
    """Wait, while time passes for the sessions."""

    def look() -> bool:
        gc.collect()  # the fake device's operators make cycles
        for side in sides:
            side.session.tick()
        return bool(is_reached())

    wait_until(look, what)


def all_is_given_back(*sides) -> None:
    await_tick(sides, lambda: not any(s.driver.live for s in sides), "what was opened is closed")
    await_tick(sides, lambda: not any(len(s.transport._loans) for s in sides), "no loan is left")


# Copies.


@pytest.mark.parametrize("target", [f"{TYPE}:0", f"{TYPE}:1"])
def test_bytes_arrive_and_memory_is_unmapped_when_the_object_goes(sides, target):
    sources = [bytes_on(f"{TYPE}:1"), bytes_on(f"{TYPE}:0", 7)[3:], bytes_on(f"{TYPE}:0", 0)]
    exposed = sides[0].transport.expose(sources)
    got = [torch.zeros(len(source), dtype=torch.uint8, device=target) for source in sources]
    read(sides, exposed, *got)
    assert [g.tolist() for g in got] == [s.tolist() for s in sources]
    assert sides[1].driver.live == len(sides[0].transport._loans) + 1 == 2
    sides[0].transport.withdraw(exposed)
    all_is_given_back(*sides)


def test_object_is_mapped_once_for_all_its_reads(sides, monkeypatch):
    producer, consumer, _ = sides
    calls, call = [], consumer.session.call
    monkeypatch.setattr(
        consumer.session, "call", lambda *args: calls.append(args[1]) or call(*args)
    )
    exposed = producer.transport.expose([bytes_on(TYPE)])
    for _ in range(3):
        got = torch.zeros(100, dtype=torch.uint8, device=TYPE)
        read(sides, exposed, got)
        assert got.tolist() == bytes_on(TYPE).tolist()
    assert (len(calls), consumer.driver.opened) == (1, 1)
    producer.transport.withdraw(exposed)
    all_is_given_back(*sides)


def test_object_that_goes_while_it_is_read_is_unmapped_after_that(sides, monkeypatch):
    producer, consumer, _ = sides
    exposed = producer.transport.expose([bytes_on(TYPE)])
    read(sides, exposed, bytes_on(TYPE))
    target, gate = torch.zeros(100, dtype=torch.uint8, device=TYPE), threading.Event()
    launch(target, 7, gate)
    taken = accelerator.record(DEVICE)
    reading = threading.Thread(
        target=read, args=(sides, exposed, target), kwargs={"timeout_s": 20, "after": [taken]}
    )
    reading.start()
    (mapped,) = consumer.transport._reads._objects.values()
    wait_until(lambda: mapped.readers == 1, "it is read")
    producer.transport.withdraw(exposed)
    wait_until(lambda: mapped.is_ended, "the consumer hears of it")
    assert (consumer.driver.live, len(producer.transport._loans)) == (1, 1)
    gate.set()
    reading.join(20)
    assert target.tolist() == bytes_on(TYPE).tolist()
    all_is_given_back(*sides)


def test_lost_producer_and_the_end_of_a_session_unmap_what_was_copied(sides):
    producer, consumer, third = sides
    exposed = producer.transport.expose([bytes_on(TYPE)])
    for reader in (consumer, third):
        read((producer, reader, None), exposed, bytes_on(TYPE))
        assert reader.driver.live == 1
    consumer.transport._on_peer_lost(producer.peer.agent_id)
    third.transport.close()
    all_is_given_back(*sides)


def test_ten_thousand_tensors_are_a_few_handles(sides, monkeypatch):
    sources = [bytes_on(TYPE, 1 + i % 50) for i in range(10_000)]
    answers, call = [], sides[1].session.call
    monkeypatch.setattr(
        sides[1].session, "call", lambda *args: answers.append(call(*args)) or answers[-1]
    )
    exposed = sides[0].transport.expose(sources)
    got = [torch.zeros(len(source), dtype=torch.uint8, device=TYPE) for source in sources]
    read(sides, exposed, *got)
    assert all(g.equal(s) for g, s in zip(map(on_host, got), map(on_host, sources), strict=True))
    assert sides[0].driver.exported <= 6
    assert len(protocol.pack([exposed, *answers])) < 200_000
    sides[0].transport.withdraw(exposed)
    all_is_given_back(*sides)


def test_segment_is_mapped_once_and_until_its_last_user(sides):
    producer, consumer, _ = sides
    first, second = bytes_on(TYPE), bytes_on(TYPE, 50)
    (one,) = consumer.borrow(producer, first)
    (two,) = consumer.borrow(producer, second)
    assert (consumer.driver.opened, consumer.driver.live) == (1, 1)
    del one
    gc.collect()
    await_tick(sides, lambda: len(producer.transport._loans) == 1, "one object is given back")
    assert consumer.driver.live == 1
    assert two.tolist() == second.tolist()
    del two
    all_is_given_back(*sides)


def test_memory_is_unmapped_before_the_producer_is_told(sides, monkeypatch):
    consumer = sides[1]
    live, tell = [], consumer.session.send_oneway
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    read(sides, exposed, bytes_on(TYPE))
    monkeypatch.setattr(
        consumer.session,
        "send_oneway",
        lambda *args: (live.append(consumer.driver.live), tell(*args)),
    )
    sides[0].transport.withdraw(exposed)
    all_is_given_back(*sides)
    assert live == [0]


def test_producer_does_not_wait_for_the_memory_to_be_unmapped(sides):
    sides[1].driver.rest = rest = threading.Event()
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    read(sides, exposed, bytes_on(TYPE))
    sides[0].transport.withdraw(exposed)
    assert (sides[1].driver.live, len(sides[0].transport._loans)) == (1, 1)
    rest.set()
    all_is_given_back(*sides)


def test_target_is_written_after_what_the_consumers_stream_had(sides):
    target, gate = torch.zeros(100, dtype=torch.uint8, device=TYPE), threading.Event()
    launch(target, 7, gate)
    taken = accelerator.record(DEVICE)
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    threading.Timer(0.2, gate.set).start()
    read(sides, exposed, target, after=[taken])
    assert target.tolist() == bytes_on(TYPE).tolist()


def test_busy_producer_delays_no_pull(sides):
    busy, gate = torch.zeros(4, device=TYPE), threading.Event()
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    launch(busy, 7, gate)
    read(sides, exposed, torch.zeros(100, dtype=torch.uint8, device=TYPE), timeout_s=2)
    assert busy.tolist() == [0] * 4
    gate.set()


def test_other_host(sides):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    with pytest.raises(TransportUnavailable, match="another host"):
        read(sides, {**exposed, "place": "x"}, bytes_on(TYPE))


def test_process_of_another_container_is_not_taken_for_one_that_has_ended(
    sides, monkeypatch, tmp_path
):
    """Its number means another process here, or none: its loans would end at once."""
    (tmp_path / "pid").touch()
    monkeypatch.setattr(processes, "_PID_NAMESPACE", tmp_path / "pid")
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    elsewhere = Side(monkeypatch, 2000)
    with pytest.raises(TransportUnavailable, match="in another container"):
        read((sides[0], elsewhere, None), exposed, bytes_on(TYPE))
    with pytest.raises(TransportUnavailable, match="in another container"):
        elsewhere.borrow(sides[0], bytes_on(TYPE))
    assert not len(sides[0].transport._loans)
    elsewhere.transport.close()
    elsewhere.session.close()


def test_host_memory_is_left_to_others(sides):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    with pytest.raises(TransportUnavailable, match="writes device memory only"):
        read(sides, exposed, torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(TransportUnavailable, match="memory only"):
        sides[0].transport.expose([torch.zeros(3, dtype=torch.uint8)])
    assert sides[0].driver.exported == 0


def test_devices_that_do_not_reach_each_other(sides):
    exposed = sides[0].transport.expose([bytes_on(f"{TYPE}:1")])
    sides[1].driver.unreachable = {"fake-1"}
    with pytest.raises(TransportUnavailable, match=rf"{TYPE}:0 cannot reach.*fake-1"):
        read(sides, exposed, bytes_on(f"{TYPE}:0"))
    read(sides, exposed, bytes_on(f"{TYPE}:1"))
    sides[0].transport.withdraw(exposed)
    all_is_given_back(*sides)


def test_memory_that_cannot_be_shared_is_named_to_the_consumer(sides):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    sides[0].driver.broken = "an expandable segment"
    with pytest.raises(Exception, match="expandable segment"):
        read(sides, exposed, bytes_on(TYPE))


def test_segments_opened_before_one_that_cannot_be_are_given_back(sides, monkeypatch):
    sources = [bytes_on(TYPE, 1 << 19) for _ in range(3)]
    exposed = sides[0].transport.expose(sources)
    opens, good = [], sides[1].driver.map

    def open_one(handle, device):
        opens.append(handle)
        if len(opens) == 2:
            raise CannotShare("no")
        return good(handle, device)

    monkeypatch.setattr(sides[1].driver, "map", open_one)
    with pytest.raises(TransportUnavailable, match="cannot be opened: no"):
        read(sides, exposed, *[bytes_on(TYPE, 1 << 19) for _ in sources])
    all_is_given_back(*sides)


def test_withdrawn_object_is_not_shared(sides):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    sides[0].transport.withdraw(exposed)
    with pytest.raises(Exception, match="not exposed here any more"):
        read(sides, exposed, bytes_on(TYPE))
    assert sides[0].driver.exported == 0


def test_failure_keeps_mapped_what_a_copy_still_reads(sides, monkeypatch):
    monkeypatch.setattr(imports, "_GRACE_S", 0.3)
    monkeypatch.setattr(accelerator, "gate", gate := threading.Event())
    source = bytes_on(TYPE)
    exposed = sides[0].transport.expose([source])
    started = time.monotonic()
    with pytest.raises(TimeoutError) as failure:
        read(sides, exposed, bytes_on(TYPE), timeout_s=0.2)
    assert time.monotonic() - started < 3
    assert failure.value.may_still_write
    sides[0].transport.withdraw(exposed)
    monkeypatch.setattr(cuda_ipc_transport, "_SLACK_S", 0.0)
    sides[0].session.tick()
    assert (sides[1].driver.live, len(sides[0].transport._loans)) == (1, 1)
    gate.set()
    all_is_given_back(*sides)


def test_failure_whose_copies_end_leaves_nothing_mapped(sides, monkeypatch):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    gate = threading.Event()
    monkeypatch.setattr(accelerator, "gate", gate)
    threading.Timer(0.6, gate.set).start()
    with pytest.raises(TimeoutError) as failure:
        read(sides, exposed, bytes_on(TYPE), timeout_s=0.2)
    assert not isinstance(failure.value, TransferFailed)  # one would say that bytes still come
    all_is_given_back(*sides)


# The memory itself.


def test_borrowed_memory_is_the_producers(sides):
    producer, consumer, _ = sides
    source, other = bytes_on(TYPE), bytes_on(TYPE, 1 << 19)
    got, empty, large = consumer.borrow(producer, source, bytes_on(TYPE, 0), other)
    assert (got.device, got.tolist()) == (source.device, source.tolist())
    assert got.untyped_storage().nbytes() == 100
    assert (empty.device, empty.numel()) == (source.device, 0)
    assert large.tolist() == other.tolist()
    source.fill_(9)
    assert got.tolist() == [9] * 100
    got[:50].fill_(3)
    assert source.tolist() == [3] * 50 + [9] * 50
    del got, large
    all_is_given_back(*sides)


def test_memory_is_kept_until_the_last_tensor_over_it_dies(sides):
    producer, consumer, _ = sides
    source = bytes_on(TYPE, 1 << 19)  # has a segment of its own, which ends with it
    (got,) = consumer.borrow(producer, source)
    view = got[10:100].view(2, 45)
    del source, got
    gc.collect()
    assert view.tolist() == bytes_on("cpu")[10:].view(2, 45).tolist()
    del view
    all_is_given_back(*sides)


def test_memory_that_is_used_has_no_deadline(sides, monkeypatch):
    producer, consumer, _ = sides
    monkeypatch.setattr(cuda_ipc_transport, "_SLACK_S", -60.0)
    (got,) = consumer.borrow(producer, bytes_on(TYPE))
    wait_until(
        lambda: [each.until for each in producer.transport._loans._loans.values()] == [None],
        "the consumer's word",
    )
    producer.session.tick()
    assert len(producer.transport._loans) == 1
    del got
    all_is_given_back(*sides)


def test_memory_is_given_back_after_the_work_that_the_consumers_stream_has(sides):
    producer, consumer, _ = sides
    (got,) = consumer.borrow(producer, bytes_on(TYPE))
    gate, busy = threading.Event(), torch.zeros(4, device=TYPE)
    launch(busy, 7, gate)
    del got
    gc.collect()
    time.sleep(0.2)
    assert (consumer.driver.live, len(producer.transport._loans)) == (1, 1)
    gate.set()
    all_is_given_back(*sides)


def test_streams_wait_for_the_producer_and_the_host_does_not(sides):
    producer, consumer, _ = sides
    source, gate = torch.zeros(100, dtype=torch.uint8, device=TYPE), threading.Event()
    launch(source, 7, gate)
    event = accelerator.record(DEVICE)
    seen = torch.zeros(100, dtype=torch.uint8)
    with accelerator.on(accelerator.new_stream(DEVICE)):
        (got,) = consumer.borrow(producer, source, events=[event])
        assert got.tolist() == [0] * 100
        accelerator.stream().give(partial(seen.copy_, on_host(got)))
        used = accelerator.record(DEVICE)
    assert not used.is_reached()
    gate.set()
    used.wait(5)
    assert seen.tolist() == [7] * 100
    del got
    all_is_given_back(*sides)


def test_finished_producer_exports_no_event(sides):
    producer, consumer, _ = sides
    producer.driver.events_broken = "no events"
    event = accelerator.record(DEVICE)
    event.wait(5)
    (got,) = consumer.borrow(producer, bytes_on(TYPE), events=[event])
    gate = threading.Event()
    launch(torch.zeros(4, device=TYPE), 7, gate)
    with pytest.raises(TransportUnavailable, match="events cannot be shared: no events"):
        consumer.borrow(producer, bytes_on(TYPE), events=[accelerator.record(DEVICE)])
    gate.set()
    del got
    all_is_given_back(*sides)


def test_two_readers_and_one_that_passes_it_on(sides):
    producer, second, third = sides
    source = bytes_on(TYPE)
    (one,) = second.borrow(producer, source)
    (two,) = third.borrow(second, one)
    (back,) = producer.borrow(third, two)
    assert back.data_ptr() == source.data_ptr()
    source.fill_(4)
    assert one.tolist() == two.tolist() == [4] * 100
    assert len(producer.transport._loans) == len(second.transport._loans) == 1
    del source, back
    gc.collect()
    assert two.tolist() == [4] * 100
    del one
    gc.collect()
    assert two.tolist() == [4] * 100
    del two
    all_is_given_back(*sides)


def test_another_device_is_not_borrowed(sides):
    with pytest.raises(TransportUnavailable, match="the memory is on"):
        sides[1].borrow(sides[0], bytes_on(f"{TYPE}:1"))
    assert sides[0].driver.exported == 0


def test_borrowing_that_is_abandoned_is_given_back(sides):
    producer, consumer, _ = sides
    borrowing = consumer.transport.borrow(DEVICE)
    borrowing.abandon(producer.peer)
    wait_until(lambda: bool(producer.transport._loans._ended_early), "the producer hears of it")
    until = Deadline.after(5)
    agent = consumer.session.agent.agent_id
    producer.transport.lend(agent, borrowing.asked, [bytes_on(TYPE)], [], until)
    assert not len(producer.transport._loans)


def test_loan_that_is_never_confirmed_ends(sides, monkeypatch):
    producer, consumer, _ = sides
    monkeypatch.setattr(cuda_ipc_transport, "_SLACK_S", 0.0)
    asked = consumer.transport.borrow(DEVICE).asked
    producer.transport.lend(
        consumer.session.agent.agent_id, asked, [bytes_on(TYPE)], [], Deadline.after(0)
    )
    assert len(producer.transport._loans) == 1
    producer.session.tick()
    assert not len(producer.transport._loans)


def test_loans_outlive_the_session(sides, monkeypatch):
    producer, consumer, _ = sides
    (got,) = consumer.borrow(producer, bytes_on(TYPE))
    producer.transport.close()
    monkeypatch.setattr(accelerator, "sharing", producer.memory)
    again = DeviceIpcTransport(producer.session, TYPE)  # type: ignore[arg-type]
    others = [bytes_on(TYPE).fill_(0) for _ in range(10)]
    assert got.tolist() == bytes_on(TYPE).tolist()
    assert len(again._loans) == 1
    del got, others
    await_tick(sides, lambda: not len(again._loans), "the memory is given back")


def test_borrowed_memory_outlives_the_session(sides):
    producer, consumer, _ = sides
    (got,) = consumer.borrow(producer, bytes_on(TYPE))
    consumer.transport.close()
    assert got.tolist() == bytes_on(TYPE).tolist()
    del got
    await_tick(sides, lambda: not consumer.driver.live, "it is unmapped")
    await_tick(
        sides, lambda: not consumer.transport._imports._count, "its thread has nothing left to do"
    )


def test_failed_device_is_not_memory_that_cannot_be_shared(sides, monkeypatch):
    def fail(address, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sides[0].driver, "export", fail)
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    with pytest.raises(CallError, match=r"^RuntimeError: CUDA error: an illegal memory access"):
        read(sides, exposed, bytes_on(TYPE))


# Deaths.


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("lacks", ["nothing", "permission", "the call", "/proc"])
def test_process_is_known_to_have_ended(other_process, monkeypatch, lacks):
    def refused(pid):
        raise PermissionError("seccomp")

    if lacks == "permission":
        monkeypatch.setattr(os, "pidfd_open", refused)
    elif lacks == "the call":
        monkeypatch.delattr(os, "pidfd_open")
    elif lacks == "/proc":
        monkeypatch.setattr(processes, "_started", lambda pid: "")
    process = Process(other_process.pid)
    assert not process.has_ended()
    other_process.kill()
    wait_until(process.has_ended, "its end is seen")
    other_process.wait()
    assert Process(other_process.pid).has_ended()


def test_process_that_is_looked_at_while_its_loan_ends_has_not_ended(other_process, monkeypatch):
    kept, look = Loans(), Process.has_ended
    kept.add("first", b"peer", other_process.pid, ["memory"], Deadline.after(60))

    def look_late(process: Process) -> bool:
        monkeypatch.setattr(Process, "has_ended", look)
        kept.end("first")
        kept.end_expired()
        kept.add("second", b"peer", other_process.pid, ["memory"], Deadline.after(60))
        return look(process)

    monkeypatch.setattr(Process, "has_ended", look_late)
    kept.end_expired()
    assert len(kept) == 1


def test_process_that_nobody_looks_at_any_more_costs_no_descriptor(other_process):
    before = len(os.listdir("/proc/self/fd"))
    kept = Loans()
    kept.add("first", b"peer", other_process.pid, ["memory"], Deadline.after(60))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    kept.end("first")
    kept.end_expired()
    assert len(os.listdir("/proc/self/fd")) == before


def test_lost_connection_ends_no_loan_while_the_consumer_lives(other_process):
    kept = Loans()
    kept.add("first", b"peer", other_process.pid, ["memory"], Deadline.after(60))
    kept.confirm("first")
    kept.end_expired()
    assert len(kept) == 1
    other_process.kill()
    wait_until(lambda: kept.end_expired() or not len(kept), "the loan ends")


def test_end_of_the_consumer_that_no_connection_tells_of(other_process):
    kept = Loans()
    kept.add("first", b"peer", other_process.pid, ["memory"], Deadline.after(60))
    kept.confirm("first")
    other_process.kill()
    wait_until(lambda: kept.end_expired() or not len(kept), "the loan ends")


def test_end_of_the_producer_is_said_and_its_memory_is_not_passed_on(
    sides, monkeypatch, other_process, caplog
):
    producer, consumer, third = sides
    described = producer.memory.describe

    def describe(buffers):
        layout = described(buffers)
        layout.segments[:] = [s._replace(pid=other_process.pid) for s in layout.segments]
        return layout

    monkeypatch.setattr(producer.memory, "describe", describe)
    (got,) = consumer.borrow(producer, bytes_on(TYPE))
    consumer.memory.check_owners([got])
    other_process.kill()
    other_process.wait()
    with caplog.at_level(logging.ERROR, "ray.rdt"):
        consumer.session.lose(producer.peer.agent_id)
        consumer.session.tick()
    (said,) = caplog.records
    assert f"process {other_process.pid} has ended" in said.getMessage()
    with pytest.raises(MemoryLost, match=rf"process {other_process.pid} has ended"):
        consumer.memory.check_owners([bytes_on(TYPE), got])
    consumer.memory.check_owners([bytes_on(TYPE)])
    with pytest.raises(MemoryLost):
        third.borrow(producer, bytes_on(TYPE))


def test_copy_from_a_process_that_ended_meanwhile_is_an_error(sides, monkeypatch, other_process):
    producer, _, _ = sides
    described, gate = producer.memory.describe, threading.Event()

    def describe(buffers):
        layout = described(buffers)
        layout.segments[:] = [s._replace(pid=other_process.pid) for s in layout.segments]
        return layout

    def end():
        other_process.kill()
        other_process.wait()
        gate.set()

    monkeypatch.setattr(producer.memory, "describe", describe)
    monkeypatch.setattr(accelerator, "gate", gate)
    exposed = producer.transport.expose([bytes_on(TYPE)])
    threading.Timer(0.3, end).start()
    with pytest.raises(MemoryLost) as failure:
        read(sides, exposed, bytes_on(TYPE))
    assert failure.value.code == "peer_lost"
    all_is_given_back(*sides)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_ipc_without_a_gpu_says_so(sides):
    with pytest.raises(TransportUnavailable, match=r"cuda_ipc cannot be used.*no NVIDIA GPU"):
        CudaIpcTransport(sides[0].session)  # type: ignore[arg-type]
