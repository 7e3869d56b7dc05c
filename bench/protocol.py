"""The lines that run.py and a worker exchange: one JSON object each way for every question."""

from __future__ import annotations

from typing import Protocol


class Skip(Exception):
    """A scenario cannot run on this machine; the text says why."""


class Scenario(Protocol):
    """Something a worker can measure again and again. Making one does all the set-up."""

    def sample(self) -> list[float]:
        """Measures once.

        Returns:
            One or more samples: seconds, or bytes where the scenario is about memory.
        """

    def close(self) -> None:
        """Ends what the set-up started."""
