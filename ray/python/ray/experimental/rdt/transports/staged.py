"""staged: device memory through host memory, for every pair that nothing better serves.

The producer copies a chunk into pinned host memory, the consumer's agent pulls that over its best
lane, and the consumer copies it to its own device, or leaves it in host memory where it has none.
Three chunks are under way at once, so the copies of both sides and the pull run side by side, and
neither side pins more than a few chunks however large the object is. Nothing is copied before the
first remote pull.

No transport that users name: the last way of tensors on devices, see ``device_lanes``.

Request (JSON, through the session):

* ``rdt.staged.chunk`` {exposure, start, stop, timeout_s}: copies bytes ``start`` to ``stop`` of the
  exposed buffers, taken one after the other, and answers with the key to pull them by. The consumer
  frees the key at the producer's agent when it has them; the producer itself does so soon after
  ``timeout_s``.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt import checksums
from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.base import Accelerator, Event, have_ended
from ray.experimental.rdt.session import CallError, Session
from ray.experimental.rdt.transports.base import Capabilities, Peer, Route, TransportUnavailable

if TYPE_CHECKING:
    import torch

CHUNK_NBYTES = 16 << 20
_WINDOW = 3

#: How long a failed read waits for a device that still writes.
_GRACE_S = 5.0

#: A reader gives up at its deadline. A chunk that was copied for it may stay for so much longer, if
#: it could not say so.
_READER_SLACK_S = 5.0

Buffers = Sequence["torch.Tensor"]


@dataclass
class _Exposed:
    """One object's buffers.

    Attributes:
        buffers: They share the storages of the user's tensors.
        chunks: The agent's keys for copies that readers may still pull.
    """

    buffers: Buffers
    chunks: set[bytes] = field(default_factory=set)


@dataclass(frozen=True)
class _Chunk:
    """A copy in host memory, kept while the agent serves it.

    Attributes:
        memory: The copy.
        key: What the agent serves it by.
        reader: The agent of the consumer that asked for it.
        until: When that will have given up.
        exposed: The object.
    """

    memory: torch.Tensor
    key: bytes
    reader: bytes
    until: float
    exposed: _Exposed


class StagedTransport:
    """See ``base.OneSided``. Thread-safe.

    Args:
        session: Brings the requests; its agent serves and pulls the chunks.
    """

    capabilities = Capabilities("staged", frozenset(), two_sided=False)

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._exposed: dict[int, _Exposed] = {}
        self._chunks: dict[int, _Chunk] = {}
        # The store's own tokens are above 0.
        self._tokens = itertools.count(-1, -1)
        session.serve("rdt.staged.chunk", self._on_chunk)
        session.on_released(self._on_released)
        session.on_peer_lost(self._on_peer_lost)
        session.on_tick(self._release_overdue)

    # Producer.

    def expose(self, buffers: Buffers) -> Route:
        """See ``OneSided``."""
        with self._lock:
            number = next(self._numbers)
            self._exposed[number] = _Exposed(buffers)
        return {"exposure": number}

    def withdraw(self, exposed: Route) -> None:
        """See ``OneSided``."""
        with self._lock:
            ended = self._exposed.pop(exposed["exposure"], None)
            keys = list(ended.chunks) if ended is not None else []
        for key in keys:
            self._session.agent.release(key)

    def close(self) -> None:
        """See ``OneSided``. The agent, which ends after this, reads the chunks until then."""
        with self._lock:
            self._exposed.clear()

    def _on_chunk(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        with self._lock:
            exposed = self._exposed.get(body["exposure"])
        if exposed is None:
            raise CallError("the object is not exposed here any more", "not_found")
        until = time.monotonic() + float(body["timeout_s"]) + _READER_SLACK_S
        memory = _to_host(exposed.buffers, body["start"], body["stop"], body["timeout_s"])
        chunk = _Chunk(memory, os.urandom(16), peer_id, until, exposed)
        with self._lock:
            token = next(self._tokens)
            self._chunks[token] = chunk
            exposed.chunks.add(chunk.key)
        where = array("Q", [memory.data_ptr()]), array("Q", [memory.numel()])
        self._session.agent.register(chunk.key, *where, token)
        return {"key": chunk.key.hex()}

    def _on_released(self, tokens: list[int]) -> None:
        """Runs on: producer, the reaper thread."""
        with self._lock:
            for token in tokens:
                chunk = self._chunks.pop(token, None)
                if chunk is not None:
                    chunk.exposed.chunks.discard(chunk.key)

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: producer, the reaper thread."""
        self._release(lambda chunk: chunk.reader == peer_id)

    def _release_overdue(self) -> None:
        """Runs on: producer, the reaper thread."""
        now = time.monotonic()
        self._release(lambda chunk: chunk.until < now)

    def _release(self, is_over: Callable[[_Chunk], bool]) -> None:
        with self._lock:
            keys = [chunk.key for chunk in self._chunks.values() if is_over(chunk)]
        for key in keys:
            self._session.agent.release(key)

    # Consumer.

    def read(
        self,
        peer: Peer,
        exposed: Route,
        buffers: Buffers,
        deadline: float,
        after: Sequence[Event] = (),
    ) -> None:
        """See ``OneSided``."""
        reading = _Reading(self._session, peer, exposed["exposure"], buffers, deadline, after)
        try:
            reading.run()
        except BaseException as error:
            error.may_still_write = not reading.has_ended()  # type: ignore[attr-defined]
            raise


