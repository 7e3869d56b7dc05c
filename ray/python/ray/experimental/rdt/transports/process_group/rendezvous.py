"""Where the ranks of a process group that is being made find each other.

Torch wants a key-value store for that. Ours lives in each rank and what one sets is sent to the
others through their agents: no port is opened, no name server asked (torch's TCPStore looks up the
names of its clients), and a rank that fails tells the others at once.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import TransportUnavailable


class Rendezvous:
    """One rank's copy of the keys. Safe to use from any thread.

    Args:
        publish: Sends a key and its value to the other ranks; must not block.
    """

    def __init__(self, publish: Callable[[str, bytes], None]):
        self._publish = publish
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}
        self._failure = ""

    def set(self, key: str, value: bytes) -> None:
        """Stores a key here and at the other ranks."""
        self.put(key, value)
        self._publish(key, value)

    def put(self, key: str, value: bytes) -> None:
        """Stores a key that another rank has set."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def has(self, keys: list[str]) -> bool:
        """Whether all these are here."""
        with self._changed:
            return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout_s: float) -> list[bytes]:
        """The values of these, once all are here.

        Raises:
            TransportUnavailable: a rank failed, or the time has passed.
        """
        deadline = Deadline.after(timeout_s)
        with self._changed:
            while not self.has(keys):
                if self._failure:
                    raise TransportUnavailable(self._failure)
                left = deadline.left_s()
                if left <= 0:
                    raise TransportUnavailable("the other processes did not join in time")
                self._changed.wait(left)
            return [self._values[key] for key in keys]

    def fail(self, reason: str) -> None:
        """Ends all waits."""
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()


def as_store(rendezvous: Rendezvous, timeout_s: float) -> Any:
    """A ``torch.distributed.Store`` over it. Torch calls it from its threads, with the GIL."""
    import torch.distributed

    store: Any = torch.distributed.Store  # type: ignore[attr-defined]

    class AgentStore(store):
        def set(self, key: str, value: bytes) -> None:
            rendezvous.set(key, value)

        def get(self, key: str) -> bytes:
            return rendezvous.wait([key], timeout_s)[0]

        def check(self, keys: list[str]) -> bool:
            return rendezvous.has(keys)

        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            rendezvous.wait(keys, timeout.total_seconds() if timeout else timeout_s)

        def has_extended_api(self) -> bool:
            return False

    return AgentStore()
