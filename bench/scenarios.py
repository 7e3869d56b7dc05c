"""What a Ray process measures. Each scenario owns its actors; making one does all its set-up.

A hop is `ray.get(consumer.use.remote(producer.make.remote(...)))`: submitted by the driver, made by
one actor, used by the other.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from bench.peers import Waiter, first_element, peer_class
from bench.protocol import Scenario, Skip
from ray.experimental.collective import create_collective_group, destroy_collective_group

GROUP_TRANSPORTS = ("gloo", "nccl")
WARM_UP_NBYTES = 1 << 20
SMALL = ("tensor", 40)


class Pair:
    """A producer and a consumer, ready to hand over.

    Args:
        transport: The transport of make(), or None for plain objects.
        threads: How many methods of an actor may run at once.
    """

    def __init__(self, transport: str | None, threads: int = 1) -> None:
        actor_class = peer_class(transport, threads)
        self.producer, self.consumer = actor_class.remote(), actor_class.remote()
        self._group: Any = None
        actors = [self.producer, self.consumer]
        ray.get([actor.__ray_ready__.remote() for actor in actors])
        if transport in GROUP_TRANSPORTS:
            self._group = create_collective_group(actors, backend=transport)

    def warm_up(self) -> None:
        """Hands a small object over, so that libraries are loaded and connections made."""
        self.prepare("tensor", WARM_UP_NBYTES)
        self.hop("tensor", WARM_UP_NBYTES)

    def prepare(self, kind: str, nbytes: int) -> None:
        """Lets the producer make a new value ahead of time."""
        ray.get(self.producer.prepare.remote(kind, nbytes))

    def hop(self, kind: str, nbytes: int) -> float:
        """Hands the prepared value over; returns the seconds it took."""
        start = time.perf_counter()
        ray.get(self.consumer.use.remote(self.producer.make.remote(kind, nbytes)))
        return time.perf_counter() - start

    def close(self) -> None:
        """Ends both actors."""
        if self._group is not None:
            destroy_collective_group(self._group)
        for actor in (self.producer, self.consumer):
            ray.kill(actor)


class PairScenario:
    """What the scenarios on one pair share."""

    def __init__(self, transport: str | None = None, threads: int = 1) -> None:
        self.pair = Pair(transport, threads)
        self.pair.warm_up()

    def close(self) -> None:
        """Ends the pair."""
        self.pair.close()


class Hop(PairScenario):
    """Hands over a value that exists already, so many times in a row.

    Args:
        transport: The transport, or None for plain objects.
        kind: See make_value.
        nbytes: See make_value.
        count: Hops in one sample.
    """

    def __init__(
        self, transport: str | None, kind: str = "tensor", nbytes: int = 0, count: int = 1
    ) -> None:
        super().__init__(transport)
        self._value, self._count = (kind, nbytes), count
        self.pair.prepare(*self._value)

    def sample(self) -> list[float]:
        """Seconds of each hop."""
        return [self.pair.hop(*self._value) for _ in range(self._count)]


class HopOfNew(PairScenario):
    """Hands over a value that was made just before, and never handed over yet."""

    def __init__(self, transport: str | None, nbytes: int) -> None:
        super().__init__(transport)
        self._value = ("tensor", nbytes)

    def sample(self) -> list[float]:
        """Seconds of one hop; making the value is not counted."""
        self.pair.prepare(*self._value)
        return [self.pair.hop(*self._value)]


class FreshPairs:
    """What the scenarios share that need processes whose memory has never been used.

    Args:
        transport: The transport, or None for plain objects.
        nbytes: Bytes of the tensor that is handed over.
    """

    def __init__(self, transport: str | None, nbytes: int) -> None:
        self._transport, self._value = transport, ("tensor", nbytes)

    @contextlib.contextmanager
    def fresh_pair(self) -> Iterator[Pair]:
        """Two new processes, connected and warm, with the value prepared."""
        pair = Pair(self._transport)
        try:
            pair.warm_up()
            pair.prepare(*self._value)
            yield pair
        finally:
            pair.close()

    def close(self) -> None:
        """Nothing stays between samples."""


class HopToFresh(FreshPairs):
    """Hands over a value to a process whose memory has never been used."""

    def sample(self) -> list[float]:
        """Seconds of one hop; starting the processes is not counted.

        Free memory that a virtual machine has given back to its host costs many times a copy when
        it is touched again, whoever copies. So as much as the hop needs is touched right before.
        """
        with self.fresh_pair() as pair:
            touch_free_memory(2 * self._value[1])
            return [pair.hop(*self._value)]


class HopInto(PairScenario):
    """Fetches a tensor into one that the consumer has registered with NIXL."""

    def __init__(self, transport: str, nbytes: int) -> None:
        super().__init__(transport)
        self._value = ("tensor", nbytes)
        self.pair.prepare(*self._value)
        ray.get(self.pair.consumer.register_target.remote(nbytes))

    def sample(self) -> list[float]:
        """Seconds until the target is filled with an object that exists."""
        ref = self.pair.producer.make.remote(*self._value)
        ray.wait([ref], fetch_local=False)
        return [_seconds_of(self._pull, ref)]

    def _pull(self, ref: ray.ObjectRef) -> None:
        ray.get(self.pair.consumer.pull_into.remote([ref]))


class Burst(PairScenario):
    """Submits many hand-overs of ten floats without waiting for any."""

    def __init__(self, transport: str | None, count: int) -> None:
        super().__init__(transport)
        self._count = count
        self.pair.prepare(*SMALL)

    def sample(self) -> list[float]:
        """Seconds for one object, on average over the burst."""
        make, use = self.pair.producer.make, self.pair.consumer.use
        start = time.perf_counter()
        ray.get([use.remote(make.remote(*SMALL)) for _ in range(self._count)])
        return [(time.perf_counter() - start) / self._count]


class Busy(PairScenario):
    """Hands over existing objects while the producer computes, or not.

    Args:
        transport: The transport.
        nbytes: Bytes of each object.
        is_spinning: Whether one of the producer's methods runs pure Python meanwhile.
        count: Objects in one sample.
    """

    def __init__(self, transport: str, nbytes: int, is_spinning: bool, count: int) -> None:
        super().__init__(transport, threads=2)
        self._is_spinning, self._count = is_spinning, count
        self._value = ("tensor", nbytes)
        self.pair.prepare(*self._value)

    def sample(self) -> list[float]:
        """Seconds of each pull."""
        make = self.pair.producer.make
        refs = [make.remote(*self._value) for _ in range(self._count)]
        ray.wait(refs, num_returns=len(refs), fetch_local=False)
        return self._pull_beside_spin(refs) if self._is_spinning else self._pull(refs)

    def _pull_beside_spin(self, refs: list[ray.ObjectRef]) -> list[float]:
        producer = self.pair.producer
        spinning = producer.spin.remote()
        while not ray.get(producer.is_spinning.remote()):
            pass
        try:
            return self._pull(refs)
        finally:
            ray.get([producer.stop_spinning.remote(), spinning])

    def _pull(self, refs: list[ray.ObjectRef]) -> list[float]:
        return [_seconds_of(self._pull_one, ref) for ref in refs]

    def _pull_one(self, ref: ray.ObjectRef) -> None:
        ray.get(self.pair.consumer.use.remote(ref))


class ExtraMemory(FreshPairs):
    """How far one process's memory rises while a fresh consumer receives a tensor.

    Args:
        transport: The transport.
        nbytes: Bytes of the tensor.
        process: "producer" or "consumer".
    """

    def __init__(self, transport: str | None, nbytes: int, process: str) -> None:
        super().__init__(transport, nbytes)
        self._process = process

    def sample(self) -> list[float]:
        """Bytes between the memory before and its peak."""
        with self.fresh_pair() as pair:
            actor = getattr(pair, self._process)
            try:
                before = ray.get(actor.reset_peak.remote())
            except OSError as error:
                raise Skip(f"a process cannot reset its memory peak here: {error}") from None
            pair.hop(*self._value)
            return [float(ray.get(actor.peak.remote()) - before)]


class PlainHop(PairScenario):
    """Plain hops between actors that have, or have not, used RDT before.

    Args:
        used: The transport that they have used, or None.
        nbytes: Bytes of the plain tensor.
        count: Hops in one sample.
    """

    def __init__(self, used: str | None, nbytes: int, count: int) -> None:
        super().__init__(used)
        self._value, self._count = ("tensor", nbytes), count
        self.pair.prepare(*self._value)

    def sample(self) -> list[float]:
        """Seconds of each plain hop."""
        return [_seconds_of(self._hop) for _ in range(self._count)]

    def _hop(self) -> None:
        ref = self.pair.producer.kept.remote(*self._value)
        ray.get(self.pair.consumer.use.remote(ref))


class TaskHop(PairScenario):
    """Hands over an existing value to a normal task.

    Args:
        transport: The transport, or None for plain objects.
        nbytes: Bytes of the tensor.
        count: Hops in one sample.
    """

    def __init__(self, transport: str | None, nbytes: int, count: int) -> None:
        super().__init__(transport)
        self._value, self._count = ("tensor", nbytes), count
        self.pair.prepare(*self._value)
        self._task = ray.remote(num_cpus=1)(first_element)
        self._hop()

    def sample(self) -> list[float]:
        """Seconds of each hop."""
        return [_seconds_of(self._hop) for _ in range(self._count)]

    def _hop(self) -> None:
        ray.get(self._task.remote(self.pair.producer.make.remote(*self._value)))


class Items(PairScenario):
    """Takes items from a generator, each with a ``ray.get``.

    Args:
        transport: The transport of the items, or None for plain objects.
        nbytes: Bytes of each item.
        count: Items in one sample.
    """

    def __init__(self, transport: str | None, nbytes: int, count: int) -> None:
        super().__init__(None)
        self._options = {"num_returns": "streaming"}
        if transport is not None:
            self._options["tensor_transport"] = transport
        self._value, self._count = ("tensor", nbytes), count
        self.pair.prepare(*self._value)

    def sample(self) -> list[float]:
        """Seconds for one item, on average."""
        stream = self.pair.producer.stream.options(**self._options)
        start = time.perf_counter()
        for ref in stream.remote(*self._value, self._count):
            ray.get(ref)
        return [(time.perf_counter() - start) / self._count]


class Awaited(PairScenario):
    """One async actor awaits many objects.

    Args:
        transport: The transport.
        nbytes: Bytes of each object.
        count: How many.
        is_at_once: Whether all together, or one after the other.
        what: "pulls" for the seconds of all, "standstill" for the event loop's longest.
    """

    def __init__(
        self, transport: str, nbytes: int, count: int, is_at_once: bool, what: str
    ) -> None:
        super().__init__(transport)
        self._value, self._count = ("tensor", nbytes), count
        self.pair.prepare(*self._value)
        self._waiter = ray.remote(num_cpus=0)(Waiter).remote()
        self._wait = self._waiter.all_at_once if is_at_once else self._waiter.one_by_one
        self._index = ["pulls", "standstill"].index(what)
        self.sample()

    def sample(self) -> list[float]:
        """Seconds."""
        refs = [self.pair.producer.make.remote(*self._value) for _ in range(self._count)]
        ray.wait(refs, num_returns=len(refs), fetch_local=False)
        return [ray.get(self._wait.remote(refs))[self._index]]

    def close(self) -> None:
        """Ends the actors."""
        super().close()
        ray.kill(self._waiter)


class GroupOf:
    """Makes a collective group of actors that run already, and destroys it again.

    Args:
        transport: The group's backend.
        count: Its members.
    """

    def __init__(self, transport: str, count: int) -> None:
        self._transport = transport
        self._actors = [peer_class(transport).remote() for _ in range(count)]
        ray.get([actor.__ray_ready__.remote() for actor in self._actors])

    def sample(self) -> list[float]:
        """Seconds to make the group; destroying it is not counted."""
        start = time.perf_counter()
        group = create_collective_group(self._actors, backend=self._transport)
        elapsed = time.perf_counter() - start
        destroy_collective_group(group)
        return [elapsed]

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            ray.kill(actor)


def touch_free_memory(nbytes: int) -> None:
    """Writes to free memory of the machine, page by page, and frees it again."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    zeros = bytes(1 << 20)
    for _ in range(0, nbytes, len(zeros)):
        memory.write(zeros)
    memory.close()


def _seconds_of(work: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


SCENARIOS: dict[str, Callable[..., Scenario]] = {
    "hop": Hop,
    "hop_of_new": HopOfNew,
    "hop_to_fresh": HopToFresh,
    "hop_into": HopInto,
    "burst": Burst,
    "busy": Busy,
    "extra_memory": ExtraMemory,
    "plain_hop": PlainHop,
    "group_of": GroupOf,
    "task_hop": TaskHop,
    "items": Items,
    "awaited": Awaited,
}
