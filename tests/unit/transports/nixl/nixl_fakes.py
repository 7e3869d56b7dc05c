"""A stand-in for nixl's agent: reads are copies within this process, when the test says so."""

from __future__ import annotations

import ctypes
import itertools
import pickle
from typing import Any

import numpy as np

from ray.experimental.rdt.transports.nixl.engine import NixlError
from ray.experimental.rdt.transports.nixl.plan import KINDS, Spans


class Fabric:
    """The network between the engines of one test.

    Attributes:
        looks: How often a read is looked at before it is done; None for never.
        error: What reads fail with, if anything.
    """

    def __init__(self) -> None:
        self.engines: dict[str, FakeEngine] = {}
        self.looks: int | None = 0
        self.error: NixlError | None = None

    def engine(self) -> FakeEngine:
        made = FakeEngine(self, f"engine-{len(self.engines)}")
        self.engines[made.name] = made
        return made


class FakeEngine:
    """See ``NixlEngine``. Reading memory that is not registered any more is an error.

    Attributes:
        registered: By handle: kind and rows.
        known: By peer: what it has described.
        log: Calls of attach and detach, and what was posted.
        refusal: What ``register``, ``describe`` and ``attach`` raise, if anything.
    """

    def __init__(self, fabric: Fabric, name: str):
        self.name = name
        self.reach = "host"
        self.registered: dict[int, tuple[str, Any]] = {}
        self.known: dict[str, list[tuple[str, Any]]] = {}
        self.log: list[tuple[str, Any]] = []
        self.refusal: NixlError | None = None
        self.is_closed = False
        self._fabric = fabric
        self._handles = itertools.count(1)

    def register(self, kind: str, rows: Any) -> int:
        if self.refusal is not None:
            raise self.refusal
        handle = next(self._handles)
        self.registered[handle] = (kind, rows.copy())
        return handle

    def deregister(self, handle: int) -> None:
        del self.registered[handle]

    def describe(self, kind: str, rows: Any) -> bytes:
        if self.refusal is not None:
            raise self.refusal
        return pickle.dumps((self.name, kind, rows))

    def attach(self, metadata: bytes) -> None:
        if self.refusal is not None:
            raise self.refusal
        name, kind, rows = pickle.loads(metadata)
        self.log.append(("attach", name))
        self.known.setdefault(name, []).append((kind, rows))

    def detach(self, name: str) -> None:
        self.log.append(("detach", name))
        self.known.pop(name, None)

    def post(self, batch: Any, name: str) -> FakeRead:
        self.log.append(("post", len(batch.local)))
        self.check(batch.local_kind, batch.local)
        remote = self._fabric.engines[name]
        remote.check(batch.remote_kind, batch.remote)
        missing = [
            row for row in batch.remote if not covered(row, batch.remote_kind, self.known[name])
        ]
        if missing:
            raise NixlError(f"not described: {missing}")
        return FakeRead(self._fabric, batch)

    def check(self, kind: str, rows: Any) -> None:
        """Raise NixlError unless all memory is registered here."""
        missing = [row for row in rows if not covered(row, kind, self.registered.values())]
        if missing:
            raise NixlError(f"not registered at {self.name}: {missing}")

    def close(self) -> None:
        self.is_closed = True


def covered(row: Any, kind: str, regions: Any) -> bool:
    """Tell whether a row lies in one of the regions."""
    start, nbytes, device = row.tolist()
    return any(
        kind == of_kind and device == dev and at <= start and start + nbytes <= at + size
        for of_kind, rows in regions
        for at, size, dev in rows.tolist()
    )


class FakeRead:
    """See ``NixlRead``. Writes nothing once it was released."""

    def __init__(self, fabric: Fabric, batch: Any):
        self._fabric = fabric
        self._batch = batch
        self._seen = 0
        self.is_released = False

    def is_done(self) -> bool:
        assert not self.is_released
        self._seen += 1
        if self._fabric.error is not None:
            raise self._fabric.error
        if self._fabric.looks is None or self._seen <= self._fabric.looks:
            return False
        for here, there in zip(self._batch.local.tolist(), self._batch.remote.tolist()):
            ctypes.memmove(here[0], there[0], here[1])
        return True

    def release(self) -> None:
        self.is_released = True


def host_spans(*spans: tuple[int, int]) -> Spans:
    """Host memory: address and bytes of each span."""
    rows = np.array([(*span, 0) for span in spans], np.uint64).reshape(-1, 3)
    return Spans(np.full(len(spans), KINDS.index("DRAM"), np.uint8), rows)
