"""Scenarios of a Ray process. Each owns its actors, and its constructor does all set-up.

A hop is `ray.get(consumer.use.remote(producer.make.remote(...)))`: the driver submits both calls,
one actor creates the value, the other uses it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from bench.peers import Waiter, first_element, peer_class, proportional_memory
from bench.protocol import Scenario, Skip
from ray.experimental.collective import create_collective_group, destroy_collective_group

GROUP_TRANSPORTS = ("gloo", "nccl")
WARM_UP_NBYTES = 1 << 20
SMALL = ("tensor", 40)
#: After this time without use, processes have returned their free memory to the system.
IDLE_S = 15


class Pair:
    """A producer and a consumer that are ready to transfer.

    Args:
        transport: The transport of make(), or None for plain objects.
        threads: Number of methods of an actor that may run at once.
    """

    def __init__(self, transport: str | None, threads: int = 1) -> None:
        actor_class = peer_class(transport, threads)
        self.producer, self.consumer = actor_class.remote(), actor_class.remote()
        self._group = _group_of([self.producer, self.consumer], transport)

    def warm_up(self) -> None:
        """Transfer a small object, to load libraries and create connections."""
        self.prepare("tensor", WARM_UP_NBYTES)
        self.hop("tensor", WARM_UP_NBYTES)

    def prepare(self, kind: str, nbytes: int) -> None:
        """Let the producer create a new value in advance."""
        ray.get(self.producer.prepare.remote(kind, nbytes))

    def hop(self, kind: str, nbytes: int) -> float:
        """Transfer the prepared value; return the seconds."""
        start = time.perf_counter()
        ray.get(self.consumer.use.remote(self.producer.make.remote(kind, nbytes)))
        return time.perf_counter() - start

    def close(self) -> None:
        """End both actors."""
        if self._group is not None:
            destroy_collective_group(self._group)
        for actor in (self.producer, self.consumer):
            ray.kill(actor)


class PairScenario:
    """Base of the scenarios with one pair."""

    def __init__(self, transport: str | None = None, threads: int = 1) -> None:
        self.pair = Pair(transport, threads)
        self.pair.warm_up()

    def close(self) -> None:
        """End the pair."""
        self.pair.close()


class Hop(PairScenario):
    """Transfer an existing value a number of times in sequence.

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
        """Return seconds of each hop."""
        return [self.pair.hop(*self._value) for _ in range(self._count)]


class HopOfNew(PairScenario):
    """Transfer a new value that was not transferred before."""

    def __init__(self, transport: str | None, nbytes: int) -> None:
        super().__init__(transport)
        self._value = ("tensor", nbytes)

    def sample(self) -> list[float]:
        """Return seconds of one hop, without the creation of the value."""
        self.pair.prepare(*self._value)
        return [self.pair.hop(*self._value)]


class HopOfCreated(PairScenario):
    """Transfer a value that the producer's method creates and returns.

    Args:
        transport: The transport, or None for plain objects.
        nbytes: Bytes of the tensor.
        count: Hops in one sample.
    """

    def __init__(self, transport: str | None, nbytes: int, count: int) -> None:
        super().__init__(transport)
        self._value, self._count = ("tensor", nbytes), count

    def sample(self) -> list[float]:
        """Return seconds of each hop, with the creation of the value."""
        return [_seconds_of(self._hop) for _ in range(self._count)]

    def _hop(self) -> None:
        ref = self.pair.producer.create.remote(*self._value)
        ray.get(self.pair.consumer.use.remote(ref))


class FreshPairs:
    """Base of the scenarios that need processes with unused memory.

    Args:
        transport: The transport, or None for plain objects.
        nbytes: Bytes of the transferred tensor.
    """

    def __init__(self, transport: str | None, nbytes: int) -> None:
        self._transport, self._value = transport, ("tensor", nbytes)

    @contextlib.contextmanager
    def fresh_pair(self) -> Iterator[Pair]:
        """Return two new processes, connected and warm, with the value prepared."""
        pair = Pair(self._transport)
        try:
            pair.warm_up()
            pair.prepare(*self._value)
            yield pair
        finally:
            pair.close()

    def close(self) -> None:
        """Do nothing: no state remains between samples."""


