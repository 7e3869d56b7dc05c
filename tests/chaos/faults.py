"""Faults, and what a test sees of them. What has a ``peer`` argument runs in an actor."""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from ray.exceptions import RayError

import ray
from ray.experimental.rdt.api import current_manager
from tests.integration.peers import LARGE, Peer, ones, total_of_refs
from tests.support import BUSY_S, KNOWN_WITHIN_S, wait_until

#: So much later than the bound a busy machine may know of a death.
LATEST_S = KNOWN_WITHIN_S + BUSY_S

#: Enough that a pull takes a while (256 MiB).
LONG = 1 << 26

#: The bound for an owner's end, on a busy machine.
FREED_WITHIN_S = 10 + BUSY_S

_IN_USE = ("stored_objects", "regions", "pinned")


def assert_exchange(actors: Sequence[Any]) -> None:
    """Each sends to each."""
    pairs = [(one, two) for one in actors for two in actors if one is not two]
    sums = [two.run.remote(total_of_refs, [one.make.remote(ones)]) for one, two in pairs]
    assert ray.get(sums, timeout=60) == [LARGE] * len(pairs)


def pid_of(actor: Any) -> int:
    return int(ray.get(actor.pid.remote(), timeout=60))


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def stat(actor: Any, name: str) -> int:
    return int(ray.get(actor.stats.remote(), timeout=60).get(name, 0))


def wait_pinned(producer: Any) -> None:
    """Until somebody reads from the producer."""
    asks = producer.run.remote

    def is_pinned() -> bool:
        return bool(
            ray.get(asks(lambda _: ray.experimental.rdt.stats().get("pinned", 0)), timeout=60)
        )

    wait_until(is_pinned, "a pull is under way")


def wait_idle(producer: Any, limit_s: float = FREED_WITHIN_S, kept: int = 0) -> None:
    """Until the producer holds nothing, or no more than ``kept`` objects."""

    def assert_idle() -> None:
        gc.collect()  # Errors and the frames that they name hold references in cycles.
        counters = ray.get(producer.stats.remote())
        expected = {"stored_objects": kept, "regions": kept, "pinned": 0}
        assert {name: counters[name] for name in _IN_USE} == expected

    wait_until(assert_idle, "at the producer:", limit_s)


@contextmanager
def at_most(limit_s: float, what: str) -> Iterator[None]:
    """Fails if it takes longer; prints how long it took (``pytest -rP``)."""
    began = time.monotonic()
    yield
    took_s = time.monotonic() - began
    print(f"{what}: {took_s:.2f} s")
    assert took_s < limit_s, what


def fetch(peer: Peer, refs: list[Any]) -> str:
    """Whether what came is "right" or "wrong", or the error that came instead."""
    try:
        got = ray.get(refs[0])
    except RayError as error:
        return type(error).__name__
    return "right" if torch.equal(got, numbers(peer, len(got))) else "wrong"


def numbers(peer: Peer, length: int = LONG) -> torch.Tensor:
    return torch.arange(length, dtype=torch.int32)


def agent_port(peer: Peer) -> int:
    """Where this process's agent listens: the last field of its address."""
    return int.from_bytes(current_manager().explainer().address[-2:], "little")


def cut_while_pulling(peer: Peer, port: int, times: int) -> int:
    """Breaks this process's connections to agents, again and again while it pulls.

    Args:
        peer: The actor.
        port: Of the producer's agent, for data connections.
        times: How often at most.

    Returns:
        How many connections it broke.
    """
    wait_until(is_pulling, "a pull is under way")
    broken = 0
    for _ in range(times):
        time.sleep(0.03)
        if is_pulling():
            broken += sum(map(_break, _connections(port)))
    return broken


def cut_control(peer: Peer) -> int:
    """Breaks the connections that this process has made to agents of its host; how many."""
    return sum(map(_break, _connections(0)))


def is_pulling() -> bool:
    return ray.experimental.rdt.stats().get("pulls_live", 0) > 0


def _connections(port: int) -> list[int]:
    """The descriptors of this process's connections to agents."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            peer = one.getpeername()
            is_control = isinstance(peer, bytes) and peer.startswith(b"\0ray-rdt-")
            is_data = isinstance(peer, tuple) and peer[1] == port
            if is_control or is_data:
                found.append(int(name))
    return found


def _break(descriptor: int) -> bool:
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as one:
        one.shutdown(socket.SHUT_RDWR)
        return True
    return False
