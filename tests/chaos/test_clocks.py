"""The wall clock of processes steps, forth and back, while they wait for objects."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ray
from tests.chaos.faults import LATEST_S, LONG, at_most, fetch, is_pulling, numbers, pid_of
from tests.integration.peers import LARGE
from tests.support import stopped, wait_until

pytestmark = pytest.mark.slow

STEP_S = 2 * 3600


class Clock:
    """The wall clock of the processes that are started with ``environment``."""

    def __init__(self, folder: Path):
        library, self._shift = folder / "shifted_clock.so", folder / "shift"
        source = Path(__file__).with_name("shifted_clock.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        self._shift.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "SHIFTED_CLOCK": str(self._shift)}

    def step(self, seconds: int) -> None:
        """From now on they are so far from the machine's."""
        with self._shift.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def start(spawn: Any, clock: Clock) -> Callable[..., Any]:
    """Makes an actor with that clock."""

    def make(**more: str) -> Any:
        return spawn(max_concurrency=2, runtime_env={"env_vars": {**clock.environment, **more}})

    return make


def away(actor: Any) -> float:
    """How far the actor's clock is from this process's."""
    return float(ray.get(actor.run.remote(lambda _: time.time()))) - time.time()


def test_a_pull_goes_on_over_steps_of_the_wall_clock(start: Any, clock: Clock) -> None:
    maker, taker = start(), start()
    ref = maker.make.remote(numbers, LONG)
    pid = pid_of(maker)
    ray.get(taker.pid.remote())
    waiting = taker.run.remote(fetch, [ref])
    with stopped(pid):
        for step in (STEP_S, -STEP_S):
            clock.step(step)
            ray.wait([waiting], timeout=0.5)
    assert ray.get(waiting, timeout=60) == "right"
    assert away(taker) < -STEP_S / 2


def test_deadlines_hold_over_steps_of_the_wall_clock(start: Any, clock: Clock) -> None:
    maker = start()
    impatient = start(RAY_rdt_fetch_fail_timeout_milliseconds="1500")
    ref = maker.make.remote(numbers, LARGE)
    ray.wait([ref], fetch_local=False)
    pid = pid_of(maker)
    assert abs(away(impatient)) < STEP_S / 2
    with stopped(pid), at_most(1.5 + LATEST_S, "a silent producer is given up"):
        waiting = impatient.run.remote(fetch, [ref])
        asks = impatient.run.remote
        wait_until(lambda: ray.get(asks(lambda _: is_pulling())), "it pulls")
        clock.step(-STEP_S)
        assert ray.get(waiting, timeout=60) == "RDTFetchTimedOutError"
    assert away(impatient) < -STEP_S / 2
    assert ray.get(impatient.run.remote(fetch, [ref])) == "right"
