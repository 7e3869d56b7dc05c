"""Find resources that many objects leak: ``python -m ci.leaks [objects [path]]``.

Sends objects along every path of RDT objects, and compares the counters of each process before
and after. Tests run it with few objects. The Python must have the wheel installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import torch

import ray
from ray.experimental.rdt import stats

#: Too large to be inlined in the value (65 KiB).
LARGE = (1 << 14) + (1 << 8)
SMALL = 16

TRANSPORTS = ["auto", "gloo"]
with contextlib.suppress(ImportError):  # nixl, or its package for this torch, is not installed
    importlib.import_module("nixl._api")
    TRANSPORTS.append("nixl")

#: Objects in flight at the same time.
BATCH = 50

#: Counters that must have exactly their earlier value.
EXACT: tuple[str, ...] = (
    "stored_objects",
    "directory_rows",
    "held_arguments",
    "recipes",
    "exposed",
    "streams",
    "regions",
)
EXACT += ("pinned", "pulls_live", "calls_live", "pool_used")

#: Counters that Ray changes too, and their allowed difference. Ray starts and ends workers of
#: normal tasks at any time, and each has a connection of the agent and descriptors.
ROUGH = {"connections": 8, "file_descriptors": 40}


@ray.remote(num_cpus=0)
class Actor:
    """A producer and a consumer."""

    def make(self, count: int) -> torch.Tensor:
        return torch.ones(count)

    def pair(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(count), torch.ones(count)

    def items(self, count: int, size: int) -> Iterator[torch.Tensor]:
        for _ in range(count):
            yield torch.ones(size)

    def total(self, tensor: torch.Tensor, *, other: Any = 0) -> float:
        return float(tensor.sum()) + float(torch.as_tensor(other).sum())

    def total_of(self, refs: list[Any]) -> float:
        return sum(float(tensor.sum()) for tensor in ray.get(refs))

    def put(self, count: int, transport: str) -> list[Any]:
        return [ray.put(torch.ones(count), _tensor_transport=transport)]

    def count(self) -> dict[str, int]:
        return count_here()


@ray.remote(num_cpus=0)
class Coroutines:
    """A producer and a consumer with coroutines."""

    async def items(self, count: int, size: int) -> AsyncIterator[torch.Tensor]:
        for _ in range(count):
            yield torch.ones(size)

    async def total(self, tensor: torch.Tensor) -> float:
        return float(tensor.sum())

    async def total_of(self, refs: list[Any]) -> float:
        return sum([float(tensor.sum()) for tensor in await asyncio.gather(*refs)])

    async def count(self) -> dict[str, int]:
        return count_here()


@ray.remote
def make_in_task(count: int) -> torch.Tensor:
    return torch.ones(count)


@ray.remote
def items_in_task(count: int, size: int) -> Iterator[torch.Tensor]:
    for _ in range(count):
        yield torch.ones(size)


@ray.remote
def total_in_task(tensor: torch.Tensor) -> float:
    return float(tensor.sum())


@ray.remote
def put_in_task(count: int, transport: str) -> list[Any]:
    return [ray.put(torch.ones(count), _tensor_transport=transport)]


def count_here() -> dict[str, int]:
    gc.collect()
    counters: dict[str, int] = stats()
    return {"file_descriptors": len(os.listdir("/proc/self/fd"))} | counters


class World:
    """The processes that exchange objects."""

    def __init__(self) -> None:
        kinds: tuple[Any, ...] = (Actor, Actor, Coroutines)
        self.one, self.two, self.loop = (kind.remote() for kind in kinds)

    def make(self, size: int, transport: str = "auto") -> Any:
        """A new object of ``one``'s."""
        return self.one.make.options(tensor_transport=transport).remote(size)

    def counts(self) -> dict[str, dict[str, int]]:
        actors = {"one": self.one, "two": self.two, "loop": self.loop}
        found = {name: ray.get(actor.count.remote()) for name, actor in actors.items()}
        return {"driver": count_here()} | found


Path = Callable[[World, int], Any]


def _through(size: int, transport: str) -> Path:
    def method_to_method(world: World, count: int) -> Any:
        refs = [world.make(size, transport) for _ in range(count)]
        return ray.get([world.two.total.remote(ref) for ref in refs]) == [size] * count

    return method_to_method


def _by_keyword(world: World, count: int) -> Any:
    return ray.get(
        [world.two.total.remote(world.make(SMALL), other=world.make(LARGE)) for _ in range(count)]
    )


def _get(world: World, count: int) -> Any:
    refs = [world.make(LARGE) for _ in range(count)]
    ray.wait(refs, num_returns=count)
    return ray.get([*refs, *refs[:3]])


def _await(world: World, count: int) -> Any:
    async def gather() -> Any:
        return await asyncio.gather(*[world.make(LARGE) for _ in range(count)])

    return asyncio.run(gather())


def _never_taken(world: World, count: int) -> None:
    for _ in range(count):
        world.make(LARGE)


def _lent(world: World, count: int) -> Any:
    refs = [world.make(LARGE) for _ in range(count)]
    return ray.get([world.two.total_of.remote(refs), world.loop.total_of.remote(refs)])


def _to_coroutines(world: World, count: int) -> Any:
    return ray.get([world.loop.total.remote(world.make(LARGE)) for _ in range(count)])


