"""The moment at which an operation times out."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Deadline:
    """A moment of this process's monotonic clock. Deadlines do not travel: send ``left_s()``.

    Attributes:
        at: The moment, as ``time.monotonic()`` gives it.
    """

    at: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        """Return the deadline ``timeout_s`` seconds from now."""
        return cls(time.monotonic() + timeout_s)

    def left_s(self) -> float:
        """Return the seconds left, 0 after the deadline."""
        return max(0.0, self.at - time.monotonic())

    def has_passed(self) -> bool:
        return time.monotonic() >= self.at

    def later(self, by_s: float) -> Deadline:
        """Return the deadline ``by_s`` seconds after this one."""
        return Deadline(self.at + by_s)

    def halfway(self) -> Deadline:
        """Return the deadline that leaves half of the remaining time for a later attempt."""
        return Deadline.after(self.left_s() / 2)