class HopToFresh(FreshPairs):
    """Transfer an existing value to a process with unused memory.

    Args:
        transport: The transport, or None for plain objects.
        nbytes: Bytes of the tensor.
        count: Hops of each pair; the first one fills unused memory.
    """

    def __init__(self, transport: str | None, nbytes: int, count: int) -> None:
        super().__init__(transport, nbytes)
        self._count = count

    def sample(self) -> list[float]:
        """Return seconds of each hop of a new pair, without the start of the processes.

        If a virtual machine has returned free memory to its host, touching it again costs many
        times a copy. So the memory that the hop needs is touched right before.
        """
        with self.fresh_pair() as pair:
            touch_free_memory(2 * self._value[1])
            return [pair.hop(*self._value) for _ in range(self._count)]


class HopInto(PairScenario):
    """Fetch a tensor into one that the consumer has registered with NIXL."""

    def __init__(self, transport: str, nbytes: int) -> None:
        super().__init__(transport)
        self._value = ("tensor", nbytes)
        self.pair.prepare(*self._value)
        ray.get(self.pair.consumer.register_target.remote(nbytes))

    def sample(self) -> list[float]:
        """Return seconds until an existing object fills the target."""
        ref = self.pair.producer.make.remote(*self._value)
        ray.wait([ref], fetch_local=False)
        return [_seconds_of(self._pull, ref)]

    def _pull(self, ref: ray.ObjectRef) -> None:
        ray.get(self.pair.consumer.pull_into.remote([ref]))


class Burst(PairScenario):
    """Submit many transfers of ten floats without waiting for any."""

    def __init__(self, transport: str | None, count: int) -> None:
        super().__init__(transport)
        self._count = count
        self.pair.prepare(*SMALL)

    def sample(self) -> list[float]:
        """Return seconds for one object, averaged over the burst."""
        make, use = self.pair.producer.make, self.pair.consumer.use
        start = time.perf_counter()
        ray.get([use.remote(make.remote(*SMALL)) for _ in range(self._count)])
        return [(time.perf_counter() - start) / self._count]


class Busy(PairScenario):
    """Transfer existing objects while the producer computes or is idle.

    Args:
        transport: The transport.
        nbytes: Bytes of each object.
        is_spinning: Whether a method of the producer runs pure Python meanwhile.
        count: Objects in one sample.
    """

    def __init__(self, transport: str, nbytes: int, is_spinning: bool, count: int) -> None:
        super().__init__(transport, threads=2)
        self._is_spinning, self._count = is_spinning, count
        self._value = ("tensor", nbytes)
        self.pair.prepare(*self._value)

    def sample(self) -> list[float]:
        """Return seconds of each pull."""
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
    """Measure how far a process's memory rises while a fresh consumer receives a tensor.

    Args:
        transport: The transport.
        nbytes: Bytes of the tensor.
        process: "producer" or "consumer".
    """

    def __init__(self, transport: str | None, nbytes: int, process: str) -> None:
        super().__init__(transport, nbytes)
        self._process = process

    def sample(self) -> list[float]:
        """Return the bytes between the memory before and its peak."""
        with self.fresh_pair() as pair:
            actor = getattr(pair, self._process)
            try:
                before = ray.get(actor.reset_peak.remote())
            except OSError as error:
                raise Skip(f"a process cannot reset its memory peak here: {error}") from None
            pair.hop(*self._value)
            return [float(ray.get(actor.peak.remote()) - before)]


class PlainHop(PairScenario):
    """Measure plain hops between actors that have or have not used RDT.

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
        """Return seconds of each plain hop."""
        return [_seconds_of(self._hop) for _ in range(self._count)]

    def _hop(self) -> None:
        ref = self.pair.producer.kept.remote(*self._value)
        ray.get(self.pair.consumer.use.remote(ref))


class TaskHop(PairScenario):
    """Transfer an existing value to a normal task.

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
        """Return seconds of each hop."""
        return [_seconds_of(self._hop) for _ in range(self._count)]

    def _hop(self) -> None:
        ray.get(self._task.remote(self.pair.producer.make.remote(*self._value)))


