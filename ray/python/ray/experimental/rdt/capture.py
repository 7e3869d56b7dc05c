"""Takes the tensors out of a value (producer) and puts them back (consumer).

The value is pickled with Ray's own pickler; each tensor that RDT carries becomes a call of
``_placeholder(index)`` in the stream, and a row in a table that says which bytes of which region
it is. Everything else, tensors of other kinds included, is pickled as plain Ray pickles it.
Nothing is registered with any pickler of the process.

Regions: tensors whose spans of one storage overlap or touch share a region, so ties and views
survive and every byte is sent once. A view is its own span, not its whole storage.

Layout of the value's out-of-band buffers: the pickled table, then the tensors' bytes where the
object is eager, then the buffers of the rest of the value.
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
from ray.experimental.rdt.descriptor import Descriptor

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
    """The layout of an object's tensors, as it travels."""

    regions: list[int]
    rows: list[Row]

    @property
    def nbytes(self) -> int:
        return sum(self.regions)


@dataclass
class Captured:
    """The tensors of one value at its producer.

    Attributes:
        tensors: As the user returned them, in the order of the placeholders.
        regions: Their memory; the tensors keep it alive.
        table: Their layout.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    table: Table = field(default_factory=lambda: Table([], []))

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def gather(self) -> bytes:
        """A copy of all regions, one after the other."""
        return b"".join(ctypes.string_at(address, nbytes) for address, nbytes in self.regions)


class Skeleton(NamedTuple):
    """A pickled value whose tensors are placeholders."""

    inband: bytes
    buffers: list[Any]
    contained_refs: Any


def take(context: Any, value: Any) -> tuple[Skeleton, Captured]:
    """Pickles ``value`` and takes its tensors out.

    Runs on: producer, the thread that runs the user's task. Holds the GIL; copies no tensor.

    Args:
        context: The worker's ``SerializationContext``, which collects contained ObjectRefs.
        value: What the user returned or put.

    Raises:
        TypeError: as plain Ray does for a value that cannot be pickled.
    """
    buffers: list[Any] = []
    stream = _Stream()
    pickler = _Pickler(stream, buffers)
    context.set_in_band_serialization()
    try:
        pickler.dump([value])
    except Exception:
        context.get_and_clear_contained_object_refs()
        raise
    finally:
        context.set_out_of_band_serialization()
    refs = context.get_and_clear_contained_object_refs()
    return Skeleton(stream.join(), buffers, refs), lay_out(pickler.tensors, pickler.is_parameter)


def pack(skeleton: Skeleton, captured: Captured, head: Descriptor | None) -> Any:
    """The serialized object that Ray stores: an RDT value, or a plain one if ``head`` is None."""
    writer = Pickle5Writer()
    metadata = ray_constants.OBJECT_METADATA_TYPE_PYTHON
    if head is not None:
        metadata = descriptor_module.encode(head)
        writer.buffer_callback(pickle.PickleBuffer(pickle.dumps(captured.table, protocol=5)))
        if head.is_eager:
            writer.buffer_callback(pickle.PickleBuffer(captured.gather()))
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
    """

    head: Descriptor
    inband: Any
    table: Table
    eager: Any | None
    buffers: Sequence[Any]

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
    eager = buffers[1] if head.is_eager else None
    return Envelope(head, inband, table, eager, buffers[2 if head.is_eager else 1 :])


def build_tensors(
    table: Table,
    memory: Sequence[tuple[Any, int]],
    ready: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> list[torch.Tensor]:
    """Makes the tensors of ``table`` over memory that holds their bytes.

    Args:
        table: The layout.
        memory: For each region a writable buffer and the offset in it. Each region becomes a
            storage of its own that keeps its buffer alive, so that a tensor kept alone does not
            drag the others' bytes along when it is pickled.
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
            tensor = torch.empty_strided(shape, stride or (), dtype=dtype)
        elif stride is None and region not in shared:
            buffer, offset = memory[region]
            items = math.prod(shape)
            flat = torch.frombuffer(buffer, dtype=dtype, count=items, offset=offset + start)
            tensor = flat if len(shape) == 1 else flat.view(shape)
        else:
            if region not in storages:
                storages[region] = _storage_over(memory[region], count)
            step = contiguous_stride(shape) if stride is None else stride
            empty = torch.empty(0, dtype=dtype)
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
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=offset)
    return flat.untyped_storage()


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

    def __init__(self, stream: _Stream, buffers: list[Any]):
        super().__init__(stream, protocol=5, buffer_callback=buffers.append)
        self.tensors: list[torch.Tensor] = []
        self.is_parameter: list[bool] = []
        # Without torch in the process there is no tensor to look for.
        torch = sys.modules.get("torch")
        self._tensor_type = getattr(torch, "Tensor", None)
        self._parameter_type = getattr(getattr(torch, "nn", None), "Parameter", None)

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is self._tensor_type and is_carried(obj):
            return self._take(obj, False)
        if kind is self._parameter_type and is_carried(obj) and not obj.__dict__:
            return self._take(obj, True)
        return super().reducer_override(obj)

    def _take(self, tensor: torch.Tensor, is_parameter: bool) -> tuple[Any, ...]:
        self.tensors.append(tensor)
        self.is_parameter.append(is_parameter)
        call = (_placeholder, (len(self.tensors) - 1,))
        if not tensor.__dict__:
            return call
        return *call, dict(tensor.__dict__), None, None, _set_attributes


def is_carried(tensor: torch.Tensor) -> bool:
    """Whether RDT moves this tensor's bytes itself: plain, strided, on a device that it knows."""
    import torch

    return (
        tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def lay_out(tensors: list[torch.Tensor], is_parameter: list[bool] | None = None) -> Captured:
    """Finds the regions of tensors and how each lies in its region."""
    spans = [_span(tensor) for tensor in tensors]
    regions, owner = _merge(spans)
    parameters = is_parameter or itertools.repeat(False)
    rows = [
        _row(tensor, start, end, region, regions[region][0], parameter)
        for tensor, (_, start, end), region, parameter in zip(tensors, spans, owner, parameters)
    ]
    return Captured(tensors, regions, Table([nbytes for _, nbytes in regions], rows))


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
