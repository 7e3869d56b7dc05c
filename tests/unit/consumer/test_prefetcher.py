"""Objects that are pulled before their task asks: within a budget, given up if it never does."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from ray._private import ray_constants

from ray.experimental.rdt import _agent
from ray.experimental.rdt.common import config
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.consumer.prefetcher import Prefetcher
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.transports.selection import Pair
from tests.support import wait_until

MIB = 1 << 20
LONG_S = 30


class World:
    """A producer's agent with objects of 1 MiB, and a consumer's process that is hinted them."""

    def __init__(self):
        self._agents = [_agent.Agent(secret=b"s", bind_ip="127.0.0.1") for _ in range(2)]
        self._producer, consumer = self._agents
        self._memory = self._producer.allocate(MIB)
        self._handlers = {}
        session = SimpleNamespace(
            agent=consumer, serve=self._handlers.__setitem__, on_close=lambda _: None
        )
        self.pair = Pair(is_same_host=True)
        policy = SimpleNamespace(pair=lambda address: self.pair)
        self.hinted = Prefetcher(session, policy)

    def hint(self, number):
        """Return the object's key."""
        key = bytes([number]) * 16
        self._producer.register(key, array("Q", [self._memory.address]), array("Q", [MIB]), number)
        body = {
            "key": key,
            "address": self._producer.address,
            "regions": [MIB],
        }
        assert self._handlers[protocol.HINT](b"owner", body) == {}
        return key

    def stop(self):
        self.hinted.clear()
        for agent in self._agents:
            agent.stop()


@pytest.fixture
def make_world(monkeypatch):
    worlds = []

    def make(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        config.settings.cache_clear()
        worlds.append(World())
        return worlds[-1]

    yield make
    for world in worlds:
        world.stop()
    monkeypatch.undo()
    config.settings.cache_clear()


def test_hints_are_let_go_where_a_transport_comes_before_the_lanes(make_world):
    world = make_world()
    world.pair = Pair(is_same_host=False, has_rdma=True)
    key = world.hint(1)
    assert world.hinted.nbytes == 0
    assert world.hinted.take(key) is None


def test_hinted_objects_keep_within_their_budget(make_world):
    world = make_world(RAY_RDT_HINT_BYTES=str(2 * MIB))
    first, second, third = (world.hint(number) for number in (1, 2, 3))
    assert world.hinted.nbytes == 2 * MIB
    assert world.hinted.take(third) is None
    pull = world.hinted.take(first)
    pull.wait(Deadline.after(LONG_S))
    assert world.hinted.nbytes == MIB
    fourth = world.hint(4)
    assert world.hinted.nbytes == 2 * MIB
    for key in (second, fourth):
        world.hinted.take(key).wait(Deadline.after(LONG_S))
    assert world.hinted.nbytes == 0


def test_without_a_budget_nothing_is_pulled_early(make_world):
    world = make_world(RAY_RDT_HINT_BYTES="0")
    assert world.hinted.take(world.hint(1)) is None


def test_a_hint_that_comes_after_the_fetch_is_passed_over(make_world):
    world = make_world()
    world.hinted.take(bytes([1]) * 16)
    world.hint(1)
    assert world.hinted.nbytes == 0


def test_what_no_task_asks_for_is_given_up(make_world, monkeypatch):
    monkeypatch.setattr(ray_constants, "RDT_FETCH_FAIL_TIMEOUT_SECONDS", 2)
    world = make_world()
    world.hint(1)
    world.hinted.drop_stale()
    assert world.hinted.nbytes == MIB

    def is_given_up():
        world.hinted.drop_stale()
        return world.hinted.nbytes == 0

    wait_until(is_given_up, "the hinted object is given up")
