"""What goes wrong is told soon, as an error that names object, peer and lane; the rest works on."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    ObjectFetchTimedOutError,
    ObjectLostError,
    RayError,
    RayTaskError,
)

import ray
from ray.experimental.rdt.common.errors import RDTFetchError
from tests.integration import user_transports
from tests.integration.conftest import needs_nixl
from tests.integration.peers import LARGE, SMALL, Peer, ones, total, total_of_refs
from tests.support import BUSY_S, KNOWN_WITHIN_S, MAKER, START, run_driver, stopped, wait_until


def kill_process(actor: Any) -> int:
    """Ends the actor's process as a crash would; returns its id once it is gone."""
    pid = int(ray.get(actor.pid.remote()))
    os.kill(pid, signal.SIGKILL)
    return pid


def assert_tells_of_death(error: BaseException, object_id: str, transport: str) -> None:
    assert isinstance(error, ObjectLostError)
    assert isinstance(error, ActorDiedError)
    assert object_id in str(error)
    assert "producer" in str(error)
    assert repr(transport) in str(error)


def cause_of(error: RayTaskError) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) else error


def test_unknown_transport_of_a_call(producer: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid tensor transport: carrier_pigeon.*auto.*gloo"):
        producer.make.options(tensor_transport="carrier_pigeon").remote(ones)
    assert ray.get(producer.make.remote(ones, 3)).tolist() == [1, 1, 1]


def test_unknown_transport_of_a_decorator(local_ray: None) -> None:
    with pytest.raises(ValueError, match=r"Invalid tensor transport: carrier_pigeon.*auto.*gloo"):

        @ray.remote
        class _Wrong:
            @ray.method(tensor_transport="carrier_pigeon")
            def make(self) -> None: ...


def test_killed_producer_is_known_soon(spawn: Any, transport: str) -> None:
    maker = spawn()
    ref = maker.make.options(tensor_transport=transport).remote(ones)
    ray.wait([ref])
    kill_process(maker)
    began = time.monotonic()
    with pytest.raises(ObjectLostError) as caught:
        ray.get(ref)
    assert time.monotonic() - began < KNOWN_WITHIN_S + BUSY_S
    assert_tells_of_death(caught.value, ref.hex(), transport)


def test_killed_producer_is_known_soon_to_who_has_talked_to_it(
    spawn: Any, consumer: Any, transport: str
) -> None:
    def get_both(peer: Peer, refs: list[Any]) -> str:
        try:
            return str(total_of_refs(peer, refs))
        except ObjectLostError as error:
            assert_tells_of_death(error, refs[0].hex(), transport)
            return "told"

    maker = spawn()
    make = maker.make.options(tensor_transport=transport)
    assert ray.get(consumer.run.remote(total, make.remote(ones))) == LARGE
    ref = make.remote(ones)
    ray.wait([ref])
    kill_process(maker)
    began = time.monotonic()
    assert ray.get(consumer.run.remote(get_both, [ref])) == "told"
    assert time.monotonic() - began < KNOWN_WITHIN_S + BUSY_S


def test_task_whose_argument_is_lost_fails_with_its_error(
    spawn: Any, consumer: Any, transport: str
) -> None:
    maker = spawn()
    ref = maker.make.options(tensor_transport=transport).remote(ones)
    ray.wait([ref])
    kill_process(maker)
    with pytest.raises(RayError) as caught:
        ray.get(consumer.run.remote(total, ref), timeout=60)
    assert ref.hex() in str(caught.value)
    assert ray.get(consumer.run.remote(lambda _: "works on")) == "works on"


def test_producer_killed_while_a_get_waits_for_it(spawn: Any) -> None:
    maker, taker = spawn(), spawn(max_concurrency=2)
    ref = maker.make.remote(ones)
    ray.wait([ref])
    pid = ray.get(maker.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    waiting = taker.run.remote(total_of_refs, [ref])
    assert not ray.wait([waiting], timeout=0.5)[0]
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ObjectLostError):
        ray.get(waiting, timeout=60)
    assert time.monotonic() - began < KNOWN_WITHIN_S + BUSY_S


def test_small_object_survives_its_producer(spawn: Any, consumer: Any) -> None:
    maker = spawn()
    ref = maker.make.remote(ones, SMALL)
    ray.wait([ref])
    kill_process(maker)
    assert ray.get(ref).sum() == SMALL
    assert ray.get(consumer.run.remote(total, ref)) == SMALL


def test_restarted_producer_makes_new_objects(spawn: Any, consumer: Any, transport: str) -> None:
    maker = spawn(max_restarts=1)
    make = maker.make.options(tensor_transport=transport)
    old = make.remote(ones)
    assert ray.get(consumer.run.remote(total, old)) == LARGE
    kill_process(maker)
    with pytest.raises(ObjectLostError):
        ray.get(old, timeout=60)
    wait_until(lambda: is_up(maker), "the producer is back")
    assert ray.get(consumer.run.remote(total, make.remote(ones))) == LARGE


def is_up(actor: Any) -> bool:
    try:
        return bool(ray.get(actor.pid.remote()))
    except RayError:
        return False


def test_killed_consumer_leaves_nothing_at_the_producer(spawn: Any, transport: str) -> None:
    def hold(peer: Peer, got: torch.Tensor) -> None:
        peer.kept["got"] = got

    maker, taker = spawn(), spawn()
    refs = [maker.make.options(tensor_transport=transport).remote(ones) for _ in range(4)]
    ray.get([taker.run.remote(hold, ref) for ref in refs])
    kill_process(taker)
    assert ray.get(refs[0]).sum() == LARGE
    del refs

    def assert_idle() -> None:
        counters = ray.get(maker.stats.remote())
        assert {name: counters[name] for name in ("stored_objects", "regions", "pinned")} == {
            "stored_objects": 0,
            "regions": 0,
            "pinned": 0,
        }

    wait_until(assert_idle, "at the producer:")


def test_freed_object_says_so(spawn: Any) -> None:
    maker = spawn()
    ref = maker.make.remote(ones)
    ray.wait([ref])
    manager = ray._private.worker.global_worker.rdt_manager
    manager.queue_or_free_object_primary_copy(ref.hex())
    wait_until(lambda: ray.get(maker.stats.remote())["stored_objects"] == 0, "freed")
    with pytest.raises(ObjectLostError, match="does not hold it any more") as caught:
        ray.get(ref)
    assert not isinstance(caught.value, ActorDiedError)
    assert ref.hex() in str(caught.value)


def spoil(peer: Peer, module: str, name: str) -> None:
    """Makes a function of RDT fail in this process."""

    def fail(*args: Any) -> Any:
        raise OSError("spoilt by the test")

    setattr(importlib.import_module(f"ray.experimental.rdt.{module}"), name, fail)


@pytest.mark.usefixtures("users_transports")
@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("gloo", "producer.transport_server", "flat_buffers"),
        ("gloo", "transports.process_group.packing", "plan"),
        pytest.param("nixl", "producer.transport_server", "flat_buffers", marks=needs_nixl()),
        ("pipe", "producer.transport_server", "await_events"),
        ("pipe", "transports.user.registered", "read_note"),
        ("shm", "producer.transport_server", "await_events"),
    ],
)
def test_consumer_hears_at_once_why_the_producer_cannot_send(
    spawn: Any, consumer: Any, name: str, module: str, function: str
) -> None:
    maker = spawn()
    ref = maker.make.options(tensor_transport=name).remote(ones)
    ray.get(maker.run.remote(spoil, module, function))
    with pytest.raises(RayError, match="spoilt by the test") as caught:
        ray.get(consumer.run.remote(total, ref), timeout=15)
    assert isinstance(cause_of(caught.value), RDTFetchError), caught.value
    assert not isinstance(cause_of(caught.value), ObjectFetchTimedOutError)


