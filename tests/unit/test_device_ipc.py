"""The transport behind "cuda_ipc", over a fake device, between two sessions of this process."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from ray.experimental.rdt.transports import cuda_ipc
from ray.experimental.rdt.transports.base import Peer, TransportUnavailable
from ray.experimental.rdt.transports.cuda_ipc import CudaIpcTransport, DeviceIpcTransport
from tests.fake_device import TYPE, Sharing, accelerator
from tests.support import wait_until
from tests.unit.gloo_peers import FakeSession


@pytest.fixture(autouse=True)
def sharing(monkeypatch: pytest.MonkeyPatch) -> Sharing:
    monkeypatch.setattr(accelerator, "sharing", Sharing())
    return accelerator.sharing


class Side:
    """One end."""

    def __init__(self) -> None:
        self.session = FakeSession()
        self.transport = DeviceIpcTransport(self.session, TYPE)  # type: ignore[arg-type]
        self.peer = Peer(self.session.address, self.session.agent.agent_id)


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    made = Side(), Side()
    yield made
    for side in made:
        side.transport.close()
        side.session.close()


def bytes_on(device: str, count: int = 100) -> torch.Tensor:
    return (torch.arange(count) % 251).to(torch.uint8).to(device)


def read(sides, exposed, *targets, timeout_s=5.0):
    producer, consumer = sides
    consumer.transport.read(producer.peer, exposed, targets, time.monotonic() + timeout_s)


@pytest.mark.parametrize("target", ["cpu", f"{TYPE}:0", f"{TYPE}:1"])
def test_bytes_arrive_and_memory_is_closed(sides, sharing, target):
    sources = [bytes_on(f"{TYPE}:1"), bytes_on(f"{TYPE}:0", 7)[3:], bytes_on(f"{TYPE}:0", 0)]
    exposed = sides[0].transport.expose(sources)
    got = [torch.zeros(len(source), dtype=torch.uint8, device=target) for source in sources]
    read(sides, exposed, *got)
    assert [g.tolist() for g in got] == [s.tolist() for s in sources]
    assert (sharing.shared, sharing.live, sharing.revoked) == (2, 0, 0)
    wait_until(lambda: not sides[0].transport._shares, "the producer is told that it was closed")


def test_each_reader_gets_handles_of_its_own(sides, sharing):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    for _ in range(3):
        read(sides, exposed, bytes_on(TYPE))
    assert (sharing.shared, sharing.live) == (3, 0)


def test_memory_is_closed_before_the_producer_is_told(sides, sharing, monkeypatch):
    live, tell = [], sides[1].session.tell
    monkeypatch.setattr(
        sides[1].session, "tell", lambda *args: (live.append(sharing.live), tell(*args))
    )
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    read(sides, exposed, bytes_on(TYPE))
    assert live == [0]


def test_other_host(sides):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    with pytest.raises(TransportUnavailable, match="another host"):
        read(sides, {**exposed, "boot_id": "x"}, bytes_on(TYPE))


def test_device_that_is_hidden(sides, sharing):
    exposed = sides[0].transport.expose([bytes_on(f"{TYPE}:1")])
    sharing.visible = {0}
    with pytest.raises(TransportUnavailable, match=r"does not see.*fake-1.*CUDA_VISIBLE_DEVICES"):
        read(sides, exposed, bytes_on(TYPE))
    assert sharing.shared == 0


def test_devices_that_do_not_reach_each_other(sides, sharing):
    exposed = sides[0].transport.expose([bytes_on(f"{TYPE}:1")])
    sharing.peers = False
    with pytest.raises(TransportUnavailable, match=rf"{TYPE}:0 cannot reach.*{TYPE}:1"):
        read(sides, exposed, bytes_on(f"{TYPE}:0"))
    read(sides, exposed, bytes_on(f"{TYPE}:1"))


def test_memory_that_cannot_be_shared_is_named_to_the_consumer(sides, sharing):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    sharing.broken = "an expandable segment"
    with pytest.raises(Exception, match="expandable segment"):
        read(sides, exposed, bytes_on(TYPE))


def test_handles_that_were_not_opened_are_revoked(sides, sharing, monkeypatch):
    sources = [bytes_on(TYPE) for _ in range(3)]
    exposed = sides[0].transport.expose(sources)
    opens, good = [], sharing.open

    def open_one(handle, device):
        opens.append(handle)
        if len(opens) == 2:
            raise RuntimeError("no")
        return good(handle, device)

    monkeypatch.setattr(sharing, "open", open_one)
    with pytest.raises(TransportUnavailable, match="cannot be opened: no"):
        read(sides, exposed, *[bytes_on(TYPE) for _ in sources])
    wait_until(lambda: sharing.revoked == 2, "the two others are revoked")
    assert sharing.live == 0


def test_lost_reader_gives_its_handles_back(sides, sharing):
    producer, consumer = sides
    exposed = producer.transport.expose([bytes_on(TYPE)])
    name = f"rdt.{TYPE}_ipc.share"
    body = {"exposure": exposed["exposure"]}
    consumer.session.call(producer.peer.address, name, body, 5)
    producer.session.lose(consumer.peer.agent_id)
    assert sharing.revoked == 1
    assert not producer.transport._shares


def test_withdrawn_object_is_not_shared(sides, sharing):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    sides[0].transport.withdraw(exposed)
    with pytest.raises(Exception, match="not exposed here any more"):
        read(sides, exposed, bytes_on(TYPE))
    assert sharing.shared == 0


def test_host_memory_is_refused(sides):
    with pytest.raises(TransportUnavailable, match="memory only"):
        sides[0].transport.expose([torch.zeros(3, dtype=torch.uint8)])


def test_deadline_while_the_device_is_busy(sides, monkeypatch):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    busy_for(0.6, monkeypatch)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        read(sides, exposed, bytes_on(TYPE), timeout_s=0.2)
    assert time.monotonic() - started < 3


def test_failure_keeps_open_what_a_copy_still_reads(sides, sharing, monkeypatch):
    monkeypatch.setattr(cuda_ipc, "_GRACE_S", 0.3)
    exposed = sides[0].transport.expose([bytes_on(f"{TYPE}:{i % 2}") for i in range(4)])
    ended, begun, copy = threading.Event(), [], accelerator.copy

    class Copy:
        def wait(self, timeout_s):
            if not ended.wait(timeout_s):
                raise TimeoutError("not this one")

    def slow_then_broken(pairs, device, after=()):
        if begun:
            raise ValueError("the device broke")
        begun.append(Copy())
        return begun[0]

    monkeypatch.setattr(accelerator, "copy", slow_then_broken)
    with pytest.raises(ValueError, match="the device broke") as failure:
        read(sides, exposed, *[bytes_on(f"{TYPE}:{i % 2}") for i in range(4)])
    assert failure.value.may_still_write
    assert sharing.live == 4
    assert sides[0].transport._shares
    ended.set()
    monkeypatch.setattr(accelerator, "copy", copy)
    del failure
    read(sides, exposed, *[bytes_on(TYPE) for _ in range(4)])
    assert sharing.live == 0
    wait_until(lambda: not sides[0].transport._shares, "the producer is told that it was closed")


def test_failure_whose_copies_end_leaves_nothing_open(sides, sharing, monkeypatch):
    exposed = sides[0].transport.expose([bytes_on(TYPE)])
    busy_for(0.6, monkeypatch)
    with pytest.raises(TimeoutError) as failure:
        read(sides, exposed, bytes_on(TYPE), timeout_s=0.2)
    assert failure.value.may_still_write is False
    del failure
    gc.collect()
    assert sharing.live == 0


def busy_for(seconds, monkeypatch):
    """Copies wait so long."""
    gate = threading.Event()
    monkeypatch.setattr(accelerator, "gate", gate)
    threading.Timer(seconds, gate.set).start()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_ipc_without_a_gpu_says_so(sides):
    with pytest.raises(TransportUnavailable, match=r"cuda_ipc cannot be used.*no NVIDIA GPU"):
        CudaIpcTransport(sides[0].session)  # type: ignore[arg-type]
