"""Generators whose items are RDT objects: of actors, of tasks, sync and async."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch

import ray
from tests.integration.peers import LARGE, SMALL, total
from tests.support import run_driver, wait_until

#: Ray warns that it is deprecated.
dynamic = pytest.mark.filterwarnings("ignore:num_returns='dynamic'")


@ray.remote(num_cpus=0)
class Source:
    """An actor that yields tensors."""

    @ray.method(tensor_transport="auto")
    def items(self, count: int, nbytes: int = LARGE) -> Iterator[torch.Tensor]:
        for index in range(count):
            yield torch.full((nbytes,), float(index))

    def mixed(self) -> Iterator[Any]:
        yield {"a": torch.ones(LARGE), "text": "x"}
        yield None
        yield torch.ones(SMALL)
        yield "no tensor"

    @ray.method(tensor_transport="auto", _num_objects_per_yield=2)
    def pairs(self) -> Iterator[Any]:
        yield torch.ones(LARGE), torch.ones(SMALL)
        yield [torch.ones(LARGE), "text"]
        yield torch.ones(2)

    def failing(self) -> Iterator[torch.Tensor]:
        yield torch.ones(LARGE)
        raise RuntimeError("no more")

    def endless(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.ones(LARGE)

    def flaky(self, marker: str) -> Iterator[torch.Tensor]:
        for index in range(4):
            if index == 2 and not os.path.exists(marker):
                with open(marker, "w"):
                    raise ValueError("try again")
            yield torch.full((LARGE,), float(index))

    def stats(self) -> dict[str, int]:
        from ray.experimental.rdt import stats

        gc.collect()
        return stats()


@ray.remote(num_cpus=0)
class AsyncSource:
    """An async actor that yields tensors."""

    @ray.method(tensor_transport="auto")
    async def items(self, count: int, *late: torch.Tensor) -> AsyncIterator[torch.Tensor]:
        for index in range(count):
            await asyncio.sleep(0)
            yield torch.full((LARGE,), float(index) + sum(float(t.sum()) for t in late))

    async def stats(self) -> dict[str, int]:
        from ray.experimental.rdt import stats

        gc.collect()
        return stats()


@ray.remote(num_cpus=0)
class Caller:
    """Takes another actor's items itself."""

    def take(self, source: Any, count: int) -> list[float]:
        return [float(ray.get(ref).sum()) for ref in source.items.remote(count)]

    async def take_async(self, source: Any, count: int) -> list[float]:
        return [float((await ref).sum()) async for ref in source.items.remote(count)]

    def leave(self, source: Any) -> None:
        """Takes one of five items and ends without a word."""
        next(source.items.remote(5))
        os._exit(1)


@ray.remote
def tensors(count: int, offset: float = 0.0) -> Iterator[torch.Tensor]:
    for index in range(count):
        yield torch.full((LARGE,), index + offset)


@pytest.fixture(scope="module")
def source(local_ray: None) -> Iterator[Any]:
    """One for all tests; each leaves it empty."""
    actor = Source.remote()
    yield actor
    ray.kill(actor)


def expect_empty(actor: Any) -> None:
    def is_empty() -> None:
        stats = ray.get(actor.stats.remote())
        assert (stats["stored_objects"], stats["streams"]) == (0, 0), stats

    wait_until(is_empty)


def test_items_arrive_in_order_and_are_freed(source: Any, transport: str) -> None:
    generator = source.items.options(tensor_transport=transport).remote(5)
    values = [ray.get(ref) for ref in generator]
    assert [float(value[0]) for value in values] == [0, 1, 2, 3, 4]
    assert all(value.shape == (LARGE,) for value in values)
    del generator
    expect_empty(source)


def test_items_go_to_others_and_come_home(source: Any, consumer: Any, transport: str) -> None:
    refs = list(source.items.options(tensor_transport=transport).remote(3))
    sums = [consumer.run.remote(total, ref) for ref in refs]
    nested = consumer.run.remote(lambda _, held: total(None, ray.get(held[0])), [refs[2]])
    assert ray.get([*sums, nested]) == [0, LARGE, 2 * LARGE, 2 * LARGE]
    assert all(ref.tensor_transport() is not None for ref in refs)
    del refs
    expect_empty(source)


