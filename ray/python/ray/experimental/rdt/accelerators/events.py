"""Events of devices, and private streams for copies."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline


class Event(Protocol):
    """A point in a stream."""

    def is_reached(self) -> bool:
        """Return whether the stream has reached the event. Does not block."""

    def wait(self, timeout_s: float) -> None:
        """Block until the stream has reached the event. Raises TimeoutError."""

    def make_stream_wait(self) -> None:
        """Make later work on this thread's current stream run after the event."""


def have_ended(events: Iterable[Event], timeout_s: float) -> bool:
    """Return whether all events are reached within ``timeout_s``.

    An event whose device has failed counts as not reached. For waits after a failure.

    Runs on: any thread; blocks.
    """
    deadline, ended = Deadline.after(timeout_s), True
    for event in events:
        try:
            event.wait(deadline.left_s())
        except Exception:  # the failure that led here is the one to report
            ended = False
    return ended


#: Of one device and direction.
_LIMIT = 16

_Stream = TypeVar("_Stream")


@dataclass
class _Slot(Generic[_Stream]):
    """A stream, and the ends of the work that may be pending on it, in its sequence."""

    stream: _Stream
    pending: list[Event] = field(default_factory=list)


class SideStreams(Generic[_Stream]):
    """Private streams for copies, a few for each device and direction. Thread-safe.

    A copy may have to wait for what its memory was used for before. So a stream whose last copy is
    still pending is not given the next one while fewer than ``_LIMIT`` streams exist: copies of
    different pulls do not wait for each other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: defaultdict[Hashable, deque[_Slot[_Stream]]] = defaultdict(deque)
        self._made: defaultdict[Hashable, int] = defaultdict(int)

    def run(
        self, key: Hashable, make: Callable[[], _Stream], event: Event,
        begin: Callable[[_Stream], None],
    ) -> Event:  # fmt: skip
        """Give work to a stream that no other thread uses meanwhile. Returns ``event``.

        Args:
            key: The device and direction.
            make: Makes one more stream.
            event: Recorded by ``begin`` behind the work, also when it fails. It is kept until the
                work has ended and the stream is used again, so it can hold memory of the work's.
            begin: Gives the work to the stream.
        """
        slot = self._take(key) or _Slot(make())
        try:
            begin(slot.stream)
        finally:
            slot.pending.append(event)
            with self._lock:
                self._free[key].append(slot)
        return event

    def _take(self, key: Hashable) -> _Slot[_Stream] | None:
        """Return a stream whose work has ended, or any if there are many; None to make one more."""
        for _ in range(_LIMIT):
            with self._lock:
                slot = self._free[key].popleft() if self._free[key] else None
            if slot is None:
                break
            if not slot.pending or slot.pending[-1].is_reached():
                slot.pending.clear()
                return slot
            with self._lock:
                self._free[key].append(slot)
        with self._lock:
            if self._made[key] >= _LIMIT and self._free[key]:
                return self._free[key].popleft()
            self._made[key] += 1
        return None
