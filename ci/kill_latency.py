"""Measure how soon a consumer knows that its producer was killed: median and worst case.

    .venv/bin/python ci/kill_latency.py [TRIES]

In each try, a consumer waits in ``ray.get`` for an object whose producer is stopped. Then the
producer gets SIGKILL. In every second try, the agents of both are already connected. The clock is
CLOCK_MONOTONIC, which all processes of a host share.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ray

ELEMENTS = 1 << 20


class Process:
    """The producer of each try, and the consumer of all."""

    @ray.method(tensor_transport="auto")
    def make(self) -> Any:
        import torch

        return torch.ones(ELEMENTS)

    def pid(self) -> int:
        return os.getpid()

    def total(self, tensor: Any) -> float:
        return float(tensor.sum())

    def fetch(self, refs: list[Any]) -> float:
        """Return the time at which the fetch raised the error for a dead producer."""
        try:
            ray.get(refs[0])
        except ray.exceptions.ActorDiedError:
            return time.monotonic()
        raise AssertionError("the object arrived")


_Process: Any = ray.remote(num_cpus=0)(Process)


def stop(pid: int) -> None:
    """Return once all threads of the process have stopped."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while any(
        file.read_text().rpartition(")")[2].split()[0] != "T"
        for file in Path(f"/proc/{pid}/task").glob("*/stat")
    ):
        assert time.monotonic() < deadline, f"{pid} does not stop"


def one_try(consumer: Any, is_connected: bool) -> float:
    """Seconds from the kill to the error."""
    producer = _Process.remote()
    pid = ray.get(producer.pid.remote())
    ref, other = producer.make.remote(), producer.make.remote()
    ray.wait([ref, other], num_returns=2, fetch_local=False)
    if is_connected:
        ray.get(consumer.total.remote(other))
    stop(pid)
    waiting = consumer.fetch.remote([ref])
    ray.wait([waiting], timeout=0.3)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return float(ray.get(waiting)) - killed


def main(tries: int) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    consumer = _Process.remote()
    one_try(consumer, True)  # starts its process and its imports
    taken = [one_try(consumer, number % 2 == 1) for number in range(tries)]
    for name, some in (("new peer", taken[::2]), ("known peer", taken[1::2]), ("all", taken)):
        print(f"{name}: median {statistics.median(some):.3f} s, worst {max(some):.3f} s")
    print(f"{tries} tries, load {Path('/proc/loadavg').read_text().split()[0]}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
