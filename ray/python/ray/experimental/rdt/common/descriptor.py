"""Descriptor of an RDT value in its metadata: where the tensors are.

Ray copies the metadata of an object with the object and does not interpret it. The metadata of an
RDT value is ``PYTHON,RDT`` followed by the base64 text of a packed head, so that Ray's own fields,
which are separated by commas, stay readable. Pure code: no Ray, torch or thread inside.

Head, little-endian: version u8, flags u8, key 16 bytes, payload bytes u64, producer id 16 bytes,
length of the transport's name u8 and the name, length of the agent's address u16 and the address,
the origin if there is one.
"""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass, field

PREFIX = b"PYTHON,RDT"
VERSION = 2
KEY_BYTES = 16
PRODUCER_BYTES = 16
ORIGIN_BYTES = 28

_HEAD = struct.Struct("<BB16sQ16s")
_EAGER = 1
_USERS = 2
_ORIGIN = 4


class DescriptorError(ValueError):
    """Raised if bytes are not a descriptor of this version."""


@dataclass(frozen=True)
class Descriptor:
    """The location of the tensors of one RDT object.

    Attributes:
        key: 16 random bytes, which permit to read the object at the producer's agent.
        nbytes: The number of bytes that a pull transfers.
        producer: The producer's actor id, or the start of its worker id if it is not an actor.
        transport: The transport that the user named, in lower case.
        address: The address of the producer's agent.
        is_eager: Whether the value contains the bytes of the tensors.
        is_user_defined: Whether a user wrote the transport; the value contains its description.
        origin: The object's id if a consumer may receive the value without a reference, else b"".
    """

    key: bytes = field(repr=False)
    nbytes: int
    producer: bytes
    transport: str
    address: bytes
    is_eager: bool
    is_user_defined: bool = False
    origin: bytes = b""


def encode(descriptor: Descriptor) -> bytes:
    """Return the metadata of a value with this descriptor."""
    name = descriptor.transport.encode()
    head = _HEAD.pack(
        VERSION,
        _EAGER * descriptor.is_eager
        | _USERS * descriptor.is_user_defined
        | _ORIGIN * bool(descriptor.origin),
        descriptor.key,
        descriptor.nbytes,
        descriptor.producer,
    )
    tail = bytes([len(name)]) + name + struct.pack("<H", len(descriptor.address))
    return PREFIX + base64.b64encode(head + tail + descriptor.address + descriptor.origin)


def is_rdt(metadata: bytes | None) -> bool:
    """Tell whether a serialized value with this metadata is an RDT value."""
    return metadata is not None and metadata.startswith(PREFIX)


def decode(metadata: bytes) -> Descriptor:
    """Return the descriptor in the metadata of an RDT value.

    Raises:
        DescriptorError: The metadata is truncated, of another version, or not base64.
    """
    # Ray appends its own fields, such as a debugger's breakpoint, after another comma.
    text = metadata[len(PREFIX) :].split(b",", 1)[0]
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DescriptorError(f"the descriptor is not base64: {error}") from None
    return unpack(raw)


def unpack(raw: bytes) -> Descriptor:
    """Return the descriptor in a packed head. Raises DescriptorError."""
    if not raw or raw[0] != VERSION:
        found = raw[0] if raw else "nothing"
        raise DescriptorError(f"descriptor version {found}, this process reads {VERSION}")
    try:
        _, flags, key, nbytes, producer = _HEAD.unpack_from(raw)
        at = _HEAD.size
        name_end = at + 1 + raw[at]
        transport = raw[at + 1 : name_end].decode("ascii")
        (length,) = struct.unpack_from("<H", raw, name_end)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise DescriptorError(f"the descriptor is malformed: {error}") from None
    address = raw[name_end + 2 : name_end + 2 + length]
    origin = raw[name_end + 2 + length :]
    if len(address) != length or not transport:
        raise DescriptorError(f"address of {length} bytes announced, {len(address)} found")
    if len(origin) != ORIGIN_BYTES * bool(flags & _ORIGIN):
        raise DescriptorError(f"origin of {len(origin)} bytes")
    is_eager, is_user_defined = bool(flags & _EAGER), bool(flags & _USERS)
    return Descriptor(key, nbytes, producer, transport, address, is_eager, is_user_defined, origin)


@dataclass(frozen=True)
class Location:
    """The place of an object's tensors.

    Attributes:
        address: The address of the producer's agent.
        key: The object's key at that agent.
        nbytes: The bytes that a pull moves.
        regions: The bytes of each region if the object is worth a prefetch, else None.
        is_eager: Whether the value contains the tensors' bytes.
    """

    address: bytes
    key: bytes = field(repr=False)
    nbytes: int
    regions: tuple[int, ...] | None = None
    is_eager: bool = False
