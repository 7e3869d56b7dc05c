"""Interface between RDT and a kind of device.

Devices run work asynchronously, in streams. RDT waits for events only, never for a whole device. A
reader waits for the event that was recorded when the producer gave the tensor to RDT. A writer
waits for the event that was recorded when the consumer took the memory. Copies run on private
streams, so they never wait for later work on the user's streams. All methods may be called from any
thread; those that block hold no GIL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.events import Event
    from ray.experimental.rdt.accelerators.shared_memory import SharedMemory


class Accelerator(Protocol):
    """One kind of device."""

    #: The name of the device type in torch.
    device_type: str
    #: The transports between two processes that both have such devices, best first. If none works,
    #: the bytes go through host memory.
    transports: tuple[str, ...]
    #: The shared memory of such devices; None if processes cannot share it.
    sharing: SharedMemory | None

    def unavailable_reason(self) -> str:
        """Return why this process has no such device, "" if it has one."""

    def current_device(self) -> torch.device:
        """Return the current device of this thread, with its index."""

    def segment(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Return address and bytes of the device allocation of a tensor, None if not known."""

    def record(self, device: torch.device) -> Event:
        """Record an event on this thread's current stream of ``device``."""

    def new_stream(self, device: torch.device) -> Any:
        """Return a private stream of ``device`` for ``on``. The user's work never runs on it."""

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Make a stream the current one of the thread that enters it, until it leaves."""

    def capture_safe(self) -> AbstractContextManager[None]:
        """Return a context for calls of torch on a device that might disturb other threads."""

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Return flat uint8 memory on a device, for use on this thread's current stream."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return flat uint8 host memory that devices copy from and to at full speed."""

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Pin host memory that is mapped here. Raises RuntimeError, with the reason, if it cannot.

        Returns:
            A function that unpins it, to be called before the memory is unmapped.
        """

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
        after: Sequence[Event] = (),
    ) -> Event:
        """Begin to copy flat (target, source) pairs.

        Each side lies on ``device`` or in host memory, which is pinned (``pinned``).

        The copies run on a private stream, after the events in ``after`` and nothing else. The
        caller has waited for the writers of the sources. For targets on a device, ``after`` holds
        an event recorded when their memory was taken. The pairs are kept until the copy has ended.
        """
