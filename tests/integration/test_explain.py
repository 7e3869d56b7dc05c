"""ray.experimental.rdt.explain tells beforehand what a fetch then does."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ray.exceptions import GetTimeoutError, RayActorError

import ray
from ray.experimental.rdt import explain
from tests.integration.peers import LANES, LARGE, SMALL, Peer, ones, pulls, total


@ray.remote(num_cpus=0)
class Coroutines:
    async def total(self, tensor: torch.Tensor) -> float:
        return float(tensor.sum())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What this process's RDT logs meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ray.rdt")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def reason(explanation: Any, name: str) -> str:
    (found,) = [way.reason for way in explanation.ways["cpu"] if way.name == name]
    return str(found)


def test_what_is_explained_is_what_happens(producer: Any, consumer: Any, transport: str) -> None:
    numbers = LARGE + 1  # no other test has had several consumers for objects of this size
    ref = producer.make.options(tensor_transport=transport).remote(ones, numbers)
    told = explain((ref, consumer))
    before = pulls(consumer)
    assert ray.get(consumer.run.remote(total, ref)) == numbers
    moved_by = [lane for lane, count in pulls(consumer).items() if count > before[lane]]
    assert [told.used()] == (moved_by or [transport])
    assert told.transport == transport
    assert (transport == "auto") == (told.used() in LANES)
    assert "is another process" in reason(told, "inproc")
    assert explain((producer, consumer), transport=transport).used() == told.used()
    assert explain(ref).used() == told.used()


def test_every_way_is_named_with_a_reason(producer: Any, consumer: Any) -> None:
    told = explain((producer, consumer), transport="gloo")
    names = [way.name for way in told.ways["cpu"]]
    assert names[:7] == ["inproc", "eager", "gloo", "cma", "map", "shm", "tcp"]
    assert {*names[7:]} == {"nccl", "nixl", "cuda_ipc", "object store"}
    assert all(way.reason for way in told.ways["cpu"])
    assert "RAY_RDT_STRICT_TRANSPORT" in reason(told, "cma")
    table = str(told)
    assert "gloo" in table.splitlines()[0]
    for name in names:
        assert name in table


def test_objects_that_need_no_lane(producer: Any, consumer: Any) -> None:
    mine = ray.put(torch.ones(LARGE), _tensor_transport="auto")
    assert explain(mine).used() == "inproc"
    assert explain((mine, consumer)).used() in LANES
    its = producer.make.remote(ones)
    assert explain((its, producer)).used() == "inproc"
    small = producer.make.remote(ones, SMALL)
    assert explain(small).used() == "eager"
    for plain in (ray.put(7), producer.make.remote(lambda _: "text")):
        assert explain((plain, consumer)).used() == "object store"
        assert "no tensors" in str(explain(plain))


def test_a_transport_that_one_side_cannot_use(producer: Any, consumer: Any) -> None:
    told = explain((producer, consumer), transport="cuda_ipc")
    assert told.used() is None
    assert "cuda_ipc" in reason(told, "cuda_ipc")
    assert "nothing serves" in str(told)


@pytest.mark.usefixtures("users_transports")
def test_a_transport_of_the_users(producer: Any, consumer: Any) -> None:
    assert explain((producer, consumer), transport="shm").used() == "shm"
    assert explain(ray.put(torch.ones(3), _tensor_transport="shm")).used() == "inproc"


def test_async_and_dead_actors(producer: Any, spawn: Any) -> None:
    coroutines, dead = spawn(Coroutines), spawn()
    assert explain((producer, coroutines)).used() in LANES
    lost = dead.make.options(tensor_transport="gloo").remote(ones)
    ends = os.pidfd_open(ray.get(dead.pid.remote()))  # Ray calls an actor dead before it ends
    ray.wait([lost])
    ray.kill(dead)
    poller = select.poll()
    poller.register(ends, select.POLLIN)
    assert poller.poll(30_000)
    os.close(ends)
    with pytest.raises(RayActorError):
        explain((dead, producer))
    told = explain((lost, producer), timeout=20)
    assert told.used() is None
    assert "cannot be" in reason(told, "gloo")


def test_what_cannot_be_explained(producer: Any, spawn: Any) -> None:
    busy = spawn(max_concurrency=1)
    waiting = busy.make.remote(lambda peer: peer.gate.wait(5))
    for what in (waiting, (busy, producer)):
        with pytest.raises(GetTimeoutError):
            explain(what, timeout=0.2)
    for wrong in (7, producer, (producer, 7), (7, producer)):
        with pytest.raises(TypeError, match=r"explain|consuming"):
            explain(wrong)
    with pytest.raises(ValueError, match="Invalid tensor transport"):
        explain((producer, producer), transport="carrier_pigeon")


def test_each_lane_is_logged_once_for_a_peer(spawn: Any, said: list[str], transport: str) -> None:
    maker: Any = spawn(Peer)
    for _ in range(2):
        ref = maker.make.options(tensor_transport=transport).remote(ones)
        assert ray.get(ref).sum() == LARGE
    lane = explain(ref).used()
    lines = [line for line in said if f"lane {lane}" in line]
    assert len(lines) == 1, said
    why = "the named transport" if lane == transport else "is another process"
    assert why in lines[0]
