"""The memory of this process that is registered with its nixl agent.

Large storages in host memory are registered whole, once, and stay registered until they die:
weights that are sent every step are registered in the first one. Small buffers in host memory are
registered for one use only, many in one stretch of memory. Device memory is registered by segment:
all of the allocation (cudaMalloc) that a buffer lies in, for torch carves many tensors out of one.
Memory that a user registers stays so until they end it.

Never stale. A registration is found by address, but only while a storage in it lives with the same
extent, which a weak reference to the storage tells: torch keeps a segment at least as long. At the
peers, each registration of host memory has a number of its own (nixl's "region", where GPU memory
has the device's index), so what they know of one that has ended is never mistaken for another at
the same address. GPU memory cannot be told apart like that: for it the version grows whenever a
registration ends, and peers that know an older version forget all and learn anew.
"""

from __future__ import annotations

import itertools
import weakref
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.transports.nixl.engine import NixlEngine
from ray.experimental.rdt.transports.nixl.plan import KINDS, Spans, cover, spans_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ray.experimental.rdt.transports.nixl.plan import Rows

#: A buffer of at least this many bytes has its whole storage registered, to be found again.
LARGE_NBYTES = 1 << 20

_HOST = KINDS.index("DRAM")


#: Returns the address and bytes of the device allocation of a tensor, None if not known.
FindSegment = Callable[["torch.Tensor"], "tuple[int, int] | None"]


@dataclass(eq=False)
class Registration:
    """One storage in host memory or one segment of device memory, registered whole.

    Attributes:
        row: Its address, bytes and device.
        kind: Its place in ``KINDS``.
        handle: What the engine gave.
        storages: Storages in it, weakly, and their bytes, by address. It is kept while one lives.
        pins: By address of a tenant, how often a user has registered it.
        leases: How many leases use it.
    """

    row: tuple[int, int, int]
    kind: int
    handle: Any
    storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = field(default_factory=dict)
    pins: dict[int, int] = field(default_factory=dict)
    leases: int = 0

    @property
    def is_valid(self) -> bool:
        """Return whether the registered storages still exist."""
        return any(
            (storage := ref()) is not None
            and (storage.data_ptr(), storage.nbytes()) == (address, nbytes)
            for address, (ref, nbytes) in list(self.storages.items())  # one may die meanwhile
        )

    def has_pinned(self, start: int, end: int) -> bool:
        """Return whether a user has registered the storage that these bytes lie in."""
        return any(
            address in self.pins and address <= start and end <= address + nbytes
            for address, (_, nbytes) in list(self.storages.items())  # one may die meanwhile
        )


@dataclass
class Lease:
    """Registered memory in use.

    Attributes:
        spans: The memory, each row with the device that nixl knows it by.
        version: See the module; 0 if no GPU memory is among it.
        registrations: The storages and segments that it uses.
        bundle: The host memory that was registered for it alone, if any: rows, handle.
    """

    spans: Spans
    version: int = 0
    registrations: list[Registration] = field(default_factory=list)
    bundle: tuple[Rows, Any] | None = None

    def registered(self, kind: int) -> Rows:
        """Return all registered rows of one kind of memory."""
        import numpy as np

        storages = [r.row for r in self.registrations if r.kind == kind]
        rows = np.array(storages, np.uint64).reshape(-1, 3)
        if kind == _HOST and self.bundle is not None:
            return np.concatenate([rows, self.bundle[0]])
        return rows


