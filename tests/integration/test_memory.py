"""Limits of memory: returns wait for room, then go through Ray's object store; nothing is lost."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError

import ray
from tests.integration.peers import LARGE, Peer, count_up, ones, pulls, total
from tests.support import wait_until

#: Two objects of LARGE floats fit, three do not.
LIMIT = 5 * LARGE * 2


def limits(wait_s: float, **others: str) -> dict[str, Any]:
    return {
        "env_vars": {
            "RAY_RDT_STORE_BYTES": str(LIMIT),
            "RAY_RDT_STORE_WAIT_S": str(wait_s),
            "RAY_RDT_STRICT_TRANSPORT": "0",
            **others,
        }
    }


@pytest.fixture(scope="module")
def patient(local_ray: None) -> Any:
    actor = Peer.options(runtime_env=limits(60)).remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="module")
def hasty(local_ray: None) -> Any:
    actor = Peer.options(runtime_env=limits(0.2)).remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(autouse=True)
def nothing_is_left(patient: Any, hasty: Any) -> Any:
    yield
    for actor in (patient, hasty):
        wait_until(lambda actor=actor: stored(actor) == 0, "all is freed")


def stored(actor: Any) -> int:
    return int(ray.get(actor.stats.remote())["stored_bytes"])


def plain(actor: Any) -> int:
    return int(ray.get(actor.stats.remote())["plain_objects"])


def test_stats_count_bytes(patient: Any) -> None:
    refs = [patient.make.remote(ones) for _ in range(2)]
    ray.wait(refs, num_returns=2)
    assert stored(patient) == 2 * 4 * LARGE


def test_return_waits_until_an_object_is_freed(patient: Any, consumer: Any) -> None:
    refs = [patient.make.remote(ones) for _ in range(2)]
    ray.wait(refs, num_returns=2)
    late = patient.make.remote(count_up)
    assert not ray.wait([late], timeout=0.7)[0]
    del refs
    before = sum(pulls(consumer).values())
    assert ray.get(consumer.run.remote(total, late)) == LARGE * (LARGE - 1) / 2
    assert sum(pulls(consumer).values()) == before + 1
    assert plain(patient) == 0


def test_the_same_memory_returned_again_needs_no_room(patient: Any) -> None:
    def keep(peer: Peer) -> torch.Tensor:
        return peer.kept.setdefault("weights", torch.ones(2 * LARGE))

    refs = [patient.make.remote(keep) for _ in range(5)]
    assert [ray.get(ref).sum() for ref in refs] == [2 * LARGE] * 5
    assert plain(patient) == 0
    ray.get(patient.run.remote(lambda peer: peer.kept.clear()))


def test_after_the_wait_tensors_go_through_rays_object_store(hasty: Any, consumer: Any) -> None:
    before, pulled = plain(hasty), sum(pulls(consumer).values())
    refs = [hasty.make.remote(lambda _, i: torch.full((LARGE,), float(i)), i) for i in range(6)]
    ray.wait(refs, num_returns=6)
    assert plain(hasty) == before + 4
    assert stored(hasty) == 2 * 4 * LARGE
    totals = ray.get([consumer.run.remote(total, ref) for ref in refs])
    assert totals == [float(i * LARGE) for i in range(6)]
    assert sum(pulls(consumer).values()) == pulled + 2


def test_the_log_says_it_once(local_ray: None) -> None:
    def listen(peer: Peer) -> None:
        handler, peer.kept["said"] = logging.Handler(), []
        handler.emit = lambda record: peer.kept["said"].append(record.getMessage())
        logging.getLogger("ray.rdt").addHandler(handler)

    speaker = Peer.options(runtime_env=limits(0.2)).remote()
    ray.get(speaker.run.remote(listen))
    refs = [speaker.make.remote(ones) for _ in range(5)]
    ray.wait(refs, num_returns=5)
    (line,) = [
        line
        for line in ray.get(speaker.run.remote(lambda peer: peer.kept["said"]))
        if "object store" in line
    ]
    assert "RAY_RDT_STORE_BYTES" in line
    assert plain(speaker) == 3
    ray.kill(speaker)


def test_once_there_is_room_objects_stay_with_their_producer_again(hasty: Any) -> None:
    before = plain(hasty)
    refs = [hasty.make.remote(ones) for _ in range(3)]
    ray.wait(refs, num_returns=3)
    assert plain(hasty) == before + 1
    del refs
    wait_until(lambda: stored(hasty) == 0, "all is freed")
    assert ray.get(hasty.make.remote(ones)).sum() == LARGE
    assert plain(hasty) == before + 1


def test_an_object_over_the_limit_waits_for_nothing(patient: Any, consumer: Any) -> None:
    before = plain(patient)
    ref = patient.make.remote(ones, 3 * LARGE)
    assert ray.get(consumer.run.remote(total, ref), timeout=30) == 3 * LARGE
    assert plain(patient) == before + 1


def test_small_objects_need_no_room(patient: Any) -> None:
    refs = [patient.make.remote(ones) for _ in range(2)]
    assert ray.get(patient.make.remote(ones, 16), timeout=30).sum() == 16
    del refs


def test_put_waits_as_well(patient: Any, hasty: Any) -> None:
    def put_three(peer: Peer) -> list[float]:
        refs = [ray.put(torch.full((LARGE,), 2.0), _tensor_transport="auto") for _ in range(3)]
        return [float(tensor.sum()) for tensor in ray.get(refs)]

    before = plain(hasty)
    assert ray.get(hasty.run.remote(put_three)) == [2.0 * LARGE] * 3
    assert plain(hasty) == before + 1


def test_tasks_and_generators_know_the_limit(local_ray: None) -> None:
    @ray.remote(num_cpus=0, tensor_transport="auto", runtime_env=limits(0.2))
    def items(count: int) -> Any:
        for index in range(count):
            yield torch.full((LARGE,), float(index))

    @ray.remote(num_cpus=0, tensor_transport="auto", runtime_env=limits(0.2), num_returns=3)
    def three() -> Any:
        return [torch.ones(LARGE) for _ in range(3)]

    assert [float(value.sum()) for value in ray.get(three.remote())] == [LARGE] * 3
    assert [float(value.sum()) for value in ray.get(list(items.remote(4)))] == [
        float(index * LARGE) for index in range(4)
    ]


def test_async_actors_do_not_wait(local_ray: None) -> None:
    @ray.remote(num_cpus=0)
    class Async:
        @ray.method(tensor_transport="auto")
        async def make(self) -> torch.Tensor:
            return torch.ones(LARGE)

        async def plain(self) -> int:
            return int(ray.experimental.rdt.stats()["plain_objects"])

    maker = Async.options(runtime_env=limits(60)).remote()
    began = time.monotonic()
    refs = [maker.make.remote() for _ in range(4)]
    assert [float(value.sum()) for value in ray.get(refs, timeout=50)] == [LARGE] * 4
    assert time.monotonic() - began < 50
    assert ray.get(maker.plain.remote()) == 2
    ray.kill(maker)


def test_strict_transport_makes_it_an_error(spawn: Any) -> None:
    maker = spawn(runtime_env=limits(0.2, RAY_RDT_STRICT_TRANSPORT="1"))
    with pytest.raises(RayTaskError, match=r"RAY_RDT_STORE_BYTES=.*RAY_RDT_STRICT_TRANSPORT"):
        ray.get(maker.make.remote(ones, 3 * LARGE))
    assert ray.get(maker.make.remote(ones)).sum() == LARGE


def test_a_waiting_return_can_be_cancelled(local_ray: None) -> None:
    @ray.remote(num_cpus=0, tensor_transport="auto", num_returns=3, runtime_env=limits(60))
    def three() -> Any:
        return [torch.ones(LARGE) for _ in range(3)]

    refs = three.remote()
    assert not ray.wait([refs[2]], timeout=3)[0]
    ray.cancel(refs[0])
    with pytest.raises((ray.exceptions.TaskCancelledError, RayTaskError)):
        ray.get(refs[2], timeout=30)
