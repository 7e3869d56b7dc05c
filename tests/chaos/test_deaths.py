"""Processes that are killed: who waits is told soon, what they held is freed, the rest goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

import ray
from tests.chaos.faults import (
    FREED_WITHIN_S,
    LATEST_S,
    LONG,
    at_most,
    fetch,
    kill,
    numbers,
    pid_of,
    stat,
    wait_idle,
    wait_pinned,
)
from tests.integration.peers import LARGE, Peer, ones, total_of_refs
from tests.support import ROOT, stopped, wait_until

pytestmark = pytest.mark.slow

#: Longer than a producer waits before it asks who wants an object, and for the answer.
STOPPED_S = 7


def hold(peer: Peer, refs: list[Any]) -> None:
    peer.kept["refs"] = refs


def submit(peer: Peer, to: Any, count: int) -> list[Any]:
    peer.kept["own"] = [to.make.remote(ones) for _ in range(count)]
    ray.wait(peer.kept["own"], num_returns=count)
    return peer.kept["own"]


def test_producer_killed_while_its_bytes_flow(spawn: Any, taker: Any) -> None:
    maker = spawn()
    ref = maker.make.remote(numbers, 2 * LONG)
    pid = pid_of(maker)
    waiting = taker.run.remote(fetch, [ref])
    wait_pinned(maker)
    kill(pid)
    with at_most(LATEST_S, "the consumer knows of its producer's end"):
        assert ray.get(waiting, timeout=60) in ("right", "RDTProducerDiedError")
    with at_most(LATEST_S, "and so does who asks later"):
        assert ray.get(taker.run.remote(fetch, [ref]), timeout=60) == "RDTProducerDiedError"


def test_what_was_received_outlives_its_producer(spawn: Any, consumer: Any) -> None:
    maker = spawn()
    ref = maker.make.remote(ones)
    ray.get(consumer.run.remote(lambda peer, refs: peer.kept.update(got=ray.get(refs[0])), [ref]))
    kill(pid_of(maker))
    with pytest.raises(ObjectLostError):
        ray.get(ref, timeout=60)
    assert ray.get(consumer.run.remote(lambda peer: float(peer.kept.pop("got").sum()))) == LARGE


@pytest.mark.parametrize("lane", ["cma", "tcp"])
def test_consumer_killed_while_it_pulls(
    spawn: Any, producer: Any, consumer: Any, huge: Any, lane: str
) -> None:
    doomed = spawn(runtime_env={"env_vars": {"RAY_RDT_LANES": lane}})
    pid = pid_of(doomed)
    before = stat(producer, "stored_objects")
    waiting = doomed.run.remote(fetch, [huge])
    wait_pinned(producer)
    kill(pid)
    with at_most(LATEST_S, "nothing is pinned for the dead consumer"):
        wait_until(lambda: stat(producer, "pinned") == 0, "unpinned")
    with pytest.raises(ray.exceptions.RayError):
        ray.get(waiting, timeout=60)
    assert stat(producer, "stored_objects") == before
    assert ray.get(consumer.run.remote(fetch, [huge])) == "right"


def test_owner_killed(spawn: Any, producer: Any, consumer: Any) -> None:
    kept = stat(producer, "stored_objects")
    owner = spawn()
    refs = ray.get(owner.run.remote(submit, producer, 3))
    ray.get(consumer.run.remote(hold, refs))
    assert stat(producer, "stored_objects") == kept + 3
    kill(pid_of(owner))
    with at_most(FREED_WITHIN_S, "a dead owner's objects are freed"):
        wait_idle(producer, kept=kept)
    with pytest.raises(ObjectLostError):
        ray.get(refs[0], timeout=60)
    ray.get(consumer.run.remote(lambda peer: peer.kept.clear()))


def test_owner_killed_before_it_heard_of_its_object(
    spawn: Any, producer: Any, tmp_path: Path
) -> None:
    """Nobody has claimed the object, and nobody will."""

    def make_late(_: Peer, begun: Path, gate: Path) -> Any:
        begun.touch()
        wait_until(gate.exists, "the owner is dead")
        return numbers(_, LARGE)

    def start(peer: Peer, to: Any, begun: Path, gate: Path) -> None:
        peer.kept["late"] = to.make.remote(make_late, begun, gate)

    kept = stat(producer, "stored_objects")
    maker, owner = spawn(), spawn()
    pid = pid_of(owner)
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    ray.get(owner.run.remote(start, maker, begun, gate))
    wait_until(begun.exists, "the task runs")
    kill(pid)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the owner has ended")
    gate.touch()
    wait_until(lambda: stat(maker, "stored_objects") == 1, "it is stored")
    with at_most(FREED_WITHIN_S, "an object that no owner claimed is freed"):
        wait_idle(maker)
    assert stat(producer, "stored_objects") == kept


def test_an_unclaimed_object_of_a_stopped_owner_stays(spawn: Any, tmp_path: Path) -> None:
    """The owner is alive, so what it has not heard of yet is kept for it."""

    def make_late(_: Peer, begun: Path, gate: Path) -> Any:
        begun.touch()
        wait_until(gate.exists, "the owner is stopped")
        return numbers(_, LARGE)

    def start(peer: Peer, to: Any, begun: Path, gate: Path) -> None:
        peer.kept["late"] = [to.make.remote(make_late, begun, gate)]

    maker, owner = spawn(), spawn()
    pid = pid_of(owner)
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    ray.get(owner.run.remote(start, maker, begun, gate))
    wait_until(begun.exists, "the task runs")
    with stopped(pid):
        gate.touch()
        wait_until(lambda: stat(maker, "stored_objects") == 1, "it is stored")
        time.sleep(STOPPED_S)
        assert stat(maker, "stored_objects") == 1
    assert ray.get(owner.run.remote(lambda peer: fetch(peer, peer.kept["late"]))) == "right"
    ray.get(owner.run.remote(lambda peer: peer.kept.clear()))
    wait_idle(maker)


DRIVER = """
import sys, time, ray
ray.init(address=sys.argv[1], namespace=sys.argv[2], log_to_driver=False)
from tests.integration.peers import Peer, ones
maker = ray.get_actor("maker")
refs = [maker.make.remote(ones) for _ in range(3)]
refs.append(ray.put(ray.get(refs[0]), _tensor_transport="auto"))
print("ready", flush=True)
time.sleep(600)
"""


def test_driver_killed(spawn: Any) -> None:
    maker = spawn(name="maker")
    pid_of(maker)
    context = ray.get_runtime_context()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, context.gcs_address, context.namespace],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout is not None
        lines = iter(driver.stdout.readline, "")
        assert "ready\n" in lines
        wait_until(lambda: stat(maker, "stored_objects") == 3, "its objects are there")
    finally:
        driver.kill()
        driver.wait()
    with at_most(FREED_WITHIN_S, "a killed driver's objects are freed"):
        wait_idle(maker)


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_borrower_killed(
    spawn: Any, producer: Any, consumer: Any, takers: Any, huge: Any, when: str
) -> None:
    """Its end takes nothing from the owner or from other borrowers, and it keeps nothing alive."""
    kept = stat(producer, "stored_objects")
    ref = producer.make.remote(numbers)
    borrower = spawn()
    pid = pid_of(borrower)
    ray.get(borrower.run.remote(hold, [ref]))
    if when == "during":
        borrower.run.remote(fetch, [huge])
        wait_pinned(producer)
    elif when == "after":
        assert ray.get(borrower.run.remote(fetch, [ref])) == "right"
    kill(pid)
    assert ray.get(consumer.run.remote(fetch, [ref]), timeout=60) == "right"
    del ref
    with at_most(FREED_WITHIN_S, "a dead borrower keeps nothing alive"):
        wait_idle(producer, kept=kept)


def test_producer_that_dies_in_its_task_leaves_nothing_when_it_runs_again(
    spawn: Any, consumer: Any, tmp_path: Path
) -> None:
    def die_once(peer: Peer, marker: Path) -> Any:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return numbers(peer, LARGE)

    maker = spawn(max_restarts=1, max_task_retries=1)
    ref = maker.make.remote(die_once, tmp_path / "died")
    assert ray.get(consumer.run.remote(fetch, [ref]), timeout=60) == "right"
    assert ray.get(consumer.run.remote(total_of_refs, [maker.make.remote(ones)])) == LARGE
    del ref
    wait_idle(maker)
