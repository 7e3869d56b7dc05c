"""The compiled agent through its Python face, from two processes; no Ray is started."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import gc
import multiprocessing
import os
import select
import signal
import threading
import time
from array import array

import pytest

from ray.experimental.rdt import _agent

KEY = bytes(range(16))
SIZE = 5_000_011
LONG_S = 30


def make_agent(**options):
    return _agent.Agent(secret=b"secret", bind_ip="127.0.0.1", **options)


def spans(*buffers):
    views = [memoryview(b) for b in buffers]
    addrs = array("Q", [_address(b) for b in buffers])
    return addrs, array("Q", [v.nbytes for v in views])


def _address(buffer):
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0


def contents(size=SIZE):
    return bytearray((i * 2654435761 >> 7) & 0xFF for i in range(min(size, 4099))) * (
        size // 4099 + 1
    )


def produce(pipe):
    """The other process: serves KEY, echoes calls, until told otherwise."""
    agent = make_agent()
    data = contents()[:SIZE]
    agent.register(KEY, *spans(data), 1)
    pipe.send((agent.address, agent.agent_id))
    while not pipe.poll():
        for event in agent.next_events(0.05):
            if event[0] == "call" and event[3] != b"ignore":
                agent.reply(event[1], b"echo " + event[3], event[3] == b"fail")
    agent.stop()


@pytest.fixture
def producer():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=produce, args=(theirs,))
    process.start()
    theirs.close()
    process.address, process.agent_id = ours.recv()
    yield process
    with contextlib.suppress(BrokenPipeError):  # it may have been killed
        ours.send("stop")
    process.join(LONG_S)
    ours.close()


@pytest.fixture
def agent():
    made = make_agent()
    yield made
    made.stop()


def pull_block(agent, address, size=SIZE):
    block = agent.allocate(size)
    lens = array("Q", [size])
    return block, agent.pull(address, KEY, array("Q", [block.address]), lens)


def next_event(agent, kind):
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        for event in agent.next_events(0.5):
            if event[0] == kind:
                return event
    raise AssertionError(f"no {kind} event came")


@pytest.mark.parametrize("lane", ["cma", "shm", "tcp"])
def test_pull_from_another_process(producer, lane):
    agent = make_agent(lanes=frozenset({lane}))
    block, pull = pull_block(agent, producer.address)
    pull.wait(LONG_S)
    assert bytes(block) == bytes(contents()[:SIZE])
    assert (pull.done, pull.lane, pull.nbytes) == (True, lane, SIZE)
    assert agent.stats()[f"pulls_{lane}"] == 1
    assert agent.explain(producer.address)[lane] == "ok"
    agent.stop()


def test_pull_into_several_spans(agent, producer):
    parts = [bytearray(1), bytearray(), bytearray(SIZE - 5), bytearray(4)]
    addrs, lens = spans(*parts)
    agent.pull(producer.address, KEY, addrs, lens).wait(LONG_S)
    assert b"".join(parts) == contents()[:SIZE]


def test_own_memory_is_pulled_in_process(agent):
    data = contents()[:SIZE]
    agent.register(KEY, *spans(data), 1)
    block, pull = pull_block(agent, agent.address)
    pull.wait(LONG_S)
    assert bytes(block) == bytes(data)
    assert pull.lane == "inproc"


def test_release_brings_the_token(agent):
    agent.register(KEY, array("Q"), array("Q"), 42)
    with pytest.raises(ValueError, match="in use"):
        agent.register(KEY, array("Q"), array("Q"), 43)
    assert agent.release(KEY)
    assert not agent.release(KEY)
    assert next_event(agent, "released") == ("released", [42])


def test_free_from_another_process(agent, producer):
    _block, pull = pull_block(agent, producer.address)
    pull.wait(LONG_S)
    agent.free(producer.address, KEY)
    with pytest.raises(_agent.AgentError, match="no such object") as caught:
        pull_block(agent, producer.address)[1].wait(LONG_S)
    assert caught.value.code == "not_found"


def test_call_and_error_reply(agent, producer):
    assert agent.call(producer.address, b"x").wait(LONG_S) == b"echo x"
    with pytest.raises(_agent.AgentError, match="echo fail") as caught:
        agent.call(producer.address, b"fail").wait(LONG_S)
    assert caught.value.code == "refused"


def test_wait_times_out_and_goes_on(agent, producer):
    call = agent.call(producer.address, b"ignore")
    with pytest.raises(TimeoutError):
        call.wait(0.1)
    assert not call.done


def test_fileno_is_readable_when_done(agent, producer):
    _block, pull = pull_block(agent, producer.address)
    assert select.select([pull.fileno()], [], [], LONG_S)[0]
    assert pull.done


def test_cancelled_pull_raises(agent, producer):
    os.kill(producer.pid, signal.SIGSTOP)
    _, pull = pull_block(agent, producer.address)
    pull.cancel()
    pull.cancel()
    os.kill(producer.pid, signal.SIGCONT)
    with pytest.raises(_agent.AgentError) as caught:
        pull.wait(LONG_S)
    assert caught.value.code == "cancelled"


def test_killed_producer_is_lost(agent, producer):
    call = agent.call(producer.address, b"ignore")
    assert agent.call(producer.address, b"x").wait(LONG_S)
    start = time.monotonic()
    producer.kill()
    with pytest.raises(_agent.AgentError) as caught:
        call.wait(LONG_S)
    assert caught.value.code == "peer_lost"
    assert time.monotonic() - start < 2
    assert next_event(agent, "lost") == ("lost", producer.agent_id)


@pytest.fixture
def interruptible():
    """A program that a shell starts in the background ignores SIGINT, and this one with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_wait_ends_on_an_interrupt_flag(agent, producer, interruptible):
    """Ray cancels a task this way: with a flag and no signal."""
    threading.Timer(0.2, _thread.interrupt_main).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        agent.call(producer.address, b"ignore").wait(LONG_S)
    assert time.monotonic() - start < 5


