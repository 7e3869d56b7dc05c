"""Values whose tensors have not arrived: when pulls begin, how many, and how they end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import ray
from ray.experimental.rdt.common.thread_role import without_turn
from ray.experimental.rdt.consumer.deferred import Puller

PRODUCER = b"a producer"


def test_a_value_that_exits_while_it_is_unpickled_is_an_error() -> None:
    def deserialize(_: Any) -> Any:
        raise SystemExit(3)

    puller = Puller()
    future = puller.defer(deserialize, PRODUCER).start()
    assert isinstance(future.result(20), ray.exceptions.RaySystemError)
    puller.close()


def test_callbacks_that_raise_leave_their_turn() -> None:
    def leave(_: Any) -> None:
        raise SystemExit(3)

    puller = Puller()
    for _ in range(20):
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        late = puller.defer(lambda _: 7, PRODUCER)
        late.then(done.set_result)
        late.then(leave)
        assert done.result(20) == 7
    puller.close()


@pytest.mark.parametrize("kind", [ValueError, TimeoutError])
def test_other_errors_are_given_as_those_of_ray_get(kind: type[Exception]) -> None:
    def deserialize(_: Any) -> Any:
        raise kind("on purpose")

    puller = Puller()
    error = puller.defer(deserialize, PRODUCER).start().result(20)
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error.as_instanceof_cause(), kind)
    puller.close()


class Held:
    """Values that are deserialized only once they are let go; counts the pulls that have begun."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.changed = threading.Condition()
        self.is_open = False

    def __call__(self, into: Any) -> Any:
        with without_turn(), self.changed:
            self.begun.append(into)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.is_open, 20)
        return len(self.begun)

    def wait_begun(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= count, 20)

    def let_go(self) -> None:
        with self.changed:
            self.is_open = True
            self.changed.notify_all()


@pytest.fixture
def puller() -> Iterator[Puller]:
    puller = Puller()
    yield puller
    puller.close()


def test_a_pull_begins_when_somebody_asks_and_only_once(puller: Puller) -> None:
    held = Held()
    late = puller.defer(held, PRODUCER)
    late.into(["a tensor"])  # type: ignore[list-item]
    assert not held.begun
    assert late.start() is late.start()
    held.wait_begun(1)
    held.let_go()
    assert late.result() == 1
    assert held.begun == [["a tensor"]]


def test_a_silent_producer_leaves_threads_for_others(puller: Puller) -> None:
    held = Held()
    silent = [puller.defer(held, b"silent").start() for _ in range(100)]
    held.wait_begun(16)
    assert puller.defer(lambda _: 7, PRODUCER).start().result(20) == 7
    assert len(held.begun) == 16
    held.let_go()
    for each in silent:
        each.result(20)
    assert len(held.begun) == 100


def test_a_value_is_awaited(puller: Puller) -> None:
    held = Held()

    async def take() -> Any:
        late = puller.defer(held, PRODUCER)
        waiting = asyncio.ensure_future(late.arrive())
        await asyncio.to_thread(held.wait_begun, 1)
        assert not waiting.done()
        held.let_go()
        return await waiting

    assert asyncio.run(take()) == 1


def test_a_canceled_wait_leaves_the_pull(puller: Puller) -> None:
    held = Held()

    async def leave() -> Any:
        late = puller.defer(held, PRODUCER)
        waiting = asyncio.ensure_future(late.arrive())
        await asyncio.to_thread(held.wait_begun, 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        held.let_go()
        return await late.arrive()

    assert asyncio.run(leave()) == 1


def test_values_that_wait_for_a_thread_end_with_the_process() -> None:
    held = Held()
    puller = Puller()
    begun = [puller.defer(held, PRODUCER) for _ in range(16)]
    for each in begun:
        each.start()
    held.wait_begun(16)
    waiting = puller.defer(held, PRODUCER)
    waiting.start()
    puller.close()
    assert isinstance(waiting.result(), ray.exceptions.RaySystemError)
    held.let_go()
    assert [type(each.result()) for each in begun] == [int] * 16
