"""A value that the first caller makes while other callers wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline

_T = TypeVar("_T")


class StillBeingMade(TimeoutError):
    """Another thread was still making the value at the caller's deadline."""


class Once(Generic[_T]):
    """A value that is made at its first use. Thread-safe.

    A failed attempt fails only its own caller. The next caller, or a waiting one, then makes its
    own attempt.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_being_made = False
        self._made: list[_T] = []  # empty, or the value

    def get(self, make: Callable[[], _T], deadline: Deadline | None = None) -> _T:
        """Return the value; make it if there is none and no other thread makes it.

        Args:
            deadline: How long to wait for another thread. None waits without limit.

        Raises:
            StillBeingMade: The deadline passed.
            Exception: ``make`` failed.
        """
        with self._changed:
            left_s = None if deadline is None else deadline.left_s()
            if not self._changed.wait_for(lambda: not self._is_being_made, left_s):
                raise StillBeingMade("another thread has not finished in time")
            if self._made:
                return self._made[0]
            self._is_being_made = True
        try:
            value = make()
            self._made.append(value)
            return value
        finally:
            with self._changed:
                self._is_being_made = False
                self._changed.notify_all()

    def peek(self) -> _T | None:
        """Return the value if there is one. Does not block."""
        return next(iter(self._made), None)
