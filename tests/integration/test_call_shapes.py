"""Every call shape with every transport that runs here, a user's among them.

One row each of the table in doc/compatibility.md. What is special about a shape has its own tests
in the file that is about it; here it has to work, whatever moves the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import ray
from tests.integration.peers import SMALL, Peer, ones, total, total_of_refs
from tests.support import needs_nixl

pytestmark = pytest.mark.usefixtures("users_transports")

#: Too large to ride along in the value, and quick to move.
COUNT = 1 << 15

TRANSPORTS = ["auto", "gloo", pytest.param("nixl", marks=needs_nixl()), "shm"]


@dataclass
class Box:
    refs: list[Any]
    text: str = "x"


@ray.remote(num_cpus=0)
class Shapes:
    """A consumer with a signature, and a producer of several things at a time."""

    def __init__(self, *tensors: torch.Tensor, **named: torch.Tensor):
        self.got = tensors, named

    def total(self, first: torch.Tensor, second: Any = 0, *rest: Any, **named: Any) -> float:
        every = [first, second, *rest, *named.values()]
        return sum(float(torch.as_tensor(each).sum()) for each in every)

    def total_of_own(self) -> float:
        tensors, named = self.got
        return self.total(*tensors, **named)

    def two(self) -> tuple[torch.Tensor, Any]:
        return torch.ones(COUNT), {"t": torch.full((COUNT,), 2.0), "n": 1}

    def items(self, count: int) -> Iterator[torch.Tensor]:
        yield from (torch.full((COUNT,), float(index)) for index in range(count))


@ray.remote(num_cpus=0)
class Coroutines:
    async def total(self, first: torch.Tensor, second: Any = 0, **named: Any) -> float:
        every = [first, second, *named.values()]
        return sum(float(torch.as_tensor(each).sum()) for each in every)

    async def total_of_refs(self, refs: list[Any]) -> float:
        return sum([float(tensor.sum()) for tensor in await asyncio.gather(*refs)])

    async def make(self) -> torch.Tensor:
        return torch.ones(COUNT)

    async def items(self, count: int) -> AsyncIterator[torch.Tensor]:
        for index in range(count):
            yield torch.full((COUNT,), float(index))


@ray.remote(num_cpus=1)
def total_in_task(first: Any, second: Any = 0, *rest: Any, **named: Any) -> float:
    every = [first, second, *rest, *named.values()]
    return sum(float(torch.as_tensor(each).sum()) for each in every)


@ray.remote(num_cpus=1)
def in_task(kind: str) -> Any:
    if kind == "one":
        return torch.ones(COUNT)
    return torch.ones(COUNT), {"t": torch.full((COUNT,), 2.0)}


@ray.remote(num_cpus=1)
def items_in_task(count: int) -> Iterator[torch.Tensor]:
    yield from (torch.full((COUNT,), float(index)) for index in range(count))


@ray.remote(num_cpus=1)
def put_in_task(transport: str) -> list[Any]:
    return [ray.put(torch.ones(COUNT), _tensor_transport=transport)]


@pytest.fixture(scope="module")
def shapes(local_ray: None) -> Iterator[Any]:
    actor = Shapes.remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="module")
def threaded(local_ray: None) -> Iterator[Any]:
    actor = Shapes.options(max_concurrency=4).remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="module")
def coroutines(local_ray: None) -> Iterator[Any]:
    actor = Coroutines.remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(params=TRANSPORTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(producer: Any, name: str) -> Any:
    """A new object of the producer's, of ``COUNT`` ones."""
    method = producer.make.options(tensor_transport=name)
    return lambda count=COUNT: method.remote(ones, count)


def through(actor: Any, method: str, name: str, **options: Any) -> Any:
    return getattr(actor, method).options(tensor_transport=name, **options)


# Consumers.


