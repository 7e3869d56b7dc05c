"""staged: device memory through host memory, for pairs without a better transport.

The producer copies a chunk into a slot of host memory that its devices use at full speed. A
consumer of the same host maps the slot and copies out of it to its own device. For any other
consumer, and for one that receives in host memory, the agent pulls the chunk over its best lane.
Three chunks are in flight at once, so the copies of both sides and the pull run side by side, and
neither side pins more than a few chunks however large the object is. Nothing is copied before the
first remote pull.

The slots are few. When all are read, a request waits for one for a moment, then its chunk goes
through other pinned memory, which only the agent reads.

No transport that users name: the last way of tensors on devices, see ``device_lanes``.

Request: ``STAGED_CHUNK`` of ``rpc/protocol.py``. The answer is the key to pull the bytes by, and
the slot they are in, if any. The consumer frees the key at the producer's agent when it has them;
the producer itself does so soon after the timeout.
"""

from __future__ import annotations

import itertools
import logging
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.base import Accelerator
from ray.experimental.rdt.accelerators.events import Event, have_ended
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.thread_pool import DaemonThreads
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import CallError, Session
from ray.experimental.rdt.transports.base import Buffers, Capabilities, Events, Peer, Route
from ray.experimental.rdt.transports.staged import chunk_copies
from ray.experimental.rdt.transports.staged import reading as staged_reading
from ray.experimental.rdt.transports.staged.shared_slots import Slot, Slots

if TYPE_CHECKING:
    import torch

_SLOTS = 8
_THREADS = 8

#: How long a request waits for a slot. One is read within some milliseconds, unless its reader
#: waits for its device, and readers that wait for each other's slots must go on.
_SLOT_WAIT_S = 0.1

#: A reader gives up at its deadline. A chunk that was copied for it may stay for so much longer, if
#: it could not say so.
_READER_SLACK_S = 5.0


@dataclass(frozen=True)
class _Chunk:
    """A copy in host memory, in a slot or not, kept while the agent serves it.

    Attributes:
        key: Its key at the agent.
        reader: The agent of the consumer that asked for it.
        until: When the consumer has certainly timed out.
        exposure: The number of the object.
    """

    memory: torch.Tensor
    slot: Slot | None
    key: bytes
    reader: bytes
    until: Deadline
    exposure: int


class StagedTransport:
    """See ``base.OneSided``. Thread-safe. The agent serves and pulls the chunks."""

    capabilities = Capabilities("staged", frozenset(), two_sided=False)

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._exposed: dict[int, Buffers] = {}
        self._chunks: dict[int, _Chunk] = {}
        # The store's own tokens are above 0.
        self._tokens = itertools.count(-1, -1)
        self._copies = chunk_copies.ChunkCopies()
        self._reader = staged_reading.Reader(session, self._copies)
        self._slots: dict[str, Slots] = {}
        # Slots of requests that failed while devices wrote.
        self._written: list[tuple[Slot, list[Event]]] = []
        threads = DaemonThreads(_THREADS, "rdt-staged")
        session.serve(protocol.STAGED_CHUNK, self._on_chunk, threads)
        session.on_close(threads.close)
        session.on_released(self._on_released)
        session.on_peer_lost(self._on_peer_lost)
        session.on_tick(self._on_tick)

    # Producer.

    def expose(self, buffers: Buffers) -> Route:
        number = next(self._numbers)
        self._exposed[number] = buffers
        return {"exposure": number}

    def withdraw(self, exposed: Route) -> None:
        number = exposed["exposure"]
        self._exposed.pop(number, None)
        self._release(lambda chunk: chunk.exposure == number)

    def close(self) -> None:
        """See ``OneSided``. The agent, which ends after this, reads the chunks until then."""
        self._exposed.clear()

    def _on_chunk(self, peer_id: bytes, body: protocol.StagedChunk) -> dict[str, Any]:
        """Runs on: producer, an rdt-staged thread."""
        buffers = self._exposed.get(body["exposure"])
        if buffers is None:
            raise CallError("the object is not exposed here any more", "not_found")
        start, stop, deadline = body["start"], body["stop"], Deadline.after(body["timeout_s"])
        pieces = list(chunk_copies.pieces_of(buffers, start, stop))
        accelerator = chunk_copies.accelerator_of(pieces[0].device)
        slot = self._take_slot(accelerator, deadline)
        if slot is None:
            place, memory = None, accelerator.pinned(stop - start)
        else:
            place, memory = slot.describe(), slot.memory[: stop - start]
        self._fill(memory, slot, pieces, deadline)
        key, until = os.urandom(16), deadline.later(_READER_SLACK_S)
        with self._lock:
            token = next(self._tokens)
            self._chunks[token] = _Chunk(memory, slot, key, peer_id, until, body["exposure"])
        where = array("Q", [memory.data_ptr()]), array("Q", [memory.numel()])
        self._session.agent.register(key, *where, token)
        if self._session.is_asker_lost():
            self._session.agent.release(key)
        return {"key": key, "slot": place}

    def _take_slot(self, accelerator: Accelerator, deadline: Deadline) -> Slot | None:
        """Return a free slot for devices of a kind, None if there is none."""
        if "shm" not in settings().lanes:
            return None
        device_type = accelerator.device_type
        with self._lock:
            if device_type not in self._slots:
                nbytes = staged_reading.CHUNK_NBYTES
                self._slots[device_type] = Slots(_SLOTS, nbytes, accelerator)
            slots = self._slots[device_type]
        try:
            return slots.take(min(_SLOT_WAIT_S, deadline.left_s()))
        except (OSError, RuntimeError) as error:
            self._session.log_once(
                f"RDT cannot share host memory for tensors on {device_type} with other processes: "
                f"{error}. Falling back to pulls by the agent.",
                logging.INFO,
            )
            return None

    def _fill(
        self, memory: torch.Tensor, slot: Slot | None, pieces: Buffers, deadline: Deadline
    ) -> None:
        """Copy finished pieces to host memory."""
        begun: list[Event] = []
        try:
            self._copies.to_host(memory, pieces, begun)
            for event in begun:
                event.wait(deadline.left_s())
        except BaseException:  # also Ctrl-C: devices may still write the slot
            if slot is not None:
                with self._lock:
                    self._written.append((slot, begun))
            raise

    def _on_released(self, tokens: list[int]) -> None:
        """Runs on: producer, the reaper thread."""
        with self._lock:
            ended = [self._chunks.pop(token, None) for token in tokens]
        for chunk in ended:
            if chunk is not None and chunk.slot is not None:
                chunk.slot.give_back()

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: producer, the reaper thread."""
        self._release(lambda chunk: chunk.reader == peer_id)
        self._reader.forget(peer_id)

    def _on_tick(self) -> None:
        """Runs on: producer, the reaper thread."""
        self._release(lambda chunk: chunk.until.has_passed())
        with self._lock:
            ended = [slot for slot, begun in self._written if have_ended(begun, 0)]
            self._written = [entry for entry in self._written if entry[0] not in ended]
        for slot in ended:
            slot.give_back()

    def _release(self, is_over: Callable[[_Chunk], bool]) -> None:
        with self._lock:
            keys = [chunk.key for chunk in self._chunks.values() if is_over(chunk)]
        for key in keys:
            self._session.agent.release(key)

    # Consumer.

    def read(
        self, peer: Peer, exposed: Route, buffers: Buffers, deadline: Deadline, after: Events = ()
    ) -> None:
        self._reader.read(peer, exposed["exposure"], buffers, deadline, after)
