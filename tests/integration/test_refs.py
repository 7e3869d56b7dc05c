"""References to RDT objects behave as references to plain ones, whoever holds them and when."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from ray.exceptions import GetTimeoutError

import ray
from tests.integration.peers import LARGE, SMALL, Peer, count_up, ones, total, total_of_refs
from tests.support import stopped, wait_until

SIZES = pytest.mark.parametrize("count", [SMALL, LARGE], ids=["small", "large"])


def when_open(peer: Peer, count: int = LARGE) -> torch.Tensor:
    """Makes the object once the test opens the gate of the peer, which needs a second thread."""
    assert peer.gate.wait(60)
    peer.gate.clear()
    return torch.ones(count)


@SIZES
def test_nested_reference_is_fetched_by_who_gets_it(
    producer: Any, consumer: Any, transport: str, count: int
) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(ones, count)
    assert ray.get(consumer.run.remote(total_of_refs, [ref])) == count


@SIZES
def test_reference_can_be_lent_before_its_object_exists(
    spawn: Any, consumer: Any, count: int
) -> None:
    maker = spawn(max_concurrency=2)
    ref = maker.make.remote(when_open, count)
    in_list = consumer.run.remote(total_of_refs, [ref])
    assert not ray.wait([in_list], timeout=0.2)[0]
    ray.get(maker.open.remote())
    assert ray.get(in_list) == count


def test_reference_lent_early_survives_its_lender(spawn: Any, consumer: Any) -> None:
    maker = spawn(max_concurrency=2)
    ref = maker.make.remote(when_open)
    in_list = consumer.run.remote(total_of_refs, [ref])
    del ref
    ray.get(maker.open.remote())
    assert ray.get(in_list) == LARGE


def test_reference_is_passed_on_by_a_borrower(producer: Any, consumer: Any, third: Any) -> None:
    def pass_on(_: Peer, refs: list[Any], to: Any) -> Any:
        return to.run.remote(total_of_refs, refs)

    ref = producer.make.remote(ones)
    inner = consumer.run.remote(pass_on, [ref], third)
    del ref
    assert ray.get(ray.get(inner)) == LARGE


def test_borrowers_reference_comes_back_in_a_plain_value(producer: Any, consumer: Any) -> None:
    ref = producer.make.remote(ones)
    (back,) = ray.get(consumer.run.remote(lambda _, refs: refs, [ref]))
    assert back == ref
    del ref
    assert torch.equal(ray.get(back), torch.ones(LARGE))


def test_borrower_keeps_the_object_alive(producer: Any, consumer: Any) -> None:
    ref = producer.make.remote(ones)
    ray.get(consumer.run.remote(lambda peer, refs: peer.kept.update(refs=refs), [ref]))
    object_id = ref.hex()
    del ref
    assert ray.get(consumer.run.remote(lambda p: total_of_refs(p, p.kept["refs"]))) == LARGE
    is_stored = ray.get(producer.run.remote(is_stored_here, object_id))
    ray.get(consumer.run.remote(lambda peer: peer.kept.clear()))
    assert is_stored


def is_stored_here(_: Peer, object_id: str) -> bool:
    return ray._private.worker.global_worker.rdt_manager.rdt_store.has_object(object_id)


def test_rdt_value_may_hold_references(producer: Any, consumer: Any, third: Any) -> None:
    def make_outer(_: Peer, refs: list[Any]) -> dict[str, Any]:
        inner = ray.put(torch.full((LARGE,), 2.0), _tensor_transport="auto")
        return {"t": torch.ones(LARGE), "own": inner, "lent": refs[0], "plain": ray.put(5)}

    def add_up(peer: Peer, outer: dict[str, Any]) -> float:
        return total(peer, outer["t"], *ray.get([outer["own"], outer["lent"]])) + ray.get(
            outer["plain"]
        )

    lent = third.make.remote(ones)
    ref = producer.make.remote(make_outer, [lent])
    del lent
    assert ray.get(consumer.run.remote(add_up, ref)) == 4 * LARGE + 5
    outer = ray.get(ref)
    del ref
    assert torch.equal(ray.get(outer["own"]), torch.full((LARGE,), 2.0))
    assert torch.equal(ray.get(outer["lent"]), torch.ones(LARGE))


def test_reference_inside_a_plain_object(producer: Any, consumer: Any) -> None:
    outer = ray.put({"refs": [producer.make.remote(ones)]})
    got = consumer.run.remote(lambda peer, value: total_of_refs(peer, value["refs"]), outer)
    assert ray.get(got) == LARGE
    assert torch.equal(ray.get(ray.get(outer)["refs"][0]), torch.ones(LARGE))


def test_reference_that_a_borrowing_task_returns(producer: Any, consumer: Any) -> None:
    @ray.remote(num_cpus=1)
    def give_back(refs: list[Any]) -> Any:
        return refs[0]

    inner = ray.get(give_back.remote([producer.make.remote(ones)]))
    assert isinstance(inner, ray.ObjectRef)
    assert torch.equal(ray.get(inner), torch.ones(LARGE))
    assert ray.get(consumer.run.remote(total, inner)) == LARGE


@SIZES
def test_same_reference_twice_in_one_call(
    producer: Any, consumer: Any, transport: str, count: int
) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(ones, count)
    assert ray.get(consumer.run.remote(total, ref, ref)) == 2 * count
    again = [consumer.run.remote(total, ref) for _ in range(5)]
    assert ray.get(again) == [count] * 5


def test_get_of_a_mixed_list_keeps_its_order(producer: Any, consumer: Any, transport: str) -> None:
    make = producer.make.options(tensor_transport=transport)
    large, small = make.remote(count_up), make.remote(ones, SMALL)
    other = consumer.make.remote(ones, LARGE + 1)
    none, plain = make.remote(lambda _: None), ray.put({"x": 1})
    got = ray.get([plain, large, small, large, none, other, plain])
    assert got[0] == got[6] == {"x": 1}
    assert torch.equal(got[1], got[3])
    assert torch.equal(got[1], torch.arange(LARGE, dtype=torch.float32))
    assert torch.equal(got[2], torch.ones(SMALL))
    assert got[4] is None
    assert torch.equal(got[5], torch.ones(LARGE + 1))


def test_large_batches_of_two_producers_in_opposite_orders(
    producer: Any, consumer: Any, spawn: Any, transport: str
) -> None:
    """Each consumer waits first for the producer that serves the other one first."""
    mine, others = (
        [peer.make.options(tensor_transport=transport).remote(ones) for _ in range(20)]
        for peer in (producer, consumer)
    )
    takers = [spawn(), spawn()]
    results = [
        takers[0].run.remote(total_of_refs, mine + others),
        takers[1].run.remote(total_of_refs, others + mine),
    ]
    assert ray.get(results, timeout=50) == [40 * LARGE] * 2


def test_wait_tells_when_the_object_exists(spawn: Any) -> None:
    maker = spawn(max_concurrency=2)
    ref = maker.make.remote(when_open)
    assert ray.wait([ref], timeout=0.2) == ([], [ref])
    ray.get(maker.open.remote())
    assert ray.wait([ref], timeout=30) == ([ref], [])
    assert ray.wait([ref, ray.put(1)], num_returns=2, timeout=30, fetch_local=False)[1] == []
    assert torch.equal(ray.get(ref), torch.ones(LARGE))


def test_get_times_out_before_the_object_exists(spawn: Any) -> None:
    maker = spawn(max_concurrency=2)
    ref = maker.make.remote(when_open)
    with pytest.raises(GetTimeoutError):
        ray.get(ref, timeout=0.2)
    ray.get(maker.open.remote())
    assert torch.equal(ray.get(ref, timeout=30), torch.ones(LARGE))


def test_get_times_out_on_the_way_and_can_be_repeated(spawn: Any, transport: str) -> None:
    maker = spawn()
    ref = maker.make.options(tensor_transport=transport).remote(ones)
    ray.wait([ref])
    pid = ray.get(maker.pid.remote())
    with stopped(pid), pytest.raises(GetTimeoutError):
        ray.get(ref, timeout=0.3)
    assert torch.equal(ray.get(ref, timeout=60), torch.ones(LARGE))


def test_dropped_before_during_and_after_its_creation(spawn: Any, consumer: Any) -> None:
    maker = spawn(max_concurrency=2)
    before = maker.make.remote(when_open)
    del before
    ray.get(maker.open.remote())
    passed = maker.make.remote(when_open)
    used = consumer.run.remote(total, passed)
    del passed
    ray.get(maker.open.remote())
    assert ray.get(used) == LARGE
    after = maker.make.remote(ones)
    assert ray.get(consumer.run.remote(total, after)) == LARGE
    del after
    assert_stores_nothing(maker)


def test_who_has_no_patience_gets_it_in_the_end(producer: Any) -> None:
    """Each try takes up what the one before has begun."""
    ref = producer.make.remote(ones, 64 * LARGE)
    ray.wait([ref], fetch_local=False)
    got = []

    def get() -> bool:
        with suppress(ray.exceptions.GetTimeoutError):
            got.append(ray.get(ref, timeout=0))
        return bool(got)

    wait_until(get, "the tensor is here")
    assert float(got[0].sum()) == 64 * LARGE
    assert ray.experimental.rdt.stats()["hinted_bytes"] == 0


def test_dropped_while_it_is_pulled(spawn: Any, consumer: Any) -> None:
    maker = spawn()
    ref, own = maker.make.remote(ones), maker.make.remote(count_up)
    ray.wait([ref, own], num_returns=2)
    pid = ray.get(maker.pid.remote())
    with stopped(pid), ThreadPoolExecutor(1) as threads:
        used, got = consumer.run.remote(total, ref), threads.submit(ray.get, own)
        del ref, own
        assert not ray.wait([used], timeout=0.3)[0]
        os.kill(pid, signal.SIGCONT)
        assert torch.equal(got.result(30), torch.arange(LARGE, dtype=torch.float32))
    assert ray.get(used) == LARGE
    del got
    assert_stores_nothing(maker)


def assert_stores_nothing(peer: Any) -> None:
    wait_until(lambda: ray.get(peer.stats.remote())["stored_objects"] == 0, "nothing stored")


def test_dropped_right_after_the_call_is_used(producer: Any, consumer: Any) -> None:
    results = []
    for _ in range(30):
        results.append(consumer.run.remote(total, producer.make.remote(ones)))
    assert ray.get(results) == [LARGE] * 30


def test_future_and_await_give_the_value(producer: Any) -> None:
    async def wait_for(refs: list[Any]) -> list[torch.Tensor]:
        return list(await asyncio.gather(*refs))

    refs = [producer.make.remote(ones, count) for count in (SMALL, LARGE)]
    small, large = asyncio.run(wait_for(refs))
    assert torch.equal(small, torch.ones(SMALL))
    assert torch.equal(large, torch.ones(LARGE))
    assert torch.equal(refs[1].future().result(timeout=30), torch.ones(LARGE))
