"""Memory that an object is received into: blocks of the receive pool, device memory, or the user's
target tensors.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from ray.experimental.rdt._tensors import CONJUGATED, NEGATED, Table, build_tensors, place
from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.serialization.layout import tenants

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt._tensors import Row
    from ray.experimental.rdt.accelerators.events import Event
    from ray.experimental.rdt.rpc.session import Session

Targets = Sequence["torch.Tensor"]

#: A region of at least this many bytes gets a block of its own, so that keeping one large tensor
#: does not keep the memory of all the others.
_OWN_BLOCK_BYTES = 1 << 20

_ALIGNMENT = 64


@dataclass(frozen=True)
class ReceiveBuffers:
    """The memory for one object.

    Attributes:
        regions: The bytes of each region.
        places: For each region its buffer and the offset in it; on a device a flat tensor and 0.
        addresses: For each region its address, as uint64.
        lengths: For each region its bytes, as uint64.
        direct: Regions that are received into one target tensor, and that tensor.
        devices: The device type at the producer of each region in device memory. The agent does not
            fill these regions: ``addresses`` and ``lengths`` leave them out.
        after: Device memory may be written after these events: they mark the work of this thread's
            streams at the time of the allocation.
        split_regions: Regions that several target tensors receive. Only the agent does that:
            ``flat`` has none of them.
    """

    regions: array[int]
    places: list[tuple[Any, int]]
    addresses: array[int]
    lengths: array[int]
    direct: Mapping[int, torch.Tensor]
    devices: Mapping[int, str]
    after: list[Event] = field(default_factory=list)
    split_regions: Mapping[int, SplitRegion] = field(default_factory=dict)

    @property
    def has_user_memory(self) -> bool:
        """Tell whether some of the memory is the user's."""
        return bool(self.direct or self.split_regions)

    def put(self, tensors: Mapping[int, torch.Tensor]) -> None:
        """Receive regions into flat tensors on devices."""
        for region, tensor in tensors.items():
            self.places[region] = (tensor, 0)

    def flat(self, device_type: str = "cpu") -> list[torch.Tensor]:
        """Return regions as flat uint8 tensors, for a transport to fill."""
        return [
            self._flat(region)
            for region in range(len(self.regions))
            if self.devices.get(region, "cpu") == device_type
        ]

    def _flat(self, region: int) -> torch.Tensor:
        import torch

        (buffer, offset), nbytes = self.places[region], self.regions[region]
        if region in self.direct:
            return writable(self.direct[region]).view(-1).view(torch.uint8)
        if isinstance(buffer, torch.Tensor):
            return buffer
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=offset)

    def deliver(self, table: Table, targets: Targets | None) -> Targets:
        """Return the object's tensors over the memory. The bytes have arrived."""
        if targets is None:
            return build_tensors(table, self.places)
        arrived = {
            index: self.direct[row[0]]
            for index, row in enumerate(table.rows)
            if row[0] in self.direct
        }
        for split_region in self.split_regions.values():
            arrived.update(split_region.arrived)
        note_written(arrived.values())
        if len(self.direct) == len(table.regions):
            return targets
        return fill(targets, build_tensors(table, self.places, arrived))


class Destination(Protocol):
    """The memory that a transfer fills."""

    def buffers(self, may_split: bool) -> ReceiveBuffers:
        """Return the memory. ``may_split``: one region may go to several tensors of the user's."""

    def deliver(self, buffers: ReceiveBuffers) -> Targets:
        """Return the tensors over the memory. The bytes have arrived."""


@dataclass(frozen=True)
class HostDestination:
    """New memory for an object in the host memory of its producer. See ``Destination``."""

    session: Session
    table: Table
    targets: Targets | None

    def buffers(self, may_split: bool) -> ReceiveBuffers:
        direct = direct_targets(self.table, self.targets)
        split_regions = find_split_regions(self.table, self.targets, direct) if may_split else {}
        return allocate(self.session, self.table.regions, direct, split_regions)

    def deliver(self, buffers: ReceiveBuffers) -> Targets:
        return buffers.deliver(self.table, self.targets)


