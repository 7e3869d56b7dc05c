"""Methods with a transport are called, and their results used, in every way that Ray has."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError

import ray
from tests.integration.peers import LARGE, SMALL, Peer, ones, total
from tests.support import stopped, wait_until


@ray.remote(num_cpus=0)
class Plain:
    """An actor that says nothing of transports."""

    def make(self, count: int) -> torch.Tensor:
        return torch.ones(count)

    def total(self, *tensors: torch.Tensor, **named: torch.Tensor) -> float:
        return sum(float(tensor.sum()) for tensor in (*tensors, *named.values()))


@ray.remote(num_cpus=0)
class Built:
    """An actor whose constructor takes tensors."""

    def __init__(self, first: torch.Tensor, *, scale: torch.Tensor):
        self.product = first * scale

    def total(self) -> float:
        return float(self.product.sum())


@ray.remote(num_cpus=0)
class Async:
    """An actor of coroutines."""

    @ray.method(tensor_transport="auto")
    async def make(self, count: int) -> torch.Tensor:
        return torch.ones(count)

    async def total(self, tensor: torch.Tensor) -> float:
        return float(tensor.sum())

    async def total_of_refs(self, refs: list[Any]) -> float:
        return sum([float((await ref).sum()) for ref in refs])


@ray.remote(num_cpus=0)
class Several:
    """An actor with methods that return more than one thing."""

    @ray.method(tensor_transport="auto", num_returns=2)
    def pair(self, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.ones(count), {"t": torch.full((count,), 2.0)}

    @ray.method(tensor_transport="auto", num_returns=3)
    def mixed(self) -> tuple[Any, ...]:
        return None, torch.ones(LARGE), "text"


@ray.remote(num_cpus=0, concurrency_groups={"one": 1, "two": 1})
class Grouped:
    """An actor with threads for groups of its methods."""

    @ray.method(tensor_transport="auto")
    def make(self) -> torch.Tensor:
        return torch.ones(LARGE)

    def total(self, tensor: torch.Tensor) -> float:
        return float(tensor.sum())


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Stubborn:
    """An actor that dies on its first call and is called again."""

    @ray.method(tensor_transport="auto")
    def make(self, marker: str) -> torch.Tensor:
        if not os.path.exists(marker):
            with open(marker, "w"):
                os._exit(1)
        return torch.ones(LARGE)


@ray.remote(num_cpus=1)
def total_in_task(*tensors: torch.Tensor, **named: torch.Tensor) -> float:
    return sum(float(tensor.sum()) for tensor in (*tensors, *named.values()))


def test_result_is_a_positional_or_a_named_argument(producer: Any, spawn: Any) -> None:
    plain = spawn(Plain)
    small, large = producer.make.remote(ones, SMALL), producer.make.remote(ones, LARGE)
    assert ray.get(plain.total.remote(small, large)) == SMALL + LARGE
    assert ray.get(plain.total.remote(small, a=large, b=small)) == 2 * SMALL + LARGE


def test_result_is_an_argument_of_a_constructor(producer: Any, spawn: Any, transport: str) -> None:
    make = producer.make.options(tensor_transport=transport)
    built = Built.remote(make.remote(ones), scale=make.remote(lambda _: torch.full((LARGE,), 3.0)))
    assert ray.get(built.total.remote()) == 3 * LARGE


def test_result_is_an_argument_of_a_task(producer: Any, transport: str) -> None:
    large = producer.make.options(tensor_transport=transport).remote(ones)
    assert ray.get(total_in_task.remote(large, large, other=large)) == 3 * LARGE


def test_coroutines_take_and_make_results(producer: Any, spawn: Any) -> None:
    coroutines = spawn(Async)
    refs = [producer.make.remote(ones, count) for count in (SMALL, LARGE)] * 4
    assert ray.get([coroutines.total.remote(ref) for ref in refs]) == [SMALL, LARGE] * 4
    assert ray.get(coroutines.total_of_refs.remote(refs)) == 4 * (SMALL + LARGE)
    back = [coroutines.make.remote(count) for count in (SMALL, LARGE)]
    assert ray.get(producer.run.remote(total, *back)) == SMALL + LARGE
    assert ray.get(coroutines.total.remote(back[1])) == LARGE


def test_threads_take_and_make_results_at_once(spawn: Any, transport: str) -> None:
    makers, takers = spawn(max_concurrency=4), spawn(max_concurrency=4)
    make = makers.make.options(tensor_transport=transport)
    results = [
        takers.run.remote(total, make.remote(lambda _, i: torch.full((LARGE,), float(i)), i))
        for i in range(24)
    ]
    assert ray.get(results) == [float(i * LARGE) for i in range(24)]


def test_no_concurrency_group_waits_for_anothers_pull(spawn: Any, producer: Any) -> None:
    slow, grouped = spawn(), spawn(Grouped)
    late, here = slow.make.remote(ones), producer.make.remote(ones)
    ray.wait([late, here], num_returns=2)
    pid = ray.get(slow.pid.remote())
    with stopped(pid):
        waiting = grouped.total.options(concurrency_group="one").remote(late)
        for group in ("two", None):
            others = grouped.total.options(concurrency_group=group).remote(here)
            assert ray.get(others, timeout=30) == LARGE
        assert not ray.wait([waiting], timeout=0.1)[0]
    assert ray.get(waiting, timeout=30) == LARGE
    made = grouped.make.options(concurrency_group="two").remote()
    assert ray.get(producer.run.remote(total, made)) == LARGE


def test_actors_and_tasks_in_a_placement_group(local_ray: None, producer: Any) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 0.5}, {"CPU": 0.5}])
    places = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in (0, 1)]
    one = Peer.options(num_cpus=0.5, scheduling_strategy=places[0]).remote()
    placed = total_in_task.options(num_cpus=0.5, scheduling_strategy=places[1])
    assert ray.get(placed.remote(one.make.remote(ones), producer.make.remote(ones))) == 2 * LARGE
    assert ray.get(one.run.remote(total, producer.make.remote(ones))) == LARGE
    ray.kill(one)
    remove_placement_group(group)


def test_actors_send_to_each_other_at_once(spawn: Any, transport: str) -> None:
    one, two = spawn(max_concurrency=3), spawn(max_concurrency=3)
    results = []
    for _ in range(10):
        results.append(
            two.run.remote(total, one.make.options(tensor_transport=transport).remote(ones))
        )
        results.append(
            one.run.remote(total, two.make.options(tensor_transport=transport).remote(ones))
        )
    assert ray.get(results) == [LARGE] * 20


def test_transport_can_be_chosen_for_one_call(spawn: Any, consumer: Any, transport: str) -> None:
    plain = spawn(Plain)
    ref = plain.make.options(tensor_transport=transport).remote(LARGE)
    assert ray.get(consumer.run.remote(total, ref)) == LARGE
    assert is_managed(ref)
    assert not is_managed(plain.make.remote(LARGE))


def is_managed(ref: Any) -> bool:
    return ray._private.worker.global_worker.rdt_manager.is_managed_object(ref.hex())


def test_enable_tensor_transport_is_accepted(consumer: Any) -> None:
    enabled = ray.remote(num_cpus=0, enable_tensor_transport=True)(
        Plain.__ray_metadata__.modified_class
    ).remote()
    ref = enabled.make.options(tensor_transport="auto").remote(LARGE)
    assert ray.get(consumer.run.remote(total, ref)) == LARGE


def test_handles_work_in_other_processes(producer: Any, consumer: Any, transport: str) -> None:
    def call(peer: Peer, maker: Any, transport: str) -> tuple[float, list[Any]]:
        ref = maker.make.options(tensor_transport=transport).remote(ones)
        return total(peer, ray.get(ref)), [ref]

    got, (ref,) = ray.get(consumer.run.remote(call, producer, transport))
    assert got == LARGE
    assert torch.equal(ray.get(ref), torch.ones(LARGE))
    assert ray.get(producer.run.remote(total, ref)) == LARGE


def test_handle_in_a_task(producer: Any) -> None:
    @ray.remote(num_cpus=1)
    def call(maker: Any) -> float:
        return float(ray.get(maker.make.remote(ones)).sum())

    assert ray.get(call.remote(producer)) == LARGE


def test_named_actor(spawn: Any, consumer: Any) -> None:
    def call(peer: Peer, name: str) -> float:
        return total(peer, ray.get(ray.get_actor(name).make.remote(ones)))

    maker = spawn(name="maker of tensors")
    ray.get(maker.pid.remote())
    ref = ray.get_actor("maker of tensors").make.remote(ones)
    assert ray.get(consumer.run.remote(total, ref)) == LARGE
    assert ray.get(consumer.run.remote(call, "maker of tensors")) == LARGE


def test_own_handle_and_own_result(producer: Any) -> None:
    def keep(peer: Peer) -> torch.Tensor:
        peer.kept["own"] = torch.zeros(LARGE)
        return peer.kept["own"]

    def is_own(peer: Peer, got: torch.Tensor) -> bool:
        got[0] = 7
        return got is peer.kept["own"]

    ref = producer.make.remote(keep)
    assert ray.get(producer.run.remote(is_own, ref))
    assert ray.get(ref)[0] == 7
    ray.get(producer.run.remote(lambda peer: peer.kept.clear()))


@pytest.mark.parametrize("count", [SMALL, LARGE], ids=["small", "large"])
def test_two_returns(spawn: Any, consumer: Any, count: int) -> None:
    first, second = spawn(Several).pair.remote(count)
    assert ray.get(consumer.run.remote(total, first)) == count
    assert ray.get(consumer.run.remote(lambda p, v: total(p, v["t"]), second)) == 2 * count
    assert torch.equal(ray.get(first), torch.ones(count))
    assert torch.equal(ray.get(second)["t"], torch.full((count,), 2.0))


def test_returns_of_which_some_have_tensors(spawn: Any, consumer: Any) -> None:
    none, tensor, text = spawn(Several).mixed.remote()
    assert ray.get([none, text]) == [None, "text"]
    assert ray.get(consumer.run.remote(total, tensor)) == LARGE


@pytest.mark.parametrize("value", [None, 1, "text", [], {"a": 1}, b"raw"], ids=repr)
def test_method_without_tensors_in_its_result(
    producer: Any, consumer: Any, transport: str, value: Any
) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(lambda _, v: v, value)
    assert ray.get(ref) == value
    assert ray.get(consumer.run.remote(lambda _, got: got, ref)) == value


class OwnError(Exception):
    """A user's."""


