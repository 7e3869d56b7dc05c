"""Takes the tensors out of a value (producer) and puts them back (consumer).

The value is pickled with Ray's own pickler; each tensor that RDT carries becomes a call of
``next_tensor()`` in the stream, and a row in a table that says which bytes of which region it is.
What is done for each tensor is compiled: ``_tensors``. Everything else, tensors of other kinds
included, is pickled as plain Ray pickles it.
Tensors on a device that ``accelerators`` knows are carried as those on the CPU are; an event on the
stream that made them tells when their bytes may be read. Nothing is registered with any pickler of
the process.

Regions: tensors whose spans of one storage overlap or touch share a region, so ties and views
survive and every byte is sent once. A view is its own span, not its whole storage. A view that
leaves out most of its span, as one block of a cache does, is a region that is gathered: its bytes
are runs of the storage's, read where they are, and it arrives dense.

An object is the memory that its tensors had when it was made. What is written to it before it is
pulled is sent; memory that was freed, resized or moved since is not (``MemoryChanged``).

Objects of a transport that a user wrote have their own rules: what the transport's data type says
is taken out, and what it gets to move are *carriers*, see ``carriers``.

Layout of the value's out-of-band buffers: the pickled table, then the tensors' bytes where the
object is eager or the shipment where its transport is a user's, then the buffers of the rest of
the value.
"""

from __future__ import annotations

import ctypes
import functools
import pickle
import sys
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ray._private import ray_constants
from ray._raylet import (
    MessagePackSerializedObject,
    MessagePackSerializer,
    Pickle5SerializedObject,
    Pickle5Writer,
    split_buffer,
    unpack_pickle5_buffers,
)

from ray import cloudpickle
from ray.experimental.rdt import _tensors
from ray.experimental.rdt._tensors import (
    CONJUGATED,
    NEGATED,
    Layout,
    Pickler,
    Table,
    finish,
    restore,
)
from ray.experimental.rdt.accelerators import writers
from ray.experimental.rdt.accelerators.base import Event
from ray.experimental.rdt.common import descriptor as descriptor_module
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.serialization.array_reducers import ArrayPickler, are_arrays_wanted
from ray.experimental.rdt.transports.base import Parcel, Shipment

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.transports.nixl.pool import Copies


class MemoryChanged(TransferFailed):
    """The memory of an object's tensors is not what it was when the object was made."""

    code = "changed"


