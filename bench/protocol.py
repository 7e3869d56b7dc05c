"""The lines between run.py and a worker: one JSON object for each request and answer."""

from __future__ import annotations

from typing import Protocol


class Skip(Exception):
    """A scenario cannot run on this machine; the text is the reason."""


class Scenario(Protocol):
    """A scenario that a worker measures repeatedly. Its constructor does all set-up."""

    def sample(self) -> list[float]:
        """Measure once.

        Returns:
            One or more samples: seconds, or bytes if the scenario measures memory.
        """

    def close(self) -> None:
        """End all that the constructor started."""
