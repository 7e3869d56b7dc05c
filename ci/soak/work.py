"""The paths along which a soak sends objects. Each checks the received bytes."""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ci.soak.actors import check_in_task, is_right, make_in_task, pattern
from ci.soak.faults import Faults

#: Numbers of 4-byte elements: inlined objects, larger ones, and ones that need several pieces.
LENGTHS = [1, 1000, 17_000, 300_000, 2_000_000, 8_000_000]
HOW_OFTEN = [3, 3, 4, 4, 2, 1]

#: The workers of tasks. Each keeps its objects after its task, and runs other tasks.
TASKS = "workers of tasks"

#: Limit of each call: the fetch timeout plus the time of process restarts.
BOUND_S = 90.0


class Job:
    """One use of one path: its actors, object and transport.

    Attributes:
        members: The names of the chosen actors.
        length: Number of elements.
    """

    _seeds = itertools.count(0, 10)

    def __init__(
        self, actors: dict[str, Any], transports: list[str], faults: Faults, pick: random.Random
    ):
        self.members: set[str] = set()
        self.seed = next(self._seeds)
        self.length = pick.choices(LENGTHS, HOW_OFTEN)[0]
        self.transport = pick.choice(transports)
        self.faults = faults
        self.pick = pick
        self._actors = actors

    def actor(self) -> Any:
        """Return an actor that is not part of this job yet."""
        name = self.pick.choice(sorted(set(self._actors) - self.members))
        self.members.add(name)
        return self._actors[name]

    def make(self, producer: Any, at: int = 0) -> Any:
        method = producer.make.options(tensor_transport=self.transport)
        return method.remote(self.seed + at, self.length)

    def __str__(self) -> str:
        return f"{self.length} elements over {self.transport!r} by {sorted(self.members)}"


def _get(what: Any) -> Any:
    return ray.get(what, timeout=BOUND_S)


def argument(job: Job) -> bool:
    ref = job.make(job.actor())
    return bool(_get(job.actor().check.remote(job.seed, ref)))


def two_by_keyword(job: Job) -> bool:
    one, other = job.make(job.actor()), job.make(job.actor(), 1)
    return bool(_get(job.actor().check.remote(job.seed, one, other=other)))


def back_to_its_maker(job: Job) -> bool:
    actor = job.actor()
    return bool(_get(actor.check.remote(job.seed, job.make(actor))))


def get_in_the_driver(job: Job) -> bool:
    ref = job.make(job.actor())
    return all(is_right(tensor, job.seed) for tensor in _get([ref, ref]))


def awaited(job: Job) -> bool:
    async def both() -> Any:
        producer = job.actor()
        gathered = asyncio.gather(job.make(producer), job.make(producer, 1))
        return await asyncio.wait_for(gathered, BOUND_S)

    one, other = asyncio.run(both())
    return is_right(one, job.seed) and is_right(other, job.seed + 1)


def put_by_the_driver(job: Job) -> bool:
    ref = ray.put(pattern(job.seed, job.length), _tensor_transport=job.transport)
    return bool(_get(job.actor().check.remote(job.seed, ref)))


def put_by_an_actor(job: Job) -> bool:
    refs = _get(job.actor().put.remote(job.seed, job.length, job.transport))
    return bool(_get(job.actor().check_refs.remote(job.seed, refs)))


def lent_and_passed_on(job: Job) -> bool:
    producer = job.actor()
    refs = [job.make(producer, at) for at in range(3)]
    return bool(_get(job.actor().pass_on.remote(job.seed, refs, job.actor())))


def owned_by_an_actor(job: Job) -> bool:
    own = job.actor().own.remote
    refs = _get(own(job.actor(), job.seed, job.length, job.transport))
    return bool(_get(job.actor().check_refs.remote(job.seed, refs)))


def items_of_a_generator(job: Job) -> bool:
    method = job.actor().items.options(num_returns="streaming", tensor_transport=job.transport)
    consumer = job.actor()
    sent = [
        consumer.check.remote(job.seed + at, item)
        for at, item in enumerate(method.remote(job.seed, job.length, 4))
    ]
    return all(_get(sent))


def given_up(job: Job) -> bool:
    """Drop a transfer in flight, and cancel a consumer."""
    ref = job.make(job.actor())
    taken = job.actor().check.remote(job.seed, ref)
    ray.wait([taken], timeout=job.pick.choice([0, 0.001, 0.02]))
    ray.cancel(taken)
    try:
        return bool(_get(taken))
    except ray.exceptions.TaskCancelledError:
        job.faults.count("consumer cancelled")
        return True


def dropped(job: Job) -> bool:
    for at in range(4):
        job.make(job.actor(), at)
    return True


def to_a_task(job: Job) -> bool:
    return bool(_get(check_in_task.remote(job.seed, job.make(job.actor()))))


def of_a_task(job: Job) -> bool:
    job.members.add(TASKS)
    make = make_in_task.options(tensor_transport=job.transport)
    return bool(_get(job.actor().check.remote(job.seed, make.remote(job.seed, job.length))))


def of_a_task_that_dies(job: Job) -> bool:
    """Kill the task's process: Ray retries the task, so this fault excuses no error."""
    with tempfile.TemporaryDirectory() as folder:
        make = make_in_task.options(tensor_transport=job.transport)
        ref = make.remote(job.seed, job.length, str(Path(folder) / "died"))
        job.faults.killed(TASKS)
        job.faults.count("task's process killed")
        return is_right(_get(ref), job.seed)


PATHS: dict[Callable[[Job], bool], float] = {
    argument: 6,
    two_by_keyword: 3,
    back_to_its_maker: 1,
    get_in_the_driver: 3,
    awaited: 2,
    put_by_the_driver: 2,
    put_by_an_actor: 2,
    lent_and_passed_on: 3,
    owned_by_an_actor: 3,
    items_of_a_generator: 2,
    given_up: 2,
    dropped: 1,
    to_a_task: 1,
    of_a_task: 1,
    of_a_task_that_dies: 0.3,
}