def test_items_are_whatever_plain_ray_gives(source: Any) -> None:
    rdt = [ray.get(ref) for ref in source.mixed.options(tensor_transport="auto").remote()]
    plain = [ray.get(ref) for ref in source.mixed.remote()]
    assert torch.equal(rdt[0]["a"], plain[0]["a"])
    assert rdt[0]["text"] == plain[0]["text"]
    assert torch.equal(rdt[2], plain[2])
    assert (rdt[1], rdt[3]) == (plain[1], plain[3])
    expect_empty(source)


def test_error_comes_after_the_items(source: Any) -> None:
    generator = source.failing.options(tensor_transport="auto").remote()
    assert float(ray.get(next(generator)).sum()) == LARGE
    with pytest.raises(RuntimeError, match="no more"):
        ray.get(next(generator))
    with pytest.raises(StopIteration):
        next(generator)
    del generator
    expect_empty(source)


def test_items_that_nobody_takes_are_freed(source: Any) -> None:
    generator = source.items.remote(6)
    kept = next(generator)
    wait_until(lambda: ray.get(source.stats.remote())["stored_objects"] == 6)
    del generator
    gc.collect()
    wait_until(lambda: ray.get(source.stats.remote())["stored_objects"] == 1)
    assert float(ray.get(kept)[0]) == 0
    del kept
    expect_empty(source)


def test_endless_generator_waits_for_its_caller(spawn: Any) -> None:
    source = spawn(Source, max_concurrency=2)
    generator = source.endless.options(
        tensor_transport="auto", _generator_backpressure_num_objects=2
    ).remote()
    for _ in range(5):
        assert float(ray.get(next(generator)).sum()) == LARGE
    assert ray.get(source.stats.remote())["stored_objects"] <= 4


def test_retried_generator_leaves_nothing(source: Any, tmp_path: Any) -> None:
    generator = source.flaky.options(
        tensor_transport="auto", retry_exceptions=True, max_task_retries=1
    ).remote(str(tmp_path / "tried"))
    assert [float(ray.get(ref)[0]) for ref in generator] == [0, 1, 2, 3]
    del generator
    expect_empty(source)


def test_task_yields(local_ray: None, transport: str) -> None:
    generator = tensors.options(tensor_transport=transport).remote(3, offset=1)
    assert [float(ray.get(ref)[0]) for ref in generator] == [1, 2, 3]


def test_task_decorated_with_a_transport_yields(local_ray: None, consumer: Any) -> None:
    @ray.remote(tensor_transport="auto")
    def yielding(count: int, **rest: float) -> Iterator[torch.Tensor]:
        yield from (torch.full((LARGE,), rest["value"]) for _ in range(count))

    refs = list(yielding.remote(2, value=2.0))
    assert ray.get([consumer.run.remote(total, ref) for ref in refs]) == [2 * LARGE] * 2


def test_async_actor_yields(spawn: Any, producer: Any) -> None:
    source = spawn(AsyncSource)
    late = producer.make.remote(lambda _: torch.ones(LARGE))
    assert [float(ray.get(ref)[0]) for ref in source.items.remote(2)] == [0, 1]
    assert [float(ray.get(ref)[0]) for ref in source.items.remote(2, late)] == [LARGE, LARGE + 1]
    expect_empty(source)


def test_actor_takes_items_of_another(source: Any, spawn: Any) -> None:
    caller = spawn(Caller)
    sums = [float(index * LARGE) for index in range(4)]
    assert ray.get(caller.take.remote(source, 4)) == sums
    assert ray.get(caller.take_async.remote(source, 4)) == sums
    expect_empty(source)


def test_async_iteration_by_the_driver(source: Any) -> None:

    async def take() -> list[float]:
        return [float((await ref)[0]) async for ref in source.items.remote(3)]

    assert asyncio.run(take()) == [0, 1, 2]
    expect_empty(source)