def test_arguments_of_a_method(make: Any, shapes: Any) -> None:
    one, two, small = make(), make(), make(SMALL)
    calls = [
        shapes.total.remote(one),
        shapes.total.remote(first=one),
        shapes.total.remote(one, second=two),
        shapes.total.remote(one, two, small, one, a=small, b=two),
    ]
    assert ray.get(calls) == [COUNT, COUNT, 2 * COUNT, 4 * COUNT + 2 * SMALL]


def test_arguments_of_a_constructor(make: Any, name: str) -> None:
    actor = Shapes.remote(make(), make(SMALL), named=make())
    assert ray.get(actor.total_of_own.remote()) == 2 * COUNT + SMALL
    ray.kill(actor)


def test_arguments_of_a_task(make: Any) -> None:
    one, small = make(), make(SMALL)
    calls = [
        total_in_task.remote(one),
        total_in_task.remote(first=one, second=small),
        total_in_task.remote(one, one, small, a=one),
    ]
    assert ray.get(calls) == [COUNT, COUNT + SMALL, 3 * COUNT + SMALL]


def test_arguments_of_coroutines(make: Any, coroutines: Any) -> None:
    one, small = make(), make(SMALL)
    calls = [coroutines.total.remote(one, small, a=one), coroutines.total.remote(first=one)]
    calls += [coroutines.total.remote(make()) for _ in range(8)]
    assert ray.get(calls) == [2 * COUNT + SMALL, COUNT] + [COUNT] * 8


def test_arguments_of_a_threaded_actor(make: Any, threaded: Any) -> None:
    assert ray.get([threaded.total.remote(make(), b=make()) for _ in range(8)]) == [2 * COUNT] * 8


def test_get_in_the_driver(make: Any) -> None:
    one, small, plain = make(), make(SMALL), ray.put("plain")
    got = ray.get([one, plain, small, one])
    assert torch.equal(got[0], torch.ones(COUNT))
    assert got[1] == "plain"
    assert torch.equal(got[2], torch.ones(SMALL))
    assert torch.equal(got[3], got[0])
    assert torch.equal(ray.get(one, timeout=30), torch.ones(COUNT))


def test_await_and_futures_in_the_driver(make: Any) -> None:
    async def gather(refs: list[Any]) -> list[torch.Tensor]:
        return list(await asyncio.gather(*refs))

    for tensor in asyncio.run(gather([make(), make()])):
        assert torch.equal(tensor, torch.ones(COUNT))
    assert torch.equal(make().future().result(timeout=30), torch.ones(COUNT))


def test_await_in_coroutines(make: Any, coroutines: Any) -> None:
    assert ray.get(coroutines.total_of_refs.remote([make(), make(), make()])) == 3 * COUNT


def test_wait(make: Any) -> None:
    refs = [make(), make(SMALL)]
    for fetch_local in (True, False):
        assert ray.wait(refs, num_returns=2, timeout=30, fetch_local=fetch_local)[1] == []
    assert torch.equal(ray.get(refs[0]), torch.ones(COUNT))


@pytest.mark.parametrize(
    "pack",
    [lambda ref: [ref], lambda ref: {"k": [ref]}, lambda ref: Box([ref])],
    ids=["list", "dict", "dataclass"],
)
def test_nested_references(make: Any, consumer: Any, pack: Any) -> None:
    def total_inside(peer: Peer, value: Any) -> float:
        refs = value.refs if isinstance(value, Box) else value
        return total_of_refs(peer, refs["k"] if isinstance(refs, dict) else refs)

    assert ray.get(consumer.run.remote(total_inside, pack(make()))) == COUNT


def test_references_that_are_passed_on_twice(make: Any, consumer: Any, third: Any) -> None:
    def pass_on(peer: Peer, refs: list[Any], to: Any) -> float:
        inner = to.run.remote(total_of_refs, refs)
        return float(ray.get(inner)) + total_of_refs(peer, refs)

    refs = [make()]
    result = consumer.run.remote(pass_on, refs, third)
    del refs
    assert ray.get(result) == 2 * COUNT


