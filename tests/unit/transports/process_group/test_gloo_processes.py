"""The gloo transport between real processes: random schedules, and processes that die or stop."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import Peer
from ray.experimental.rdt.transports.process_group.link import TransferFailed
from tests.unit.transports.process_group.gloo_peers import Node, blanks, open_links, pattern, same

KB, MB = 1 << 10, 1 << 20


def worker(pipe):
    """A process with one node; does what the pipe says."""
    node = Node()
    pipe.send((node.peer.address, node.peer.agent_id, os.getpid()))
    with ThreadPoolExecutor(16) as pool:
        while (command := pipe.recv()) is not None:
            name, args = command
            if name == "put":
                node.objects[args[0]] = pattern(*args[1:])
                pipe.send(True)
            elif name == "free":
                node.objects[args][0].untyped_storage().resize_(0)
                pipe.send(True)
            elif name == "fetch_all":
                pipe.send(list(pool.map(lambda job: fetch(node, *job), args)))
            elif name == "links":
                pipe.send(len(open_links(node)))
    node.close()
    os._exit(0)


def fetch(node, address, agent_id, name, sizes, seed, delay_s):
    """Fetches one object and says whether it is right, or what went wrong."""
    time.sleep(delay_s)
    buffers = blanks(sizes)
    try:
        node.fetch(Peer(address, agent_id), name, buffers, 60)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return same(buffers, pattern(sizes, seed))


class Worker:
    """The test's end of a worker process."""

    def __init__(self, context):
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=worker, args=(other,), daemon=True)
        self.process.start()
        address, agent_id, self.pid = self.pipe.recv()
        self.peer = Peer(address, agent_id)

    def ask(self, name, args=()):
        self.pipe.send((name, args))
        return self.pipe.recv()

    def end(self):
        if self.process.is_alive():
            self.pipe.send(None)
            self.process.join(10)
            self.process.kill()


@pytest.fixture
def workers():
    made = []

    def make(count):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["tests.unit.transports.process_group.gloo_peers"]
        )  # torch is imported once
        with ThreadPoolExecutor(count) as pool:
            made.extend(pool.map(lambda _: Worker(context), range(count)))
        return made

    yield make
    for each in made:
        each.end()


@pytest.fixture
def node():
    made = Node()
    yield made
    made.close()


def schedule(rng, workers):
    """Random objects on every worker, and random fetches of all of them by all others."""
    transfers = [[] for _ in workers]
    for producer, who in enumerate(workers):
        for index in range(3):
            sizes = [
                rng.choice([0, 1, 100, 5_000, 20_000, 300_000, 2 * MB])
                for _ in range(rng.choice([1, 2, 12]))
            ]
            name, seed = f"{producer}-{index}", rng.randrange(1 << 30)
            who.ask("put", (name, sizes, seed))
            for consumer in range(len(workers)):
                for _ in range(rng.choice([0, 1, 2])):
                    if consumer != producer:
                        delay_s = rng.choice([0, 0, 0.01, 0.1])
                        job = (who.peer.address, who.peer.agent_id, name, sizes, seed, delay_s)
                        transfers[consumer].append(job)
    for mine in transfers:
        rng.shuffle(mine)
    return transfers


@pytest.mark.slow
def test_random_schedules_between_all_pairs_never_mix_or_hang(workers):
    members = workers(8)
    for seed in range(2):
        transfers = schedule(random.Random(seed), members)
        with ThreadPoolExecutor(len(members)) as pool:
            results = list(pool.map(lambda m, j: m.ask("fetch_all", j), members, transfers))
        assert all(result is True for mine in results for result in mine), results


def test_death_in_the_middle_of_a_transfer(workers, node):
    (producer,) = workers(1)
    sizes = [512 * MB]
    producer.ask("put", ("x", sizes, 1))
    node.fetch(producer.peer, "x", blanks(sizes))  # the link is made and warm
    buffers = blanks(sizes)

    def kill():
        os.kill(producer.pid, signal.SIGKILL)
        node.session.lose(producer.peer.agent_id)

    threading.Timer(0.05, kill).start()
    started = time.monotonic()
    with pytest.raises(TransferFailed):
        node.fetch(producer.peer, "x", buffers)
    assert time.monotonic() - started < 1.5


def test_death_of_the_consumer_frees_the_producer(workers, node):
    (consumer,) = workers(1)
    node.objects["x"] = pattern([512 * MB], 1)
    job = (node.peer.address, node.peer.agent_id, "x", [512 * MB], 1, 0)
    consumer.pipe.send(("fetch_all", [job]))
    end = Deadline.after(20)
    while not open_links(node) and not end.has_passed():
        time.sleep(0.001)
    time.sleep(0.05)
    os.kill(consumer.pid, signal.SIGKILL)
    node.session.lose(consumer.peer.agent_id)
    started = time.monotonic()
    while not node.send_errors and time.monotonic() - started < 10:
        time.sleep(0.01)
    assert node.send_errors
    assert time.monotonic() - started < 1.5
    while open_links(node) and time.monotonic() - started < 10:
        time.sleep(0.01)
    assert not open_links(node)


def test_stopped_producer_costs_its_consumer_the_deadline_only(workers, node):
    (producer,) = workers(1)
    producer.ask("put", ("x", [MB], 1))
    node.fetch(producer.peer, "x", blanks([MB]))
    producer.ask("put", ("y", [512 * MB], 1))
    buffers = blanks([512 * MB])
    stop = threading.Timer(0.05, os.kill, (producer.pid, signal.SIGSTOP))
    stop.start()
    started = time.monotonic()
    with pytest.raises(TransferFailed):
        node.fetch(producer.peer, "y", buffers, timeout_s=1.0)
    assert time.monotonic() - started < 2.5
    stop.join()
    os.kill(producer.pid, signal.SIGCONT)
    node.fetch(producer.peer, "x", blanks([MB]))


@pytest.mark.parametrize("sizes", [[1000] * 10, [40 * MB]], ids=["packed", "direct"])
def test_memory_that_is_freed_before_it_is_read_fails_its_transfer_only(workers, sizes):
    one, other = workers(2)
    one.ask("put", ("lost", sizes, 1))
    one.ask("put", ("kept", sizes, 2))
    one.ask("free", "lost")
    peer = (one.peer.address, one.peer.agent_id)
    (outcome,) = other.ask("fetch_all", [(*peer, "lost", sizes, 1, 0.0)])
    assert isinstance(outcome, str)
    assert other.ask("fetch_all", [(*peer, "kept", sizes, 2, 0.0)]) == [True]
    assert one.process.is_alive()
