"""The processes that tests send tensors between. What they do is up to each test."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

import ray
from tests.integration import fake_transport

#: The fakes, which every process that holds a peer knows.
FAKES = (fake_transport.FakeOneSided, fake_transport.FakeTwoSided)

#: Small enough to ride along in the value, and too large for that (1 MiB).
SMALL, LARGE = 16, 1 << 18

#: The lanes between two processes.
LANES = ("map", "cma", "shm", "tcp")

#: The setting with which large objects use a lane. What cannot be mapped needs another lane, and
#: with cma an object is mapped only if several consumers pull it.
LANE_SETTINGS = {lane: lane for lane in LANES} | {"map": "map,shm"}


@ray.remote(num_cpus=0)
class Peer:
    """Runs what a test gives it; ``action`` gets the peer itself first.

    Attributes:
        kept: What the test wants to find again.
        gate: Closed until the test opens it.
    """

    def __init__(self, **kept: Any):
        self.kept: dict[str, Any] = kept
        self.gate = threading.Event()

    @ray.method(tensor_transport="auto")
    def make(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result is an RDT object."""
        return action(self, *args, **kwargs)

    def run(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result is a plain object."""
        return action(self, *args, **kwargs)

    def pid(self) -> int:
        return os.getpid()

    def stats(self) -> dict[str, int]:
        """After what failed calls left in cycles, references among it, has been collected."""
        gc.collect()
        return ray.experimental.rdt.stats()

    def open(self) -> None:
        self.gate.set()


def ones(peer: Peer, count: int = LARGE) -> torch.Tensor:
    return torch.ones(count)


def count_up(peer: Peer, count: int = LARGE) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)


def total(peer: Peer, *tensors: torch.Tensor) -> float:
    return sum(float(tensor.double().sum()) for tensor in tensors)


def total_of_refs(peer: Peer, refs: Any) -> float:
    """``refs`` in a list, so that the peer gets the references and not their values."""
    return total(peer, *ray.get(refs))


def pulls(actor: Any) -> dict[str, int]:
    """What the actor has pulled, by lane."""
    counters = ray.get(actor.stats.remote())
    return {lane: counters.get(f"pulls_{lane}", 0) for lane in LANES}
