"""The memory of an object's tensors: regions, and how tensors lie in them.

Tensors whose spans of one storage overlap or touch share a region, so shared memory and views
survive and every byte is sent once. A view is its own span, not its whole storage. A view that
leaves out most of its span, as one block of a cache does, is gathered: its region consists of runs
of the storage, which are read in place and arrive dense.

An object is the memory that its tensors had when it was made. Data that is written to it before a
pull is sent. Memory that was freed, resized or moved since is not sent (``MemoryChanged``).
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt import _tensors
from ray.experimental.rdt._tensors import CONJUGATED, NEGATED, Layout, Table, apply_flags
from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.transports.base import UserObject

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.transports.nixl.pool import Copies


class MemoryChanged(TransferFailed):
    """The memory of an object's tensors has changed since the object was made."""

    code = "changed"


@dataclass
class Captured:
    """The tensors of one value at its producer.

    Attributes:
        tensors: As the user returned them, in the order of the placeholders.
        layout: How they lie in memory; empty where they are no torch tensors.
        addresses: Where the regions are; empty where only a transport of the user's can read them.
        events: For each device, the ends of the work that makes the tensors on it.
        user_object: What a transport of the user's moves, None for any other.
        copies: Copies of the regions as they were when the object was made; None if the regions
            are the user's memory.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    layout: Layout = field(default_factory=Layout)
    addresses: array[int] = field(default_factory=lambda: array("Q"))
    events: Sequence[Event] = ()
    user_object: UserObject | None = None
    copies: Copies | None = None

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @property
    def table(self) -> Table:
        """The part of the layout that travels."""
        return self.layout.table

    @property
    def guards(self) -> array[int]:
        """For ``Agent.register``; see ``Layout``. A copy needs none."""
        return self.layout.guards if self.copies is None else array("Q")

    def host_spans(self) -> tuple[array[int], array[int]]:
        """Return the addresses and sizes of all host memory, in the order of the regions."""
        devices, regions = self.table.devices, self.table.regions
        runs = self.layout.runs if self.copies is None else {}
        if not devices and not runs:
            return self.addresses, regions[: len(self.addresses)]
        addresses, lengths = array("Q"), array("Q")
        for region, address in enumerate(self.addresses):
            if region in runs:
                starts, nbytes = runs[region]
                addresses.extend(address + start for start in starts)
                lengths.extend([nbytes] * len(starts))
            elif region not in devices:
                addresses.append(address)
                lengths.append(regions[region])
        return addresses, lengths

    def require_unchanged(self) -> None:
        """Raise MemoryChanged if a storage was freed, resized or moved since.

        A storage that has its old address and size again counts as unchanged.
        """
        if self.copies is None and not self.layout.is_unchanged():
            raise MemoryChanged(
                "the storage of one of its tensors was freed, resized or moved after the object "
                "was made"
            )

    def uses(self, value: Any) -> bool:
        """Tell whether a tensor shares a storage with one of these, or data is one of these."""
        if not hasattr(value, "untyped_storage"):
            return any(tensor is value for tensor in self.tensors)
        address = value.untyped_storage().data_ptr()
        storages = self.layout.storages
        at = bisect_left(storages, address)
        return at < len(storages) and storages[at] == address

    def gather(self) -> bytes:
        """Return a copy of all regions, one after the other."""
        return b"".join(map(ctypes.string_at, *self.host_spans()))


def lay_out(
    tensors: list[torch.Tensor], is_parameter: list[bool] | None = None, may_gather: bool = True
) -> Captured:
    """Find the regions of tensors and the place of each tensor in its region.

    Records the events of tensors on devices, so it runs on the thread that made them.
    """
    layout = _tensors.lay_out(tensors, is_parameter, may_gather)
    events = accelerators.record_writers(tensors) if layout.table.devices else ()
    return Captured(tensors, layout, layout.addresses, events)


def region_bytes(captured: Captured, region: int) -> torch.Tensor:
    """Return a region as a flat uint8 tensor: a view of its memory, or a copy if it is gathered."""
    import torch

    if captured.copies is not None:
        return captured.copies.buffers[region]
    layout, nbytes = captured.layout, captured.table.regions[region]
    storage = layout.owners[region]
    if storage is None:
        device = captured.table.devices.get(region, "cpu")
        return torch.empty(0, dtype=torch.uint8, device=device)
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    offset = layout.offsets[region]
    if region not in layout.runs:
        return flat.set_(storage, offset, (nbytes,), (1,))
    starts, run = layout.runs[region]
    flat.set_(storage, offset, (starts[-1] + run,), (1,))
    return torch.cat([flat[start : start + run] for start in starts])


def tenants(table: Table) -> dict[int, list[int]]:
    """Return the indices of the tensors in each region."""
    found: dict[int, list[int]] = {}
    for index, row in enumerate(table.rows):
        found.setdefault(row[0], []).append(index)
    return found


def is_alone(table: Table, rows: list[int]) -> bool:
    """Tell whether a region is one tensor that is dense, not conjugated and not negated."""
    _, _, _, _, stride, flags = table.rows[rows[0]]
    return len(rows) == 1 and stride is None and not flags & (CONJUGATED | NEGATED)


def carriers(captured: Captured) -> list[Any]:
    """Return the tensors that a user-defined transport moves for an object.

    There is one dense tensor for each region that has bytes. It is the user's tensor, without its
    graph, if that is alone in the region, and else the region's bytes. So each byte moves once, and
    views and shared storage survive. Data of other types is returned unchanged.
    """
    table = captured.table
    if not table.rows:
        return captured.tensors
    return [
        captured.tensors[rows[0]].detach()
        if is_alone(table, rows)
        else region_bytes(captured, region)
        for region, rows in sorted(tenants(table).items())
        if table.regions[region]
    ]


def unpack_carriers(table: Table, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors of ``table`` from its received ``carriers``.

    Raises:
        ValueError: The received tensors do not fit.
    """
    import torch

    filled = [region for region, nbytes in enumerate(table.regions) if nbytes]
    if len(filled) != len(received):
        raise ValueError(f"{len(received)} tensors were received, {len(filled)} were sent")
    found, by_region = tenants(table), dict(zip(filled, received))
    tensors: list[Any] = [None] * len(table.rows)
    for region, rows in found.items():
        for index in rows:
            _, start, dtype, shape, stride, flags = table.rows[index]
            step = contiguous_stride(shape) if stride is None else stride
            if region not in by_region:
                tensor = torch.empty_strided(shape, step, dtype=dtype, device="cpu")
            elif is_alone(table, rows):
                tensor = by_region[region]
                _expect(tensor, dtype, shape)
            else:
                flat = by_region[region]
                _expect(flat, torch.uint8, (table.regions[region],))
                if not flat.is_contiguous() or flat.storage_offset() % dtype.itemsize:
                    flat = by_region[region] = flat.clone()
                first = (int(flat.storage_offset()) + start) // dtype.itemsize
                empty = torch.empty(0, dtype=dtype, device=flat.device)
                tensor = empty.set_(flat.untyped_storage(), first, shape, step)
            tensors[index] = apply_flags(tensor, flags)
    return tensors


def _expect(tensor: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"a {type(tensor).__name__} was received, a torch.Tensor was sent")
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"a tensor of {tensor.dtype} and shape {tuple(tensor.shape)} was received, one of "
            f"{dtype} and shape {tuple(shape)} was sent"
        )


@functools.lru_cache(maxsize=4096)
def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the stride, in elements, of a dense row-major tensor."""
    stride, step = [], 1
    for length in reversed(shape):
        stride.append(step)
        step *= max(length, 1)
    return tuple(reversed(stride))
