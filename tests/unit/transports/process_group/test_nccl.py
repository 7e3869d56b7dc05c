"""The additions of nccl to gloo, with a fake device for the GPU and gloo in NCCL's place."""

from __future__ import annotations

import contextlib
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.gloo import GlooBackend
from ray.experimental.rdt.transports.nccl import NcclBackend
from ray.experimental.rdt.transports.process_group.link import TransferRefused
from ray.experimental.rdt.transports.process_group.transport import ProcessGroupTransport
from tests.fake_device import TYPE, Event, Stream, accelerator, launch, on_host
from tests.unit.transports.process_group.gloo_peers import Node, open_links, pattern
from tests.unit.transports.process_group.test_gloo import run_all

KB, MB = 1 << 10, 1 << 20
DEVICE = torch.device(TYPE, 0)


class Group:
    """A gloo process group that runs on streams, as torch's of NCCL does.

    Point-to-point operations and async collectives run on a stream of torch's pool, after what the
    current stream has. Other collectives run on the current stream.
    """

    def __init__(self, inner, pool_stream):
        self.inner = inner
        self._pool_stream = pool_stream

    def send(self, tensors, rank, tag):
        return self._run(self._pool_stream, lambda: self.inner.send(_hosts(tensors), rank, 0))

    def recv(self, tensors, rank, tag):
        return self._run(self._pool_stream, lambda: self.inner.recv(_hosts(tensors), rank, 0))

    def broadcast(self, tensors, options):
        stream = self._pool_stream if options.asyncOp else accelerator.stream()
        root = options.rootRank
        if self.inner.rank() == root:
            work = self._run(stream, lambda: self.inner.send(_hosts(tensors), 1 - root, 0))
        else:
            work = self._run(stream, lambda: self.inner.recv(_hosts(tensors), root, 0))
        return work if options.asyncOp else None

    def _run(self, stream, post):
        before = Event(accelerator.stream())

        def run():
            with contextlib.suppress(RuntimeError):  # the group was killed
                post().wait()

        stream.give(lambda: before.wait(60))
        stream.give(run)
        return Work(stream)


def _hosts(tensors):
    return [on_host(tensor) for tensor in tensors]


class Work:
    """An operation on a stream of torch's; ``wait`` orders the current stream after it."""

    def __init__(self, stream):
        self._end = Event(stream)

    def wait(self):
        self._end.make_stream_wait()


class Backend(NcclBackend):
    """NCCL's, but for the process group and the device."""

    def __init__(self):
        super().__init__(accelerator, DEVICE)
        self.gloo = GlooBackend("127.0.0.1")
        self.pool_stream = Stream()

    def check_available(self):
        pass

    def make(self, store, rank, size, timeout_s, has_collectives):
        inner = self.gloo.make(store, rank, size, timeout_s, has_collectives)
        return Group(inner, self.pool_stream)

    def kill(self, group):
        self.gloo.kill(group.inner)


@pytest.fixture
def nodes():
    made = [Node(lambda s, host, g: ProcessGroupTransport(Backend(), s, g)) for _ in range(2)]
    yield made
    for node in made:
        node.close()


class Keys(dict):
    """The keys of a rendezvous at which all ranks have arrived."""

    set, get = dict.__setitem__, dict.__getitem__


def test_ranks_on_one_gpu_are_refused():
    """NCCL connects different ones only."""
    make = NcclBackend(accelerator, DEVICE)._check_gpus_differ
    make(Keys({"gpu/0": b"fake-1"}), 1, 2)
    with pytest.raises(TransportUnavailable, match="ranks 0 and 1 are on one GPU, fake-0"):
        make(Keys({"gpu/0": b"fake-0"}), 1, 2)