class _Reading:
    """One object on its way to this process. Runs on: consumer, the fetching thread."""

    def __init__(
        self,
        session: Session,
        peer: Peer,
        exposure: int,
        buffers: Buffers,
        deadline: float,
        after: Sequence[Event],
    ):
        self._session = session
        self._peer = peer
        self._exposure = exposure
        self._buffers = buffers
        self._deadline = deadline
        self._after = after
        self._copies: deque[tuple[Event, Any]] = deque()

    def run(self) -> None:
        """Returns when all bytes are in place."""
        total = sum(buffer.numel() for buffer in self._buffers)
        asked: deque[tuple[int, int, Callable[[float], dict[str, Any]]]] = deque()
        for start in range(0, total, CHUNK_NBYTES):
            stop = min(start + CHUNK_NBYTES, total)
            asked.append((start, stop, self._ask(start, stop)))
            if len(asked) == _WINDOW:
                self._take(*asked.popleft())
        while asked:
            self._take(*asked.popleft())
        while self._copies:
            self._copies[0][0].wait(self._left())
            self._copies.popleft()

    def has_ended(self) -> bool:
        """After a failure: waits a while; whether nothing is written any more."""
        return have_ended([copy for copy, _ in self._copies], _GRACE_S)

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _ask(self, start: int, stop: int) -> Callable[[float], dict[str, Any]]:
        body = {
            "exposure": self._exposure,
            "start": start,
            "stop": stop,
            "timeout_s": self._left(),
        }
        return self._session.start_call(self._peer.address, "rdt.staged.chunk", body)

    def _take(self, start: int, stop: int, answer: Callable[[float], dict[str, Any]]) -> None:
        key = bytes.fromhex(answer(self._left())["key"])
        try:
            pieces = list(_pieces(self._buffers, start, stop))
            landed = _host_memory_for(pieces)
            self._pull(key, landed)
        finally:
            self._session.agent.free(self._peer.address, key)
        self._to_devices(list(zip(pieces, landed)))

    def _pull(self, key: bytes, landed: Buffers) -> None:
        pull = checksums.pull(
            self._session,
            self._peer.address,
            key,
            array("Q", [memory.data_ptr() for memory in landed]),
            array("Q", [memory.numel() for memory in landed]),
            landed,
        )
        try:
            pull.wait(self._left())
        finally:
            if not pull.done:
                pull.cancel()

    def _to_devices(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for device in {target.device for target, _ in pairs if not target.is_cpu}:
            accelerator = _accelerator(device)
            here = [pair for pair in pairs if pair[0].device == device]
            self._copies.append((accelerator.copy(here, device, self._after), here))
        while len(self._copies) > _WINDOW:
            self._copies[0][0].wait(self._left())
            self._copies.popleft()


def _pieces(buffers: Buffers, start: int, stop: int) -> Iterator[torch.Tensor]:
    """What bytes ``start`` to ``stop`` of the buffers, one after the other, are made of."""
    starts = [0, *itertools.accumulate(buffer.numel() for buffer in buffers)]
    for index in range(bisect_right(starts, start) - 1, len(buffers)):
        first = starts[index]
        if first >= stop:
            return
        piece = buffers[index][max(start - first, 0) : stop - first]
        if piece.numel():
            yield piece


def _host_memory_for(pieces: Buffers) -> list[torch.Tensor]:
    """Memory that the agent can write for each piece: the piece itself if it is in host memory."""
    away = [piece for piece in pieces if not piece.is_cpu]
    if not away:
        return list(pieces)
    sizes = [piece.numel() for piece in away]
    slots = iter(_cut(_accelerator(away[0].device).pinned(sum(sizes)), sizes))
    return [piece if piece.is_cpu else next(slots) for piece in pieces]


def _cut(memory: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    ends = list(itertools.accumulate(sizes))
    return [memory[end - size : end] for size, end in zip(sizes, ends)]


def _to_host(buffers: Buffers, start: int, stop: int, timeout_s: float) -> torch.Tensor:
    """A copy in pinned memory of a chunk of buffers, which their writers have finished."""
    pieces = list(_pieces(buffers, start, stop))
    devices = {piece.device for piece in pieces}
    memory = _accelerator(next(iter(devices))).pinned(stop - start)
    parts = _cut(memory, [piece.numel() for piece in pieces])
    begun = []
    for device in devices:
        pairs = [pair for pair in zip(parts, pieces) if pair[1].device == device]
        begun.append(_accelerator(device).copy(pairs, device))
    for event in begun:
        event.wait(timeout_s)
    return memory


def _accelerator(device: torch.device) -> Accelerator:
    accelerator = accelerators.usable(device.type)
    if accelerator is None:
        raise TransportUnavailable(f"this process cannot work with memory on {device}")
    return accelerator