def test_wait_ends_on_a_signal(agent, producer, interruptible):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        agent.call(producer.address, b"ignore").wait(LONG_S)


def test_the_gil_is_free_while_waiting(agent, producer):
    call = agent.call(producer.address, b"ignore")

    def wait():
        with pytest.raises(TimeoutError):
            call.wait(0.5)

    waiter = threading.Thread(target=wait)
    waiter.start()
    turns = 0
    while waiter.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 20


def test_what_is_noted_as_pulled_must_be_spans(agent):
    data = bytearray(100)
    agent.note_pulled(*spans(data))
    with pytest.raises(ValueError, match="length"):
        agent.note_pulled(array("Q", [1, 2]), array("Q", [1]))
    with pytest.raises(ValueError, match="overflow"):
        agent.note_pulled(array("Q", [1]), array("Q", [2**64 - 1]))
    agent.stop()
    agent.note_pulled(*spans(data))


def test_a_forked_child_cannot_use_the_agent(agent, producer):
    block, pull = pull_block(agent, producer.address)
    gc.collect()  # what other tests left behind is not the child's to end
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            agent.stats()
        except _agent.AgentError as error:
            code = 0 if error.code == "stopped" else 2
        del block, pull, agent
        gc.collect()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    pull.wait(LONG_S)
    assert bytes(block) == bytes(contents()[:SIZE])


def sockets():
    names = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread may close it
            names.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {name for name in names if name.startswith("socket:")}


def test_a_forked_child_holds_none_of_its_connections(producer):
    before = sockets()
    agent = make_agent(lanes=frozenset({"tcp"}))
    pull_block(agent, producer.address)[1].wait(LONG_S)
    made = sockets() - before  # what other tests left may close meanwhile
    assert len(made) > 2
    pid = os.fork()
    if pid == 0:
        os._exit(len(sockets() & made))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    pull_block(agent, producer.address)[1].wait(LONG_S)
    agent.stop()


def test_stop_fails_waiters_and_ends_events(producer):
    agent = make_agent()
    agent.register(KEY, array("Q"), array("Q"), 9)
    call = agent.call(producer.address, b"ignore")
    threading.Timer(0.1, agent.stop).start()
    with pytest.raises(_agent.AgentError) as caught:
        call.wait(LONG_S)
    assert caught.value.code == "stopped"
    assert next_event(agent, "released") == ("released", [9])
    agent.stop()
    with pytest.raises(_agent.AgentError):
        pull_block(agent, producer.address)[1].wait(LONG_S)


def test_blocks_outlive_the_agent():
    agent = make_agent()
    block = agent.allocate(1000)
    view = memoryview(block)
    agent.stop()
    del agent, block
    gc.collect()
    view[:3] = b"abc"
    assert bytes(view[:3]) == b"abc"


def test_pool_recycles_and_trims(agent):
    size = 3 << 20
    first = agent.allocate(size)
    address = first.address
    assert address % (2 << 20) == 0
    del first
    again = agent.allocate(size)
    assert again.address == address
    del again
    assert agent.stats()["pool_free"] >= size
    agent.trim()
    assert agent.stats()["pool_free"] == 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="unknown lane 'ib'"):
        make_agent(lanes={"ib"})
    agent = make_agent()
    with pytest.raises(ValueError, match="16 bytes"):
        agent.release(b"short")
    with pytest.raises(ValueError, match="address"):
        agent.call(b"nonsense", b"")
    with pytest.raises(ValueError, match="differ"):
        agent.register(KEY, array("Q", [1]), array("Q"), 1)
    agent.stop()
