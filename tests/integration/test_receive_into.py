"""receive_into: arguments of methods and tasks land in tensors of the consumer's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ray
from ray.experimental import set_target_for_ref
from ray.experimental.rdt import receive_into
from tests.integration.peers import LARGE, SMALL, Peer, ones

SIZES = pytest.mark.parametrize("count", [SMALL, LARGE], ids=["small", "large"])


def new_model(count: int) -> torch.nn.Module:
    """A model whose second weight is not contiguous."""
    model = torch.nn.Module()
    model.one = torch.nn.Parameter(torch.zeros(count))
    model.two = torch.nn.Parameter(torch.zeros(2, count).t())
    return model


def weights(_: Peer, count: int, factor: float = 1.0) -> dict[str, torch.Tensor]:
    model = new_model(count)
    with torch.no_grad():
        model.one.fill_(factor)
        model.two.copy_(torch.arange(2.0 * count).view(count, 2) * factor)
    return dict(model.state_dict())


def values_of(model: Any) -> list[torch.Tensor]:
    return list(model.state_dict().values())


class Report:
    """What a consumer saw: whether it got its own tensors, and what is in them."""

    def report(self, count: int, got: dict[str, torch.Tensor]) -> tuple[bool, float]:
        model: Any = self.models[count]  # type: ignore[attr-defined]
        is_own = got["one"].data_ptr() == model.one.data_ptr()
        is_own &= got["two"].data_ptr() == model.two.data_ptr() and not got["two"].is_contiguous()
        factor = float(got["one"][0])
        expected = weights(None, count, factor)  # type: ignore[arg-type]
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        return is_own, factor


@ray.remote(num_cpus=0)
class Generator(Report):
    def __init__(self) -> None:
        self.models = {count: new_model(count) for count in (SMALL, LARGE)}
        self.calls = 0

    @receive_into(new=lambda self: values_of(self.models[LARGE]))
    def update(self, new: dict[str, torch.Tensor]) -> Any:
        return self.report(LARGE, new)

    @receive_into(new=lambda self: values_of(self.models[SMALL]))
    def update_small(self, *, new: dict[str, torch.Tensor], other: Any = None) -> Any:
        return self.report(SMALL, new), other

    @receive_into(new=lambda self: None)
    def take(self, new: Any, *others: Any) -> float:
        return float(new["one"][0])

    @ray.method(tensor_transport="auto")
    def own(self) -> dict[str, torch.Tensor]:
        return weights(None, LARGE, 7.0)  # type: ignore[arg-type]


@ray.remote(num_cpus=0)
class AsyncGenerator(Report):
    def __init__(self) -> None:
        self.models = {count: new_model(count) for count in (SMALL, LARGE)}

    @receive_into(new=lambda self: values_of(self.models[LARGE]))
    async def update(self, new: dict[str, torch.Tensor]) -> Any:
        return self.report(LARGE, new)

    @receive_into(new=lambda self: values_of(self.models[SMALL]))
    async def update_small(self, *, new: dict[str, torch.Tensor], other: Any = None) -> Any:
        return self.report(SMALL, new), other

    @receive_into(new=lambda self: None)
    async def take(self, new: Any, *others: Any) -> float:
        return float(new["one"][0])

    @ray.method(tensor_transport="auto")
    async def own(self) -> dict[str, torch.Tensor]:
        return weights(None, LARGE, 7.0)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["sync", "async", "threads"])
def generator(request: pytest.FixtureRequest, local_ray: None) -> Iterator[Any]:
    if request.param == "async":
        actor = AsyncGenerator.remote()
    else:
        actor = Generator.options(max_concurrency=3 if request.param == "threads" else 1).remote()
    yield actor
    ray.kill(actor)


def test_a_positional_argument(producer: Any, generator: Any, transport: str) -> None:
    make = producer.make.options(tensor_transport=transport)
    for factor in (2.0, 3.0):
        assert ray.get(generator.update.remote(make.remote(weights, LARGE, factor))) == (
            True,
            factor,
        )


def test_an_argument_by_name_beside_others(producer: Any, generator: Any) -> None:
    small, other = (producer.make.remote(weights, SMALL, factor) for factor in (4.0, 5.0))
    (is_own, factor), got = ray.get(generator.update_small.remote(other=other, new=small))
    assert (is_own, factor) == (True, 4.0)
    assert got["one"][0] == 5


def test_an_object_of_its_own(generator: Any) -> None:
    assert ray.get(generator.update.remote(generator.own.remote())) == (True, 7.0)


def test_what_is_not_for_targets_arrives_as_ever(producer: Any, generator: Any) -> None:
    ref = producer.make.remote(weights, LARGE, 2.0)
    assert ray.get(generator.take.remote(ref, ref, 5)) == 2
    assert ray.get(generator.update.remote(weights(None, LARGE, 3.0)))[0] is False  # type: ignore[arg-type]


def test_targets_that_do_not_fit_fail_the_call(producer: Any, generator: Any) -> None:
    small = producer.make.remote(weights, SMALL)
    with pytest.raises(ValueError, match=r"target 0 has shape"):
        ray.get(generator.update.remote(small))
    assert ray.get(generator.update.remote(producer.make.remote(weights, LARGE, 6.0))) == (True, 6)


buffer: list[torch.Tensor] = []


def module_buffer() -> list[torch.Tensor]:
    """Of the worker's process."""
    if not buffer:
        buffer.append(torch.zeros(LARGE, 2)[:, 0])
    return buffer


