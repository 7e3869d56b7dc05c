"""Tensors on a device, without processes: what is captured, where it lands, when it is read."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray.experimental.rdt.accelerators import cuda, cuda_calls
from ray.experimental.rdt.accelerators.cuda import CudaAccelerator, CudaEvent
from ray.experimental.rdt.accelerators.events import SideStreams, have_ended
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.consumer.fetcher import Fetcher, Request
from ray.experimental.rdt.consumer.receive_buffers import (
    ReceiveBuffers,
    allocate_with_devices,
    direct_targets,
    fill,
    hosted_regions,
    move,
    take_memory,
)
from ray.experimental.rdt.consumer.user_transfer import UserTransfer
from ray.experimental.rdt.producer.tensor_store import TensorStore
from ray.experimental.rdt.producer.transport_server import await_writers, flat_buffers
from ray.experimental.rdt.serialization import capture
from ray.experimental.rdt.serialization.envelope import Envelope
from ray.experimental.rdt.serialization.layout import Captured, lay_out
from ray.experimental.rdt.transports.selection import Pair, default_transports
from tests import fake_device
from tests.fake_device import TYPE, accelerator, launch, on_host
from tests.unit.consumer.test_fetcher import FakeAgent
from tests.unit.serialization.test_capture import Context

SESSION = SimpleNamespace(agent=FakeAgent())


@pytest.fixture(autouse=True)
def first_device():
    accelerator.current, accelerator.missing = 0, ""
    yield
    accelerator.current, accelerator.missing = 0, ""


def stored(captured: Captured) -> Any:
    return SimpleNamespace(captured=captured)


def receive(table: Any, targets: Any, target_device: Any = None) -> ReceiveBuffers:
    """Allocate as a transfer does."""
    received = allocate_with_devices(SESSION, table, direct_targets(table, targets))
    hosted = hosted_regions(table, targets)
    take_memory(SESSION, table, received, TYPE, target_device, hosted)
    return received


def deliver(
    captured: Captured, targets: Any = None, target_device: Any = None
) -> list[torch.Tensor]:
    """Move the bytes as transports do, from flat buffers into flat buffers."""
    table = captured.table
    received = receive(table, targets, target_device)
    sources, _ = captured.host_spans()
    for source, target, nbytes in zip(sources, received.addresses, received.lengths, strict=True):
        ctypes.memmove(target, source, nbytes)
    buffers = flat_buffers(stored(captured), TYPE)
    for target, buffer in zip(received.flat(TYPE), buffers, strict=True):
        target.copy_(buffer)
    return list(received.deliver(table, targets))


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
    ("target_device", "lands"), [("cpu", "cpu"), (f"{TYPE}:1", f"{TYPE}:1"), (TYPE, f"{TYPE}:0")]
)
def test_target_device_receives(target_device: str, lands: str):
    (got,) = deliver(
        lay_out([torch.ones(3, device=TYPE)]), target_device=torch.device(target_device)
    )
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


def test_what_only_host_targets_are_filled_from_lands_in_host_memory():
    base = torch.arange(6.0, device=TYPE)
    captured = lay_out([base, base[2:4], torch.ones(3, device=TYPE), torch.ones(2, device=TYPE)])
    targets = [
        torch.zeros(6),
        torch.zeros(2),
        torch.zeros(6)[::2],
        torch.zeros(4, device=TYPE)[::2],
    ]
    table = captured.table
    assert direct_targets(table, targets) == {}
    received = receive(table, targets)
    assert [buffer.device.type for buffer in received.flat(TYPE)] == ["cpu", "cpu", TYPE]
    deliver(captured, targets)
    assert [t.tolist() for t in targets] == [[0, 1, 2, 3, 4, 5], [2, 3], [1, 1, 1], [1, 1]]


def test_target_that_requires_grad_receives():
    captured = lay_out([torch.arange(3.0, device=TYPE)])
    target = torch.nn.Parameter(torch.zeros(3, device=TYPE))
    deliver(captured, [target])
    assert target.tolist() == [0, 1, 2]


@pytest.mark.parametrize("device", ["cpu", TYPE])
@pytest.mark.parametrize("step", [1, 2])
def test_target_of_inference_mode_receives(device: str, step: int):
    captured = lay_out([torch.arange(3.0, device=TYPE)])
    with torch.inference_mode():
        target = torch.zeros(3 * step, device=device)[::step]
    deliver(captured, [target])
    assert on_host(target).tolist() == [0, 1, 2]


def test_bytes_are_read_after_what_the_producers_stream_had():
    tensor, gate = torch.zeros(4, device=TYPE), threading.Event()
    launch(tensor, 5, gate)
    captured = lay_out([tensor])
    with pytest.raises(TimeoutError):
        await_writers(stored(captured), TYPE, Deadline.after(0))
    gate.set()
    await_writers(stored(captured), TYPE, Deadline.after(5))
    assert flat_buffers(stored(captured), TYPE)[0].view(torch.float32).tolist() == [5] * 4


def test_work_of_other_streams_is_not_waited_for():
    tensor, gate = torch.zeros(4, device=TYPE), threading.Event()
    with accelerator.on(fake_device.Stream()):
        launch(tensor, 5, gate)
    await_writers(stored(lay_out([tensor])), TYPE, Deadline.after(5))
    gate.set()


def test_copies_do_not_wait_for_the_users_stream():
    source, target, gate = torch.ones(4, device=TYPE), torch.zeros(4), threading.Event()
    busy = torch.zeros(4, device=TYPE)
    launch(busy, 5, gate)
    accelerator.copy([(target, source)], source.device).wait(5)
    assert target.tolist() == [1] * 4
    assert busy.tolist() == [0] * 4
    gate.set()


def test_copies_come_after_the_given_events_alone():
    source, target, gate = (
        torch.ones(4, device=TYPE),
        torch.zeros(4, device=TYPE),
        threading.Event(),
    )
    launch(target, 5, gate)
    taken = accelerator.record(target.device)
    copied = accelerator.copy([(target, source)], source.device, [taken])
    with pytest.raises(TimeoutError):
        copied.wait(0.05)
    assert not copied.is_reached()
    gate.set()
    copied.wait(5)
    assert copied.is_reached()
    assert target.tolist() == [1] * 4


def test_copies_of_different_pulls_do_not_wait_for_each_other():
    gate, busy = threading.Event(), torch.zeros(4, device=TYPE)
    launch(busy, 5, gate)
    source, taken = torch.ones(4, device=TYPE), accelerator.record(torch.device(TYPE, 0))
    stuck = accelerator.copy([(torch.zeros(4), source)], source.device, [taken])
    for _ in range(3):
        accelerator.copy([(torch.zeros(4), source)], source.device).wait(5)
    assert not stuck.is_reached()
    gate.set()
    stuck.wait(5)


def test_receive_buffers_remember_what_its_memory_was_used_for():
    target, gate = torch.zeros(4, device=TYPE), threading.Event()
    table = lay_out([torch.ones(4, device=TYPE)]).table
    with accelerator.on(fake_device.Stream()):
        launch(target, 5, gate)
        received = receive(table, [target])
        launch(
            torch.zeros(1, device=TYPE), 5, threading.Event()
        )  # what comes later: not waited for
    (taken,) = received.after
    assert not taken.is_reached()
    gate.set()
    taken.wait(5)


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(accelerator, "is_late", True)


def test_copies_into_targets_are_waited_for(late):
    target, tensor = torch.zeros(12, device=TYPE)[::2], torch.arange(6.0).to(TYPE)
    fill([target], [tensor])
    assert on_host(target).tolist() == [0, 1, 2, 3, 4, 5]


def test_moves_to_another_device_are_waited_for(late):
    there, here = torch.arange(6.0).to(f"{TYPE}:1"), torch.arange(3.0).to(TYPE)
    moved, same = move([there, here], f"{TYPE}:0", 5)
    assert on_host(moved).tolist() == [0, 1, 2, 3, 4, 5]
    assert same is here


def test_what_need_not_be_moved_is_not_waited_for():
    gate, busy = threading.Event(), torch.zeros(4, device=TYPE)
    with accelerator.on(fake_device.Stream()):
        launch(busy, 5, gate)
        move([busy], TYPE, 0)
    gate.set()


def test_side_streams_are_few_and_reused_when_idle():
    class Recorded:
        is_over = True

        def is_reached(self):
            return self.is_over

    made: list[int] = []

    def run(event):
        used: list[int] = []
        streams.run("key", lambda: made.append(len(made)) or len(made), event, used.append)
        return used[0]

    streams: SideStreams[int] = SideStreams()
    assert {run(Recorded()) for _ in range(5)} == {1}
    busy = Recorded()
    busy.is_over = False
    assert run(busy) == 1
    assert run(Recorded()) == 2
    assert run(Recorded()) == 2
    assert {run(busy) for _ in range(100)} == set(range(1, 17))
    assert len(made) == 16


def test_side_stream_keeps_what_its_copies_use_however_many_are_under_way():
    class Copy:
        def __init__(self) -> None:
            self.is_over = False

        def is_reached(self) -> bool:
            return self.is_over

    streams: SideStreams[int] = SideStreams()
    begun = [Copy() for _ in range(100)]
    kept = weakref.WeakSet(begun)
    for copy in begun:
        streams.run("key", int, copy, lambda stream: None)
    last = begun[-20:]
    del begun, copy
    gc.collect()
    assert len(kept) == 100
    for each in last:
        each.is_over = True
    for each in last:
        streams.run("key", int, each, lambda stream: None)
    gc.collect()
    assert len(kept) == 20


def test_side_stream_that_failed_is_kept_with_what_it_holds():
    streams: SideStreams[str] = SideStreams()
    event = fake_device.Event()

    def fail(stream):
        raise ValueError(stream)

    with pytest.raises(ValueError, match="first"):
        streams.run("key", lambda: "first", event, fail)
    used: list[str] = []
    streams.run("key", lambda: "second", fake_device.Event(), used.append)
    assert used == ["second"]


@pytest.fixture
def torch_cuda(monkeypatch):
    """The calls of torch by ``CudaAccelerator.copy``, in their order."""
    calls: list[Any] = []

    class Stream(SimpleNamespace):
        device = torch.device("cuda", 0)

        def wait_event(self, event):
            calls.append(("after", event))

    class Recorded(SimpleNamespace):
        reached = False

        def record(self, stream):
            calls.append(("event", stream))

        def query(self):
            return self.reached

    monkeypatch.setattr(cuda, "bindings", lambda: None)
    monkeypatch.setattr(cuda_calls, "bindings", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(
        torch,
        "_foreach_copy_",
        lambda targets, sources, non_blocking: calls.append(("copies", targets, sources)),
    )
    return calls


class OnGpu:
    def __init__(self, calls, nbytes, is_cuda=True):
        self._calls, self._nbytes, self.is_cuda = calls, nbytes, is_cuda

    def numel(self):
        return self._nbytes

    def copy_(self, source, non_blocking):
        assert non_blocking
        self._calls.append(("copy", self, source))


def test_cuda_copies_run_beside_the_users_stream(torch_cuda):
    """The stubs have no ``current_stream``: asking for it would be an error."""
    small = [(OnGpu(torch_cuda, 10), OnGpu(torch_cuda, 10)) for _ in range(3)]
    large = (OnGpu(torch_cuda, 1 << 20), OnGpu(torch_cuda, 1 << 20))
    taken = CudaEvent("taken", torch.device("cuda", 0))
    CudaAccelerator().copy([*small, large], torch.device("cuda", 0), [taken])
    after, copy, copies, event = torch_cuda
    assert after == ("after", "taken")
    assert copy == ("copy", *large)
    assert copies == ("copies", tuple(t for t, _ in small), tuple(s for _, s in small))
    assert event[0] == "event"


def test_cuda_copy_keeps_its_memory_until_it_has_ended(torch_cuda):
    accelerator = CudaAccelerator()
    target, source = OnGpu(torch_cuda, 10, is_cuda=False), OnGpu(torch_cuda, 10)
    kept = [weakref.ref(target), weakref.ref(source)]
    event: Any = accelerator.copy([(target, source)], torch.device("cuda", 0))
    torch_cuda.clear()
    del target, source
    assert all(each() is not None for each in kept)
    event.event.reached = True
    event.wait(0)
    assert all(each() is None for each in kept)


def test_cuda_copies_of_each_direction_have_streams_of_their_own(torch_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda.Event, "reached", True)
    away, here = OnGpu(torch_cuda, 10), OnGpu(torch_cuda, 10, is_cuda=False)
    accelerator = CudaAccelerator()
    for pair in ((here, away), (away, here), (here, away)):
        accelerator.copy([pair], torch.device("cuda", 0))
    there, back, there_again = [call[1] for call in torch_cuda if call[0] == "event"]
    assert there is there_again
    assert there is not back


@pytest.mark.parametrize("is_capturing", [False, True])
def test_cuda_event_is_recorded_beside_a_graph_that_is_captured(
    torch_cuda, monkeypatch, is_capturing
):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    CudaAccelerator().record(torch.device("cuda", 0))
    assert torch_cuda == [("event", "default" if is_capturing else "current")]


def test_cuda_event_is_spun_for_before_the_first_sleep(monkeypatch):
    now, slept = [0.0], []

    def pass_time(seconds):
        now[0] += seconds

    def sleep(seconds):
        slept.append((now[0], seconds))
        pass_time(seconds)

    class Late:
        def query(self):
            pass_time(1e-5)
            return now[0] > reached_after_s

    monkeypatch.setattr(cuda_calls, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(cuda_calls, "sleep", sleep)
    reached_after_s = 5e-5
    CudaEvent(Late(), torch.device("cuda", 0)).wait(5)
    assert slept == []
    reached_after_s = 1.0
    now[0] = 0.0
    CudaEvent(Late(), torch.device("cuda", 0)).wait(5)
    assert slept[0][0] > 5e-5
    assert max(seconds for _, seconds in slept) == pytest.approx(1e-3)
    reached_after_s = 9.0
    with pytest.raises(TimeoutError, match=r"cuda:0 did not finish.*0.05 s"):
        CudaEvent(Late(), torch.device("cuda", 0)).wait(0.05)
    assert now[0] < 1.1


def test_the_segment_of_a_tensor_is_what_the_driver_says(monkeypatch):
    tensor = SimpleNamespace(get_device=lambda: 1, data_ptr=lambda: 4096 + 100)
    answers = {4196: (0, 4096, 2 << 20)}
    driver = SimpleNamespace(cuMemGetAddressRange=lambda a: answers.get(a, (500, None, None)))
    monkeypatch.setattr(cuda, "current", lambda index: nullcontext())
    monkeypatch.setattr(cuda_calls, "bindings", lambda: None)
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    assert CudaAccelerator().segment(tensor) == (4096, 2 << 20)
    answers.clear()
    assert CudaAccelerator().segment(tensor) is None
    monkeypatch.setattr(cuda, "driver", lambda: None)
    assert CudaAccelerator().segment(tensor) is None


def test_mapped_memory_is_pinned_for_cuda_until_it_is_undone(monkeypatch):
    memory, code, pinned = torch.zeros(100, dtype=torch.uint8), 0, []
    runtime = SimpleNamespace(
        cudaHostRegisterPortable=1,
        cudaHostRegister=lambda *args: pinned.append(args) or (code,),
        cudaHostUnregister=lambda address: pinned.remove((address, 100, 1)),
    )
    monkeypatch.setattr(cuda_calls, "bindings", lambda: None)
    monkeypatch.setattr(cuda, "bindings", lambda: runtime)
    undo = CudaAccelerator().pin(memory)
    assert pinned == [(memory.data_ptr(), 100, 1)]
    undo()
    assert pinned == []
    code = 2
    with pytest.raises(RuntimeError, match="cudaHostRegister failed: 2"):
        CudaAccelerator().pin(memory)
    monkeypatch.setattr(cuda, "bindings", lambda: None)
    with pytest.raises(RuntimeError, match="cuda-bindings is not installed"):
        CudaAccelerator().pin(memory)


def test_cuda_calls_are_relaxed_while_others_capture(monkeypatch):
    """cuda-bindings as it answers: a code, then the mode that the thread had before."""
    modes = ["global"]

    def exchange(mode):
        modes.append(mode)
        return 0, modes[-2]

    runtime = SimpleNamespace(
        cudaThreadExchangeStreamCaptureMode=exchange,
        cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeRelaxed="relaxed"),
    )
    monkeypatch.setattr(cuda_calls, "bindings", lambda: runtime)

    class Reached:
        def query(self):
            return modes[-1] == "relaxed"

    CudaEvent(Reached(), torch.device("cuda", 0)).wait(0)
    assert modes == ["global", "relaxed", "global"]


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


def test_a_users_transport_moves_tensors_on_devices():
    """The transports of RDT cannot: they do not know the user's metadata."""
    table = lay_out([torch.ones(3, device=TYPE)]).table
    head = Descriptor(b"k" * 16, table.nbytes, b"p" * 16, "shm", b"A" * 18, False, True)
    services: Any = SimpleNamespace(
        session=SESSION,
        transports=None,
        policy=SimpleNamespace(pair=lambda address: Pair()),
        prefetcher=SimpleNamespace(take=lambda key: None),
    )
    envelope = Envelope(head, b"", table, None, [], b"")
    transfer: Any = Fetcher(TensorStore(), lambda: services)._plan(Request("", envelope))
    transfer.start(Deadline.after(5))
    assert isinstance(transfer._attempt, UserTransfer)


def test_order_of_transports():
    assert [*default_transports("cpu")] == ["nixl"]
    assert [*default_transports(TYPE)] == [f"{TYPE}_ipc", "staged"]
    accelerator.missing = "it was pulled out"
    assert [*default_transports(TYPE)] == ["staged"]