def test_silent_producer_is_given_up_in_time(spawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RAY_rdt_fetch_fail_timeout_milliseconds": "1500"}
    maker, taker = spawn(), spawn(runtime_env={"env_vars": environment})
    ref = maker.make.remote(ones)
    ray.wait([ref])
    ray.get(taker.pid.remote())
    pid = ray.get(maker.pid.remote())
    with stopped(pid), pytest.raises(ObjectFetchTimedOutError, match=r"1\.5 s"):
        ray.get(taker.run.remote(total_of_refs, [ref]), timeout=30)
    assert ray.get(taker.run.remote(total_of_refs, [ref])) == LARGE


def test_cancelled_get_stops_and_the_object_stays(spawn: Any, tmp_path: Path) -> None:
    @ray.remote(num_cpus=0)
    def get(refs: list[Any], begun: Path) -> float:
        import torch  # An import that is cancelled half-way spoils the worker for later tasks.

        assert torch is not None
        begun.touch()
        return float(ray.get(refs[0]).sum())

    maker, begun = spawn(), tmp_path / "begun"
    ref = maker.make.remote(ones)
    ray.wait([ref])
    pid = ray.get(maker.pid.remote())
    with stopped(pid):
        waiting = get.remote([ref], begun)
        wait_until(begun.exists, "the task waits")
        assert not ray.wait([waiting], timeout=0.5)[0]
        ray.cancel(waiting)
        with pytest.raises((ray.exceptions.TaskCancelledError, RayTaskError)):
            ray.get(waiting, timeout=30)
    assert ray.get(get.remote([ref], begun)) == LARGE


class TooLateError(TimeoutError):
    """Of the program's own."""


@contextlib.contextmanager
def interrupted(error: type[BaseException], after_s: float) -> Iterator[None]:
    """Has a signal handler raise an error on the main thread, and expects that one."""

    def handler(signum: int, frame: Any) -> None:
        raise error("from the handler")

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(error) as caught:
            yield
        assert type(caught.value) is error
        assert str(caught.value) == "from the handler"
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("users_transports")
@pytest.mark.parametrize("name", ["auto", "gloo", pytest.param("nixl", marks=needs_nixl()), "pipe"])
def test_exception_of_a_signal_handler_comes_as_it_is(spawn: Any, name: str) -> None:
    maker = spawn()
    ref = maker.make.options(tensor_transport=name).remote(ones)
    ray.wait([ref])
    pid = ray.get(maker.pid.remote())
    with stopped(pid):
        for error in (TooLateError, TimeoutError, ConnectionError, KeyboardInterrupt):
            with interrupted(error, after_s=0.3):
                ray.get(ref)
    assert ray.get(ref).sum() == LARGE


@pytest.mark.usefixtures("users_transports")
def test_exception_of_a_signal_handler_while_an_object_is_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(user_transports.SCRIPT, "extract", "hang")
    with interrupted(TooLateError, after_s=0.3):
        ray.put(torch.ones(3), _tensor_transport="shm")
    monkeypatch.undo()
    assert ray.get(ray.put(torch.ones(3), _tensor_transport="shm")).sum() == 3


def test_alarm_around_a_get_in_an_actor(spawn: Any) -> None:
    def reward(peer: Peer, refs: list[Any]) -> str:
        def handler(*arguments: Any) -> None:
            raise TimeoutError("the reward took too long")

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            return str(total_of_refs(peer, refs))
        except TimeoutError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    maker, taker = spawn(), spawn()
    ref = maker.make.remote(ones)
    ray.wait([ref])
    pid = ray.get(maker.pid.remote())
    with stopped(pid):
        assert ray.get(taker.run.remote(reward, [ref]), timeout=20) == (
            "TimeoutError: the reward took too long"
        )
    assert ray.get(taker.run.remote(total, ref), timeout=20) == LARGE


@pytest.mark.parametrize("kind", ["task", "actor", "threaded"])
def test_cancelled_consumer_stops_pulling_its_argument(spawn: Any, kind: str) -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def task(action: Any, tensor: torch.Tensor) -> float:
        return float(tensor.sum())

    maker = spawn()
    ref = maker.make.remote(ones)
    call = task if kind == "task" else spawn(max_concurrency=2 if kind == "threaded" else 1).run
    assert ray.get(call.remote(total, ref)) == LARGE
    pid = ray.get(maker.pid.remote())
    with stopped(pid):
        waiting = call.remote(total, ref)
        assert not ray.wait([waiting], timeout=0.5)[0]
        ray.cancel(waiting)
        # Before the silent producer is given up.
        with pytest.raises(RayError) as caught:
            ray.get(waiting, timeout=8)
        assert "ancel" in str(caught.value), caught.value
    assert ray.get(call.remote(total, ref), timeout=30) == LARGE


def test_a_lost_object_does_not_spoil_the_others(spawn: Any, producer: Any) -> None:
    maker = spawn()
    lost, kept = maker.make.remote(ones), producer.make.remote(ones)
    ray.wait([lost, kept], num_returns=2)
    kill_process(maker)
    with pytest.raises(ObjectLostError):
        ray.get([kept, lost])
    assert ray.get([kept, kept])[1].sum() == LARGE


def test_lost_error_can_be_passed_on(spawn: Any, consumer: Any) -> None:
    maker = spawn()
    ref = maker.make.remote(ones)
    ray.wait([ref])
    kill_process(maker)
    with pytest.raises(ObjectLostError) as caught:
        ray.get(ref)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert str(again) == str(caught.value)
    (returned,) = ray.get(consumer.run.remote(lambda _, errors: errors, [caught.value]))
    assert str(returned) == str(again)


def test_named_transport_that_is_not_here_is_replaced_unless_strict(
    spawn: Any, consumer: Any
) -> None:
    ref = ray.put(torch.ones(LARGE), _tensor_transport="nccl")
    lenient = spawn(runtime_env={"env_vars": {"RAY_RDT_STRICT_TRANSPORT": "0"}})
    assert ray.get(lenient.run.remote(total, ref)) == LARGE
    with pytest.raises(RayError, match="RAY_RDT_STRICT_TRANSPORT"):
        ray.get(consumer.run.remote(total_of_refs, [ref]))


def test_setting_that_cannot_be_read_is_named(spawn: Any, producer: Any) -> None:
    wrong = spawn(runtime_env={"env_vars": {"RAY_RDT_LANES": "cma,pigeon"}})
    ref = producer.make.remote(ones)
    with pytest.raises(Exception, match=r"RAY_RDT_LANES.*pigeon"):
        ray.get(wrong.run.remote(total_of_refs, [ref]), timeout=60)
    assert ray.get(wrong.run.remote(lambda _: "works on")) == "works on"


#: A worker in whose environment torch is missing: the import fails as it does there.
WITHOUT_TORCH = """
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

@ray.remote(num_cpus=0)
class Bare:
    def __init__(self):
        sys.meta_path.insert(0, NoTorch())
        assert "torch" not in sys.modules

    @ray.method(tensor_transport="auto")
    def number(self):
        return {"n": 5}

    def get(self, refs):
        try:
            return ray.get(refs[0])
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def put(self, value):
        try:
            return ray.get(ray.put(value, _tensor_transport="auto"))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
"""


def test_torch_missing_is_said_at_first_use_and_the_rest_works(tmp_path: Path) -> None:
    source = (
        START
        + MAKER
        + WITHOUT_TORCH
        + """
start()
maker, bare = Maker.remote(), Bare.remote()
for count in (3, 100_000):
    ref = maker.make.remote(count)
    ray.wait([ref])
    print("got", ray.get(bare.get.remote([ref])))
    try:
        print("argument", ray.get(bare.get.remote(ref), timeout=60))
    except ray.exceptions.RayError as error:
        print("argument", str(error).replace(chr(10), " "))
print("put", ray.get(bare.put.remote([1])))
print("number", ray.get(bare.number.remote()), ray.get(maker.make.remote(3)).tolist())
"""
    )
    lines = run_driver(source, tmp_path).splitlines()
    for begin in ("got", "argument"):
        told = [line for line in lines if line.startswith(begin)]
        assert len(told) == 2
        assert all("torch" in line and "Install torch" in line for line in told), told
    assert "put [1]" in lines
    assert "number {'n': 5} [1.0, 1.0, 1.0]" in lines


def test_get_timeout_of_zero(producer: Any) -> None:
    ref = producer.make.remote(ones)
    ray.wait([ref])
    with contextlib.suppress(GetTimeoutError):  # What Ray does where it is not local yet.
        assert ray.get(ref, timeout=0).sum() == LARGE
    assert ray.get(ref, timeout=30).sum() == LARGE
