"""The nixl transport over stand-ins for nixl's agents."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from ray.experimental.rdt import nixl_tensor_transport
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.nixl_tensor_transport import NixlTensorTransport
from ray.experimental.rdt.producer.transport_server import await_writers
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.serialization.layout import lay_out
from ray.experimental.rdt.transports.base import Peer, TransportUnavailable
from ray.experimental.rdt.transports.nixl import endpoint as nixl_endpoint
from ray.experimental.rdt.transports.nixl import engine as nixl_engine
from ray.experimental.rdt.transports.nixl import transport as nixl_transport
from ray.experimental.rdt.transports.nixl.engine import (
    NixlError,
    NixlMissing,
    choose_backend,
    find_reach,
    is_direct,
)
from ray.experimental.rdt.transports.nixl.pool import MemoryPool
from ray.experimental.rdt.transports.nixl.registration import LARGE_NBYTES
from ray.experimental.rdt.transports.nixl.transport import NixlTransport
from tests.fake_device import TYPE, Stream, accelerator, launch
from tests.unit.transports.nixl.nixl_fakes import Fabric, FakeEngine

PEER = Peer(b"", b"")


@pytest.fixture
def fabric():
    return Fabric()


@pytest.fixture
def producer(fabric):
    return NixlTransport(open_engine=fabric.engine)


@pytest.fixture
def consumer(fabric):
    return NixlTransport(open_engine=fabric.engine)


def pattern(*sizes):
    return [torch.arange(size, dtype=torch.int64).to(torch.uint8) + 1 for size in sizes]


def blanks(buffers):
    return [torch.zeros_like(buffer) for buffer in buffers]


def expose(transport, buffers):
    return protocol.unpack(protocol.pack(transport.expose(buffers)))


def read(transport, exposed, buffers, timeout_s=10.0):
    transport.read(PEER, exposed, buffers, Deadline.after(timeout_s))


def same(buffers, others):
    return all(torch.equal(one, other) for one, other in zip(buffers, others, strict=True))


@pytest.mark.parametrize(
    "sizes",
    [(1,), (0,), (), (0, 5, 0, 7), (LARGE_NBYTES + 3, 10, 0), (20_000,) * 300, (40 << 20,)],
    ids=lambda sizes: f"{len(sizes)}-{sum(sizes)}",
)
def test_round_trip(producer, consumer, sizes):
    sent = pattern(*sizes)
    received = blanks(sent)
    exposed = expose(producer, sent)
    read(consumer, exposed, received)
    read(consumer, exposed, received)
    producer.withdraw(exposed)
    assert same(sent, received)


def test_nothing_is_opened_before_it_is_needed(fabric, producer):
    exposed = expose(producer, pattern(0))
    producer.withdraw(exposed)
    assert not fabric.engines


def test_withdrawn_memory_is_not_read(fabric, producer, consumer):
    sent = pattern(100)
    exposed = expose(producer, sent)
    producer.withdraw(exposed)
    producer.withdraw(exposed)
    with pytest.raises(NixlError, match="not registered"):
        read(consumer, exposed, blanks(sent))


def test_a_consumer_registers_its_memory_while_it_lives(fabric, producer, consumer):
    sent = pattern(LARGE_NBYTES, 10)
    received = blanks(sent)
    exposed = expose(producer, sent)
    read(consumer, exposed, received)
    read(consumer, exposed, received)
    assert len(fabric.engines["engine-1"].registered) == 1
    del received
    gc.collect()
    assert not fabric.engines["engine-1"].registered


def test_a_read_that_hangs_keeps_its_memory_until_it_ends(fabric, producer, consumer, monkeypatch):
    monkeypatch.setattr(nixl_endpoint, "_GRACE_S", 0.05)
    fabric.looks = None
    sent = pattern(100)
    exposed = expose(producer, sent)
    received = blanks(sent)
    storage = weakref.ref(received[0].untyped_storage())
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        read(consumer, exposed, received, 0.5)
    assert time.monotonic() - began < 5
    assert not any(received[0])
    del received
    gc.collect()
    assert storage() is not None
    assert len(fabric.engines["engine-1"].registered) == 1
    fabric.looks = 0
    received = blanks(sent)
    read(consumer, exposed, received)
    gc.collect()
    assert same(sent, received)
    assert storage() is None
    assert not fabric.engines["engine-1"].registered


def test_hosts_without_rdma_take_another_lane(fabric, producer, consumer, monkeypatch):
    sent = pattern(100)
    received = blanks(sent)
    exposed = {**expose(producer, sent), "reach": "other host"}
    with pytest.raises(TransportUnavailable, match="RDMA"):
        read(consumer, exposed, received)

    class Strict:
        strict_transport = True

    monkeypatch.setattr(nixl_endpoint, "settings", lambda: Strict)
    read(consumer, exposed, received)
    assert same(sent, received)


def test_device_memory_goes_to_host_memory_another_way_within_a_host(
    fabric, producer, consumer, monkeypatch
):
    """UCX's cuda_ipc writes device memory only; else the producer's process has to take part."""
    sent, received = on_device(pattern(100, 0)), blanks(pattern(100, 0))
    exposed = expose(producer, sent)
    with pytest.raises(TransportUnavailable, match="GPU memory only"):
        read(consumer, exposed, received)
    monkeypatch.setattr(fabric.engines["engine-1"], "reach", "host rdma")
    read(consumer, {**exposed, "reach": "other rdma"}, received)
    assert [one.tolist() for one in received] == [one.tolist() for one in sent]


@pytest.mark.parametrize(
    ("reach", "other", "expected"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a rdma", "b rdma", True),
        ("a rdma", "b", False),
        ("a rdma", "a", True),
    ],
)
def test_reach(reach, other, expected):
    assert is_direct(reach, other) is expected


def test_reach_names_the_host_and_its_rdma_devices(tmp_path):
    own = find_reach(tmp_path)
    assert own == find_reach(tmp_path)
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    assert find_reach(tmp_path) == own + " rdma"


def test_a_read_that_ends_just_after_its_deadline_leaves_nothing(fabric, producer, consumer):
    fabric.looks = 60
    sent = pattern(100)
    with pytest.raises(TimeoutError):
        read(consumer, expose(producer, sent), blanks(sent), 0.0005)
    assert not fabric.engines["engine-1"].registered


def test_a_deadline_that_has_passed_posts_nothing(fabric, producer, consumer):
    sent = pattern(100)
    with pytest.raises(TimeoutError):
        read(consumer, expose(producer, sent), blanks(sent), -1)
    assert ("post", 1) not in fabric.engines["engine-1"].log


def test_a_failed_read_is_over_and_the_next_one_works(fabric, producer, consumer):
    sent = pattern(100)
    received = blanks(sent)
    exposed = expose(producer, sent)
    fabric.error = NixlError("lost", "peer_lost")
    with pytest.raises(NixlError) as failure:
        read(consumer, exposed, received)
    assert failure.value.code == "peer_lost"
    fabric.error = None
    read(consumer, exposed, received)
    assert same(sent, received)
    assert ("detach", "engine-0") in fabric.engines["engine-1"].log


def test_buffers_that_do_not_match_are_refused(producer, consumer):
    exposed = expose(producer, pattern(100))
    with pytest.raises(ValueError, match="buffer 0 has 99 bytes, the peer's has 100"):
        read(consumer, exposed, blanks(pattern(99)))


def test_reads_at_once_do_not_mix(fabric, producer, consumer):
    fabric.looks = 3
    objects = [pattern(1000 + i, 10, i) for i in range(20)]
    results = {}

    def fetch(index):
        received = blanks(objects[index])
        read(consumer, expose(producer, objects[index]), received)
        results[index] = same(objects[index], received)

    threads = [threading.Thread(target=fetch, args=(i,)) for i in range(len(objects))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == dict.fromkeys(range(len(objects)), True)


def test_copies_in_a_registered_pool_need_no_registration(fabric, producer, consumer):
    pool = MemoryPool(1000, "cpu")
    producer.register_memory(pool.memory)
    sent = pattern(100, 0, 200)
    copies = pool.take([buffer.numel() for buffer in sent], 0)
    for copy, buffer in zip(copies.buffers, sent, strict=True):
        copy.copy_(buffer)
    exposed, received = expose(producer, copies.buffers), blanks(sent)
    read(consumer, exposed, received)
    assert same(sent, received)
    assert len(fabric.engines["engine-0"].registered) == 1
    producer.withdraw(exposed)


def test_what_a_user_has_registered_is_known(producer):
    mine = pattern(50)
    assert not producer.has_registered(mine)
    producer.register_memory(mine[0])
    assert producer.has_registered([*pattern(3), mine[0][5:]])
    assert not producer.has_registered(pattern(3))
    producer.deregister_memory(mine[0])
    assert not producer.has_registered(mine)
    with pytest.raises(ValueError, match="not registered"):
        producer.deregister_memory(mine[0])


def gpu_buffers(*devices):
    return [SimpleNamespace(is_cpu=False, device=torch.device(name)) for name in devices]


@pytest.fixture
def short_fetch(monkeypatch):
    monkeypatch.setattr(nixl_transport, "settings", lambda: SimpleNamespace(fetch_timeout_s=0.4))


def test_no_device_is_waited_for_unless_the_user_asks(producer, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    check_writers = producer.check_writers
    check_writers(gpu_buffers("cuda:1"))
    producer.set_cuda_stream(SimpleNamespace(device=torch.device("cuda:0")))
    check_writers(gpu_buffers("cuda:0"))
    with pytest.raises(ValueError, match=r"stream on cuda:0.*tensors on \['cuda:1'\]"):
        check_writers(gpu_buffers("cuda:0", "cuda:1"))
    assert waited == []
    producer.set_cuda_stream(None)
    check_writers(gpu_buffers("cuda:0"))
    assert waited == ["cuda:0"]


def test_a_named_stream_is_waited_for_as_it_was_when_the_object_was_made(producer):
    class Named(Stream):
        device = torch.device(TYPE, 0)

    stream, written, later = Named(), threading.Event(), threading.Event()
    tensor = torch.zeros(4, dtype=torch.uint8, device=f"{TYPE}:0")
    producer.set_cuda_stream(stream)
    with accelerator.on(stream):
        launch(tensor, 5, written)
    captured = lay_out([tensor])
    with accelerator.on(stream):
        launch(torch.zeros(4, device=TYPE), 1, later)
    stored = SimpleNamespace(captured=captured)
    with pytest.raises(TimeoutError):
        await_writers(stored, TYPE, Deadline.after(0.1))
    written.set()
    await_writers(stored, TYPE, Deadline.after(5))
    assert tensor.tolist() == [5] * 4
    producer.close()
    assert len(lay_out([tensor]).events) == 1
    later.set()


def on_device(buffers):
    return [buffer.to(TYPE) for buffer in buffers]


def test_device_memory_goes_while_the_producers_device_is_busy(producer, consumer):
    sent = on_device(pattern(100, 20))
    received = on_device(blanks(pattern(100, 20)))
    gate = threading.Event()
    captured = lay_out(sent)
    launch(torch.zeros(1, device=TYPE), 1, gate)
    try:
        await_writers(SimpleNamespace(captured=captured), TYPE, Deadline.after(5))
        read(consumer, expose(producer, sent), received)
    finally:
        gate.set()
    assert [one.tolist() for one in received] == [one.tolist() for one in pattern(100, 20)]


def test_nixl_works_beside_a_graph_that_another_thread_captures(
    fabric, producer, consumer, monkeypatch
):
    depth, calls = [0], []

    @contextlib.contextmanager
    def capture_safe():
        depth[0] += 1
        yield
        depth[0] -= 1

    monkeypatch.setattr(accelerator, "capture_safe", capture_safe)
    for name in ("register", "describe", "attach", "post"):
        call = getattr(FakeEngine, name)

        def noted(*args, name=name, call=call):
            calls.append((name, depth[0] > 0))
            return call(*args)

        monkeypatch.setattr(FakeEngine, name, noted)
    sent, received = on_device(pattern(100)), on_device(blanks(pattern(100)))
    read(consumer, expose(producer, sent), received)
    order = ["register", "describe", "register", "attach", "post"]
    assert calls == [(name, True) for name in order]


def test_a_program_that_reaches_for_nixl_reads_finished_memory(producer, consumer, monkeypatch):
    sent, target = torch.zeros(4, device=TYPE), torch.zeros(4, device=TYPE)
    gates = [threading.Event(), threading.Event()]

    def soon(gate):
        threading.Timer(0.2, gate.set).start()

    monkeypatch.setattr(nixl_tensor_transport.nixl_api, "nixl_transport", lambda: producer)
    launch(sent, 5, gates[0])
    soon(gates[0])
    described = NixlTensorTransport().extract_tensor_transport_metadata("object", [sent])
    assert sent.tolist() == [5] * 4
    monkeypatch.setattr(nixl_tensor_transport.nixl_api, "nixl_transport", lambda: consumer)
    launch(target, 1, gates[1])
    soon(gates[1])
    NixlTensorTransport().recv_multiple_tensors("object", described, None, [target])
    accelerator.record(target.device).wait(5)
    assert target.tolist() == [5] * 4


def test_neighbouring_segments_are_read_apart(producer, consumer, monkeypatch):
    def storage_of(tensor):
        return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()

    monkeypatch.setattr(accelerator, "segment", storage_of)
    sent, received = on_device(pattern(*[4096] * 3)), on_device(blanks(pattern(*[4096] * 3)))
    for buffers in (sent, received):
        assert buffers[1].data_ptr() == buffers[0].data_ptr() + 4096
    read(consumer, expose(producer, sent), received)
    assert [one.tolist() for one in received] == [one.tolist() for one in pattern(*[4096] * 3)]


def test_device_memory_is_read_in_few_requests(fabric, producer, consumer):
    """A request costs more than the copy of 16 MiB."""
    sent, received = ([torch.zeros(40 << 20, dtype=torch.uint8, device=TYPE)] for _ in range(2))
    read(consumer, expose(producer, sent), received)
    calls = [call for engine in fabric.engines.values() for call, _ in engine.log]
    assert calls.count("post") == 1
    assert nixl_endpoint._DEVICE_BATCH_NBYTES >= 256 << 20


def test_small_tensors_of_a_device_are_one_registration(fabric, producer):
    expose(producer, on_device(pattern(*[100] * 20)))
    (engine,) = fabric.engines.values()
    assert len(engine.registered) == 1


def test_a_device_that_does_not_finish_makes_it_unavailable(producer, short_fetch, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: ended.wait(10))
    started = time.monotonic()
    producer.set_cuda_stream(None)
    with pytest.raises(TransportUnavailable, match=r"cuda:0 did not.*set_nixl_cuda_stream"):
        producer.check_writers(gpu_buffers("cuda:1", "cuda:0"))
    assert time.monotonic() - started < 3
    ended.set()


def test_a_device_that_fails_says_so(producer, monkeypatch):
    def fail(device):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    producer.set_cuda_stream(None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        producer.check_writers(gpu_buffers("cuda:0"))


def test_memory_is_read_into_after_what_it_was_used_for(fabric, producer, consumer):
    gate, memory = threading.Event(), torch.zeros(100, dtype=torch.uint8, device=TYPE)
    sent = on_device(pattern(100))
    exposed = expose(producer, sent)
    launch(memory, 7, gate)
    taken, started = accelerator.record(memory.device), time.monotonic()
    with pytest.raises(TimeoutError):
        consumer.read(PEER, exposed, [memory], Deadline.after(0.2), [taken])
    assert time.monotonic() - started < 3
    gate.set()
    consumer.read(PEER, exposed, [memory], Deadline.after(5), [taken])
    assert memory.tolist() == sent[0].tolist()


def test_a_read_whose_task_is_cancelled_ends(fabric, producer, consumer, monkeypatch):
    fabric.looks = None
    asked = []

    def cancelled_at_the_second_look():
        asked.append(time.monotonic())
        if len(asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(nixl_endpoint, "raise_if_cancelled", cancelled_at_the_second_look)
    monkeypatch.setattr(nixl_endpoint, "_GRACE_S", 0.3)
    sent = pattern(100)
    exposed = expose(producer, sent)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as cancelled:
        read(consumer, exposed, blanks(sent))
    assert len(consumer._endpoint._hung) == 1  # its memory is kept
    assert cancelled.value.__cause__ is None
    assert time.monotonic() - started < 5
    assert len(asked) == 2  # not while it settles
    assert asked[1] - asked[0] >= 0.2


def test_memory_that_nixl_refuses_is_unavailable(fabric, producer, consumer):
    exposed = expose(producer, pattern(5))
    read(consumer, exposed, blanks(pattern(5)))
    for engine in fabric.engines.values():
        engine.refusal = NixlError("read-only")
    with pytest.raises(TransportUnavailable, match="read-only"):
        producer.expose(pattern(6))
    with pytest.raises(TransportUnavailable, match="read-only"):
        read(consumer, exposed, blanks(pattern(5)))


def test_a_closed_transport_stays_closed(fabric, producer):
    producer.expose(pattern(5))
    producer.close()
    producer.close()
    assert fabric.engines["engine-0"].is_closed
    with pytest.raises(TransportUnavailable, match="closed"):
        producer.expose(pattern(5))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(TransportUnavailable, match="pip install nixl"):
        NixlTransport()
    with pytest.raises(ImportError):
        nixl_engine.open_engine()
    assert issubclass(NixlMissing, ImportError)


def test_a_library_of_another_layout_is_unavailable(monkeypatch):
    monkeypatch.setattr(nixl_engine, "check_installed", lambda: None)
    monkeypatch.setattr(nixl_engine, "_import_nixl", object)
    with pytest.raises(TransportUnavailable, match=r"nixl 1\.5"):
        nixl_engine.open_engine()


def test_tls_forbids_nixl(monkeypatch):
    monkeypatch.setenv("RAY_USE_TLS", "1")
    settings.cache_clear()
    try:
        with pytest.raises(TransportUnavailable, match="RAY_RDT_ALLOW_CLEAR_TCP"):
            NixlTransport()
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_libfabric_is_chosen_for_efa_devices_only(tmp_path):
    plugins = ["LIBFABRIC", "UCX"]
    assert choose_backend(plugins, tmp_path) == "UCX"
    for name, driver in (("mlx5_0", "mlx5_core"), ("rdmap0", "efa")):
        device = tmp_path / "infiniband" / name / "device"
        device.mkdir(parents=True)
        (tmp_path / driver).mkdir()
        (device / "driver").symlink_to(tmp_path / driver)
        expected = "LIBFABRIC" if driver == "efa" else "UCX"
        assert choose_backend(plugins, tmp_path) == expected
    assert choose_backend(["UCX"], tmp_path) == "UCX"
