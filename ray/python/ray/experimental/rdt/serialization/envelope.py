"""The value as it travels: the pickled skeleton, the table of its tensors, and its buffers.

Out-of-band buffers of the value: the pickled table, then the tensors' bytes if the object is eager
or the user_description if its transport is user-defined, then the buffers of the rest of the value.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray._private import ray_constants
from ray._raylet import (
    MessagePackSerializedObject,
    MessagePackSerializer,
    Pickle5SerializedObject,
    Pickle5Writer,
    split_buffer,
    unpack_pickle5_buffers,
)

from ray.experimental.rdt._tensors import Table, restore
from ray.experimental.rdt.common import descriptor
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.serialization.capture import Skeleton
from ray.experimental.rdt.serialization.layout import Captured

if TYPE_CHECKING:
    import torch


def pack(
    skeleton: Skeleton, captured: Captured, head: Descriptor | None, user_description: bytes = b""
) -> Any:
    """Return the serialized object that Ray stores: a plain value if ``head`` is None."""
    writer = Pickle5Writer()
    metadata = ray_constants.OBJECT_METADATA_TYPE_PYTHON
    if head is not None:
        metadata = descriptor.encode(head)
        writer.buffer_callback(pickle.PickleBuffer(pickle.dumps(captured.table, protocol=5)))
        if head.is_eager:
            writer.buffer_callback(pickle.PickleBuffer(captured.gather()))
        if head.is_user_defined:
            writer.buffer_callback(pickle.PickleBuffer(user_description))
    for buffer in skeleton.buffers:
        writer.buffer_callback(buffer)
    body = Pickle5SerializedObject(metadata, skeleton.inband, writer, skeleton.contained_refs)
    return MessagePackSerializedObject(metadata, _msgpack_of_first_object(), [], body)


@dataclass
class Envelope:
    """An RDT value as it arrived, without its tensors.

    Attributes:
        eager: The tensors' bytes if they rode along, else None.
        buffers: The out-of-band buffers of the rest of the value.
        user_description: What a user's transport needs to receive them, pickled; else None.
    """

    head: Descriptor
    inband: Any
    table: Table
    eager: Any | None
    buffers: Sequence[Any]
    user_description: Any | None = None

    def restore(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Return the value, as the list of Python objects that Ray's deserializer expects.

        Runs on: consumer, the thread that deserializes.
        """
        value: list[Any] = restore(self.inband, self.buffers, tensors)
        return value


def open_envelope(metadata: bytes, data: Any) -> Envelope:
    """Read an RDT value without its tensors.

    Raises:
        DescriptorError: The metadata is not that of an RDT value.
    """
    head = descriptor.decode(metadata)
    _, body = split_buffer(data)
    inband, buffers = unpack_pickle5_buffers(body)
    table = pickle.loads(buffers[0])
    if head.is_user_defined:
        return Envelope(head, inband, table, None, buffers[2:], buffers[1])
    eager = buffers[1] if head.is_eager else None
    return Envelope(head, inband, table, eager, buffers[2 if head.is_eager else 1 :])


@functools.cache
def _msgpack_of_first_object() -> bytes:
    """Return the MessagePack half of each value: it names the first pickled object."""
    encoded: bytes = MessagePackSerializer.dumps(_Opaque(), lambda _: 0)
    return encoded


class _Opaque:
    """A type that MessagePack does not know."""
