"""Each lane by itself: forced by RAY_RDT_LANES, seen in the counters, bytes right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ray
from tests.integration.peers import (
    LANE_SETTINGS,
    LANES,
    LARGE,
    Peer,
    count_up,
    ones,
    pulls,
    total,
)
from tests.support import wait_until


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def limited(local_ray: None) -> Any:
    """Actors that may use one lane only, or the lanes given: made once each."""
    made: dict[tuple[str, int], Any] = {}

    def get(lanes: str, number: int = 0) -> Any:
        if (lanes, number) not in made:
            setting = LANE_SETTINGS.get(lanes, lanes)
            environment = {"env_vars": {"RAY_RDT_LANES": setting}}
            made[lanes, number] = Peer.options(runtime_env=environment).remote()
        return made[lanes, number]

    yield get
    for actor in made.values():
        ray.kill(actor)


def pulled_since(actor: Any, before: dict[str, int]) -> dict[str, int]:
    return {lane: now - before[lane] for lane, now in pulls(actor).items() if now != before[lane]}


def sum_exactly(_: Peer, tensor: torch.Tensor) -> tuple[float, bool]:
    return float(tensor.double().sum()), bool((tensor[1:] - tensor[:-1]).eq(1).all())


def test_consumer_pulls_over_the_lane_that_it_may_use(
    producer: Any, limited: Any, lane: str
) -> None:
    taker = limited(lane)
    before = pulls(taker)
    ref = producer.make.remote(count_up)
    assert ray.get(taker.run.remote(sum_exactly, ref)) == (LARGE * (LARGE - 1) / 2, True)
    assert pulled_since(taker, before) == {lane: 1}


def test_producer_serves_over_the_lane_that_it_may_use(
    consumer: Any, limited: Any, lane: str
) -> None:
    maker = limited(lane)
    before = pulls(consumer)
    ref = maker.make.remote(count_up)
    assert ray.get(consumer.run.remote(sum_exactly, ref)) == (LARGE * (LARGE - 1) / 2, True)
    assert pulled_since(consumer, before) == {lane: 1}


def test_the_lane_is_explained(producer: Any, limited: Any, lane: str) -> None:
    for pair in ((producer, limited(lane)), (limited(lane), producer)):
        told = ray.experimental.rdt.explain(pair)
        ways = {way.name: way.reason for way in told.ways["cpu"]}
        assert told.used() == lane
        others = set(LANES) - set(LANE_SETTINGS[lane].split(","))
        assert all("forbidden by" in ways[other] for other in others)


def test_large_object_over_one_lane(producer: Any, limited: Any, lane: str) -> None:
    """48 MiB plus some, so that copies are cut into parts and streams are many."""

    def make(_: Peer) -> list[torch.Tensor]:
        torch.manual_seed(1)
        return [torch.rand(12 << 20), torch.rand(777), torch.arange(3)]

    def check(_: Peer, got: list[torch.Tensor]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(got, make(None), strict=True))  # type: ignore[arg-type]

    taker = limited(lane)
    before = pulls(taker)
    assert ray.get(taker.run.remote(check, producer.make.remote(make)))
    assert pulled_since(taker, before) == {lane: 1}


def test_many_small_tensors_over_one_lane(producer: Any, limited: Any, lane: str) -> None:
    def make(_: Peer) -> list[torch.Tensor]:
        return [torch.full((i % 97,), i) for i in range(5000)]

    def check(_: Peer, got: list[torch.Tensor]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(got, make(None), strict=True))  # type: ignore[arg-type]

    assert ray.get(limited(lane).run.remote(check, producer.make.remote(make)))


def test_targets_over_one_lane(producer: Any, limited: Any, lane: str) -> None:
    def get_into(_: Peer, refs: list[Any]) -> bool:
        target, stepped = torch.zeros(LARGE), torch.zeros(2 * LARGE)[::2]
        ray.experimental.set_target_for_ref(refs[0], [target, stepped])
        got = ray.get(refs[0])
        assert got[0] is target
        assert got[1] is stepped
        return torch.equal(target, count_up(_)) and torch.equal(stepped, count_up(_))

    ref = producer.make.remote(lambda peer: [count_up(peer), count_up(peer)])
    assert ray.get(limited(lane).run.remote(get_into, [ref]))


def test_many_pulls_at_once_over_one_lane(producer: Any, limited: Any, lane: str) -> None:
    taker = limited(lane)
    refs = [producer.make.remote(lambda _, i: torch.full((LARGE,), float(i)), i) for i in range(20)]
    results = [taker.run.remote(total, ref) for ref in refs]
    results.append(taker.run.remote(lambda peer, refs: total(peer, *ray.get(refs)), refs))
    assert ray.get(results) == [float(i * LARGE) for i in range(20)] + [190.0 * LARGE]


def test_both_ways_over_one_lane(limited: Any, lane: str) -> None:
    one, two = limited(lane), limited(lane, 1)
    before = [pulls(one), pulls(two)]
    for _ in range(3):
        there = two.run.remote(total, one.make.remote(ones))
        back = one.run.remote(total, two.make.remote(ones))
        assert ray.get([there, back]) == [LARGE, LARGE]
    assert [pulled_since(one, before[0]), pulled_since(two, before[1])] == [{lane: 3}, {lane: 3}]


def test_one_lane_leaves_nothing_behind(limited: Any, lane: str) -> None:
    maker, taker = limited(lane, 1), limited(lane)
    refs = [maker.make.remote(ones) for _ in range(3)]
    assert ray.get([taker.run.remote(total, ref) for ref in refs]) == [LARGE] * 3
    del refs

    def assert_idle() -> None:
        for actor in (maker, taker):
            counters = ray.get(actor.stats.remote())
            in_use = ("stored_objects", "regions", "pinned", "pool_used")
            assert {name: counters[name] for name in in_use if counters[name]} == {}

    wait_until(assert_idle, "in use:")


@pytest.mark.parametrize(
    ("ours", "theirs", "used"),
    [
        ("map,cma,shm,tcp", "map,cma,shm,tcp", "cma"),
        ("map,shm,tcp", "map,cma,shm,tcp", "map"),
        ("cma,shm,tcp", "cma,shm,tcp", "cma"),
        ("shm,tcp", "cma,shm,tcp", "shm"),
        ("cma,tcp", "shm,tcp", "tcp"),
    ],
)
def test_best_lane_that_both_may_use_is_chosen(
    limited: Any, ours: str, theirs: str, used: str
) -> None:
    taker, maker = limited(ours), limited(theirs, 1)
    before = pulls(taker)
    assert ray.get(taker.run.remote(total, maker.make.remote(ones))) == LARGE
    assert pulled_since(taker, before) == {used: 1}


def test_pair_without_a_common_lane_is_told_why(limited: Any) -> None:
    ref = limited("cma").make.remote(ones)
    with pytest.raises(ray.exceptions.RayError, match="lane"):
        ray.get(limited("tcp").run.remote(total, ref), timeout=60)


def test_own_objects_use_no_lane_at_all(producer: Any) -> None:
    def get_own(peer: Peer, refs: list[Any]) -> bool:
        return ray.get(refs[0]) is peer.kept["t"]

    def keep(peer: Peer) -> torch.Tensor:
        peer.kept["t"] = torch.ones(LARGE)
        return peer.kept["t"]

    before = pulls(producer)
    ref = producer.make.remote(keep)
    assert ray.get(producer.run.remote(get_own, [ref]))
    assert pulled_since(producer, before) == {}
    ray.get(producer.run.remote(lambda peer: peer.kept.clear()))


def test_objects_within_an_environment_of_no_lanes_but_inproc(limited: Any) -> None:
    alone = limited("inproc")
    ref = alone.make.remote(ones)
    assert ray.get(alone.run.remote(total, ref)) == LARGE