class Items(PairScenario):
    """Take items from a generator, each with a ``ray.get``.

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
        """Return the average seconds for one item."""
        stream = self.pair.producer.stream.options(**self._options)
        start = time.perf_counter()
        for ref in stream.remote(*self._value, self._count):
            ray.get(ref)
        return [(time.perf_counter() - start) / self._count]


class Awaited(PairScenario):
    """Await many objects in one async actor.

    Args:
        transport: The transport, or None for plain objects.
        nbytes: Bytes of each object.
        count: Number of objects.
        is_at_once: Whether to await concurrently instead of sequentially.
        what: "pulls" for the seconds of all, "standstill" for the longest event loop pause.
    """

    def __init__(
        self, transport: str | None, nbytes: int, count: int, is_at_once: bool, what: str
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
        """End the actors."""
        super().close()
        ray.kill(self._waiter)


class FanOut:
    """Transfer of one existing value to several readers at once.

    Args:
        transport: The transport, or None for plain objects.
        readers: The number of actors that receive it and read every element.
        what: "seconds" until all have done so, or "memory" of all processes while all hold it.
        kind: See make_value.
        nbytes: See make_value.
    """

    def __init__(
        self,
        transport: str | None,
        readers: int,
        what: str = "seconds",
        kind: str = "tensor",
        nbytes: int = 0,
    ) -> None:
        actor_class = peer_class(transport)
        self._producer = actor_class.remote()
        self._readers = [actor_class.remote() for _ in range(readers)]
        self._value, self._what = (kind, nbytes), what
        self._group = _group_of([self._producer, *self._readers], transport)
        ray.get(self._producer.prepare.remote(*SMALL))
        self._hand_out(SMALL, "total")
        ray.get(self._producer.prepare.remote(*self._value))

    def sample(self) -> list[float]:
        """Return the seconds of one transfer, or the bytes that it adds."""
        if self._what == "seconds":
            return [_seconds_of(self._hand_out, self._value, "total")]
        # What processes learn from a first transfer is not part of the result.
        self._hand_out(self._value, "hold")
        self._hand_out(SMALL, "hold")
        time.sleep(IDLE_S)
        before = proportional_memory(os.getpid())
        self._hand_out(self._value, "hold")
        return [float(proportional_memory(os.getpid()) - before)]

    def _hand_out(self, value: tuple[str, int], method: str) -> None:
        ref = self._producer.make.remote(*value)
        ray.get([getattr(reader, method).remote(ref) for reader in self._readers])

    def close(self) -> None:
        """Ends the actors."""
        if self._group is not None:
            destroy_collective_group(self._group)
        for actor in (self._producer, *self._readers):
            ray.kill(actor)


class GroupOf:
    """Create a collective group of running actors, and destroy it.

    Args:
        transport: The group's backend.
        count: Number of members.
    """

    def __init__(self, transport: str, count: int) -> None:
        self._transport = transport
        self._actors = [peer_class(transport).remote() for _ in range(count)]
        ray.get([actor.__ray_ready__.remote() for actor in self._actors])

    def sample(self) -> list[float]:
        """Return seconds to create the group, without its destruction."""
        start = time.perf_counter()
        group = create_collective_group(self._actors, backend=self._transport)
        elapsed = time.perf_counter() - start
        destroy_collective_group(group)
        return [elapsed]

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)


def touch_free_memory(nbytes: int) -> None:
    """Write to free memory of the machine, page by page, then free it."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    zeros = bytes(1 << 20)
    for _ in range(0, nbytes, len(zeros)):
        memory.write(zeros)
    memory.close()


def _group_of(actors: list[Any], transport: str | None) -> Any:
    """Wait until the actors run; return their group if stock Ray needs one for the transport."""
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    if transport not in GROUP_TRANSPORTS:
        return None
    return create_collective_group(actors, backend=transport)


def _seconds_of(work: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


SCENARIOS: dict[str, Callable[..., Scenario]] = {
    "hop": Hop,
    "hop_of_new": HopOfNew,
    "hop_of_created": HopOfCreated,
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
    "fan_out": FanOut,
}
