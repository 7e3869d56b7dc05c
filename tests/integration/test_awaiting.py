"""Waiting for tensors blocks neither an event loop nor Ray's own threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ray
from tests.integration.peers import LARGE, Peer, ones, total
from tests.support import stopped, wait_until

#: How long an event loop may stand still here; a pull that waits for a stopped producer takes
#: until that goes on.
STOPPED_S = 1.0


@ray.remote(num_cpus=0)
class Async:
    """An async actor that notices when its event loop stands still."""

    async def total(self, *tensors: torch.Tensor, **named: torch.Tensor) -> float:
        return sum(float(tensor.sum()) for tensor in (*tensors, *named.values()))

    def plain_total(self, tensor: torch.Tensor) -> float:
        return float(tensor.sum())

    def parts(self, tensor: torch.Tensor) -> Iterator[float]:
        yield float(tensor.sum())
        yield 1.0

    async def await_all(self, refs: list[Any]) -> list[float]:
        return [float(tensor.sum()) for tensor in await asyncio.gather(*refs)]

    async def ping(self) -> float:
        return time.monotonic()


@pytest.fixture(scope="module")
def slow(local_ray: None) -> Iterator[Any]:
    """A producer to be stopped."""
    actor = Peer.remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="module")
def actor(local_ray: None) -> Iterator[Any]:
    actor = Async.options(max_concurrency=100).remote()
    yield actor
    ray.kill(actor)


def test_awaited_reference_leaves_the_event_loop_alone(slow: Any, consumer: Any) -> None:
    ref = slow.make.remote(ones)
    pid = ray.get(slow.pid.remote())
    ray.wait([ref], fetch_local=False)

    async def take() -> tuple[float, int]:
        ticks = 0
        waiting = asyncio.ensure_future(_value(ref))
        with stopped(pid):
            end = time.monotonic() + STOPPED_S
            while time.monotonic() < end:
                await asyncio.sleep(0.01)
                ticks += 1
            # Ray's io thread goes on as well: a plain call of another actor comes back.
            await consumer.run.remote(lambda _: None)
            assert not waiting.done()
        return float((await waiting).sum()), ticks

    value, ticks = asyncio.run(take())
    assert value == LARGE
    assert ticks > 10


async def _value(ref: Any) -> torch.Tensor:
    return await ref


def test_future_leaves_the_io_thread_alone(slow: Any, consumer: Any) -> None:
    ref = slow.make.remote(ones)
    pid = ray.get(slow.pid.remote())
    ray.wait([ref], fetch_local=False)
    with stopped(pid):
        future = ref.future()
        assert ray.get(consumer.run.remote(lambda _: 7), timeout=20) == 7
        assert not future.done()
    assert float(future.result(timeout=30).sum()) == LARGE


def test_late_argument_leaves_an_async_actor_free(slow: Any, actor: Any) -> None:
    ref = slow.make.remote(ones)
    pid = ray.get(slow.pid.remote())
    ray.wait([ref], fetch_local=False)
    ray.get(actor.ping.remote())
    with stopped(pid):
        calls = [
            actor.total.remote(ref, again=ref),
            actor.plain_total.remote(ref),
            actor.await_all.remote([ref]),
        ]
        ray.get(actor.ping.remote(), timeout=20)
        assert ray.wait(calls, timeout=0.2) == ([], calls)
    assert ray.get(calls, timeout=30) == [2 * LARGE, LARGE, [LARGE]]


def test_a_silent_producer_keeps_only_its_own_pulls_waiting(
    slow: Any, producer: Any, actor: Any
) -> None:
    silent, other = slow.make.remote(ones), producer.make.remote(ones)
    pid = ray.get(slow.pid.remote())
    ray.wait([silent, other], num_returns=2, fetch_local=False)
    with stopped(pid):
        calls = [actor.total.remote(silent) for _ in range(70)]
        assert ray.get(actor.total.remote(other), timeout=20) == LARGE
        assert ray.wait(calls, timeout=0) == ([], calls)
    assert ray.get(calls, timeout=60) == [LARGE] * 70


def test_async_actor_takes_late_arguments_in_every_method(producer: Any, actor: Any) -> None:
    ref = producer.make.remote(ones)
    assert ray.get(actor.total.remote(ref, b=ref)) == 2 * LARGE
    assert ray.get(actor.plain_total.remote(ref)) == LARGE
    assert [ray.get(item) for item in actor.parts.remote(ref)] == [LARGE, 1.0]
    assert ray.get(actor.__ray_call__.remote(lambda _, tensor: float(tensor.sum()), ref)) == LARGE


def test_many_pulls_at_once_in_one_async_actor(producer: Any, actor: Any) -> None:
    refs = [producer.make.remote(lambda _, i: torch.full((LARGE,), float(i)), i) for i in range(50)]
    expected = [float(i * LARGE) for i in range(50)]
    assert ray.get([actor.total.remote(ref) for ref in refs]) == expected
    assert ray.get(actor.await_all.remote(refs)) == expected


class Resolving:
    """Gets what it refers to while it is unpickled."""

    def __init__(self, ref: Any):
        self.ref, self.tensor = ref, torch.ones(LARGE)

    def __reduce__(self) -> Any:
        return _resolve, (self.ref, self.tensor)


def _resolve(ref: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor + ray.get(ref)


def test_values_that_call_get_while_they_are_unpickled(
    producer: Any, third: Any, spawn: Any
) -> None:
    inner = [producer.make.remote(ones) for _ in range(12)]
    refs = [third.make.remote(lambda _, refs: Resolving(refs[0]), [ref]) for ref in inner]
    taker = spawn(Async, max_concurrency=100)
    totals = [taker.total.remote(ref) for ref in refs]
    assert ray.get([*totals, taker.await_all.remote(refs)], timeout=30) == [
        *([2 * LARGE] * len(refs)),
        [2 * LARGE] * len(refs),
    ]


def test_failed_late_argument_fails_the_call(actor: Any) -> None:
    lost = Peer.remote()
    ref, pid = lost.make.remote(ones), ray.get(lost.pid.remote())
    ray.wait([ref], fetch_local=False)
    ray.kill(lost)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the producer has ended")
    for call in (actor.total, actor.plain_total):
        with pytest.raises(ray.exceptions.RayError):
            ray.get(call.remote(ref), timeout=30)

    async def take() -> Any:
        return await ref

    with pytest.raises(ray.exceptions.RayError):
        asyncio.run(take())
    with pytest.raises(ray.exceptions.RayError):
        ref.future().result(timeout=30)


def test_cancelled_await_lets_go(slow: Any) -> None:
    ref = slow.make.remote(ones)
    pid = ray.get(slow.pid.remote())
    ray.wait([ref], fetch_local=False)

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_value(ref), 0.2)

    with stopped(pid):
        asyncio.run(give_up())
    assert float(ray.get(ref, timeout=30).sum()) == LARGE


def test_callbacks_come_on_no_thread_of_the_users(producer: Any) -> None:
    ref, done, names = producer.make.remote(ones), threading.Event(), []

    def callback(value: Any) -> None:
        names.append((threading.current_thread().name, float(value.sum())))
        done.set()

    ref._on_completed(callback)
    assert done.wait(30)
    assert names[0][1] == LARGE
    assert names[0][0] != threading.main_thread().name


def test_call_of_a_sync_actor_is_as_before(consumer: Any, producer: Any) -> None:
    ref = producer.make.remote(ones)
    assert ray.get(consumer.run.remote(total, ref)) == LARGE
