"""Events of devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

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