def fail(_: Peer) -> torch.Tensor:
    raise OwnError("on purpose")


def test_exception_reaches_get_and_dependents_as_in_plain_ray(
    producer: Any, consumer: Any, transport: str
) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(fail)
    dependent = consumer.make.remote(lambda _, got: got, ref)
    for failed in (
        ref,
        dependent,
        consumer.run.remote(total, dependent),
        total_in_task.remote(ref),
    ):
        with pytest.raises(OwnError, match="on purpose") as caught:
            ray.get(failed)
        assert isinstance(caught.value, RayTaskError)
    assert ray.get(consumer.run.remote(total, producer.make.remote(ones))) == LARGE


def test_exception_is_no_news_to_the_store(producer: Any) -> None:
    before = ray.get(producer.stats.remote())["stored_objects"]
    with pytest.raises(OwnError):
        ray.get(producer.make.remote(fail))
    assert ray.get(producer.stats.remote())["stored_objects"] <= before


def test_result_that_cannot_be_pickled_is_the_tasks_error(producer: Any) -> None:
    def make(_: Peer) -> Any:
        return [torch.ones(LARGE), (i for i in range(3))]

    for method in (producer.make, producer.run):
        with pytest.raises(RayTaskError, match="generator"):
            ray.get(method.remote(make))


