"""nixl: NVIDIA's transfer library, over UCX or libfabric. Host and GPU memory, same host or not.

The consumer's agent reads the producer's registered memory. The producer's Python takes part once
for each object, at its first pull: ``expose`` registers the memory and describes it.

UCX has no notion of who may connect and sends in the clear, so nixl is refused where Ray is told to
use TLS and ``RAY_RDT_ALLOW_CLEAR_TCP`` is not set.

Not run on a GPU yet: all that is written here for GPU memory.
"""

from __future__ import annotations

import base64
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.config import settings
from ray.experimental.rdt.transports import nixl_engine
from ray.experimental.rdt.transports.base import Capabilities, Peer, Route, TransportUnavailable
from ray.experimental.rdt.transports.nixl_engine import Engine, NixlError, Read
from ray.experimental.rdt.transports.nixl_plan import (
    KINDS,
    Batch,
    Spans,
    plan,
    spans_of,
)
from ray.experimental.rdt.transports.nixl_pool import Copies, MemoryPool
from ray.experimental.rdt.transports.nixl_registration import Lease, Registrations
from ray.experimental.rdt.transports.nixl_remotes import Exposure, Remotes

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.session import Session

logger = logging.getLogger("ray.rdt")

_BATCH_NBYTES = 16 << 20
_BATCH_ROWS = 4096
_WINDOW = 4  # requests under way at once in one read

#: How long past its deadline a read waits for requests that are under way, before it cuts them off.
_GRACE_S = 1.0


@dataclass(frozen=True)
class _Exposed:
    """What the producer keeps of one exposure."""

    lease: Lease
    copies: Copies | None


@dataclass(frozen=True)
class _Parts:
    """What begins with the engine."""

    engine: Engine
    registrations: Registrations
    remotes: Remotes