def test_items_of_a_caller_that_died_are_freed(source: Any, spawn: Any) -> None:
    caller = spawn(Caller)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(caller.leave.remote(source))
    expect_empty(source)


def test_items_that_come_several_at_a_time(source: Any, consumer: Any) -> None:
    refs = list(source.pairs.remote())
    assert ray.get(consumer.run.remote(total, *refs[:3])) == 2 * LARGE + SMALL
    assert ray.get(refs[3]) == "text"
    with pytest.raises(ValueError, match="must yield a tuple or list"):
        ray.get(refs[4])
    del refs
    expect_empty(source)


@dynamic
def test_dynamic_generator_gives_references(source: Any, consumer: Any) -> None:
    generator = ray.get(source.items.options(num_returns="dynamic").remote(3))
    assert isinstance(generator, ray.DynamicObjectRefGenerator)
    assert len(generator) == 3
    refs = list(generator)
    assert float(ray.get(refs[2])[0]) == 2
    assert ray.get(consumer.run.remote(total, *refs)) == 3 * LARGE
    del refs, generator
    expect_empty(source)


@dynamic
def test_dynamic_generators_error_is_its_last_reference(source: Any, tmp_path: Any) -> None:
    failing = source.failing.options(tensor_transport="auto", num_returns="dynamic")
    item, error = ray.get(failing.remote())
    assert float(ray.get(item).sum()) == LARGE
    with pytest.raises(RuntimeError, match="no more"):
        ray.get(error)
    flaky = source.flaky.options(
        tensor_transport="auto",
        num_returns="dynamic",
        max_task_retries=1,
        retry_exceptions=[ValueError],
    )
    refs = list(ray.get(flaky.remote(str(tmp_path / "tried"))))
    assert [float(tensor[0]) for tensor in ray.get(refs)] == [0, 1, 2, 3]
    del item, error, refs
    expect_empty(source)


@dynamic
def test_dynamic_generators_are_no_coroutines(spawn: Any) -> None:
    items = spawn(AsyncSource).items.options(num_returns="dynamic")
    with pytest.raises(ValueError, match="must return a generator"):
        ray.get(items.remote(1))


def test_adopted_items_outlive_their_stream(spawn: Any) -> None:
    """Also small ones whose bytes do not come with the value: nobody may think them unowned."""
    environment = {"env_vars": {"RAY_RDT_EAGER_BYTES": "0"}}
    source = spawn(Source, runtime_env=environment)
    for nbytes in (SMALL, LARGE):
        for _ in range(5):
            refs = list(source.items.remote(3, nbytes))
            again = source.items.remote(1, nbytes)  # has the stream before closed
            assert [float(tensor[0]) for tensor in ray.get(refs)] == [0, 1, 2]
            del refs, again
    expect_empty(source)


def test_cancelled_next_loses_no_item(source: Any) -> None:
    async def take() -> list[float]:
        generator, got = source.items.remote(5), []
        while True:
            try:
                item = await asyncio.wait_for(anext(generator), 0.001)
            except asyncio.TimeoutError:
                continue
            except StopAsyncIteration:
                return got
            got.append(float((await item)[0]))

    assert asyncio.run(asyncio.wait_for(take(), 60)) == [0, 1, 2, 3, 4]
    gc.collect()
    expect_empty(source)


def test_driver_that_ends_in_the_middle_ends(tmp_path: Any) -> None:
    printed = run_driver(
        """
        import torch, ray
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)

        @ray.remote(num_cpus=0)
        class Source:
            @ray.method(tensor_transport="auto")
            def items(self):
                while True:
                    yield torch.ones(1 << 20)

        generator = Source.options(max_concurrency=1).remote().items.options(
            _generator_backpressure_num_objects=2).remote()
        print(float(ray.get(next(generator)).sum()))
        """,
        tmp_path,
    )
    assert str(float(1 << 20)) in printed
