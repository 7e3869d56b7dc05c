"""Transfers of one object to this process, and those that need no other process.

Runs on: consumer, the thread that deserializes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

from ray.experimental.rdt._tensors import build_tensors
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.consumer.prefetcher import Prefetcher
from ray.experimental.rdt.consumer.receive_buffers import Targets, fill
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.serialization.envelope import Envelope
from ray.experimental.rdt.serialization.layout import Captured
from ray.experimental.rdt.transports.registry import Transports
from ray.experimental.rdt.transports.selection import AutoTransportPolicy

_ALIGNMENT = 64


@dataclass(frozen=True)
class TransferServices:
    """The parts of a session that transfers use."""

    session: Session
    transports: Transports
    policy: AutoTransportPolicy
    prefetcher: Prefetcher


class Transfer(Protocol):
    """One object, or its memory of one device type, on its way to this process.

    The constructor does no I/O. ``lane`` is for error messages.
    """

    @property
    def lane(self) -> str: ...

    def start(self, deadline: Deadline) -> None:
        """Ask for the bytes, if that can be done ahead of ``finish``. Blocks at most briefly."""

    def finish(self, deadline: Deadline) -> Targets:
        """Wait for the tensors. Raises AgentError, TimeoutError or an error of a transport."""

    def abandon(self) -> None:
        """Give the transfer up. No byte is written afterwards. Idempotent."""


class LocalTransfer:
    """An object of this process: the fetch returns the same tensors."""

    lane = "inproc"

    def __init__(self, captured: Captured, targets: Targets | None):
        self._captured = captured
        self._targets = targets

    def start(self, deadline: Deadline) -> None:
        """Have this thread's streams wait for what writes the tensors."""
        for event in self._captured.events:
            event.make_stream_wait()

    def finish(self, deadline: Deadline) -> Targets:
        if self._targets is None:
            return self._captured.tensors
        self._captured.require_unchanged()
        return fill(self._targets, self._captured.tensors)

    def abandon(self) -> None:
        """Nothing is in flight."""


class InlineTransfer:
    """An object whose bytes are in the value."""

    lane = "eager"

    def __init__(self, envelope: Envelope, targets: Targets | None):
        self._envelope = envelope
        self._targets = targets

    def start(self, deadline: Deadline) -> None:
        """Nothing is in flight."""

    def finish(self, deadline: Deadline) -> Targets:
        table, bytes_ = self._envelope.table, memoryview(self._envelope.eager or b"")
        # Each region begins where any dtype may: vector instructions fault elsewhere.
        memory = bytearray(len(bytes_) + (len(table.regions) + 1) * _ALIGNMENT)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        places, at, to = [], 0, -start % _ALIGNMENT
        for nbytes in table.regions:
            memory[to : to + nbytes] = bytes_[at : at + nbytes]
            places.append((memory, to))
            at += nbytes
            to += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        tensors = build_tensors(table, places)
        return tensors if self._targets is None else fill(self._targets, tensors)

    def abandon(self) -> None:
        """Nothing is in flight."""