def test_retried_method_gives_its_second_result(consumer: Any, tmp_path: Any) -> None:
    actor = Stubborn.remote()
    ref = actor.make.remote(str(tmp_path / "died"))
    assert ray.get(consumer.run.remote(total, ref)) == LARGE
    assert torch.equal(ray.get(ref), torch.ones(LARGE))
    ray.kill(actor)


def test_retry_of_an_exception(spawn: Any, consumer: Any, tmp_path: Any) -> None:
    def make(_: Peer, marker: str) -> torch.Tensor:
        if not os.path.exists(marker):
            with open(marker, "w"):
                raise OwnError("once")
        return torch.ones(LARGE)

    maker = spawn()
    method = maker.make.options(max_task_retries=2, retry_exceptions=True)
    ref = method.remote(make, str(tmp_path / "failed"))
    assert ray.get(consumer.run.remote(total, ref)) == LARGE


def test_retry_leaves_nothing_of_the_first_try(spawn: Any, tmp_path: Any) -> None:
    def make(_: Peer, marker: Any) -> dict[str, Any]:
        refs = [ray.put(torch.ones(LARGE), _tensor_transport="auto")]
        if not marker.exists():
            marker.touch()
            raise OwnError("once")
        return {"tensor": torch.ones(LARGE), "refs": refs}

    maker = spawn()
    method = maker.make.options(max_task_retries=1, retry_exceptions=True)
    got = ray.get(method.remote(make, tmp_path / "failed"))
    assert ray.get(got["refs"][0]).sum() == LARGE
    wait_until(lambda: ray.get(maker.stats.remote())["stored_objects"] < 2, "the first is gone")
    del got
    wait_until(lambda: ray.get(maker.stats.remote())["stored_objects"] == 0, "nothing stored")


