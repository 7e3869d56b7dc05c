"""Interface between links and the library that moves their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from ray.experimental.rdt.transports.base import Capabilities

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.base import Event

#: Ranks in a link's process group.
CONSUMER, PRODUCER = 0, 1

MAX_TAG = 2**31 - 1  # gloo takes a C int

Buffers = Sequence["torch.Tensor"]


class Backend(Protocol):
    """What a kind of process group needs from us. Its methods import torch."""

    capabilities: Capabilities
    #: Whether tags keep transfers apart, so that one link can carry many at once.
    has_tags: bool

    def unavailable(self) -> str:
        """Why this process cannot use the backend; "" if it can."""

    def make(
        self, store: Any, rank: int, size: int, timeout_s: float, has_collectives: bool
    ) -> Any:
        """Makes a process group; blocks until all ranks are connected, without the GIL.

        Args:
            store: Where its ranks meet.
            rank: This process's rank.
            size: How many ranks there are.
            timeout_s: How long to wait for the other ranks, and for each operation.
            has_collectives: Whether it runs more than send and receive.
        """

    def kill(self, group: Any) -> None:
        """Ends a process group for good: when this returns, no byte is written any more."""

    def send(self, group: Any, tensor: torch.Tensor, tag: int) -> Any:
        """Begins to send from rank ``PRODUCER`` to rank ``CONSUMER``; returns the work."""

    def receive(self, group: Any, tensor: torch.Tensor, tag: int) -> Any:
        """Begins to receive at rank ``CONSUMER`` what ``PRODUCER`` sends; returns the work."""

    def wait(self, work: Any, timeout_s: float) -> None:
        """Waits for a send or receive, without the GIL. Raises on failure and timeout."""

    def turn(self, after: Sequence[Event]) -> AbstractContextManager[None]:
        """Entered on the transfer's thread: orders the work of devices.

        Args:
            after: The transfer comes after these.
        """

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory for messages."""

    def reject(self, buffers: Buffers) -> str:
        """Why a link cannot carry these; "" if it can."""

    def pack(self, buffers: Buffers, slot: torch.Tensor) -> None:
        """Copies small buffers one after the other into ``slot``."""

    def unpack(self, slot: torch.Tensor, buffers: Buffers) -> None:
        """The reverse of ``pack``."""
