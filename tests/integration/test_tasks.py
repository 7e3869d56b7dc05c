"""Normal tasks as producers and consumers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ray
from ray.experimental.rdt import stats
from tests.integration.peers import Peer
from tests.support import wait_until

LARGE = 1 << 18


@ray.remote
def ones(count: int) -> dict[str, Any]:
    return {"tensor": torch.ones(count), "count": count}


@ray.remote
def pair(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(count), torch.zeros(count)


@ray.remote
def total(tensor: torch.Tensor) -> float:
    return float(tensor.sum())


@pytest.mark.parametrize("count", [10, LARGE])
def test_task_returns_an_rdt_object(local_ray: None, transport: str, count: int) -> None:
    ref = ones.options(tensor_transport=transport).remote(count)
    value = ray.get(ref)
    assert value["count"] == count
    assert torch.equal(value["tensor"], torch.ones(count))


def test_task_with_two_returns(local_ray: None) -> None:
    refs = pair.options(num_returns=2, tensor_transport="auto").remote(LARGE)
    one, other = ray.get(refs)
    assert torch.equal(one, torch.ones(LARGE))
    assert torch.equal(other, torch.zeros(LARGE))


def test_decorated_task(local_ray: None) -> None:
    @ray.remote(tensor_transport="auto")
    def make() -> torch.Tensor:
        return torch.full((LARGE,), 2.0)

    assert ray.get(total.remote(make.remote())) == 2 * LARGE


def test_task_without_tensors_returns_plain_values(local_ray: None) -> None:
    @ray.remote(tensor_transport="auto")
    def plain(value: Any) -> Any:
        return value

    for value in (None, b"bytes", 5, {"a": [1]}):
        assert ray.get(plain.remote(value)) == value


def test_exception_of_a_task_reaches_its_dependent(local_ray: None) -> None:
    @ray.remote(tensor_transport="auto", max_retries=0)
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ray.get(total.remote(fail.remote()))


def test_argument_that_nothing_else_holds_lives_until_its_task_has_it(producer: Any) -> None:
    def make(_: Peer) -> torch.Tensor:
        return torch.ones(LARGE)

    results = [total.remote(producer.make.remote(make)) for _ in range(10)]
    assert ray.get(results) == [LARGE] * 10


def test_tensors_of_a_tasks_returns_are_freed(local_ray: None) -> None:
    before = stats()["directory_rows"]
    refs = [ones.options(tensor_transport="auto").remote(LARGE) for _ in range(5)]
    ray.get(refs)
    del refs
    wait_until(lambda: stats()["directory_rows"] == before and not stats()["pinned"])


def test_unknown_transport_is_an_error_at_the_call(local_ray: None) -> None:
    with pytest.raises(ValueError, match="auto"):
        ones.options(tensor_transport="carrier_pigeon").remote(1)


def test_task_knows_its_own_name(local_ray: None) -> None:
    """As in plain Ray; functions of a driver's own file are called after the file."""

    def names() -> tuple[str, str]:
        context = ray.get_runtime_context()
        return context.get_task_function_name(), context.get_task_name()

    def named_items() -> Iterator[tuple[str, str]]:
        yield names()

    for module in ("__main__", "another"):
        names.__module__ = named_items.__module__ = module
        task, items = ray.remote(names), ray.remote(named_items)
        plain = ray.get([task.remote(), next(items.remote())])
        with_transport = ray.get(
            [
                task.options(tensor_transport="auto").remote(),
                next(items.options(tensor_transport="auto").remote()),
            ]
        )
        assert with_transport == plain
        file = "test_tasks" if module == "__main__" else module
        assert plain[0][0].startswith(f"{file}.")
