"""The memory of this process that its nixl agent may touch, and for how long.

Large storages are registered whole, once, and stay registered until they die: weights that are
sent every step are registered in the first one. Small buffers are registered for one use only, many
in one stretch of memory. Memory that a user registers stays so until they end it.

Never stale. A registration is found by address, but only while its storage lives with the same
extent, which a weak reference to the storage tells: the memory then still is what was registered.
At the peers, each registration of host memory has a number of its own (nixl's "region", where GPU
memory has the device's index), so what they know of one that has ended is never mistaken for
another at the same address. GPU memory cannot be told apart like that: for it the version grows
whenever a registration ends, and peers that know an older version forget all and learn anew.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.transports.nixl_engine import Engine
from ray.experimental.rdt.transports.nixl_plan import KINDS, Spans, cover, spans_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ray.experimental.rdt.transports.nixl_plan import Rows

#: A buffer of at least this many bytes has its whole storage registered, to be found again.
LARGE_NBYTES = 1 << 20

_HOST = KINDS.index("DRAM")


@dataclass(order=True)
class Registration:
    """One storage that is registered whole.

    Attributes:
        row: Its address, bytes and device.
        kind: Its place in ``KINDS``.
        handle: What the engine gave.
        storage: The storage, weakly.
        pins: How often a user has registered it.
        leases: How many leases use it.
        is_kept: Whether it outlives its leases and pins, to be found again.
    """

    row: tuple[int, int, int]
    kind: int = field(compare=False)
    handle: Any = field(compare=False)
    storage: weakref.ref[torch.UntypedStorage] = field(compare=False)
    pins: int = field(default=0, compare=False)
    leases: int = field(default=0, compare=False)
    is_kept: bool = field(default=True, compare=False)

    @property
    def is_valid(self) -> bool:
        """Whether the memory still is what was registered."""
        storage = self.storage()
        return storage is not None and (storage.data_ptr(), storage.nbytes()) == self.row[:2]


@dataclass
class Lease:
    """Registered memory that something uses.

    Attributes:
        spans: The memory, each row with the device that nixl knows it by.
        version: See the module; 0 if no GPU memory is among it.
        registrations: The storages that it uses.
        bundles: What was registered for it alone: kind, rows, handle.
    """

    spans: Spans
    version: int = 0
    registrations: list[Registration] = field(default_factory=list)
    bundles: list[tuple[int, Rows, Any]] = field(default_factory=list)

    def registered(self, kind: int) -> Rows:
        """All that is registered of one kind of memory."""
        import numpy as np

        storages = [r.row for r in self.registrations if r.kind == kind]
        bundles = [rows for of_kind, rows, _ in self.bundles if of_kind == kind]
        return np.concatenate([np.array(storages, np.uint64).reshape(-1, 3), *bundles])


class Registrations:
    """All registrations of one engine. Thread-safe; no call waits for another but in nixl itself.

    Args:
        engine: The process's nixl agent; when it closes, all registrations end with it.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._lock = threading.Lock()
        self._regions = itertools.count(1)
        self._version = 1
        self._found: list[Registration] = []  # can be found; sorted by address
        self._ended: list[Registration] = []  # the storage is gone, leases still use it

    def pin(self, tensor: torch.Tensor) -> None:
        """Registers a tensor's storage until ``unpin`` has been called as often.

        Raises:
            NixlError: nixl cannot register it.
        """
        with self._lock:
            self._sweep()
            known = self._find(tensor) or self._register(tensor)
            known.pins += 1
            known.is_kept = True

    def unpin(self, tensor: torch.Tensor) -> None:
        """Undoes one ``pin``.

        Raises:
            ValueError: there is none to undo.
        """
        with self._lock:
            self._sweep()
            known = self._find(tensor)
            if known is None or not known.pins:
                raise ValueError("this tensor's memory is not registered with nixl")
            known.pins -= 1
            known.is_kept = known.pins > 0
            self._sweep()

    def has_pinned(self, spans: Spans) -> bool:
        """Whether a user has registered any of this memory."""
        with self._lock:
            self._sweep()
            return any(self._found[hit].pins for hit in set(self._match(spans)) if hit >= 0)

    def acquire(self, spans: Spans, buffers: Sequence[torch.Tensor]) -> Lease:
        """Registers the memory of buffers where it is not registered yet.

        Runs on: any thread. The memory must stay until ``release``.

        Args:
            spans: The buffers' memory.
            buffers: The buffers.

        Raises:
            NixlError: nixl cannot register it.
        """
        import numpy as np

        with self._lock:
            self._sweep()
            for index in np.flatnonzero(spans.rows[:, 1] >= LARGE_NBYTES).tolist():
                if self._match(Spans(spans.kinds[[index]], spans.rows[[index]]))[0] < 0:
                    self._register(buffers[index])
            lease = Lease(Spans(spans.kinds, spans.rows.copy()))
            hits = self._match(spans)
            self._lease_storages(lease, hits)
            try:
                self._bundle(lease, (hits < 0) & (spans.rows[:, 1] > 0))
            except Exception:
                self._end(lease)
                raise
            lease.version = self._version if spans.has_device_memory else 0
            return lease

    def release(self, lease: Lease) -> None:
        """Ends a lease. Its storages stay registered while they live, to be found again."""
        with self._lock:
            self._end(lease)
            self._sweep()

    def _match(self, spans: Spans) -> np.ndarray[Any, np.dtype[np.int64]]:
        """For each span the place in ``_found`` of the storage that it lies in, else -1."""
        import numpy as np

        if not self._found:
            return np.full(len(spans.rows), -1)
        known = np.array([registration.row[:2] for registration in self._found], np.uint64)
        kinds = np.array([registration.kind for registration in self._found], np.uint8)
        starts, ends = spans.rows[:, 0], spans.rows[:, 0] + spans.rows[:, 1]
        hits = np.searchsorted(known[:, 0], starts, "right") - 1
        is_inside = (hits >= 0) & (ends <= known[hits].sum(axis=1)) & (kinds[hits] == spans.kinds)
        return np.where(is_inside & (starts < ends), hits, -1)

    def _find(self, tensor: torch.Tensor) -> Registration | None:
        hit = self._match(spans_of([_whole(tensor)]))[0]
        return self._found[hit] if hit >= 0 else None

    def _register(self, tensor: torch.Tensor) -> Registration:
        import numpy as np

        spans = spans_of([_whole(tensor)])
        kind, row = int(spans.kinds[0]), spans.rows[0]
        if kind == _HOST:
            row[2] = next(self._regions)
        handle = self._engine.register(KINDS[kind], row[np.newaxis])
        storage = weakref.ref(tensor.untyped_storage(), self._on_death)
        registration = Registration(tuple(row.tolist()), kind, handle, storage)
        insort(self._found, registration)
        return registration

    def _lease_storages(self, lease: Lease, hits: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        for hit in set(hits.tolist()) - {-1}:
            registration = self._found[hit]
            registration.leases += 1
            lease.registrations.append(registration)
            lease.spans.rows[hits == hit, 2] = registration.row[2]

    def _bundle(self, lease: Lease, is_loose: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Registers for the lease what lies in no registered storage."""
        spans = lease.spans
        for kind, name in enumerate(KINDS):
            is_meant = is_loose & (spans.kinds == kind)
            if not is_meant.any():
                continue
            rows = cover(spans.rows[is_meant], is_host=kind == _HOST)
            if kind == _HOST:
                spans.rows[is_meant, 2] = rows[:, 2] = next(self._regions)
            lease.bundles.append((kind, rows, self._engine.register(name, rows)))

    def _end(self, lease: Lease) -> None:
        for kind, _, handle in lease.bundles:
            self._deregister(kind, handle)
        lease.bundles = []
        for registration in lease.registrations:
            registration.leases -= 1

    def _sweep(self) -> None:
        """Ends registrations whose storage is gone and those that nobody wants any more."""
        found, ended = self._found, self._ended
        self._found, self._ended = [], []
        for registration in (*found, *ended):
            is_used = bool(registration.leases or registration.pins)
            if registration.is_valid and (registration.is_kept or is_used):
                self._found.append(registration)
            elif registration.leases:
                self._ended.append(registration)
            else:
                self._deregister(registration.kind, registration.handle)

    def _deregister(self, kind: int, handle: Any) -> None:
        self._engine.deregister(handle)
        if kind != _HOST:
            self._version += 1

    def _on_death(self, _: Any) -> None:
        """A registered storage dies. Runs on: any thread, even within a call here, which sweeps."""
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage, as flat bytes."""
    import torch

    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage())