@dataclass
class Captured:
    """The tensors of one value at its producer.

    Attributes:
        tensors: As the user returned them, in the order of the placeholders.
        layout: How they lie in memory; empty where they are no torch tensors.
        addresses: Where the regions are; empty where only a transport of the user's can read them.
        events: For each device, the ends of the work that makes the tensors on it.
        parcel: What a transport of the user's moves, None for any other.
        copies: The regions as they were when the object was made; None where nobody asked for such
            a copy, and the regions are the user's memory.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    layout: Layout = field(default_factory=Layout)
    addresses: array[int] = field(default_factory=lambda: array("Q"))
    events: Sequence[Event] = ()
    parcel: Parcel | None = None
    copies: Copies | None = None

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @property
    def table(self) -> Table:
        """What travels of the layout."""
        return self.layout.table

    @property
    def storages(self) -> array[int]:
        """The addresses of the storages that have bytes in a region, sorted."""
        return self.layout.storages

    @property
    def guards(self) -> array[int]:
        """For ``Agent.register``; see ``Layout``. A copy needs none."""
        return self.layout.guards if self.copies is None else array("Q")

    def host_spans(self) -> tuple[array[int], array[int]]:
        """The addresses and the bytes of what the agent can serve, in the order of the regions."""
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
        """Raises MemoryChanged if a storage was freed, resized or moved since.

        One that was, and has come back to its place with its size, is not told from others.
        """
        if self.copies is None and not self.layout.is_unchanged():
            raise MemoryChanged(
                "the storage of one of its tensors was freed, resized or moved after the object "
                "was made"
            )

    def uses(self, value: Any) -> bool:
        """Whether a tensor shares a storage with one of these; other data is only itself."""
        if not hasattr(value, "untyped_storage"):
            return any(tensor is value for tensor in self.tensors)
        address = value.untyped_storage().data_ptr()
        at = bisect_left(self.storages, address)
        return at < len(self.storages) and self.storages[at] == address

    def gather(self) -> bytes:
        """A copy of all regions, one after the other."""
        return b"".join(map(ctypes.string_at, *self.host_spans()))


class Skeleton(NamedTuple):
    """A pickled value whose tensors are placeholders."""

    inband: bytes
    buffers: list[Any]
    contained_refs: Any


@dataclass(frozen=True)
class Wanted:
    """What a transport of the user's takes out of values.

    Attributes:
        data_type: Of these, torch.Tensor for instance.
        devices: torch device types, for torch tensors.
    """

    data_type: type
    devices: frozenset[str]

    @property
    def is_torch(self) -> bool:
        torch = sys.modules.get("torch")
        return torch is not None and self.data_type is torch.Tensor

    def takes(self, value: Any) -> bool:
        """Whether a value that is no torch tensor is taken out.

        A subclass of a concrete type is not: a masked array would come back without its mask. A
        type that decides itself what its instances are, as jax.Array, means all of them.
        """
        kind = type(value)
        if kind is self.data_type:
            return True
        return isinstance(value, self.data_type) and _is_stand_in(self.data_type)


def _is_stand_in(data_type: type) -> bool:
    return type(data_type).__instancecheck__ is not type.__instancecheck__


def take(context: Any, value: Any, wanted: Wanted | None = None) -> tuple[Skeleton, Captured]:
    """Pickles ``value`` and takes its tensors out.

    Runs on: producer, the thread that runs the user's task. Holds the GIL; copies no tensor.

    Args:
        context: The worker's ``SerializationContext``, which collects contained ObjectRefs.
        value: What the user returned or put.
        wanted: What its transport takes out, None for what RDT's own take.

    Raises:
        TypeError: as plain Ray does for a value that cannot be pickled.
    """
    buffers: list[Any] = []
    stream = _Stream()
    kind = ArrayPickler if wanted is None and are_arrays_wanted() else Pickler
    pickler = kind(stream, buffers.append, wanted)
    refs = _dump(context, pickler, [value])
    skeleton = Skeleton(stream.join(), buffers, refs)
    return skeleton, arrange(pickler.tensors, pickler.is_parameter, wanted)


def arrange(
    tensors: list[Any], is_parameter: list[bool] | None = None, wanted: Wanted | None = None
) -> Captured:
    """What is known of an object's tensors before it is stored."""
    if wanted is not None and not wanted.is_torch:
        return Captured(tensors)
    # What a user's transport gets of a region is a tensor, over the tensors' own memory.
    captured = lay_out(tensors, is_parameter, may_gather=wanted is None)
    if wanted is not None and not all(tensor.is_cpu for tensor in tensors):
        captured.addresses = array("Q")
    return captured


def pickle_shipment(context: Any, skeleton: Skeleton, shipment: Shipment) -> bytes:
    """A shipment as it travels in the value; references in it become the value's."""
    stream = _Stream()
    refs = _dump(context, cloudpickle.CloudPickler(stream, protocol=5), shipment)
    skeleton.contained_refs.update(refs)
    return stream.join()


def _dump(context: Any, pickler: Any, value: Any) -> Any:
    """Pickles as a part of a Ray value; returns the ObjectRefs in it."""
    context.set_in_band_serialization()
    try:
        pickler.dump(value)
    except Exception:
        context.get_and_clear_contained_object_refs()
        raise
    finally:
        context.set_out_of_band_serialization()
    return context.get_and_clear_contained_object_refs()


def pack(
    skeleton: Skeleton, captured: Captured, head: Descriptor | None, shipment: bytes = b""
) -> Any:
    """The serialized object that Ray stores: an RDT value, or a plain one if ``head`` is None."""
    writer = Pickle5Writer()
    metadata = ray_constants.OBJECT_METADATA_TYPE_PYTHON
    if head is not None:
        metadata = descriptor_module.encode(head)
        writer.buffer_callback(pickle.PickleBuffer(pickle.dumps(captured.table, protocol=5)))
        if head.is_eager:
            writer.buffer_callback(pickle.PickleBuffer(captured.gather()))
        if head.is_user_defined:
            writer.buffer_callback(pickle.PickleBuffer(shipment))
    for buffer in skeleton.buffers:
        writer.buffer_callback(buffer)
    body = Pickle5SerializedObject(metadata, skeleton.inband, writer, skeleton.contained_refs)
    return MessagePackSerializedObject(metadata, _msgpack_of_first_object(), [], body)