def allocate(
    session: Session,
    regions: array[int],
    direct: Mapping[int, torch.Tensor] = MappingProxyType({}),
    split_regions: Mapping[int, SplitRegion] = MappingProxyType({}),
) -> ReceiveBuffers:
    """Allocate memory for all regions of an object.

    Args:
        direct: Regions that are received into one target tensor.
        split_regions: Regions that are received into several.
    """
    take = session.agent.allocate
    users = {
        **direct,
        **{region: split_region.parts[0] for region, split_region in split_regions.items()},
    }
    places, addresses = place(regions, users, _OWN_BLOCK_BYTES, _ALIGNMENT, take)
    if not split_regions:
        return ReceiveBuffers(regions, places, addresses, regions, direct, {})
    scratch = take(max(split_region.lead for split_region in split_regions.values()) or 1)
    cut: list[tuple[int, int]] = []
    for region, span in enumerate(zip(addresses, regions)):
        cut += spans(split_regions[region], scratch.address) if region in split_regions else [span]
    for region in split_regions:
        places[region] = (scratch, 0)
    at, lengths = (array("Q", column) for column in zip(*cut))
    return ReceiveBuffers(regions, places, at, lengths, direct, {}, split_regions=split_regions)


def allocate_with_devices(
    session: Session, table: Table, direct: Mapping[int, torch.Tensor]
) -> ReceiveBuffers:
    """Allocate host memory for an object with tensors on devices; ``take_memory`` adds the rest."""
    import torch

    nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
    host = allocate(session, table.regions, {**dict.fromkeys(table.devices, nothing), **direct})
    agents = [region for region in range(len(table.regions)) if region not in table.devices]
    return ReceiveBuffers(
        table.regions,
        list(host.places),
        array("Q", [host.addresses[region] for region in agents]),
        array("Q", [table.regions[region] for region in agents]),
        direct,
        table.devices,
        accelerators.record(direct.values()),
    )


def take_memory(
    session: Session,
    table: Table,
    buffers: ReceiveBuffers,
    device_type: str,
    target_device: torch.device | None,
    hosted: Collection[int] = (),
) -> None:
    """Allocate memory for the regions that are on one type of device at the producer.

    They are received on the target device, or else on this thread's current device of that type. If
    this process has no such device, they are received into host memory.

    Args:
        target_device: The device that the user chose for all tensors, if any.
        hosted: Regions that are received into host memory in any case.
    """
    regions = [
        region
        for region, name in table.devices.items()
        if name == device_type and region not in buffers.direct
    ]
    device = receive_device(device_type, target_device)
    if device is not None:
        accelerator = accelerators.of(device.type)
        assert accelerator is not None
        on_device = {
            region: accelerator.empty(table.regions[region], device)
            for region in regions
            if region not in hosted
        }
        buffers.put(on_device)
        buffers.after.extend(accelerators.record(on_device.values()))
        regions = [region for region in regions if region not in on_device]
    host = allocate(session, array("Q", [table.regions[region] for region in regions]))
    for region, where in zip(regions, host.places):
        buffers.places[region] = where


def receive_device(device_type: str, target_device: torch.device | None) -> torch.device | None:
    """Return the device that regions of a type are received on, None for host memory."""
    accelerator = accelerators.usable(device_type if target_device is None else target_device.type)
    if accelerator is None:
        return None
    is_exact = target_device is not None and target_device.index is not None
    return target_device if is_exact else accelerator.current_device()


def hosted_regions(table: Table, targets: Targets | None) -> set[int]:
    """Return the regions that only target tensors in host memory receive.

    From device memory they would be copied to memory that is not pinned.
    """
    if targets is None:
        return set()
    rows = list(zip(table.rows, targets))
    return {row[0] for row, _ in rows} - {row[0] for row, target in rows if not target.is_cpu}


def direct_targets(table: Table, targets: Targets | None) -> dict[int, torch.Tensor]:
    """Return the regions that are exactly the bytes of one contiguous target, and that target."""
    if targets is None:
        return {}
    direct = {}
    for region, (first, *others) in tenants(table).items():
        target, row = targets[first], table.rows[first]
        is_exact = takes_bytes(target, row) and target.nbytes == table.regions[region]
        is_near = target.is_cpu or target.device.type == table.devices.get(region)
        if not others and is_exact and is_near:
            direct[region] = target
    return direct


