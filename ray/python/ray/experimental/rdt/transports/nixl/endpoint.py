"""This process's nixl agent, its registrations, the peers that it knows, and its reads."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import note_still_writing
from ray.experimental.rdt.transports.base import Buffers, Events, Route, TransportUnavailable
from ray.experimental.rdt.transports.nixl.engine import (
    NixlEngine,
    NixlError,
    NixlRead,
    has_rdma_both,
    is_direct,
)
from ray.experimental.rdt.transports.nixl.plan import Batch, Spans, plan, spans_of
from ray.experimental.rdt.transports.nixl.registration import Lease, Registrations

if TYPE_CHECKING:
    import torch

_HOST_BATCH_NBYTES = 16 << 20
_DEVICE_BATCH_NBYTES = 256 << 20
_BATCH_ROWS = 4096
_WINDOW = 4  # requests in flight at once in one read
_SLICE_S = 0.2  # how often a read looks whether its task was cancelled

#: How long a failed read waits for its requests in flight.
_GRACE_S = 1.0

#: nixl cannot forget single exposures of a peer. After this many, the peer is attached again.
_MAX_EXPOSURES = 4096

#: Peers known at once. The least recently read one is forgotten first.
_MAX_PEERS = 1024


class _Hung(NamedTuple):
    """Requests that outlived their read, and the memory that they may still write."""

    in_flight: deque[NixlRead]
    lease: Lease
    buffers: Buffers


class Endpoint:
    """A nixl agent and the state that lives as long. Thread-safe.

    nixl cannot abort a request: late bytes are still written. (Closing the agent would abort it,
    but then UCX may abort the producer's process.) So a request that outlives its read
    keeps its memory until a later read finds that it has ended.

    Attributes:
        engine: The agent.
        registrations: The memory of this process that is registered with it.
    """

    def __init__(self, engine: NixlEngine):
        self.engine = engine
        self.registrations = Registrations(engine, _find_segment)
        self._remotes = Remotes(engine)
        self._lock = threading.Lock()
        self._hung: list[_Hung] = []

    def read(self, exposed: Route, buffers: Buffers, deadline: Deadline, after: Events) -> None:
        local, remote = spans_of(buffers), Spans.decode(exposed["spans"])
        self._check_reachable(exposed["reach"], local, remote)
        self._release_ended()
        for event in after:
            event.wait(deadline.left_s())
        in_flight: deque[NixlRead] = deque()
        with accelerators.capture_safe(buffers):
            try:
                lease = self.registrations.acquire(local, buffers)
            except NixlError as error:
                raise TransportUnavailable(f"nixl cannot fill this memory: {error}") from error
            try:
                sizes = (_HOST_BATCH_NBYTES, _DEVICE_BATCH_NBYTES, _BATCH_ROWS)
                batches = plan(lease.spans, remote, *sizes)
                with self._remotes.reading(exposed, deadline):
                    self._run(batches, exposed["agent"], in_flight, deadline)
            except BaseException as error:  # also Ctrl-C: requests in flight may still write
                _drain(in_flight, Deadline.after(_GRACE_S))
                if in_flight:
                    note_still_writing(error)
                raise
            finally:
                self._end(_Hung(in_flight, lease, tuple(buffers)))

    def _check_reachable(self, reach: str, local: Spans, remote: Spans) -> None:
        """Raise TransportUnavailable if UCX needs the peer's process to read its memory."""
        if settings().strict_transport:
            return
        if not is_direct(self.engine.reach, reach):
            raise TransportUnavailable(
                "this host and the producer's do not both have RDMA devices, and over TCP nixl is "
                "slower than other lanes and not safe"
            )
        is_mixed = local.filled_kinds != remote.filled_kinds
        if is_mixed and not has_rdma_both(self.engine.reach, reach):
            raise TransportUnavailable(
                "within a host nixl reads GPU memory into GPU memory only: the producer's process "
                "would have to copy what goes to or comes from host memory"
            )

    def _run(
        self, batches: Iterable[Batch], name: str, in_flight: deque[NixlRead], deadline: Deadline
    ) -> None:
        """Read all batches, a few at once. After an error some may remain ``in_flight``."""
        between_polls = _each_slice(raise_if_cancelled)
        for batch in batches:
            if deadline.has_passed():
                raise TimeoutError("the deadline passed while nixl was reading")
            in_flight.append(self.engine.post(batch, name))
            while len(in_flight) >= _WINDOW or (in_flight and in_flight[0].is_done()):
                _finish_first(in_flight, deadline, between_polls)
        while in_flight:
            _finish_first(in_flight, deadline, between_polls)

    def _release_ended(self) -> None:
        """Release the memory of hung requests that have ended since."""
        with self._lock:
            hung, self._hung = self._hung, []
        for entry in hung:
            _drain(entry.in_flight, Deadline.after(0))
            self._end(entry)

    def _end(self, entry: _Hung) -> None:
        if entry.in_flight:
            with self._lock:
                self._hung.append(entry)
        else:
            self.registrations.release(entry.lease)


def _find_segment(tensor: torch.Tensor) -> tuple[int, int] | None:
    accelerator = accelerators.usable(tensor.device.type)
    return accelerator.segment(tensor) if accelerator is not None else None


def _each_slice(action: Callable[[], None]) -> Callable[[], None]:
    """Return a function that runs an action at most once in a time slice."""
    due = Deadline.after(_SLICE_S)

    def run() -> None:
        nonlocal due
        if due.has_passed():
            due = Deadline.after(_SLICE_S)
            action()

    return run


def _finish_first(
    in_flight: deque[NixlRead], deadline: Deadline, between_polls: Callable[[], None] = lambda: None
) -> None:
    for pause in _pauses():
        if in_flight[0].is_done():
            break
        if deadline.has_passed():
            raise TimeoutError("the deadline passed while nixl was reading")
        between_polls()
        threading.sleep(pause)
    in_flight.popleft().release()


def _drain(in_flight: deque[NixlRead], deadline: Deadline) -> None:
    """Release the requests that fail or end by the deadline; keep the others in flight."""
    for _ in range(len(in_flight)):
        try:
            _finish_first(in_flight, deadline)
        except NixlError:
            in_flight.popleft().release()
        except TimeoutError:
            in_flight.rotate(-1)


def _pauses() -> Iterator[float]:
    """Yield the pauses between two polls of a request.

    nixl has no call that waits (its notifications go to the other side), and each poll makes UCX
    progress. Most requests end within some tens of microseconds. So the first polls only let other
    threads take the GIL; then the pauses grow, up to half a millisecond.
    """
    yield from itertools.repeat(0.0, 40)
    pause = 20e-6
    while True:
        yield pause
        pause = min(2 * pause, 500e-6)


@dataclass
class _Remote:
    """The state of one peer's agent.

    Attributes:
        version: The newest known version of its GPU registrations.
        exposures: Its exposures that our agent knows.
        readers: Reads from it in progress.
        is_broken: Whether the connection broke: no new read uses it.
    """

    version: int
    exposures: set[int] = field(default_factory=set)
    readers: int = 0
    is_broken: bool = False


class Remotes:
    """The agents that ``engine``, our agent, knows. None is forgotten during reads. Thread-safe."""

    def __init__(self, engine: NixlEngine):
        self._engine = engine
        self._changed = threading.Condition()
        self._known: dict[str, _Remote] = {}  # least recently used first

    @contextlib.contextmanager
    def reading(self, exposed: Route, deadline: Deadline) -> Iterator[None]:
        """Make memory that a producer exposed known to our agent while the context lasts.

        After a NixlError in the context, the next read attaches the peer again.

        Raises:
            TransportUnavailable: Our agent cannot reach the memory.
            TimeoutError: The peer has to be forgotten first, and reads from it did not end in time.
        """
        remote = self._enter(exposed, deadline)
        try:
            yield
        except NixlError:
            remote.is_broken = True
            raise
        finally:
            with self._changed:
                remote.readers -= 1
                self._changed.notify_all()

    def _enter(self, exposed: Route, deadline: Deadline) -> _Remote:
        with self._changed:
            while (remote := self._current(exposed)) is None:
                if not self._changed.wait(deadline.left_s()):
                    raise TimeoutError("other reads from this peer did not end in time")
            if exposed["number"] not in remote.exposures:
                self._learn(remote, exposed)
            remote.readers += 1
            return remote

    def _current(self, exposed: Route) -> _Remote | None:
        """Return the up-to-date peer; None if it has to be forgotten first and reads still run."""
        name, version = exposed["agent"], exposed["version"]
        remote = self._known.pop(name, None)
        if remote is None:
            self._make_room()
            remote = _Remote(version)
        is_stale = remote.is_broken or version > remote.version
        if not remote.readers and (is_stale or len(remote.exposures) >= _MAX_EXPOSURES):
            self._engine.detach(name)
            remote, is_stale = _Remote(max(version, remote.version)), False
        self._known[name] = remote
        return None if is_stale else remote

    def _learn(self, remote: _Remote, exposed: Route) -> None:
        try:
            for metadata in exposed["metadata"]:
                self._engine.attach(metadata)
            remote.exposures.add(exposed["number"])
        except NixlError as error:
            remote.is_broken = True
            raise TransportUnavailable(
                f"nixl cannot reach the producer's memory: {error}"
            ) from error

    def _make_room(self) -> None:
        idle = [name for name, remote in self._known.items() if not remote.readers]
        for name in idle[: max(0, len(self._known) + 1 - _MAX_PEERS)]:
            del self._known[name]
            self._engine.detach(name)