@ray.remote(num_cpus=1)
@receive_into(tensor=module_buffer)
def consume(factor: int, tensor: torch.Tensor) -> tuple[bool, float]:
    return tensor is module_buffer()[0], factor * float(tensor.sum())


@ray.remote(num_cpus=1)
def consume_without(factor: int, tensor: torch.Tensor) -> bool:
    return tensor is module_buffer()[0]


def test_an_argument_of_a_task(producer: Any, transport: str) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(lambda _: torch.ones(LARGE))
    assert ray.get(consume.remote(2, ref)) == (True, 2 * LARGE)
    assert ray.get(consume.remote(2, tensor=ref)) == (True, 2 * LARGE)
    assert not ray.get(consume_without.remote(2, ref))


def test_an_argument_of_a_task_with_a_result_of_its_own(producer: Any) -> None:
    ref = producer.make.remote(lambda _: torch.ones(LARGE))
    results = consume.options(tensor_transport="auto").remote(3, ref)
    assert ray.get(results) == (True, 3 * LARGE)


def test_a_function_of_the_drivers_own(producer: Any) -> None:
    """One that workers get by value."""
    held = torch.zeros(LARGE)

    @ray.remote(num_cpus=1)
    @receive_into(tensor=lambda: [held])
    def take(tensor: torch.Tensor) -> bool:
        return tensor is held and bool(held.sum() == LARGE)

    assert ray.get(take.remote(producer.make.remote(lambda _: torch.ones(LARGE))))


@ray.remote(num_cpus=0)
class Pair:
    """Holds a tensor for each of two parameters."""

    def __init__(self, count: int) -> None:
        self.held = [torch.zeros(count), torch.zeros(count)]

    @receive_into(one=lambda self: self.held[:1], two=lambda self: self.held[1:])
    def take(self, one: torch.Tensor, other: torch.Tensor, two: torch.Tensor) -> Any:
        is_apart = other.data_ptr() not in [held.data_ptr() for held in self.held]
        sums = [float(tensor.sum()) for tensor in (one, other, two)]
        return one is self.held[0], two is self.held[1], is_apart, sums


@SIZES
def test_one_object_for_two_parameters(producer: Any, count: int) -> None:
    """Each receives it into its own tensor; a third that declares nothing shares with neither."""
    ref = producer.make.remote(ones, count)
    pair = Pair.remote(count)
    assert ray.get(pair.take.remote(ref, ref, two=ref)) == (True, True, True, [float(count)] * 3)


def test_beside_a_target_of_another_object(producer: Any) -> None:
    """What a user wants of one object is nothing to the labels of a call's arguments."""

    @ray.remote(num_cpus=0)
    class Taker:
        def __init__(self) -> None:
            self.held, self.other = torch.zeros(LARGE), torch.zeros(LARGE)

        def get(self, refs: list[Any]) -> None:
            set_target_for_ref(refs[0], [self.other])
            ray.get(refs[0])

        @receive_into(tensor=lambda self: [self.held])
        def take(self, *, tensor: Any) -> bool:
            return tensor is self.held

    taker = Taker.remote()
    ray.get(taker.get.remote([producer.make.remote(ones)]))
    assert ray.get(taker.take.remote(tensor=producer.make.remote(ones)))


def test_declarations_that_cannot_be() -> None:
    def take(tensor: Any, *rest: Any, **named: Any) -> None: ...

    class Actor:
        def __init__(self, tensor: Any) -> None: ...

    for name in ("tensors", "rest", "named", "x"):
        with pytest.raises(ValueError, match=f"no parameter '{name}'"):
            receive_into(**{name: list})(take)
    with pytest.raises(TypeError, match="a function that gives"):
        receive_into(tensor=[torch.ones(1)])(take)
    with pytest.raises(ValueError, match="constructor"):
        receive_into(tensor=list)(Actor.__init__)
    with pytest.raises(TypeError, match=r"below @ray\.remote"):
        receive_into(tensor=list)(ray.remote(take))