@pytest.mark.parametrize("was", [None, "1"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_failed_communicator_does_not_end_the_process(monkeypatch, was, fails):
    """Torch reads in the constructor whether its watchdog may; the user's groups are left alone."""
    names = [
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "TORCH_NCCL_ENABLE_MONITORING",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
    ]
    for name in names:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
        if was is not None:
            monkeypatch.setenv(name, was)
    before, seen = dict(os.environ), []

    class ProcessGroupNCCL:
        Options = SimpleNamespace

        def __init__(self, store, rank, size, options):
            seen.append({name: os.environ[name] for name in names})
            if fails:
                raise RuntimeError("no GPU")

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", ProcessGroupNCCL, raising=False)
    keys = Keys({"gpu/1": b"fake-1"})
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        NcclBackend(accelerator, DEVICE).make(keys, 0, 2, 5, has_collectives=False)
    assert seen == [dict.fromkeys(names, "0")]
    assert dict(os.environ) == before


def on_device(buffers):
    return [buffer.to(DEVICE) for buffer in buffers]


def round_trip(consumer, producer, sizes, name="x", seed=1):
    producer.objects[name] = on_device(pattern(sizes, seed))
    got = on_device([torch.zeros(n, dtype=torch.uint8) for n in sizes])
    consumer.fetch(producer.peer, name, got)
    for one, other in zip(got, pattern(sizes, seed), strict=True):
        assert one.cpu().equal(other)


@pytest.mark.parametrize(
    "sizes", [[1], [0, 5, 0], [MB, 3, 300 * KB, 7, 0], [33 * MB], [20_000] * 300]
)
def test_device_buffers_arrive(nodes, sizes):
    round_trip(*nodes, sizes)


def test_a_link_carries_one_transfer_at_a_time(nodes):
    run_all([lambda i=i: round_trip(*nodes, [KB, MB], f"o{i}", i) for i in range(6)])
    links = open_links(nodes[0])
    assert 1 <= len(links) <= 4


def test_both_directions_at_once(nodes):
    a, b = nodes
    there = [lambda i=i: round_trip(a, b, [i * KB + 1, MB], f"o{i}", i) for i in range(4)]
    back = [lambda i=i: round_trip(b, a, [i * KB + 1, MB], f"o{i}", i) for i in range(4)]
    run_all(there + back)


@pytest.mark.parametrize("device", ["cpu", f"{TYPE}:1"])
def test_memory_elsewhere_is_refused_and_the_consumer_told(nodes, device):
    consumer, producer = nodes
    producer.objects["x"] = [torch.zeros(4, dtype=torch.uint8, device=device)]
    with pytest.raises(TransferRefused, match=rf"nccl links are on {DEVICE}.*{device}"):
        consumer.fetch(producer.peer, "x", on_device([torch.zeros(4, dtype=torch.uint8)]))
    round_trip(consumer, producer, [4])


def test_consumer_whose_memory_is_elsewhere_may_take_another_lane(nodes):
    consumer, producer = nodes
    producer.objects["x"] = on_device([torch.ones(4, dtype=torch.uint8)])
    with pytest.raises(TransferRefused, match=f"nccl links are on {DEVICE}.*cpu"):
        consumer.fetch(producer.peer, "x", [torch.zeros(4, dtype=torch.uint8)])
    round_trip(consumer, producer, [4])


def test_wait_ends_with_the_stream_and_not_before():
    backend, tensor = Backend(), torch.zeros(4, device=DEVICE)
    gate = threading.Event()
    with accelerator.on(Stream()):
        launch(tensor, 3, gate)
        with pytest.raises(TimeoutError):
            backend.wait(accelerator.record(DEVICE), 0.05)
        gate.set()
        backend.wait(accelerator.record(DEVICE), 5)
    assert tensor.tolist() == [3] * 4


@pytest.fixture
def busy(monkeypatch):
    """The stream that all threads share has work, which ends when the gate is opened."""
    monkeypatch.setattr(accelerator, "_default", Stream())
    gate, memory = threading.Event(), torch.zeros(4, dtype=torch.uint8, device=DEVICE)
    launch(memory, 3, gate)
    yield SimpleNamespace(gate=gate, memory=memory)
    gate.set()


class Receiving:
    """A consumer that has agreed on a transfer and waits for it, on a thread of its own."""

    def __init__(self, nodes, target, stream=None):
        consumer, producer = nodes
        self._stream = stream or accelerator.stream()
        self._route = consumer.transport.route(producer.peer, Deadline.after(10))
        self._producer = producer
        self._error = None
        arguments = (consumer.transport, target)
        self.thread = threading.Thread(target=self._receive, args=arguments, daemon=True)
        self.thread.start()

    def _receive(self, transport, target):
        try:
            with accelerator.on(self._stream):
                taken = [accelerator.record(DEVICE)]
                transport.receive(self._route, [target], Deadline.after(10), taken)
        except Exception as error:
            self._error = error

    def send(self, value):
        sent = on_device([torch.full((4,), value, dtype=torch.uint8)])
        self._producer.transport.send(self._route, sent, Deadline.after(10))

    def finish(self):
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self._error is None


def test_a_receive_keeps_nothing_of_its_caller_waiting(nodes):
    """Neither the user's work nor a send, which shares the default stream with it."""
    target = torch.zeros(4, dtype=torch.uint8, device=DEVICE)
    receiving = Receiving(nodes, target)
    receiving.thread.join(0.2)
    assert receiving.thread.is_alive()
    accelerator.record(DEVICE).wait(2)
    receiving.send(1)
    receiving.finish()
    assert target.tolist() == [1] * 4


def test_a_transfer_keeps_no_stream_of_torchs_pool_waiting(nodes):
    """The pool has 32 streams, so one of them may also be the user's."""
    target = torch.zeros(4, dtype=torch.uint8, device=DEVICE)
    receiving = Receiving(nodes, target)
    receiving.thread.join(0.2)
    assert receiving.thread.is_alive()
    for node in nodes:
        with accelerator.on(node.transport._backend.pool_stream):
            accelerator.record(DEVICE).wait(2)
    receiving.send(1)
    receiving.finish()
    assert target.tolist() == [1] * 4


def test_a_send_and_the_proof_of_a_link_do_not_wait_for_their_callers_stream(nodes, busy):
    target = torch.zeros(4, dtype=torch.uint8, device=DEVICE)
    receiving = Receiving(nodes, target, stream=Stream())
    receiving.send(1)
    receiving.finish()
    assert target.tolist() == [1] * 4
    assert busy.memory.tolist() == [0] * 4


def test_memory_is_received_into_after_what_its_caller_does_with_it(nodes, busy):
    receiving = Receiving(nodes, busy.memory)
    sender = threading.Thread(target=receiving.send, args=(1,), daemon=True)
    sender.start()
    receiving.thread.join(0.3)
    assert receiving.thread.is_alive()
    busy.gate.set()
    receiving.finish()
    sender.join(10)
    assert busy.memory.tolist() == [1] * 4


def test_streams_are_used_again_but_not_after_an_error():
    backend = Backend()
    seen = []
    for error in (None, None, ValueError, None):
        with contextlib.suppress(ValueError), backend.transfer_context(()):
            seen.append(accelerator.stream())
            if error is not None:
                raise error
    assert seen[0] is seen[1] is seen[2]
    assert seen[3] is not seen[2]
    with backend.transfer_context(()):
        seen.append(accelerator.stream())
        with backend.transfer_context(()):
            assert accelerator.stream() not in seen


def test_tls_without_permission_is_refused(monkeypatch):
    settings.cache_clear()
    monkeypatch.setenv("RAY_USE_TLS", "1")
    try:
        with pytest.raises(TransportUnavailable, match="TLS"):
            NcclBackend(accelerator, DEVICE).check_available()
    finally:
        monkeypatch.undo()
        settings.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(TransportUnavailable, match="NVIDIA GPU"):
        NcclBackend(accelerator, DEVICE).check_available()
