"""Interface to the calls of a vendor that share device memory between processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.events import Event


class CannotShare(RuntimeError):
    """Memory that another process cannot open; says why."""


class Sharing(Protocol):
    """The calls of a vendor's driver that share device memory with other processes of the host.

    ``SharedMemory`` keeps track of mappings.
    """

    #: The number of the device type in DLPack.
    dlpack_type: int

    def identity(self, device: torch.device) -> str:
        """Return an ID of a device that is the same in all processes that can see it."""

    def unreachable_reason(self, device: torch.device, identity: str) -> str:
        """Return why ``device`` cannot map memory of another device, "" if it probably can."""

    def export(self, address: int, device: torch.device) -> tuple[bytes, int, int]:
        """Return the allocation that contains an address: handle, first address, bytes.

        Raises:
            CannotShare: other processes cannot open it.
        """

    def map(self, handle: bytes, device: torch.device) -> int:
        """Map an allocation of another process for ``device``; return its first address.

        Raises:
            CannotShare: it cannot be opened.
        """

    def unmap(self, address: int, device: torch.device) -> None:
        """Undo ``map``. May block until work over the memory has ended; holds no GIL."""

    def export_event(self, event: Event) -> tuple[bytes, Any]:
        """Return an event that another process can wait for; it is reached after ``event``.

        Returns:
            Its handle, and an object to keep for as long as the other process uses it.

        Raises:
            CannotShare: events cannot be shared.
        """

    def import_event(self, handle: bytes, device: torch.device) -> Event:
        """Return an event of another process. Raises CannotShare."""
