"""Cutting the buffers of one object into messages. Pure: both sides compute the same plan.

A message costs about the same whether it carries 8 bytes or 100 KiB, so runs of small buffers share
one, through a staging slot. Large buffers go straight from and into their own memory, in segments,
so that an aborted transfer ends within one segment.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SMALL_NBYTES = 256 << 10  # buffers below this are packed
SLOT_NBYTES = 1 << 20  # bytes of small buffers in one message
SEGMENT_NBYTES = 16 << 20  # bytes of a large buffer in one message
WINDOW = 4  # messages in flight at once; as many staging slots

HEADER_NBYTES = 256
_HEADER = struct.Struct("<4sIIQQ8s")
_MAGIC = b"RDT1"
_REASON_NBYTES = HEADER_NBYTES - _HEADER.size - 1


class Message(NamedTuple):
    """One part of a large buffer, or small buffers one after the other.

    It carries the buffers ``first`` to ``last`` (exclusive), from byte ``start`` of the first one.
    """

    first: int
    last: int
    start: int
    nbytes: int

    @property
    def is_packed(self) -> bool:
        """Tell whether it goes through a staging slot."""
        return self.last - self.first > 1


def plan(sizes: Sequence[int]) -> Iterator[Message]:
    """Cut buffers of these sizes into messages, in order. Empty buffers need none."""
    first = run = 0
    for index, size in enumerate(sizes):
        is_small = size < SMALL_NBYTES
        if not is_small or run + size > SLOT_NBYTES:
            yield from _packed(sizes, first, index, run)
            first, run = index, 0
        if is_small:
            run += size
        else:
            for start in range(0, size, SEGMENT_NBYTES):
                yield Message(index, index + 1, start, min(SEGMENT_NBYTES, size - start))
            first = index + 1
    yield from _packed(sizes, first, len(sizes), run)


def _packed(sizes: Sequence[int], first: int, last: int, nbytes: int) -> Iterator[Message]:
    if nbytes:
        yield Message(first, first + 1 if nbytes == sizes[first] else last, 0, nbytes)


@dataclass(frozen=True)
class Header:
    """The message of the producer before the bytes of one transfer.

    Gloo ends the whole process when a message is larger than the buffer that waits for it, so the
    consumer compares headers before it offers any memory.

    Attributes:
        tag: The transfer's tag.
        count: How many buffers follow.
        nbytes: Their bytes.
        digest: A hash of all sizes in order.
        refusal: The reason why no bytes follow, "" if they do.
    """

    tag: int
    count: int
    nbytes: int
    digest: bytes
    refusal: str = ""

    @classmethod
    def describing(cls, tag: int, sizes: Sequence[int]) -> Header:
        """Return the header for buffers of these sizes."""
        digest = hashlib.blake2b(array("Q", sizes).tobytes(), digest_size=8).digest()
        return cls(tag, len(sizes), sum(sizes), digest)

    @classmethod
    def refusing(cls, tag: int, reason: str) -> Header:
        """Return the header of a producer that refuses to send."""
        return cls(tag, 0, 0, bytes(8), reason or "no reason given")

    def encode(self) -> bytes:
        """Return the header as ``HEADER_NBYTES`` bytes."""
        fixed = _HEADER.pack(
            _MAGIC, self.tag, bool(self.refusal), self.count, self.nbytes, self.digest
        )
        reason = self.refusal.encode()[:_REASON_NBYTES]
        return (fixed + reason).ljust(HEADER_NBYTES, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Read what ``encode`` made.

        Raises:
            ValueError: these bytes are no header.
        """
        magic, tag, refused, count, nbytes, digest = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError(f"expected the header of a transfer, got {data[:16]!r}")
        reason = data[_HEADER.size :].rstrip(b"\0").decode(errors="replace") if refused else ""
        return cls(tag, count, nbytes, digest, reason)