@dataclass
class Envelope:
    """An RDT value as it arrived, its tensors still missing.

    Attributes:
        head: The descriptor.
        inband: The pickled skeleton.
        table: The tensors' layout.
        eager: The tensors' bytes if they rode along, else None.
        buffers: The out-of-band buffers of the rest of the value.
        shipment: What a user's transport needs to receive them, pickled; else None.
    """

    head: Descriptor
    inband: Any
    table: Table
    eager: Any | None
    buffers: Sequence[Any]
    shipment: Any | None = None

    def restore(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The value, as the list of Python objects that Ray's deserializer expects.

        Runs on: consumer, the thread that deserializes.
        """
        value: list[Any] = restore(self.inband, self.buffers, tensors)
        return value


def open_envelope(metadata: bytes, data: Any) -> Envelope:
    """Reads an RDT value without its tensors.

    Raises:
        DescriptorError: the metadata is not ours.
    """
    head = descriptor_module.decode(metadata)
    _, body = split_buffer(data)
    inband, buffers = unpack_pickle5_buffers(body)
    table = pickle.loads(buffers[0])
    if head.is_user_defined:
        return Envelope(head, inband, table, None, buffers[2:], buffers[1])
    eager = buffers[1] if head.is_eager else None
    return Envelope(head, inband, table, eager, buffers[2 if head.is_eager else 1 :])


def carriers(captured: Captured) -> list[Any]:
    """What a transport of the user's moves instead of the tensors themselves.

    For torch tensors one dense tensor for each region that has bytes: the user's own, without its
    graph, where it is all that lies in the region, else the region's bytes. So each byte moves
    once, and views and shared storage survive. Other data goes as it is.
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


def tenants(table: Table) -> dict[int, list[int]]:
    """For each region the tensors that lie in it."""
    found: dict[int, list[int]] = {}
    for index, row in enumerate(table.rows):
        found.setdefault(row[0], []).append(index)
    return found


def is_alone(table: Table, rows: list[int]) -> bool:
    """Whether the tensors of a region are a single one, dense and as its bytes say."""
    _, _, _, _, stride, flags = table.rows[rows[0]]
    return len(rows) == 1 and stride is None and not flags & (CONJUGATED | NEGATED)


def region_bytes(captured: Captured, region: int) -> torch.Tensor:
    """A region as a flat uint8 tensor.

    It shares the memory that is sent; of a region that is gathered it is a copy.
    """
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


def unpack_carriers(table: Table, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of ``table`` from what stands for its regions; see ``carriers``.

    Raises:
        ValueError: what was received does not fit.
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
            tensors[index] = finish(tensor, flags)
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


def lay_out(
    tensors: list[torch.Tensor],
    is_parameter: list[bool] | None = None,
    may_gather: bool = True,
) -> Captured:
    """Finds the regions of tensors and how each lies in its region.

    Of tensors on devices it records the events; so it runs on the thread that made them.
    """
    layout = _tensors.lay_out(tensors, is_parameter, may_gather)
    events = writers.record(tensors) if layout.table.devices else ()
    return Captured(tensors, layout, layout.addresses, events)


@functools.lru_cache(maxsize=4096)
def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride, in elements, of a dense row-major tensor."""
    stride, step = [], 1
    for length in reversed(shape):
        stride.append(step)
        step *= max(length, 1)
    return tuple(reversed(stride))


class _Stream:
    """Collects what a pickler writes, without a copy of large frames."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self._parts.append(bytes(part))
        return len(part)

    def join(self) -> bytes:
        return b"".join(self._parts)


_first_object: list[bytes] = []


def _msgpack_of_first_object() -> bytes:
    """The MessagePack half of every value: one extension that names the first pickled object."""
    if not _first_object:
        _first_object.append(MessagePackSerializer.dumps(_Opaque(), lambda _: 0))
    return _first_object[0]


class _Opaque:
    """A type that MessagePack does not know."""
