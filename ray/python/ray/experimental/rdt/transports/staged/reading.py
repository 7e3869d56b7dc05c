"""The consumer of the staged transport."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.events import Event, have_ended
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import note_still_writing
from ray.experimental.rdt.common.once import StillBeingMade
from ray.experimental.rdt.rpc import checksums, protocol
from ray.experimental.rdt.rpc.session import Session, boot_id_of
from ray.experimental.rdt.transports.base import Buffers, Events, Peer
from ray.experimental.rdt.transports.staged import chunk_copies
from ray.experimental.rdt.transports.staged.shared_slots import Mapped, Mappings

if TYPE_CHECKING:
    import torch

CHUNK_NBYTES = 16 << 20
_WINDOW = 3
_COPIES = 2  # chunks that a read copies to its devices at once

#: How long a failed read waits for devices that still write.
_GRACE_S = 5.0


class Reader:
    """The state that the reads of one process share. Thread-safe.

    Attributes:
        session: Requests the chunks; its agent pulls those that cannot be mapped.
        copies: Copies between devices and chunks.
    """

    def __init__(self, session: Session, copies: chunk_copies.ChunkCopies):
        self.session = session
        self.copies = copies
        self._mappings = Mappings()
        self._unmapped: set[bytes] = set()

    def read(
        self, peer: Peer, exposure: int, buffers: Buffers, deadline: Deadline, after: Events
    ) -> None:
        reading = _Reading(self, peer, exposure, buffers, deadline, after)
        try:
            reading.run()
        except BaseException as error:  # also Ctrl-C: devices may still write the buffers
            if not reading.end():
                note_still_writing(error)
            raise

    def forget(self, producer: bytes) -> None:
        """Unmap the memory of a lost producer. Runs on: the reaper thread."""
        self._unmapped.discard(producer)
        self.session.run_in_background(self._mappings.forget, producer)

    def map(
        self, peer: Peer, slot: dict[str, Any] | None, pieces: Buffers, deadline: Deadline
    ) -> Mapped | None:
        """Map the producer's memory; None if the devices of these pieces cannot copy from it."""
        is_near = boot_id_of(peer.address) == boot_id_of(self.session.address)
        is_wanted = "shm" in settings().lanes and not settings().checksum
        is_for_devices = all(not piece.is_cpu for piece in pieces)
        if slot is None or not (is_near and is_wanted and is_for_devices):
            return None
        if peer.agent_id in self._unmapped:
            return None
        try:
            accelerator = chunk_copies.accelerator_of(pieces[0].device)
            return self._mappings.open(peer.agent_id, slot, accelerator, deadline)
        except StillBeingMade:
            raise
        except (OSError, RuntimeError) as error:
            self._unmapped.add(peer.agent_id)
            self.session.log_once(
                f"RDT cannot map the host memory of agent {peer.agent_id.hex()[:8]}: {error}. "
                "Falling back to pulls by the agent.",
                logging.INFO,
            )
            return None


@dataclass(frozen=True)
class _Chunk:
    """A chunk that is copied from host memory to devices.

    Attributes:
        key: The key of the chunk at the producer's agent.
        begun: The copies.
        mapped: The producer's memory that they copy from, if it is mapped here.
    """

    key: bytes
    begun: list[Event] = field(default_factory=list)
    mapped: Mapped | None = None


@dataclass(frozen=True)
class _Reading:
    """The read of one object. Runs on: consumer, the fetching thread."""

    reader: Reader
    peer: Peer
    exposure: int
    buffers: Buffers
    deadline: Deadline
    after: Events
    chunks: deque[_Chunk] = field(default_factory=deque)

    def run(self) -> None:
        """Read all bytes."""
        total = sum(buffer.numel() for buffer in self.buffers)
        asked: deque[tuple[int, int, Callable[[float], dict[str, Any]]]] = deque()
        for start in range(0, total, CHUNK_NBYTES):
            stop = min(start + CHUNK_NBYTES, total)
            asked.append((start, stop, self._ask(start, stop)))
            if len(asked) == _WINDOW:
                self._take(*asked.popleft())
        while asked:
            self._take(*asked.popleft())
        while self.chunks:
            self._finish_first()

    def end(self) -> bool:
        """Wait for copies after a failure; return whether none is left."""
        begun = [event for chunk in self.chunks for event in chunk.begun]
        has_ended = have_ended(begun, _GRACE_S)
        for chunk in self.chunks:
            self._free(chunk)
        return has_ended

    def _ask(self, start: int, stop: int) -> Callable[[float], dict[str, Any]]:
        body = protocol.StagedChunk(
            exposure=self.exposure, start=start, stop=stop, timeout_s=self.deadline.left_s()
        )
        return self.reader.session.start_call(self.peer.address, protocol.STAGED_CHUNK, body)

    def _take(self, start: int, stop: int, answer: Callable[[float], dict[str, Any]]) -> None:
        while len(self.chunks) >= _COPIES or self._has_first_ended():
            self._finish_first()
        answered = answer(self.deadline.left_s())
        pieces = list(chunk_copies.pieces_of(self.buffers, start, stop))
        mapped = self.reader.map(self.peer, answered["slot"], pieces, self.deadline)
        chunk = _Chunk(answered["key"], mapped=mapped)
        self.chunks.append(chunk)
        if mapped is not None:
            memory, away = mapped.memory[: stop - start], pieces
        else:
            memory, away = self._pull(chunk, pieces)
        self.reader.copies.to_devices(memory, away, self.after, chunk.begun)

    def _pull(self, chunk: _Chunk, pieces: Buffers) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Pull a chunk with the agent. Pieces in host memory are then complete.

        Returns:
            The bytes for devices, and the pieces there that they belong to.
        """
        import torch

        away = [piece for piece in pieces if not piece.is_cpu]
        if away:
            nbytes = sum(piece.numel() for piece in away)
            memory = chunk_copies.accelerator_of(away[0].device).pinned(nbytes)
        else:
            memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        parts = iter(chunk_copies.cut(memory, [piece.numel() for piece in away]))
        landed = [piece if piece.is_cpu else next(parts) for piece in pieces]
        pull = checksums.Pull(
            self.reader.session,
            self.peer.address,
            chunk.key,
            array("Q", [part.data_ptr() for part in landed]),
            array("Q", [part.numel() for part in landed]),
            landed,
        )
        try:
            pull.wait(self.deadline)
        finally:
            pull.abandon()
        self._free(chunk)
        return memory, away

    def _has_first_ended(self) -> bool:
        return bool(self.chunks) and all(event.is_reached() for event in self.chunks[0].begun)

    def _finish_first(self) -> None:
        chunk = self.chunks[0]
        for event in chunk.begun:
            event.wait(self.deadline.left_s())
        if chunk.mapped is not None:
            chunk.mapped.check()
            self._free(chunk)
        self.chunks.popleft()

    def _free(self, chunk: _Chunk) -> None:
        self.reader.session.agent.free(self.peer.address, chunk.key)
