"""The nixl transport between real processes, over nixl's UCX backend."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import Peer, TransportUnavailable
from ray.experimental.rdt.transports.nixl import endpoint as nixl_endpoint
from ray.experimental.rdt.transports.nixl.engine import NixlError, open_engine
from ray.experimental.rdt.transports.nixl.plan import Spans
from ray.experimental.rdt.transports.nixl.transport import NixlTransport
from tests.support import needs_nixl

pytestmark = needs_nixl()

KB, MB = 1 << 10, 1 << 20
PEER = Peer(b"", b"")
TCP = {"engine_config": "TLS=tcp"}


def make(options=None):
    return NixlTransport(open_engine=functools.partial(open_engine, options or {}))


def pattern(sizes, seed):
    return [
        torch.full((size,), (seed + i) % 251 + 1, dtype=torch.uint8) for i, size in enumerate(sizes)
    ]


def produce(pipe, options):
    """A process with a transport; does what the pipe says."""
    transport, objects, exposed = make(options), {}, {}
    while (command := pipe.recv()) is not None:
        name, *args = command
        answer = None
        if name == "put":
            key, sizes, seed = args
            objects[key] = pattern(sizes, seed)
            answer = exposed[key] = transport.expose(objects[key])
        elif name == "free":
            transport.withdraw(exposed.pop(args[0]))
            del objects[args[0]]
        elif name == "cpu":
            answer = time.process_time()
        pipe.send(answer)
    transport.close()
    os._exit(0)


class Producer:
    """The test's end of a producing process."""

    def __init__(self, options=None):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._turn = threading.Lock()
        self.process = context.Process(target=produce, args=(other, options), daemon=True)
        self.process.start()

    def ask(self, *command):
        with self._turn:
            self._pipe.send(command)
            return self._pipe.recv()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()
        self.process.join(10)


@pytest.fixture(scope="module")
def producer():
    made = Producer()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def consumer():
    made = make()
    yield made
    made.close()


def read(transport, exposed, sizes, timeout_s=30.0):
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    transport.read(PEER, exposed, buffers, Deadline.after(timeout_s))
    return buffers


def same(buffers, others):
    return all(torch.equal(one, other) for one, other in zip(buffers, others, strict=True))


def is_fetched(producer, consumer, key, sizes, seed):
    exposed = producer.ask("put", key, sizes, seed)
    received = read(consumer, exposed, sizes)
    producer.ask("free", key)
    return same(received, pattern(sizes, seed))


@pytest.mark.parametrize(
    "sizes",
    [(1,), (0, 3, 0), (100 * KB,), (MB, MB + 1, 5), (70 * MB,), (64,) * 1000],
    ids=lambda sizes: f"{len(sizes)}-{sizes[0]}",
)
def test_round_trip(producer, consumer, sizes):
    assert is_fetched(producer, consumer, "object", sizes, 7)


def test_ten_thousand_tensors(producer, consumer):
    assert is_fetched(producer, consumer, "many", (2 * KB + 1,) * 10_000, 3)


@pytest.mark.parametrize("nbytes", [10 * KB, 3 * MB])
def test_memory_that_was_freed_and_taken_again_is_not_stale(producer, consumer, nbytes):
    places = set()
    for seed in range(12):
        sizes = (nbytes + seed % 3 * KB,)
        exposed = producer.ask("put", "object", sizes, seed)
        places.add(int(Spans.decode(exposed["spans"]).rows[0, 0]))
        assert same(read(consumer, exposed, sizes), pattern(sizes, seed))
        producer.ask("free", "object")
    assert len(places) < 12, "no memory was taken again"


def test_the_plugin_in_use_is_logged(caplog):
    caplog.set_level(logging.INFO, "ray.rdt")
    transport = make()
    transport.expose(pattern((10,), 1))
    transport.close()
    assert "RDT uses nixl with its UCX backend" in caplog.text


def test_freed_memory_is_not_read(producer, consumer):
    sizes = (2 * MB,)
    exposed = producer.ask("put", "gone", sizes, 1)
    read(consumer, exposed, sizes)
    producer.ask("free", "gone")
    assert is_fetched(producer, consumer, "new", sizes, 2)


def test_many_pulls_at_once_do_not_mix(producer, consumer):
    def fetch(index):
        return is_fetched(producer, consumer, f"object {index}", (MB + index, 10 * index), index)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fetch, range(40)))


def test_an_idle_process_uses_no_core(producer, consumer):
    assert is_fetched(producer, consumer, "object", (10,), 1)
    began, used = time.monotonic(), producer.ask("cpu")
    time.sleep(0.5)
    assert producer.ask("cpu") - used < 0.5 * (time.monotonic() - began)


def test_two_directions_at_once(producer, consumer):
    """The consumer is a producer too: it reads while it is read from."""
    mine = pattern((MB,), 9)
    exposed = consumer.expose(mine)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    reader = context.Process(target=read_repeatedly, args=(other, exposed, (MB,)), daemon=True)
    reader.start()
    for seed in range(20):
        assert is_fetched(producer, consumer, "object", (MB,), seed)
    sums = pipe.recv()
    reader.join(10)
    consumer.withdraw(exposed)
    assert sums == [int(mine[0].sum())] * 20


def read_repeatedly(pipe, exposed, sizes):
    transport = make()
    pipe.send([int(read(transport, exposed, sizes)[0].sum()) for _ in range(20)])
    pipe.close()
    transport.close()
    os._exit(0)


def test_a_dead_producer_is_noticed_at_once(consumer):
    producer = Producer()
    exposed = producer.ask("put", "object", (MB,), 1)
    read(consumer, exposed, (MB,))
    producer.kill()
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises((NixlError, TransportUnavailable)):
            read(consumer, exposed, (MB,))
    assert time.monotonic() - began < 10


def test_a_stopped_producer_costs_the_deadline_and_no_memory(monkeypatch):
    monkeypatch.setattr(nixl_endpoint, "_GRACE_S", 0.1)
    producer, consumer = Producer(TCP), make(TCP)
    sizes = (MB,)
    exposed = producer.ask("put", "object", sizes, 1)
    read(consumer, exposed, sizes)
    producer.signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            read(consumer, exposed, sizes, 0.3)
        assert time.monotonic() - began < 5
        assert len(consumer._endpoint._hung) == 1
    finally:
        producer.signal(signal.SIGCONT)
    while consumer._endpoint._hung:
        assert same(read(consumer, exposed, sizes), pattern(sizes, 1))
    assert producer.process.is_alive()
    producer.kill()
    consumer.close()


def test_a_child_of_a_fork_leaves_the_parents_agent_alone(producer, consumer):
    assert is_fetched(producer, consumer, "object", (10,), 1)
    child = os.fork()
    if not child:
        consumer.close()
        os._exit(0)
    deadline = Deadline.after(20)
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and not deadline.has_passed():
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    assert is_fetched(producer, consumer, "object", (10,), 2)
