"""Processes that are stopped for a while, as by a machine that hangs, and then go on."""

from __future__ import annotations

import time
from typing import Any

import pytest

import ray
from tests.chaos.faults import LATEST_S, LONG, at_most, fetch, numbers, pid_of, stat, wait_idle
from tests.integration.peers import LARGE, Peer, ones, total_of_refs
from tests.support import stopped

pytestmark = pytest.mark.slow

#: Longer than the watches for dead owners take to look twice.
STOPPED_S = 5


def test_producer_stopped_in_a_pull_goes_on(spawn: Any, taker: Any) -> None:
    maker = spawn()
    ref = maker.make.remote(numbers, LONG)
    pid = pid_of(maker)
    waiting = taker.run.remote(fetch, [ref])
    time.sleep(0.02)
    with stopped(pid):
        ray.wait([waiting], timeout=1)
    assert ray.get(waiting, timeout=60) == "right"


def test_stopped_producer_is_given_up_at_the_fetch_timeout(
    spawn: Any, producer: Any, consumer: Any
) -> None:
    environment = {"RAY_rdt_fetch_fail_timeout_milliseconds": "1500"}
    maker, impatient = spawn(), spawn(runtime_env={"env_vars": environment})
    ref = maker.make.remote(numbers, LARGE)
    ray.wait([ref], fetch_local=False)
    pid = pid_of(maker)
    ray.get(impatient.pid.remote())
    with stopped(pid):
        with at_most(1.5 + LATEST_S, "a silent producer is given up"):
            assert ray.get(impatient.run.remote(fetch, [ref])) == "RDTFetchTimedOutError"
        others = producer.make.remote(ones)
        assert ray.get(impatient.run.remote(total_of_refs, [others])) == LARGE
    assert ray.get(impatient.run.remote(fetch, [ref])) == "right"
    assert ray.get(consumer.run.remote(fetch, [ref])) == "right"


def test_stopped_consumer_holds_up_nobody_and_goes_on(
    spawn: Any, producer: Any, consumer: Any, huge: Any
) -> None:
    slow = spawn()
    pid = pid_of(slow)
    waiting = slow.run.remote(fetch, [huge])
    time.sleep(0.02)
    with stopped(pid):
        assert ray.get(consumer.run.remote(fetch, [huge]), timeout=60) == "right"
    assert ray.get(waiting, timeout=60) == "right"


def test_stopped_owner_finds_its_objects_when_it_goes_on(
    spawn: Any, producer: Any, consumer: Any
) -> None:
    def submit(peer: Peer, to: Any) -> None:
        peer.kept["own"] = [to.make.remote(ones) for _ in range(3)]
        ray.wait(peer.kept["own"], num_returns=3)

    kept = stat(producer, "stored_objects")
    owner = spawn()
    ray.get(owner.run.remote(submit, producer))
    pid = pid_of(owner)
    with stopped(pid):
        time.sleep(STOPPED_S)
        assert stat(producer, "stored_objects") == kept + 3
        # Frees of the others go on meanwhile.
        assert ray.get(consumer.run.remote(total_of_refs, [producer.make.remote(ones)])) == LARGE
    got = owner.run.remote(lambda peer: total_of_refs(peer, peer.kept["own"]))
    assert ray.get(got, timeout=60) == 3 * LARGE
    ray.get(owner.run.remote(lambda peer: peer.kept.clear()))
    wait_idle(producer, kept=kept)