class NixlTransport:
    """The transport that users name "nixl". Thread-safe. See ``base.OneSided``.

    Args:
        session: Unused: a read needs no help from the producer's session.
        open_engine: Makes the process's nixl agent, at first use.

    Raises:
        TransportUnavailable: nixl is not installed, or Ray is told to use TLS.
    """

    capabilities = Capabilities("nixl", frozenset({"cpu", "cuda"}), two_sided=False)

    def __init__(
        self,
        session: Session | None = None,
        open_engine: Callable[[], Engine] = nixl_engine.open_engine,
    ):
        if not settings().clear_tcp:
            raise TransportUnavailable(
                "Ray is told to use TLS and nixl sends in the clear; RAY_RDT_ALLOW_CLEAR_TCP=1 "
                "allows it"
            )
        if open_engine is nixl_engine.open_engine:
            nixl_engine.check_installed()
        self._open_engine = open_engine
        self._lock = threading.Lock()
        self._known_parts: _Parts | None = None
        self._is_closed = False
        self._exposed: dict[int, _Exposed] = {}
        self._numbers = itertools.count(1)
        self._pool: MemoryPool | None = None
        self._stream: torch.cuda.Stream | None = None
        self._cut_off: list[tuple[Any, ...]] = []

    # Producer.

    def expose(self, buffers: Sequence[torch.Tensor]) -> Route:
        """See ``OneSided``. Blocks while a memory pool is full, half the fetch timeout at most.

        Raises:
            ValueError: a buffer is on another device than the stream given to ``set_cuda_stream``.
        """
        spans = spans_of(buffers)
        if not spans.nbytes:
            return {"spans": spans.encode()}
        parts = self._parts()
        self._await_writers(buffers, spans)
        copies = self._copy_into_pool(parts, buffers, spans)
        if copies is not None and self._pool is not None:
            spans = _spans_in(self._pool, copies, spans)
        try:
            lease = parts.registrations.acquire(spans, buffers)
            number = next(self._numbers)
            self._exposed[number] = _Exposed(lease, copies)
            return _describe(parts.engine, number, lease)
        except NixlError as error:
            raise TransportUnavailable(f"nixl cannot expose this memory: {error}") from error

    def withdraw(self, exposed: Route) -> None:
        """See ``OneSided``."""
        ended = self._exposed.pop(exposed.get("number", 0), None)
        parts = self._known_parts
        if ended is None or parts is None:
            return
        parts.registrations.release(ended.lease, keep=True)
        if ended.copies is not None and self._pool is not None:
            self._pool.free(ended.copies)

    def _copy_into_pool(
        self, parts: _Parts, buffers: Sequence[torch.Tensor], spans: Spans
    ) -> Copies | None:
        """Copies an object into the memory pool, if there is one and it is meant for the object."""
        pool = self._pool
        if pool is None or not pool.can_hold(buffers) or parts.registrations.has_pinned(spans):
            return None
        try:
            return pool.copy(buffers, time.monotonic() + settings().fetch_timeout_s / 2)
        except TimeoutError as error:
            raise TransportUnavailable(
                f"{error}; drop ObjectRefs earlier or register a larger pool"
            ) from error

    def _await_writers(self, buffers: Sequence[torch.Tensor], spans: Spans) -> None:
        """Waits until the GPUs have written what is to be read: nixl does not see their streams."""
        if not spans.has_device_memory:
            return
        import torch

        devices = {buffer.device for buffer in buffers if buffer.is_cuda}
        if self._stream is None:
            for device in devices:
                torch.cuda.synchronize(device)
            return
        others = sorted(str(device) for device in devices - {self._stream.device})
        if others:
            raise ValueError(
                f"set_nixl_cuda_stream was given a stream on {self._stream.device}, but the object "
                f"has tensors on {others}"
            )
        self._stream.synchronize()

    # Consumer.

    def read(
        self, peer: Peer, exposed: Route, buffers: Sequence[torch.Tensor], deadline: float
    ) -> None:
        """See ``OneSided``.

        After a failure it waits up to a second for requests that are under way. One that has not
        ended by then is cut off, and its memory kept until the transport closes: a late byte could
        only land where nobody looks.

        Raises:
            TimeoutError: not all bytes came by the deadline.
            NixlError: the transfer failed; its ``code`` is "peer_lost" if the connection broke.
        """
        local, remote = spans_of(buffers), Spans.decode(exposed["spans"])
        if not local.nbytes and not remote.nbytes:
            return
        parts = self._parts()
        _await_owners(buffers, local)
        try:
            lease = parts.registrations.acquire(local, buffers)
        except NixlError as error:
            raise TransportUnavailable(f"nixl cannot fill this memory: {error}") from error
        under_way: deque[Read] = deque()
        try:
            batches = plan(lease.spans, remote, _BATCH_NBYTES, _BATCH_ROWS)
            exposure = Exposure(
                *(exposed[name] for name in ("agent", "number", "version", "metadata"))
            )
            with parts.remotes.reading(exposure, deadline):
                try:
                    _run(parts.engine, batches, exposure.agent, under_way, deadline)
                finally:
                    _settle(under_way)
        finally:
            if under_way:
                self._cut_off.append((tuple(buffers), lease))
            else:
                parts.registrations.release(lease, keep=False)

    # What users call, through nixl_api.

    def register_memory(self, tensor: torch.Tensor) -> None:
        """Registers a tensor's storage until ``deregister_memory`` was called as often."""
        self._parts().registrations.pin(tensor)

    def deregister_memory(self, tensor: torch.Tensor) -> None:
        """Undoes one ``register_memory``. Raises ValueError if there is none to undo."""
        self._parts().registrations.unpin(tensor)

    def register_pool(self, nbytes: int, device: torch.device | str) -> None:
        """Makes the pool that exposed objects are copied into.

        Raises:
            ValueError: there is one, or the size is not positive.
        """
        if nbytes <= 0:
            raise ValueError(f"a nixl memory pool needs a size above 0, not {nbytes}")
        parts = self._parts()
        with self._lock:
            if self._pool is not None:
                raise ValueError("this process has a nixl memory pool already; it can have one")
            pool = MemoryPool(nbytes, device)
            parts.registrations.pin(pool.memory)
            self._pool = pool

    def set_cuda_stream(self, stream: torch.cuda.Stream | None) -> None:
        """The stream that ``expose`` waits for; None for all streams of the tensors' devices."""
        self._stream = stream

    # Life.

    def close(self) -> None:
        """See ``OneSided``."""
        with self._lock:
            self._is_closed = True
            parts, self._known_parts = self._known_parts, None
            self._exposed.clear()
        if self._pool is not None:
            self._pool.close()
        if parts is not None:
            parts.engine.close()
        self._pool = None
        self._cut_off.clear()

    def _parts(self) -> _Parts:
        with self._lock:
            if self._is_closed:
                raise TransportUnavailable("nixl has been closed in this process")
            if self._known_parts is None:
                engine = self._open_engine()
                self._known_parts = _Parts(engine, Registrations(engine), Remotes(engine))
            return self._known_parts


