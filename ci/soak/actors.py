"""The actors of the soak and their methods."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import ray
from ci.leaks import count_here

#: Objects of different seeds differ.
STRIDE = 7919


def pattern(seed: int, length: int) -> torch.Tensor:
    """Return the value of an object of this seed and length; its last element is the length."""
    numbers = torch.arange(length, dtype=torch.int32).mul_(65537).add_(seed * STRIDE % (1 << 30))
    numbers[-1] ^= length
    return numbers


def is_right(tensor: torch.Tensor, seed: int) -> bool:
    """Return whether it equals, to the last bit, the value of this seed."""
    return torch.equal(tensor, pattern(seed, len(tensor)))


def counters_here() -> dict[str, int]:
    """Return this process's RDT counters, descriptors, threads, and memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return count_here() | {
        "threads": threading.active_count(),
        "native_threads": len(os.listdir("/proc/self/task")),
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
    }


def break_connections_here() -> int:
    """Shut down this process's sockets to other agents; return their number."""
    broken = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                peer = one.getpeername()
                if isinstance(peer, bytes) and peer.startswith(b"\0ray-rdt-"):
                    one.shutdown(socket.SHUT_RDWR)
                    broken += 1
    return broken


@ray.remote(num_cpus=0, max_concurrency=8, max_restarts=-1)
class Worker:
    """A producer, consumer, owner and borrower."""

    def make(self, seed: int, length: int) -> torch.Tensor:
        return pattern(seed, length)

    def items(self, seed: int, length: int, count: int) -> Iterator[torch.Tensor]:
        for number in range(count):
            yield pattern(seed + number, length)

    def check(self, seed: int, tensor: torch.Tensor, *, other: torch.Tensor | None = None) -> bool:
        """Return the tensor, and one with the next seed."""
        return is_right(tensor, seed) and (other is None or is_right(other, seed + 1))

    def check_refs(self, seed: int, refs: list[Any]) -> bool:
        """Fetch objects with this seed and the following ones, by reference."""
        return all(is_right(tensor, seed + at) for at, tensor in enumerate(ray.get(refs)))

    def pass_on(self, seed: int, refs: list[Any], consumer: Any) -> bool:
        """Pass the references on and check them at another consumer."""
        return bool(ray.get(consumer.check_refs.remote(seed, refs)))

    def put(self, seed: int, length: int, transport: str) -> list[Any]:
        return [ray.put(pattern(seed, length), _tensor_transport=transport)]

    def own(self, producer: Any, seed: int, length: int, transport: str) -> list[Any]:
        """Return a reference, owned by this process, to another actor's object."""
        return [producer.make.options(tensor_transport=transport).remote(seed, length)]

    def break_connections(self) -> int:
        return break_connections_here()

    @ray.method(max_task_retries=-1)
    def pid(self) -> int:
        return os.getpid()

    @ray.method(max_task_retries=-1)
    def counters(self) -> dict[str, int]:
        return counters_here()


@ray.remote(max_retries=3)
def make_in_task(seed: int, length: int, dies_once: str = "") -> torch.Tensor:
    """Kill the own process the first time, if a file name is given."""
    if dies_once and not Path(dies_once).exists():
        Path(dies_once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return pattern(seed, length)


@ray.remote(max_retries=3)
def check_in_task(seed: int, tensor: torch.Tensor) -> bool:
    return is_right(tensor, seed)
