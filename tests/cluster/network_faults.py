"""What happens to the cable between two test hosts while tensors cross it. Runs in the first host.

Frames to a wrong hardware address are lost without a word, as in a switch that fails; a token
bucket delays frames, and loses them; ``ss -K`` resets connections.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from tests.chaos.faults import agent_port, fetch, numbers, wait_idle, wait_pinned

_NOWHERE = "02:00:00:00:00:01"
_LENGTH = 1 << 27  # of int32: 512 MiB


class Cable:
    """The cable, as the first host sees it.

    Args:
        device: The first host's end.
        other: The second host's namespace.
        other_device: Its end.
    """

    def __init__(self, device: str, other: str, other_device: str):
        self._ends = [([], device, "198.18.77.2"), (_inside(other), other_device, "198.18.77.1")]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Whatever is sent is lost, and nobody is told."""
        for inside, device, ip in self._ends:
            _run(*inside, "ip", "neigh", "replace", ip, "lladdr", _NOWHERE, "dev", device)
        try:
            yield
        finally:
            for inside, device, ip in self._ends:
                _run(*inside, "ip", "neigh", "del", ip, "dev", device)

    def congest(self, for_s: float) -> int:
        """Frames come up to 20 ms late, and what is more than 400 Mbit/s is lost. Says how many."""
        limits = ["tbf", "rate", "400mbit", "burst", "64kb", "latency", "20ms"]
        for inside, device, _ in self._ends:
            _run(*inside, "tc", "qdisc", "add", "dev", device, "root", *limits)
        time.sleep(for_s)
        lost = 0
        for inside, device, _ in self._ends:
            (seen,) = json.loads(_run(*inside, "tc", "-s", "-j", "qdisc", "show", "dev", device))
            lost += int(seen["drops"])
            _run(*inside, "tc", "qdisc", "del", "dev", device, "root")
        return lost

    def reset(self, port: int, *, only_there: bool = False) -> int:
        """Resets the connections to a port of the second host. Says how many."""
        count = 0
        for inside, _, ip in self._ends[only_there:]:
            side = "dport" if ip == "198.18.77.2" else "sport"
            killed = _run(*inside, "ss", "-HKtn", f"{side} = :{port}")
            count += len(killed.splitlines())
        return count


def _inside(host: str) -> list[str]:
    return ["ip", "netns", "exec", host]


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def fetch_often(peer: Any, refs: list[Any]) -> str:
    """Long enough for a fault to fall into a pull."""
    return "; ".join(sorted({fetch(peer, refs) for _ in range(4)}))


def report(cable: Cable, here: Any, there: Any) -> dict[str, Any]:
    """What two actors and this owner see of each fault."""
    wait_idle(there)
    port = ray.get(there.run.remote(agent_port))
    refs = [there.make.remote(lambda peer: numbers(peer, _LENGTH))]
    ray.wait(refs, fetch_local=False)

    def during_a_pull(fault: Callable[[], Any]) -> dict[str, Any]:
        began = time.monotonic()
        waiting = here.run.remote(fetch_often, refs)
        wait_pinned(there)
        happened = fault()
        got = ray.get(waiting, timeout=60)
        return {"got": got, "after_s": time.monotonic() - began, "happened": happened}

    def stall() -> None:
        with cable.silent():
            time.sleep(2)

    def half_open() -> int:
        with cable.silent():
            count = cable.reset(port, only_there=True)
            time.sleep(1)
        return count

    seen = {
        "nothing": during_a_pull(lambda: None),
        "reset": during_a_pull(lambda: cable.reset(port)),
        "stalled": during_a_pull(stall),
        "congested": during_a_pull(lambda: cable.congest(1)),
        "half_open": during_a_pull(half_open),
    }
    with cable.silent():
        refs.clear()
        time.sleep(1)
    began = time.monotonic()
    ray.get(here.stats.remote())  # Collects what a failed fetch left in cycles.
    wait_idle(there)
    seen["freed"] = {"after_s": time.monotonic() - began}
    return seen
