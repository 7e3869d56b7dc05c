"""Tensors on a device, without processes: what is captured, where it lands, when it is read."""

from __future__ import annotations

import ctypes
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray.experimental.rdt import capture
from ray.experimental.rdt.accelerators.base import have_ended
from ray.experimental.rdt.accelerators.cuda import CudaAccelerator
from ray.experimental.rdt.capture import Captured, lay_out
from ray.experimental.rdt.landing import allocate_on_devices, direct_targets
from ray.experimental.rdt.serve import await_writers, flat_buffers
from ray.experimental.rdt.transports.ways import ways
from tests import fake_device
from tests.fake_device import TYPE, accelerator, launch
from tests.unit.test_capture import Context
from tests.unit.test_fetch import FakeAgent

SESSION = SimpleNamespace(agent=FakeAgent())


@pytest.fixture(autouse=True)
def first_device():
    accelerator.current, accelerator.missing = 0, ""
    yield
    accelerator.current, accelerator.missing = 0, ""


def stored(captured: Captured) -> Any:
    return SimpleNamespace(captured=captured)


def deliver(captured: Captured, targets: Any = None, wish: Any = None) -> list[torch.Tensor]:
    """Moves the bytes as transports would, from flat buffers into flat buffers."""
    table = captured.table
    direct = direct_targets(table, targets)
    landing = allocate_on_devices(SESSION, table, direct, wish)
    sources, _ = captured.host_spans()
    for source, target, nbytes in zip(sources, landing.addresses, landing.lengths, strict=True):
        ctypes.memmove(target, source, nbytes)
    buffers = flat_buffers(stored(captured), TYPE)
    for target, buffer in zip(landing.flat(TYPE), buffers, strict=True):
        target.copy_(buffer)
    return list(landing.deliver(table, targets))


def test_device_tensors_are_carried_and_others_are_not():
    value = [torch.ones(3, device=TYPE), torch.ones(3, device="meta"), torch.ones(2)]
    _, captured = capture.take(Context(), value)
    assert [tensor.device.type for tensor in captured.tensors] == [TYPE, "cpu"]
    assert sorted(captured.table.devices.values()) == [TYPE]


def test_host_spans_leave_device_memory_out():
    tensors = [torch.ones(3, device=TYPE), torch.arange(4), torch.ones(5, device=f"{TYPE}:1")]
    captured = lay_out(tensors)
    addresses, lengths = captured.host_spans()
    assert (list(addresses), list(lengths)) == ([tensors[1].data_ptr()], [32])
    assert len(captured.events) == 2


def test_cpu_tensors_record_nothing():
    tensor = torch.ones(3)
    captured = lay_out([tensor])
    assert captured.events == ()
    assert captured.table.devices == {}
    assert [list(part) for part in captured.host_spans()] == [[tensor.data_ptr()], [12]]


def test_mixed_object_arrives_on_the_consumers_current_device():
    base = torch.arange(12.0, device=f"{TYPE}:1")
    tensors = [
        base,
        torch.arange(5),
        base[3:7],
        base.view(3, 4).t(),
        torch.nn.Parameter(torch.ones(2, 2, device=TYPE)),
        torch.empty(0, 3, device=TYPE),
        torch.zeros(0),
    ]
    got = deliver(lay_out(tensors, [type(t) is torch.nn.Parameter for t in tensors]))
    for one, other in zip(got, tensors, strict=True):
        assert str(one.device) == ("cpu" if other.is_cpu else f"{TYPE}:0")
        assert type(one) is type(other)
        assert one.stride() == other.stride()
        assert one.cpu().tolist() == other.cpu().tolist()
    got[0].fill_(7)
    assert got[2].cpu().tolist() == [7.0] * 4
    assert got[3].cpu().eq(7).all()


def test_current_device_decides():
    accelerator.current = 1
    (got,) = deliver(lay_out([torch.ones(3, device=f"{TYPE}:0")]))
    assert str(got.device) == f"{TYPE}:1"


def test_consumer_without_the_device_gets_host_tensors():
    captured = lay_out([torch.ones(3, device=TYPE), torch.zeros(2)])
    accelerator.missing = "it was pulled out"
    got = deliver(captured)
    assert [tensor.device.type for tensor in got] == ["cpu", "cpu"]
    assert got[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("wish", "lands"), [("cpu", "cpu"), (f"{TYPE}:1", f"{TYPE}:1"), (TYPE, f"{TYPE}:0")]
)
def test_wished_device_is_landed_on(wish: str, lands: str):
    (got,) = deliver(lay_out([torch.ones(3, device=TYPE)]), wish=torch.device(wish))
    assert str(got.device) == lands


