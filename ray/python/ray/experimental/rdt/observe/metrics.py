"""RDT's memory in Ray's metrics: ``ray_rdt_stored_bytes`` and three more, for each process.

The reaper thread sets them, so a process that does not use RDT does not import or set them. Ray
adds the tags that identify the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.experimental.rdt.rpc.session import Session

_EVERY_S = 2.0

#: By name in ``stats``. Ray adds the prefix "ray_" to the name of a metric.
_DESCRIPTIONS = {
    "stored_bytes": "Host memory of the RDT objects that this process stores.",
    "pinned_bytes": "Memory of RDT objects that other processes are reading.",
    "pooled_bytes": "The receive pool of RDT: received tensors and free memory.",
    "hinted_bytes": "RDT objects that were prefetched and not fetched yet.",
}


def _gauge(name: str, description: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description)


class Gauges:
    """The gauges of one process.

    Args:
        read: Returns the numbers by name.
        make: Creates a gauge from a name and a description.
    """

    def __init__(
        self,
        session: Session,
        read: Callable[[], dict[str, int]],
        make: Callable[[str, str], Any] = _gauge,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._read = read
        self._make = make
        self._clock = clock
        self._last = clock()
        self._gauges: dict[str, Any] = {}
        session.on_tick(self._on_tick)

    def _on_tick(self) -> None:
        """Runs on: the reaper thread, after every batch of events and every two seconds."""
        now = self._clock()
        if now - self._last < _EVERY_S:
            return
        self._last = now
        numbers = self._read()
        for name, description in _DESCRIPTIONS.items():
            if name not in self._gauges:
                self._gauges[name] = self._make(f"rdt_{name}", description)
            self._gauges[name].set(numbers.get(name, 0))
