"""The bytes of one nixl transfer: pure functions over arrays of spans, no nixl and no torch.

An object may have ten thousand small buffers, so spans are numpy arrays (nixl needs numpy and takes
such arrays as they are) and nothing here loops over them in Python.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    #: n x 3 of uint64: address, bytes, device.
    Rows = np.ndarray[Any, np.dtype[np.uint64]]

#: nixl's names of the kinds of memory, by our number for each.
KINDS = ("DRAM", "VRAM")

_PAGE_NBYTES = 4096


@dataclass(frozen=True)
class Spans:
    """The memory of an object's buffers, in order; an empty buffer has a row too.

    Attributes:
        kinds: For each its place in ``KINDS``, as uint8.
        rows: For each its address, bytes and device. The device of GPU memory is its index; that of
            host memory names the registration it lies in (nixl's "region"), 0 for none yet.
        starts: Where registered GPU memory begins. nixl reads no span that lies in two
            registrations, and those of neighbouring segments look like one.
    """

    kinds: np.ndarray[Any, np.dtype[np.uint8]]
    rows: Rows
    starts: array[int] = field(default_factory=lambda: array("Q"))

    @property
    def nbytes(self) -> int:
        return int(self.rows[:, 1].sum())

    @property
    def has_device_memory(self) -> bool:
        return bool(self.kinds.any())

    @property
    def filled_kinds(self) -> set[int]:
        """The kinds of memory that have bytes."""
        return set(self.kinds[self.rows[:, 1] > 0].tolist())

    def encode(self) -> dict[str, bytes]:
        """Return the spans for another process."""
        return {
            "kinds": self.kinds.tobytes(),
            "rows": self.rows.tobytes(),
            "starts": self.starts.tobytes(),
        }

    @classmethod
    def decode(cls, encoded: dict[str, Any]) -> Spans:
        """Return the spans that ``encode`` described. Raises ValueError if malformed."""
        import numpy as np

        kinds = np.frombuffer(encoded["kinds"], np.uint8)
        rows = np.frombuffer(encoded["rows"], np.uint64).reshape(-1, 3)
        if len(kinds) != len(rows) or (kinds >= len(KINDS)).any():
            raise ValueError("a peer's description of its memory is malformed")
        return cls(kinds, rows, array("Q", encoded["starts"]))


def spans_of(buffers: Sequence[torch.Tensor]) -> Spans:
    """Return the memory of flat uint8 tensors."""
    import numpy as np

    count = len(buffers)
    kinds = np.fromiter((not buffer.is_cpu for buffer in buffers), np.uint8, count)
    rows = np.zeros((count, 3), np.uint64)
    rows[:, 0] = np.fromiter((buffer.data_ptr() for buffer in buffers), np.uint64, count)
    rows[:, 1] = np.fromiter((buffer.numel() for buffer in buffers), np.uint64, count)
    for index in np.flatnonzero(kinds).tolist():
        rows[index, 2] = buffers[index].get_device()
    return Spans(kinds, rows)


def cover(rows: Rows) -> Rows:
    """Return the fewest stretches of host memory that contain all non-empty ``rows``.

    Spans on the same page or on neighbouring ones are one stretch: every page of it then holds
    bytes of the object, so it stays mapped as long as the object lives. Ten thousand small tensors
    give some tens of stretches.
    """
    import numpy as np

    rows = rows[rows[:, 1] > 0]
    if not len(rows):
        return rows
    rows = rows[np.argsort(rows[:, 0])]
    ends = np.maximum.accumulate(rows[:, 0] + rows[:, 1])
    last_pages = (ends[:-1] - np.uint64(1)) // _PAGE_NBYTES
    is_near = rows[1:, 0] // _PAGE_NBYTES <= last_pages + np.uint64(1)
    first = np.flatnonzero(np.r_[True, ~is_near])
    last = np.r_[first[1:], len(rows)] - 1
    covering = rows[first]
    covering[:, 1] = ends[last] - covering[:, 0]
    return covering


@dataclass(frozen=True)
class Batch:
    """One nixl request: what to read into ``local`` from ``remote``, row by row."""

    local_kind: str
    remote_kind: str
    local: Rows
    remote: Rows


def plan(
    local: Spans,
    remote: Spans,
    host_nbytes: int,
    device_nbytes: int,
    batch_rows: int,
) -> Iterator[Batch]:
    """Cut a read into requests.

    Neighbours on both sides become one span, large spans are cut. Host memory of one host is copied
    by the call that posts the request, which holds nixl's lock meanwhile, so such requests are
    small. Those for device memory run on their own and are large: a GPU copies 16 MiB in less time
    than a request costs here. A read can be aborted between two requests.

    Args:
        local: Where the bytes go.
        remote: Where they are.
        host_nbytes: What one request may carry between host memory.
        device_nbytes: The same where either side is in device memory.
        batch_rows: How many spans a request may have.

    Raises:
        ValueError: ``local`` and ``remote`` do not match one to one.
    """
    import numpy as np

    if len(local.rows) != len(remote.rows):
        raise ValueError(
            f"the peer exposes {len(remote.rows)} buffers, {len(local.rows)} are given"
        )
    uneven = np.flatnonzero(local.rows[:, 1] != remote.rows[:, 1])
    if len(uneven):
        index = uneven[0]
        raise ValueError(
            f"buffer {index} has {local.rows[index, 1]} bytes, the peer's has "
            f"{remote.rows[index, 1]}"
        )
    for local_kind in range(len(KINDS)):
        for remote_kind in range(len(KINDS)):
            is_meant = (local.kinds == local_kind) & (remote.kinds == remote_kind)
            is_meant &= local.rows[:, 1] > 0
            batch_nbytes = device_nbytes if local_kind or remote_kind else host_nbytes
            joined = _join(
                (local.rows[is_meant], local.starts), (remote.rows[is_meant], remote.starts)
            )
            pair = _cut(*joined, batch_nbytes)
            for here, there in _batches(*pair, batch_nbytes, batch_rows):
                yield Batch(KINDS[local_kind], KINDS[remote_kind], here, there)


def _join(*sides: tuple[Rows, array[int]]) -> tuple[Rows, Rows]:
    """Make one span of spans that follow each other on both sides, within one registration.

    Args:
        sides: The rows of each, and ``Spans.starts``.
    """
    import numpy as np

    (local, _), (remote, _) = sides
    if not len(local):
        return local, remote
    follows = np.ones(len(local) - 1, bool)
    for rows, starts in sides:
        follows &= rows[:-1, 0] + rows[:-1, 1] == rows[1:, 0]
        follows &= rows[:-1, 2] == rows[1:, 2]
        follows &= ~np.isin(rows[1:, 0], np.array(starts, np.uint64))
    first = np.flatnonzero(np.r_[True, ~follows])
    lengths = np.add.reduceat(local[:, 1], first)
    joined = local[first], remote[first]
    for rows in joined:
        rows[:, 1] = lengths
    return joined


def _cut(local: Rows, remote: Rows, limit: int) -> tuple[Rows, Rows]:
    """Cut spans of more than ``limit`` bytes."""
    import numpy as np

    pieces = -(-local[:, 1].astype(np.int64) // limit)
    source = np.repeat(np.arange(len(local)), pieces)
    before = np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = ((np.arange(len(source)) - before) * limit).astype(np.uint64)
    cut = local[source], remote[source]
    for rows in cut:
        rows[:, 0] += offsets
        rows[:, 1] = np.minimum(rows[:, 1] - offsets, np.uint64(limit))
    return cut


def _batches(
    local: Rows, remote: Rows, batch_nbytes: int, batch_rows: int
) -> Iterator[tuple[Rows, Rows]]:
    import numpy as np

    start = 0
    ends = np.cumsum(local[:, 1])
    while start < len(local):
        before = ends[start - 1] if start else np.uint64(0)
        stop = int(np.searchsorted(ends, before + np.uint64(batch_nbytes), "right"))
        stop = min(max(stop, start + 1), start + batch_rows)
        yield local[start:stop], remote[start:stop]
        start = stop
