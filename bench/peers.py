"""The actors of the scenarios; the same program for stock Ray and for this wheel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import time
from collections.abc import Awaitable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import ray
from ray.experimental import register_nixl_memory, set_target_for_ref

Value = torch.Tensor | list[torch.Tensor] | dict[str, torch.Tensor]

MANY_TENSORS, MANY_NBYTES = 10_000, 20_000
STATE_DICT_NBYTES = 90_852_864


def make_value(kind: str, nbytes: int) -> Value:
    """Create a value to transfer, with every page written.

    Args:
        kind: "tensor" (one of nbytes), "many" (10,000 of 20 KB) or "state_dict" (the demo's
            103 tensors).
        nbytes: The size of "tensor".
    """
    if kind == "many":
        return [torch.ones(MANY_NBYTES // 4) for _ in range(MANY_TENSORS)]
    if kind == "state_dict":
        return {name: torch.ones(shape) for name, shape in state_dict_shapes().items()}
    return torch.ones(nbytes // 4)


def state_dict_shapes() -> dict[str, tuple[int, ...]]:
    """Return the parameters of the demo's sentence encoder: 103 shapes, 90.9 MB as float32."""
    width, inner, layers = 384, 1536, 6
    sizes = {"word": 30522, "position": 512, "token_type": 2}
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}": (rows, width) for name, rows in sizes.items()
    }
    shapes |= _norm("embeddings", width)
    for layer in range(layers):
        prefix = f"layer.{layer}"
        for part in ("query", "key", "value", "attention"):
            shapes |= _dense(f"{prefix}.{part}", width, width)
        shapes |= _dense(f"{prefix}.intermediate", inner, width)
        shapes |= _dense(f"{prefix}.output", width, inner)
        shapes |= _norm(f"{prefix}.attention", width) | _norm(f"{prefix}.output", width)
    return shapes | _dense("pooler", width, width)


def _dense(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.norm.weight": (width,), f"{name}.norm.bias": (width,)}


def first_element(value: Value) -> float:
    """Touch one element of a received value."""
    return float(next(iter(tensors_of(value))).view(-1)[0])


def tensors_of(value: Value) -> Iterable[torch.Tensor]:
    """Return the tensors of a value."""
    if isinstance(value, torch.Tensor):
        return [value]
    return value.values() if isinstance(value, dict) else value


def process_memory(field: str) -> int:
    """Return bytes of this process from a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) << 10


def proportional_memory(root: int) -> int:
    """Return the bytes of a process and its descendants; shared pages count once (PSS)."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            parents[int(entry.parent.name)] = int(fields[1])
    family = {root}
    while added := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= added
    total = 0
    for pid in family:
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss:\s+(\d+) kB", smaps_rollup(pid), re.MULTILINE)
            total += int(found[1]) << 10 if found else 0
    return total


def smaps_rollup(pid: int) -> str:
    """Return the kernel's summary of a process's memory."""
    return Path(f"/proc/{pid}/smaps_rollup").read_text()


class Peer:
    """Actor that creates values and uses those of others; peer_class adds the transport of make."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Value] = {}
        self._spins = threading.Event()
        self._target = torch.empty(0)
        self._held: Value = []

    def prepare(self, kind: str, nbytes: int) -> int:
        """Create a new value in advance; return this process's id."""
        self._kept[kind, nbytes] = make_value(kind, nbytes)
        return os.getpid()

    def kept(self, kind: str, nbytes: int) -> Value:
        """Return the prepared value."""
        return self._kept[kind, nbytes]

    def stream(self, kind: str, nbytes: int, count: int) -> Iterator[Value]:
        """Yield the prepared value a number of times."""
        for _ in range(count):
            yield self._kept[kind, nbytes]

    def use(self, value: Value) -> float:
        """Touch one element and drop the rest."""
        return first_element(value)

    def total(self, value: Value) -> float:
        """Read every element and drop the value."""
        return sum(float(tensor.sum()) for tensor in tensors_of(value))

    def hold(self, value: Value) -> float:
        """Read every element and keep the value until the next call."""
        self._held = value
        return self.total(value)

    def spin(self) -> int:
        """Count in pure Python until stop_spinning."""
        self._spins.set()
        count = 0
        while self._spins.is_set():
            count += 1
        return count

    def is_spinning(self) -> bool:
        """Return whether spin has begun."""
        return self._spins.is_set()

    def stop_spinning(self) -> None:
        """End spin."""
        self._spins.clear()

    def reset_peak(self) -> int:
        """Reset the memory peak; return the memory in use."""
        Path("/proc/self/clear_refs").write_text("5")
        return process_memory("VmRSS")

    def peak(self) -> int:
        """Return the memory peak since reset_peak."""
        return process_memory("VmHWM")

    def register_target(self, nbytes: int) -> None:
        """Create the tensor that pull_into fills, and register it with NIXL."""
        self._target = torch.ones(nbytes // 4)
        register_nixl_memory(self._target)

    def pull_into(self, refs: list[ray.ObjectRef]) -> float:
        """Fetch a tensor into the registered one."""
        set_target_for_ref(refs[0], [self._target])
        return first_element(ray.get(refs[0]))


class Waiter:
    """Async actor that awaits many tensors and measures the longest pause of its event loop."""

    async def one_by_one(self, refs: list[ray.ObjectRef]) -> list[float]:
        """Await sequentially; return the seconds and the loop's longest pause."""
        return await self._timed(self._await_each(refs))

    async def all_at_once(self, refs: list[ray.ObjectRef]) -> list[float]:
        """Await concurrently; return the same."""
        return await self._timed(asyncio.gather(*refs))

    async def _await_each(self, refs: list[ray.ObjectRef]) -> None:
        for ref in refs:
            await ref

    async def _timed(self, waiting: Awaitable[Any]) -> list[float]:
        watch = asyncio.ensure_future(self._longest_standstill())
        start = time.perf_counter()
        await waiting
        elapsed = time.perf_counter() - start
        watch.cancel()
        return [elapsed, await watch]

    async def _longest_standstill(self) -> float:
        longest, last = 0.0, time.perf_counter()
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
        return longest


def peer_class(transport: str | None, threads: int = 1) -> Any:
    """Create the actor class whose make() and create() return over a transport.

    Args:
        transport: The transport, or None for plain Ray objects.
        threads: Number of methods that may run at once.
    """
    returns = ray.method(num_returns=1)
    options: dict[str, object] = {"num_cpus": 0}
    if transport is not None:
        returns = ray.method(tensor_transport=transport)
        options["enable_tensor_transport"] = True
    if threads > 1:
        options["max_concurrency"] = threads

    class Maker(Peer):
        @returns
        def make(self, kind: str, nbytes: int) -> Value:
            return self.kept(kind, nbytes)

        @returns
        def create(self, kind: str, nbytes: int) -> Value:
            return make_value(kind, nbytes)

    return ray.remote(**options)(Maker)