def test_return_that_cannot_be_pickled_spoils_no_other(spawn: Any) -> None:
    def make(_: Peer) -> Any:
        return torch.ones(LARGE), (i for i in range(3))

    maker = spawn()
    good, bad = maker.make.options(num_returns=2).remote(make)
    assert ray.get(good).sum() == LARGE
    with pytest.raises(RayTaskError, match="generator"):
        ray.get(bad)
    del good, bad
    wait_until(lambda: ray.get(maker.stats.remote())["stored_objects"] == 0, "nothing stored")


def test_cancelled_call_leaves_nothing_behind(spawn: Any) -> None:
    maker = spawn(max_concurrency=2)
    running = maker.make.remote(lambda peer: peer.gate.wait(60) and torch.ones(LARGE))
    ray.cancel(running)
    ray.get(maker.open.remote())
    with pytest.raises((ray.exceptions.TaskCancelledError, RayTaskError)):
        ray.get(running, timeout=30)
    del running
    wait_until(lambda: ray.get(maker.stats.remote())["stored_objects"] == 0, "nothing stored")


def test_pickled_method_keeps_its_transport(producer: Any, consumer: Any) -> None:
    def call(_: Peer, method: Any) -> tuple[str | None, float]:
        ref = method.remote(ones)
        return ref.tensor_transport(), float(ray.get(ref).sum())

    assert ray.get(consumer.run.remote(call, producer.make)) == ("AUTO", LARGE)


def test_rays_own_concurrency_group_does_nothing(spawn: Any) -> None:
    @ray.remote(num_cpus=0, enable_tensor_transport=True)
    class Actor:
        @ray.method(concurrency_group="_ray_system")
        def is_on_main_thread(self) -> bool:
            return threading.current_thread() is threading.main_thread()

        def number(self) -> int:
            return 1

    actor = spawn(Actor)
    assert ray.get(actor.is_on_main_thread.remote())
    assert ray.get(actor.number.options(concurrency_group="_ray_system").remote()) == 1
