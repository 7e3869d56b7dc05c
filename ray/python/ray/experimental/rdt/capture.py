"""Takes the tensors out of a value (producer) and puts them back (consumer).

The value is pickled with Ray's own pickler; each tensor that RDT carries becomes a call of
``_placeholder(index)`` in the stream, and a row in a table that says which bytes of which region
it is. Everything else, tensors of other kinds included, is pickled as plain Ray pickles it.
Tensors on a device that ``accelerators`` knows are carried as those on the CPU are; an event on the
stream that made them tells when their bytes may be read. Nothing is registered with any pickler of
the process.

Regions: tensors whose spans of one storage overlap or touch share a region, so ties and views
survive and every byte is sent once. A view is its own span, not its whole storage.

Objects of a transport that a user wrote have their own rules: what the transport's data type says
is taken out, and what it gets to move are *carriers*, see ``carriers``.

Layout of the value's out-of-band buffers: the pickled table, then the tensors' bytes where the
object is eager or the shipment where its transport is a user's, then the buffers of the rest of
the value.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
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
from ray.experimental.rdt import descriptor as descriptor_module
from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.base import Event
from ray.experimental.rdt.descriptor import Descriptor
from ray.experimental.rdt.transports.base import Parcel, Shipment

if TYPE_CHECKING:
    import torch

#: Regions start at a multiple of this from their storage's start: every dtype stays aligned.
_REGION_ALIGNMENT = 16

_REQUIRES_GRAD = 1
_PARAMETER = 2
_CONJUGATED = 4
_NEGATED = 8


#: One span of memory that a pull moves: its address at the producer and its bytes.
Region = tuple[int, int]


#: How one tensor lies in its region: region, offset in bytes, dtype, shape, stride (None means
#: contiguous), flags. A plain tuple: ten thousand of them are pickled with an object.
Row = tuple[int, int, "torch.dtype", tuple[int, ...], "tuple[int, ...] | None", int]


class Table(NamedTuple):
    """The layout of an object's tensors, as it travels.

    Attributes:
        regions: The bytes of each.
        rows: One for each tensor.
        devices: The torch device type of each region that is not in host memory. Which of its
            devices it is matters to nobody else: a consumer receives on its own current one.
    """

    regions: list[int]
    rows: list[Row]
    devices: dict[int, str]

    @property
    def nbytes(self) -> int:
        return sum(self.regions)


@dataclass
class Captured:
    """The tensors of one value at its producer.

    Attributes:
        tensors: As the user returned them, in the order of the placeholders.
        regions: Their memory; the tensors keep it alive.
        table: Their layout; no rows where they are no torch tensors.
        events: For each device, the end of the work that makes the tensors on it.
        parcel: What a transport of the user's moves, None for any other.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    table: Table = field(default_factory=lambda: Table([], [], {}))
    events: Sequence[Event] = ()
    parcel: Parcel | None = None

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @property
    def host_regions(self) -> list[Region]:
        """Those that the agent can serve."""
        if not self.table.devices:
            return self.regions
        return [region for i, region in enumerate(self.regions) if i not in self.table.devices]

    def gather(self) -> bytes:
        """A copy of all regions, one after the other."""
        return b"".join(ctypes.string_at(address, nbytes) for address, nbytes in self.regions)


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
    pickler = _Pickler(stream, buffers, wanted)
    refs = _dump(context, pickler, [value])
    skeleton = Skeleton(stream.join(), buffers, refs)
    return skeleton, arrange(pickler.tensors, pickler.is_parameter, wanted)


def arrange(
    tensors: list[Any], is_parameter: list[bool] | None = None, wanted: Wanted | None = None
) -> Captured:
    """What is known of an object's tensors before it is stored."""
    if wanted is not None and not wanted.is_torch:
        return Captured(tensors)
    captured = lay_out(tensors, is_parameter)
    if wanted is not None and not all(tensor.is_cpu for tensor in tensors):
        captured.regions = []
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
        if head.is_users:
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
        _restoring.push(tensors)
        try:
            value: list[Any] = pickle.loads(self.inband, buffers=self.buffers)
            return value
        finally:
            _restoring.pop()


def open_envelope(metadata: bytes, data: Any) -> Envelope:
    """Reads an RDT value without its tensors.

    Raises:
        DescriptorError: the metadata is not ours.
    """
    head = descriptor_module.decode(metadata)
    _, body = split_buffer(data)
    inband, buffers = unpack_pickle5_buffers(body)
    table = pickle.loads(buffers[0])
    if head.is_users:
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
        else region_bytes(captured, rows[0])
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
    return len(rows) == 1 and stride is None and not flags & (_CONJUGATED | _NEGATED)


