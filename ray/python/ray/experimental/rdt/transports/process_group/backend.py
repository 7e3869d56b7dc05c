"""Interface between links and the library that moves their bytes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from ray.experimental.rdt.transports.base import Buffers, Capabilities, Events

if TYPE_CHECKING:
    import torch

#: Ranks in a link's process group.
CONSUMER, PRODUCER = 0, 1

MAX_TAG = 2**31 - 1  # gloo takes a C int


class Backend(Protocol):
    """A kind of process group. Its methods import torch."""

    capabilities: Capabilities
    #: Whether tags keep transfers apart, so that one link can carry many at once.
    has_tags: bool

    def check_available(self) -> None:
        """Raise TransportUnavailable, with the reason, if this process cannot use the backend."""

    def make(
        self, store: Any, rank: int, size: int, timeout_s: float, has_collectives: bool
    ) -> Any:
        """Make a process group of ``size`` ranks. Blocks without the GIL until all are connected.

        Args:
            store: The store for the rendezvous of its ranks.
            rank: This process's rank.
            timeout_s: How long to wait for the other ranks, and for each operation.
            has_collectives: Whether it runs more than send and receive.
        """

    def kill(self, group: Any) -> None:
        """End a process group. When this returns, no more bytes are written."""

    def send(self, group: Any, tensor: torch.Tensor, tag: int) -> Any:
        """Begin to send from rank ``PRODUCER`` to rank ``CONSUMER``; return the work."""

    def receive(self, group: Any, tensor: torch.Tensor, tag: int) -> Any:
        """Begin to receive at rank ``CONSUMER`` from ``PRODUCER``; return the work."""

    def wait(self, work: Any, timeout_s: float) -> None:
        """Wait for a send or receive, without the GIL. Raises on failure and timeout."""

    def transfer_context(self, after: Events) -> AbstractContextManager[None]:
        """Return a context for the transfer's thread, whose work runs after the events."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return memory for messages."""

    def unsupported_reason(self, buffers: Buffers) -> str:
        """Return why a link cannot carry these buffers, "" if it can."""

    def pack(self, buffers: Buffers, slot: torch.Tensor) -> None:
        """Copy small buffers one after the other into ``slot``."""

    def unpack(self, slot: torch.Tensor, buffers: Buffers) -> None:
        """The reverse of ``pack``."""