@pytest.mark.parametrize("device", ["cpu", f"{TYPE}:0", f"{TYPE}:1"])
def test_target_receives_directly_wherever_it_is(device: str):
    captured = lay_out([torch.arange(6.0, device=TYPE)])
    target = torch.zeros(6, device=device)
    assert direct_targets(captured.table, [target]) == {0: target}
    assert deliver(captured, [target])[0] is target
    assert target.tolist() == [0, 1, 2, 3, 4, 5]


def test_targets_that_cannot_receive_directly_are_filled():
    captured = lay_out([torch.arange(6.0, device=TYPE), torch.arange(3.0)])
    targets = [torch.zeros(12, device=TYPE)[::2], torch.zeros(3, device=TYPE)]
    assert direct_targets(captured.table, targets) == {}
    deliver(captured, targets)
    assert [target.tolist() for target in targets] == [[0, 1, 2, 3, 4, 5], [0, 1, 2]]


def test_target_that_requires_grad_receives():
    captured = lay_out([torch.arange(3.0, device=TYPE)])
    target = torch.nn.Parameter(torch.zeros(3, device=TYPE))
    deliver(captured, [target])
    assert target.tolist() == [0, 1, 2]


def test_bytes_are_read_after_what_the_producers_stream_had():
    tensor, gate = torch.zeros(4, device=TYPE), threading.Event()
    launch(tensor, 5, gate)
    captured = lay_out([tensor])
    with pytest.raises(TimeoutError):
        await_writers(stored(captured), TYPE, 0)
    gate.set()
    await_writers(stored(captured), TYPE, time.monotonic() + 5)
    assert flat_buffers(stored(captured), TYPE)[0].view(torch.float32).tolist() == [5] * 4


def test_work_of_other_streams_is_not_waited_for():
    tensor, gate = torch.zeros(4, device=TYPE), threading.Event()
    with accelerator.on(fake_device.Stream()):
        launch(tensor, 5, gate)
    await_writers(stored(lay_out([tensor])), TYPE, time.monotonic() + 5)
    gate.set()


def test_side_copies_come_after_the_current_stream():
    source, target, gate = torch.zeros(4, device=TYPE), torch.zeros(4), threading.Event()
    launch(source, 5, gate)
    copied = accelerator.copy([(target, source)], source.device)
    with pytest.raises(TimeoutError):
        copied.wait(0.05)
    gate.set()
    copied.wait(5)
    assert target.tolist() == [5] * 4


@pytest.mark.parametrize("on_gpu", [(True, True), (True, False), (False, True)])
def test_memory_of_a_queued_cuda_copy_is_not_given_out_again(monkeypatch, on_gpu):
    """A copy runs on a side stream, of which torch's allocator knows nothing by itself."""
    calls = []
    side = SimpleNamespace(wait_stream=lambda stream: calls.append(("after", stream)))
    event = SimpleNamespace(record=lambda stream: calls.append(("event", stream)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)

    class Tensor:
        def __init__(self, is_cuda):
            self.is_cuda = is_cuda

        def record_stream(self, stream):
            assert self.is_cuda
            calls.append(("used on", stream, self))

        def copy_(self, source, non_blocking):
            calls.append(("copy", self, source))

    target, source = map(Tensor, on_gpu)
    CudaAccelerator().copy([(target, source)], torch.device("cuda", 0))
    used = [("used on", side, tensor) for tensor in (target, source) if tensor.is_cuda]
    assert calls == [("after", "current"), *used, ("copy", target, source), ("event", side)]


def test_events_have_one_period_to_end_together():
    class Ended:
        def wait(self, timeout_s):
            pass

    class Never:
        def wait(self, timeout_s):
            time.sleep(timeout_s)
            raise TimeoutError

    class Broken:
        def wait(self, timeout_s):
            raise RuntimeError("the device failed")

    assert have_ended([], 0)
    assert have_ended([Ended(), Ended()], 0)
    assert not have_ended([Broken(), Ended()], 0)
    started = time.monotonic()
    assert not have_ended([Never(), Never(), Ended(), Never()], 0.2)
    assert time.monotonic() - started < 0.4


def test_order_of_ways():
    assert ways("auto", "cpu") == ["nixl"]
    assert ways("gloo", "cpu") == ["gloo"]
    assert ways("auto", TYPE) == [f"{TYPE}_ipc", "staged"]
    assert ways("nixl", TYPE) == ["nixl", f"{TYPE}_ipc", "staged"]
    assert ways(f"{TYPE}_ipc", TYPE) == [f"{TYPE}_ipc", "staged"]
    accelerator.missing = "it was pulled out"
    assert ways("auto", TYPE) == ["staged"]