def region_bytes(captured: Captured, index: int) -> torch.Tensor:
    """The region of a tensor as a flat uint8 tensor that shares the tensor's storage."""
    import torch

    tensor, row = captured.tensors[index], captured.table.rows[index]
    nbytes = captured.table.regions[row[0]]
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    if not nbytes:
        return flat
    first = int(tensor.storage_offset()) * tensor.element_size() - row[1]
    return flat.set_(tensor.untyped_storage(), first, (nbytes,), (1,))


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
                tensor = torch.empty_strided(shape, step, dtype=dtype)
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
            tensors[index] = _finish(tensor, flags)
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


def build_tensors(
    table: Table,
    memory: Sequence[tuple[Any, int]],
    ready: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> list[torch.Tensor]:
    """Makes the tensors of ``table`` over memory that holds their bytes.

    Args:
        table: The layout.
        memory: For each region a writable buffer and the offset in it, or a flat tensor on a
            device and 0. Each region becomes a storage of its own that keeps its buffer alive, so
            that a tensor kept alone does not drag the others' bytes along when it is pickled.
        ready: Regions whose only tensor exists already.
    """
    import torch

    storages: dict[int, Any] = {}
    tensors = []
    shared = _shared_regions(table)
    for region, start, dtype, shape, stride, flags in table.rows:
        count = table.regions[region]
        if region in ready:
            tensor = ready[region]
        elif not count:
            device = _device_of(memory[region]) if region in table.devices else None
            tensor = torch.empty_strided(shape, stride or (), dtype=dtype, device=device)
        elif stride is None and region not in shared and region not in table.devices:
            buffer, offset = memory[region]
            items = math.prod(shape)
            flat = torch.frombuffer(buffer, dtype=dtype, count=items, offset=offset + start)
            tensor = flat if len(shape) == 1 else flat.view(shape)
        else:
            if region not in storages:
                storages[region] = _storage_over(memory[region], count)
            step = contiguous_stride(shape) if stride is None else stride
            empty = torch.empty(0, dtype=dtype, device=storages[region].device)
            tensor = empty.set_(storages[region], start // dtype.itemsize, shape, step)
        tensors.append(tensor if region in ready else _finish(tensor, flags))
    return tensors


def _shared_regions(table: Table) -> set[int]:
    """Regions that more than one tensor lies in."""
    users = Counter(row[0] for row in table.rows)
    return {region for region, count in users.items() if count > 1}


def _storage_over(memory: tuple[Any, int], nbytes: int) -> torch.UntypedStorage:
    import torch

    buffer, offset = memory
    if isinstance(buffer, torch.Tensor):
        return buffer.untyped_storage()
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=offset)
    return flat.untyped_storage()


def _device_of(memory: tuple[Any, int]) -> torch.device | None:
    """Where memory is; None for host memory."""
    import torch

    return memory[0].device if isinstance(memory[0], torch.Tensor) else None


def _finish(tensor: torch.Tensor, flags: int) -> torch.Tensor:
    if not flags:
        return tensor
    import torch

    if flags & _CONJUGATED:
        tensor = tensor.conj()
    if flags & _NEGATED:
        tensor = torch._neg_view(tensor)
    requires_grad = bool(flags & _REQUIRES_GRAD)
    if flags & _PARAMETER:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


class _Pickler(cloudpickle.CloudPickler):
    """Ray's pickler, with placeholders for the tensors that RDT carries."""

    def __init__(self, stream: _Stream, buffers: list[Any], wanted: Wanted | None):
        super().__init__(stream, protocol=5, buffer_callback=buffers.append)
        self.tensors: list[torch.Tensor] = []
        self.is_parameter: list[bool] = []
        is_torch = wanted is None or wanted.is_torch
        self._devices = None if wanted is None else wanted.devices
        self._others = None if is_torch else wanted
        # Without torch in the process there is no tensor to look for.
        torch = sys.modules.get("torch") if is_torch else None
        self._tensor_type = getattr(torch, "Tensor", None)
        self._parameter_type = getattr(getattr(torch, "nn", None), "Parameter", None)

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is self._tensor_type and is_carried(obj, self._devices):
            return self._take(obj, False)
        if kind is self._parameter_type and is_carried(obj, self._devices) and not obj.__dict__:
            return self._take(obj, True)
        if self._others is not None and self._others.takes(obj):
            self.tensors.append(obj)
            return _placeholder, (len(self.tensors) - 1,)
        return super().reducer_override(obj)

    def _take(self, tensor: torch.Tensor, is_parameter: bool) -> tuple[Any, ...]:
        self.tensors.append(tensor)
        self.is_parameter.append(is_parameter)
        call = (_placeholder, (len(self.tensors) - 1,))
        if not tensor.__dict__:
            return call
        return *call, dict(tensor.__dict__), None, None, _set_attributes


def is_carried(tensor: torch.Tensor, devices: frozenset[str] | None = None) -> bool:
    """Whether RDT moves this tensor's bytes itself: plain, strided, on one of the devices.

    Args:
        tensor: The tensor.
        devices: Those of a user's transport; None for those that RDT's own know.
    """
    import torch

    return (
        tensor.layout is torch.strided
        and _is_within_reach(tensor, devices)
        and not tensor.is_quantized
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _is_within_reach(tensor: torch.Tensor, devices: frozenset[str] | None) -> bool:
    if devices is not None:
        return tensor.device.type in devices
    return tensor.is_cpu or accelerators.of(tensor.device.type) is not None


def lay_out(tensors: list[torch.Tensor], is_parameter: list[bool] | None = None) -> Captured:
    """Finds the regions of tensors and how each lies in its region.

    Of tensors on devices it records the events; so it runs on the thread that made them. An
    address means one thing in all of a process, on whichever device.
    """
    spans = [_span(tensor) for tensor in tensors]
    regions, owner = _merge(spans)
    parameters = is_parameter or itertools.repeat(False)
    rows = [
        _row(tensor, start, end, region, regions[region][0], parameter)
        for tensor, (_, start, end), region, parameter in zip(tensors, spans, owner, parameters)
    ]
    devices = {
        region: tensor.device.type for tensor, region in zip(tensors, owner) if not tensor.is_cpu
    }
    table = Table([nbytes for _, nbytes in regions], rows, devices)
    return Captured(tensors, regions, table, _record(tensors) if devices else ())


def _record(tensors: list[torch.Tensor]) -> list[Event]:
    """An event for each device that some of the tensors are on."""
    events = []
    for device in {tensor.device for tensor in tensors if not tensor.is_cpu}:
        accelerator = accelerators.of(device.type)
        if accelerator is not None:
            events.append(accelerator.record(device))
    return events


#: The address of a tensor's storage, and where the tensor's bytes begin and end.
_Span = tuple[int, int, int]


def _span(tensor: torch.Tensor) -> _Span:
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        extent = tensor.nbytes
    elif tensor.numel() == 0:
        extent = 0
    else:
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
        extent = (last + 1) * tensor.element_size()
    # The storage's address; cheaper than to ask the storage, which Python would make an object for.
    storage = start - int(tensor.storage_offset()) * tensor.element_size()
    return storage, start, start + extent


def _merge(spans: list[_Span]) -> tuple[list[Region], list[int]]:
    """Joins spans of one storage that overlap or touch. Returns the regions and each span's."""
    starts: list[int] = []
    ends: list[int] = []
    owner = [0] * len(spans)
    last_storage = -1
    for index in sorted(range(len(spans)), key=spans.__getitem__):
        storage, start, end = spans[index]
        # An empty span takes part in no merge: its address may be anything.
        if start < end and storage == last_storage and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start - (start - storage) % _REGION_ALIGNMENT if start < end else start)
            ends.append(end)
            last_storage = storage if start < end else -1
        owner[index] = len(starts) - 1
    return [(start, end - start) for start, end in zip(starts, ends)], owner


def _row(
    tensor: torch.Tensor, start: int, end: int, region: int, base: int, is_parameter: bool
) -> Row:
    shape, stride = tuple(tensor.shape), tensor.stride()
    is_dense = start < end and stride == contiguous_stride(shape)
    flags = _PARAMETER if is_parameter else 0
    if tensor.requires_grad:
        flags |= _REQUIRES_GRAD
    dtype = tensor.dtype
    if dtype.is_complex and tensor.is_conj():
        flags |= _CONJUGATED
    if tensor.is_neg():
        flags |= _NEGATED
    offset = start - base if start < end else 0
    return region, offset, dtype, shape, None if is_dense else stride, flags


@functools.lru_cache(maxsize=4096)
def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride, in elements, of a dense row-major tensor."""
    stride, step = [], 1
    for length in reversed(shape):
        stride.append(step)
        step *= max(length, 1)
    return tuple(reversed(stride))


def _placeholder(index: int) -> torch.Tensor:
    """Stands in the pickled skeleton for the tensor of this index."""
    return _restoring.tensors()[index]


def _set_attributes(tensor: torch.Tensor, attributes: dict[str, Any]) -> None:
    tensor.__dict__.update(attributes)


class _Restoring(threading.local):
    """The tensors of the values that this thread is unpickling, innermost last."""

    def __init__(self) -> None:
        self._stack: list[Sequence[torch.Tensor]] = []

    def push(self, tensors: Sequence[torch.Tensor]) -> None:
        self._stack.append(tensors)

    def pop(self) -> None:
        self._stack.pop()

    def tensors(self) -> Sequence[torch.Tensor]:
        if not self._stack:
            raise pickle.UnpicklingError(
                "this is the skeleton of an RDT value; only Ray can restore its tensors"
            )
        return self._stack[-1]


_restoring = _Restoring()


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