class Registrations:
    """All registrations of one engine. Thread-safe. They end when the engine closes."""

    def __init__(self, engine: NixlEngine, find_segment: FindSegment):
        self._engine = engine
        self._find_segment = find_segment
        self._lock = threading.Lock()
        self._regions = itertools.count(1)
        self._version = 1
        self._found: list[Registration] = []  # can be found; sorted by address
        self._ended: list[Registration] = []  # the storages are gone, leases still use it

    def pin(self, tensor: torch.Tensor) -> None:
        """Register a tensor's storage until as many calls of ``unpin``. Raises NixlError."""
        with self._lock:
            self._sweep()
            known = self._find(tensor) or self._register(tensor)
            self._add_storage(known, tensor)
            address = tensor.untyped_storage().data_ptr()
            known.pins[address] = known.pins.get(address, 0) + 1

    def unpin(self, tensor: torch.Tensor) -> None:
        """Undo one ``pin``. Raises ValueError if there is none to undo."""
        with self._lock:
            self._sweep()
            known = self._find(tensor)
            address = tensor.untyped_storage().data_ptr()
            if known is None or address not in known.pins:
                raise ValueError("this tensor's memory is not registered with nixl")
            known.pins[address] -= 1
            if not known.pins[address]:
                del known.pins[address], known.storages[address]
                self._sweep()

    def has_pinned(self, spans: Spans) -> bool:
        """Return whether a user has registered any of this memory."""
        with self._lock:
            self._sweep()
            hits = self._match(spans)
            return any(
                self._found[hit].has_pinned(start, start + nbytes)
                for hit, (start, nbytes, _) in zip(hits.tolist(), spans.rows.tolist())
                if hit >= 0 and self._found[hit].pins
            )

    def acquire(self, spans: Spans, buffers: Sequence[torch.Tensor]) -> Lease:
        """Register the memory of buffers where it is not registered yet. Raises NixlError.

        Runs on: any thread. The memory must stay until ``release``.
        """
        import numpy as np

        with self._lock:
            self._sweep()
            is_kept = (spans.rows[:, 1] >= LARGE_NBYTES) | (spans.kinds != _HOST)
            is_kept &= spans.rows[:, 1] > 0
            hits = self._match(spans)
            while (missing := np.flatnonzero(is_kept & (hits < 0))).size:
                self._register(buffers[missing[0]])
                hits = self._match(spans)
            lease = Lease(Spans(spans.kinds, spans.rows.copy()))
            self._lease_registered(lease, hits, buffers)
            try:
                self._bundle(lease, (hits < 0) & (spans.rows[:, 1] > 0))
            except Exception:  # whatever failed: the registrations must not stay leased
                self._end(lease)
                raise
            lease.version = self._version if spans.has_device_memory else 0
            return lease

    def release(self, lease: Lease) -> None:
        """End a lease. Storages that are registered whole stay registered while they exist."""
        with self._lock:
            self._end(lease)
            self._sweep()

    def _match(self, spans: Spans) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return for each span the index in ``_found`` of its registration, -1 if there is none."""
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
        """Register all of a storage in host memory, or the segment of one in device memory."""
        import numpy as np

        spans = spans_of([_whole(tensor)])
        kind, row = int(spans.kinds[0]), spans.rows[0]
        if kind == _HOST:
            row[2] = next(self._regions)
        else:
            row[:2] = _around(row[:2].tolist(), self._find_segment(tensor))
        known = kind, tuple(row.tolist())
        kept = [each for each in self._ended if (each.kind, each.row) == known]
        if kept:  # by a lease
            registration = kept[0]
            self._ended.remove(registration)
        else:
            handle = self._engine.register(KINDS[kind], row[np.newaxis])
            registration = Registration(tuple(row.tolist()), kind, handle)
        self._add_storage(registration, tensor)
        insort(self._found, registration, key=lambda each: each.row)
        return registration

    def _add_storage(self, registration: Registration, tensor: torch.Tensor) -> None:
        """Keep a registration while a tensor's storage lives."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        known = registration.storages.get(address)
        if known is not None and known[0]() is storage and known[1] == storage.nbytes():
            return

        def on_death(dead: Any) -> None:
            """Runs on: any thread, even within a call of ``Registrations``, which then sweeps."""
            current = registration.storages.get(address)
            if current is not None and current[0] is dead:
                del registration.storages[address]
                registration.pins.pop(address, None)
            if not registration.storages:
                self._sweep_if_free()

        registration.storages[address] = weakref.ref(storage, on_death), storage.nbytes()

    def _lease_registered(
        self,
        lease: Lease,
        hits: np.ndarray[Any, np.dtype[np.int64]],
        buffers: Sequence[torch.Tensor],
    ) -> None:
        import numpy as np

        for hit, first in zip(*(found.tolist() for found in np.unique(hits, return_index=True))):
            if hit < 0:
                continue
            registration = self._found[hit]
            # One storage is enough: others only make the registration last longer.
            self._add_storage(registration, buffers[first])
            registration.leases += 1
            lease.registrations.append(registration)
            lease.spans.rows[hits == hit, 2] = registration.row[2]
            if registration.kind != _HOST:
                lease.spans.starts.append(registration.row[0])

    def _bundle(self, lease: Lease, is_loose: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Register small buffers in host memory for the lease."""
        if not is_loose.any():
            return
        rows = cover(lease.spans.rows[is_loose])
        lease.spans.rows[is_loose, 2] = rows[:, 2] = next(self._regions)
        lease.bundle = rows, self._engine.register(KINDS[_HOST], rows)

    def _end(self, lease: Lease) -> None:
        if lease.bundle is not None:
            self._deregister(_HOST, lease.bundle[1])
        lease.bundle = None
        for registration in lease.registrations:
            registration.leases -= 1

    def _sweep(self) -> None:
        """End registrations whose storages are gone."""
        found, ended = self._found, self._ended
        self._found, self._ended = [], []
        for registration in (*found, *ended):
            if registration.is_valid:
                self._found.append(registration)
            elif registration.leases:
                self._ended.append(registration)
            else:
                self._deregister(registration.kind, registration.handle)

    def _deregister(self, kind: int, handle: Any) -> None:
        self._engine.deregister(handle)
        if kind != _HOST:
            self._version += 1

    def _sweep_if_free(self) -> None:
        """Runs on: any thread. If another call holds the lock, that call or the next one sweeps."""
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's whole storage as flat bytes."""
    import torch

    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage())


def _around(extent: Sequence[int], segment: tuple[int, int] | None) -> Sequence[int]:
    """Return the segment if it contains the whole storage, else the storage.

    A storage in expandable segments may lie in several allocations.
    """
    if segment is None:
        return extent
    (start, nbytes), (first, size) = extent, segment
    return segment if first <= start and start + nbytes <= first + size else extent