def test_a_reference_inside_another_object(make: Any, name: str, consumer: Any) -> None:
    def total_of_outer(peer: Peer, outer: dict[str, Any]) -> float:
        return total(peer, outer["t"], ray.get(outer["inner"]))

    outer = ray.put({"t": torch.ones(COUNT), "inner": make()}, _tensor_transport=name)
    assert ray.get(consumer.run.remote(total_of_outer, outer)) == 2 * COUNT


# Producers.


def test_two_returns_of_a_method(name: str, shapes: Any, consumer: Any) -> None:
    one, two = through(shapes, "two", name, num_returns=2).remote()
    assert ray.get(consumer.run.remote(total, one)) == COUNT
    assert torch.equal(ray.get(two)["t"], torch.full((COUNT,), 2.0))


def test_items_of_a_method(name: str, shapes: Any, consumer: Any) -> None:
    generator = through(shapes, "items", name, num_returns="streaming").remote(3)
    assert [ray.get(consumer.run.remote(total, item)) for item in generator] == [
        0,
        COUNT,
        2 * COUNT,
    ]


def test_a_coroutines_result(name: str, coroutines: Any, consumer: Any) -> None:
    ref = through(coroutines, "make", name).remote()
    assert ray.get(consumer.run.remote(total, ref)) == COUNT


def test_items_of_coroutines(name: str, coroutines: Any) -> None:
    async def take() -> list[float]:
        generator = through(coroutines, "items", name, num_returns="streaming").remote(3)
        return [float((await item).sum()) async for item in generator]

    assert asyncio.run(take()) == [0, COUNT, 2 * COUNT]


def test_results_of_a_threaded_actor(name: str, threaded: Any, consumer: Any) -> None:
    pairs = [through(threaded, "two", name, num_returns=2).remote() for _ in range(4)]
    assert ray.get([consumer.run.remote(total, one) for one, _ in pairs]) == [COUNT] * 4


def test_results_of_a_task(name: str, consumer: Any) -> None:
    one = in_task.options(tensor_transport=name).remote("one")
    assert ray.get(consumer.run.remote(total, one)) == COUNT
    one, two = in_task.options(tensor_transport=name, num_returns=2).remote("two")
    assert ray.get(total_in_task.remote(one)) == COUNT
    assert torch.equal(ray.get(two)["t"], torch.full((COUNT,), 2.0))


def test_items_of_a_task(name: str, consumer: Any) -> None:
    generator = items_in_task.options(tensor_transport=name).remote(3)
    assert [ray.get(consumer.run.remote(total, item)) for item in generator] == [
        0,
        COUNT,
        2 * COUNT,
    ]


@pytest.mark.filterwarnings("ignore:num_returns='dynamic'")
def test_items_of_dynamic_generators(name: str, shapes: Any, consumer: Any) -> None:
    made = through(shapes, "items", name, num_returns="dynamic").remote(3)
    of_task = items_in_task.options(tensor_transport=name, num_returns="dynamic").remote(3)
    for generator in ray.get([made, of_task]):
        refs = list(generator)
        assert ray.get([consumer.run.remote(total, ref) for ref in refs]) == [0, COUNT, 2 * COUNT]
        assert torch.equal(ray.get(refs[1]), torch.ones(COUNT))


def test_puts_everywhere(name: str, producer: Any, consumer: Any) -> None:
    def put(_: Peer, transport: str) -> list[Any]:
        return [ray.put(torch.ones(COUNT), _tensor_transport=transport)]

    own = ray.put(torch.ones(COUNT), _tensor_transport=name)
    (actors,) = ray.get(producer.run.remote(put, name))
    (tasks,) = ray.get(put_in_task.remote(name))
    for ref in (own, actors, tasks):
        assert ray.get(consumer.run.remote(total, ref)) == COUNT
        assert torch.equal(ray.get(ref), torch.ones(COUNT))