def _describe(engine: Engine, number: int, lease: Lease) -> Route:
    """What a consumer needs to read a lease's memory."""
    registered = ((name, lease.registered(kind)) for kind, name in enumerate(KINDS))
    blobs = [engine.describe(name, rows) for name, rows in registered if len(rows)]
    return {
        "agent": engine.name,
        "number": number,
        "version": lease.version,
        "metadata": [base64.b64encode(blob).decode() for blob in blobs],
        "spans": lease.spans.encode(),
    }


def _spans_in(pool: MemoryPool, copies: Copies, spans: Spans) -> Spans:
    """Where the copies of spans are."""
    memory = spans_of([pool.memory])
    moved = Spans(memory.kinds.repeat(len(spans.rows)), spans.rows.copy())
    moved.rows[:, 0] = [int(memory.rows[0, 0]) + offset for offset in copies.offsets]
    moved.rows[:, 2] = memory.rows[0, 2]
    return moved


def _await_owners(buffers: Sequence[torch.Tensor], spans: Spans) -> None:
    """Waits until what a GPU still does with memory that torch has handed out again is done."""
    if not spans.has_device_memory:
        return
    import torch

    for device in {buffer.device for buffer in buffers if buffer.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _run(
    engine: Engine, batches: Iterable[Batch], name: str, under_way: deque[Read], deadline: float
) -> None:
    """Reads all batches, a few at once; what has not ended is left in ``under_way``."""
    for batch in batches:
        if time.monotonic() >= deadline:
            raise TimeoutError("the deadline passed while nixl was reading")
        under_way.append(engine.post(batch, name))
        while len(under_way) >= _WINDOW or (under_way and under_way[0].is_done()):
            _finish_first(under_way, deadline)
    while under_way:
        _finish_first(under_way, deadline)


def _finish_first(under_way: deque[Read], deadline: float) -> None:
    for pause in _pauses():
        if under_way[0].is_done():
            break
        if time.monotonic() >= deadline:
            raise TimeoutError("the deadline passed while nixl was reading")
        time.sleep(pause)
    under_way.popleft().release()


def _settle(under_way: deque[Read]) -> None:
    """After a failure: waits until no request writes any more; cuts off those that go on."""
    deadline = time.monotonic() + _GRACE_S
    still: list[Read] = []
    while under_way:
        try:
            _finish_first(under_way, deadline)
        except NixlError:
            under_way.popleft().release()
        except TimeoutError:
            still.append(under_way.popleft())
    for read in still:
        read.release()
    under_way.extend(still)


def _pauses() -> Iterator[float]:
    """How long to sleep between looks at a request.

    nixl has no call that waits (its notifications go to the other side), and a look also makes UCX
    advance. Most requests end at once or within some tens of microseconds, so the first looks
    follow each other and only let other threads have the GIL; then the pauses grow, up to half a
    millisecond, which is little beside what takes that long.
    """
    yield from itertools.repeat(0.0, 40)
    pause = 20e-6
    while True:
        yield pause
        pause = min(2 * pause, 500e-6)