def _two_returns(world: World, count: int) -> Any:
    method = world.one.pair.options(num_returns=2, tensor_transport="auto")
    pairs = [method.remote(LARGE) for _ in range(count // 2 or 1)]
    return ray.get([world.two.total.remote(one, other=other) for one, other in pairs])


def _items(producer: str) -> Path:
    def items(world: World, count: int) -> Any:
        method = items_in_task if producer == "task" else getattr(world, producer).items
        options = {} if producer == "task" else {"num_returns": "streaming"}
        generator = method.options(tensor_transport="auto", **options).remote(count, LARGE)
        taken = [world.two.total.remote(item) for item in generator]
        left = method.options(tensor_transport="auto", **options).remote(3, LARGE)
        next(left)
        return ray.get(taken)

    return items


def _dynamic_items(world: World, count: int) -> Any:
    options = {"num_returns": "dynamic", "tensor_transport": "auto"}
    made = world.one.items.options(**options).remote(count // 2 or 1, LARGE)
    of_task = items_in_task.options(**options).remote(count // 2 or 1, LARGE)
    refs = [ref for generator in ray.get([made, of_task]) for ref in generator]
    return ray.get([world.two.total.remote(ref) for ref in refs])


def _to_tasks(world: World, count: int) -> Any:
    return ray.get([total_in_task.remote(world.make(LARGE)) for _ in range(count)])


def _of_tasks(world: World, count: int) -> Any:
    make = make_in_task.options(tensor_transport="auto")
    return ray.get([world.two.total.remote(make.remote(LARGE)) for _ in range(count)])


def _put_here(world: World, count: int) -> Any:
    puts = [ray.put(torch.ones(LARGE), _tensor_transport="auto") for _ in range(count)]
    return ray.get([world.two.total.remote(ref) for ref in puts])


def _put_there(world: World, count: int) -> Any:
    puts = ray.get([world.one.put.remote(LARGE, "auto") for _ in range(count)])
    return ray.get([world.two.total_of.remote(refs) for refs in puts])


def _put_in_tasks(world: World, count: int) -> Any:
    puts = ray.get([put_in_task.remote(LARGE, "auto") for _ in range(count)])
    return ray.get([world.two.total_of.remote(refs) for refs in puts])


PATHS: dict[str, Path] = {
    "method to method, small": _through(SMALL, "auto"),
    **{f"method to method, {name}": _through(LARGE, name) for name in TRANSPORTS},
    "arguments by keyword": _by_keyword,
    "ray.wait and ray.get": _get,
    "await": _await,
    "unused results": _never_taken,
    "references lent to two": _lent,
    "arguments of coroutines": _to_coroutines,
    "two returns": _two_returns,
    "items of a method": _items("one"),
    "items of coroutines": _items("loop"),
    "items of a task": _items("task"),
    "items of dynamic generators": _dynamic_items,
    "arguments of tasks": _to_tasks,
    "results of tasks": _of_tasks,
    "puts of the driver": _put_here,
    "puts of an actor": _put_there,
    "puts of tasks": _put_in_tasks,
}


def left_behind(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> list[str]:
    """Return as text the counters of a process that have grown."""
    found = []
    for process, counters in after.items():
        for name in (*EXACT, *ROUGH):
            now, then = counters.get(name, 0), before[process].get(name, 0)
            if now > then + ROUGH.get(name, 0):
                found.append(f"{process}: {name} {then} -> {now}")
    return found


def run(world: World, path: Path, objects: int, limit_s: float = 20) -> list[str]:
    """Send objects along a path; return the leaked resources."""
    path(world, 4)  # resources that are created once, for example connections, are no leak
    before = settled(world, None, limit_s)
    for done in range(0, objects, BATCH):
        path(world, min(BATCH, objects - done))
    return left_behind(before, settled(world, before, limit_s))


def settled(
    world: World, before: dict[str, dict[str, int]] | None, limit_s: float
) -> dict[str, dict[str, int]]:
    """Return the counters when they equal ``before``; without it, when they no longer change."""
    deadline = time.monotonic() + limit_s
    counts = world.counts()
    while time.monotonic() < deadline:
        time.sleep(0.05)
        last, counts = counts, world.counts()
        reference = before if before is not None else last
        if not left_behind(reference, counts) and (before is not None or not _in_use(counts)):
            break
    return counts


def _in_use(counts: dict[str, dict[str, int]]) -> bool:
    return any(counters.get(name, 0) for counters in counts.values() for name in EXACT)


def main(objects: int, part: str) -> int:
    """Print a line for each path with ``part`` in its name."""
    failed = 0
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        world = World()
        for name, path in PATHS.items():
            if part not in name:
                continue
            started = time.monotonic()
            left = run(world, path, objects)
            failed += bool(left)
            rate = objects / (time.monotonic() - started)
            print(
                f"{name:<28} {objects} objects, {rate:6.0f}/s: {'; '.join(left) or 'nothing left'}",
                flush=True,
            )
        for process, counters in world.counts().items():
            print(process, {name: counters.get(name, 0) for name in (*EXACT, *ROUGH)})
    return 1 if failed else 0


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    sys.exit(main(int(given.get(1, "10000")), given.get(2, "")))
