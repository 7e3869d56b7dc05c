"""The consumer's side of the nixl transport: reading other processes' memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import note_still_writing
from ray.experimental.rdt.common.real_threads import sleep
from ray.experimental.rdt.transports.base import Route, TransportUnavailable
from ray.experimental.rdt.transports.nixl.endpoint import Endpoint, LazyEndpoint
from ray.experimental.rdt.transports.nixl.engine import (
    Engine,
    NixlError,
    Read,
    has_rdma_both,
    is_direct,
)
from ray.experimental.rdt.transports.nixl.plan import Batch, Spans, plan, spans_of
from ray.experimental.rdt.transports.nixl.registration import Lease
from ray.experimental.rdt.transports.nixl.remotes import Exposure

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.base import Event

_HOST_BATCH_NBYTES = 16 << 20
_DEVICE_BATCH_NBYTES = 256 << 20
_BATCH_ROWS = 4096
_WINDOW = 4  # requests under way at once in one read
_SLICE_S = 0.2  # how often a read looks whether its task was cancelled

#: How long a failed read waits for its requests that are still under way.
_GRACE_S = 1.0


@dataclass(frozen=True)
class _Hung:
    """Requests that have outlived their read, and the memory that they may still write."""

    under_way: deque[Read]
    lease: Lease
    buffers: Sequence[torch.Tensor]


class Consumer:
    """All that one process reads. Thread-safe.

    nixl cannot end a request: bytes of one that was given up are still written when they come. (To
    close the agent would end it, but then UCX may abort the producer's process.) So a request that
    outlives its read keeps its memory, and is looked after by later reads.

    Args:
        endpoint: This process's agent.
    """

    def __init__(self, endpoint: LazyEndpoint):
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._hung: list[_Hung] = []

    def read(
        self,
        exposed: Route,
        buffers: Sequence[torch.Tensor],
        deadline: Deadline,
        after: Sequence[Event] = (),
    ) -> None:
        """See ``NixlTransport``. Runs on: consumer, the fetching thread."""
        local, remote = spans_of(buffers), Spans.decode(exposed["spans"])
        if not local.nbytes and not remote.nbytes:
            return
        endpoint = self._endpoint.get()
        _check_way(endpoint.engine, exposed["reach"], local, remote)
        self._look_after_hung(endpoint)
        for event in after:
            event.wait(deadline.left_s())
        with accelerators.aside(buffers):
            self._read(endpoint, exposed, remote, local, buffers, deadline)

    def _read(
        self,
        endpoint: Endpoint,
        exposed: Route,
        remote: Spans,
        local: Spans,
        buffers: Sequence[torch.Tensor],
        deadline: Deadline,
    ) -> None:
        try:
            lease = endpoint.registrations.acquire(local, buffers)
        except NixlError as error:
            raise TransportUnavailable(f"nixl cannot fill this memory: {error}") from error
        under_way: deque[Read] = deque()
        try:
            sizes = (_HOST_BATCH_NBYTES, _DEVICE_BATCH_NBYTES, _BATCH_ROWS)
            batches = plan(lease.spans, remote, *sizes)
            names = ("agent", "number", "version", "metadata")
            exposure = Exposure(*(exposed[name] for name in names))
            with endpoint.remotes.reading(exposure, deadline):
                _run(endpoint.engine, batches, exposure.agent, under_way, deadline)
        except BaseException as error:
            _settle(under_way, Deadline.after(_GRACE_S))
            if under_way:
                note_still_writing(error)
            raise
        finally:
            self._end(endpoint, _Hung(under_way, lease, tuple(buffers)))

    def _look_after_hung(self, endpoint: Endpoint) -> None:
        """Ends what has come to an end since."""
        if self._hung:
            with self._lock:
                hung, self._hung = self._hung, []
            for entry in hung:
                _settle(entry.under_way, Deadline.after(0))
                self._end(endpoint, entry)

    def _end(self, endpoint: Endpoint, entry: _Hung) -> None:
        if entry.under_way:
            with self._lock:
                self._hung.append(entry)
        else:
            endpoint.registrations.release(entry.lease)


def _check_way(engine: Engine, reach: str, local: Spans, remote: Spans) -> None:
    """Raises TransportUnavailable where UCX would not read the peer's memory by itself."""
    if settings().strict_transport:
        return
    if not is_direct(engine.reach, reach):
        raise TransportUnavailable(
            "this host and the producer's do not both have RDMA devices, and over TCP nixl is "
            "slower than other lanes and not safe"
        )
    if not has_rdma_both(engine.reach, reach) and local.filled_kinds != remote.filled_kinds:
        raise TransportUnavailable(
            "within a host nixl reads GPU memory into GPU memory only: the producer's process "
            "would have to copy what goes to or comes from host memory"
        )


def _run(
    engine: Engine, batches: Iterable[Batch], name: str, under_way: deque[Read], deadline: Deadline
) -> None:
    """Reads all batches, a few at once; after an error some may be left in ``under_way``."""
    between_looks = _each_slice(raise_if_cancelled)
    for batch in batches:
        if deadline.has_passed():
            raise TimeoutError("the deadline passed while nixl was reading")
        under_way.append(engine.post(batch, name))
        while len(under_way) >= _WINDOW or (under_way and under_way[0].is_done()):
            _finish_first(under_way, deadline, between_looks)
    while under_way:
        _finish_first(under_way, deadline, between_looks)


def _each_slice(action: Callable[[], None]) -> Callable[[], None]:
    """What runs an action, but once in a slice of time however often it is called."""
    due = Deadline.after(_SLICE_S)

    def run() -> None:
        nonlocal due
        if due.has_passed():
            due = Deadline.after(_SLICE_S)
            action()

    return run


def _finish_first(
    under_way: deque[Read], deadline: Deadline, between_looks: Callable[[], None] = lambda: None
) -> None:
    for pause in _pauses():
        if under_way[0].is_done():
            break
        if deadline.has_passed():
            raise TimeoutError("the deadline passed while nixl was reading")
        between_looks()
        sleep(pause)
    under_way.popleft().release()


def _settle(under_way: deque[Read], deadline: Deadline) -> None:
    """Ends what failed or comes to its end by the deadline; leaves the rest."""
    still: list[Read] = []
    while under_way:
        try:
            _finish_first(under_way, deadline)
        except NixlError:
            under_way.popleft().release()
        except TimeoutError:
            still.append(under_way.popleft())
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