def fill(targets: Targets, tensors: Targets) -> Targets:
    """Copy tensors into target tensors, without autograd."""
    import torch

    copies = [(target, tensor) for target, tensor in zip(targets, tensors) if target is not tensor]
    written = [target for target, _ in copies]
    with accelerators.copying(written, settings().fetch_timeout_s):
        for target, tensor in copies:
            # torch allows writes to an inference tensor in inference mode only.
            with torch.inference_mode() if target.is_inference() else torch.no_grad():
                target.copy_(tensor)
    return targets


def note_written(targets: Iterable[torch.Tensor]) -> None:
    """Tell autograd that target tensors were written to outside of torch."""
    import torch

    for target in targets:
        if not target.is_inference():
            torch.autograd.graph.increment_version(target)


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory that any thread may write to, in any mode."""
    import torch

    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        storage, offset = tensor.untyped_storage(), tensor.storage_offset()
        return empty.set_(storage, offset, tensor.shape, tensor.stride())


def move(tensors: Targets, device: str, timeout_s: float) -> Targets:
    """Return the tensors on a device. Tensors that are there are not copied."""
    import torch

    where = torch.device(device)
    accelerator = accelerators.of(where.type)
    with accelerator.capture_safe() if accelerator is not None else contextlib.nullcontext():
        moved = [tensor.to(where) for tensor in tensors]
    with accelerators.copying([m for m, t in zip(moved, tensors) if m is not t], timeout_s):
        return moved


@dataclass(frozen=True)
class SplitRegion:
    """The target tensors of one region of host memory.

    Rows of one weight, or views of one bucket, are one region at the producer. The user may have a
    target tensor for each of them. The agent takes a list of spans, so it writes to each directly.

    Attributes:
        lead: The number of bytes at its start that belong to no tensor.
        parts: The targets of the other bytes, in their order.
        arrived: For each tensor in the region, by its number, the target that receives its bytes.
            Tensors of the same bytes share one target; the other targets are copied into.
    """

    lead: int
    parts: Sequence[torch.Tensor]
    arrived: Mapping[int, torch.Tensor]


def takes_bytes(target: torch.Tensor, row: Row) -> bool:
    """Tell whether a target can hold a tensor's bytes exactly as they are sent."""
    _, _, _, _, stride, flags = row
    is_dense = stride is None and not flags & (CONJUGATED | NEGATED)
    return is_dense and target.is_contiguous() and not (target.is_conj() or target.is_neg())


def find_split_regions(
    table: Table, targets: Targets | None, direct: Mapping[int, torch.Tensor]
) -> dict[int, SplitRegion]:
    """Return the regions that targets cover without a gap, each byte once."""
    if targets is None or len(direct) == len(table.regions):
        return {}
    found = (
        (region, _split_region(table, targets, region, rows))
        for region, rows in tenants(table).items()
        if region not in direct and region not in table.devices
    )
    return {region: split_region for region, split_region in found if split_region is not None}


def _split_region(
    table: Table, targets: Targets, region: int, rows: list[int]
) -> SplitRegion | None:
    rows = sorted(rows, key=lambda index: (table.rows[index][1], -targets[index].nbytes))
    lead = at = table.rows[rows[0]][1]
    parts: list[torch.Tensor] = []
    arrived: dict[int, torch.Tensor] = {}
    last = None
    for index in rows:
        target, row = targets[index], table.rows[index]
        if not target.is_cpu or not takes_bytes(target, row):
            return None
        span = (row[1], target.dtype, target.shape)
        if span == last:
            arrived[index] = parts[-1]
        elif row[1] == at:
            arrived[index] = target
            parts.append(target)
            at += target.nbytes
            last = span
        else:
            return None
    return SplitRegion(lead, parts, arrived) if at == table.regions[region] else None


def spans(split_region: SplitRegion, scratch: int) -> Iterator[tuple[int, int]]:
    """Yield the addresses and sizes that a region is received at; ``scratch`` takes its lead."""
    if split_region.lead:
        yield scratch, split_region.lead
    for part in split_region.parts:
        yield part.data_ptr(), part.nbytes
