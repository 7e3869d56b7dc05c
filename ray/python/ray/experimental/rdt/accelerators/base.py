"""The seam between RDT and a kind of device.

Device work is queued, and a queue (stream) runs on its own time. RDT waits for events only, never
for a device as a whole: a reader for the event recorded when the producer gave the tensor to RDT, a
writer for the one recorded when the consumer took the memory. Copies run on private streams, so
they never wait for what the user's streams are given later. All methods may be called from any
thread; those that block hold no GIL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from ray.experimental.rdt.common.deadline import Deadline

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.shared_memory import SharedMemory


class Event(Protocol):
    """A point in one stream's queue."""

    def is_reached(self) -> bool:
        """Whether the stream has come so far. Does not block."""

    def wait(self, timeout_s: float) -> None:
        """Blocks until the stream has come so far. Raises TimeoutError."""

    def order(self) -> None:
        """What this thread's current stream is given from now on runs after the event."""


def have_ended(events: Iterable[Event], timeout_s: float) -> bool:
    """Whether all are reached within ``timeout_s``; one whose device fails is not known to be.

    For what has to be waited for after a failure. Runs on: any thread; blocks.
    """
    deadline, ended = Deadline.after(timeout_s), True
    for event in events:
        try:
            event.wait(deadline.left_s())
        except Exception:  # the failure that led here is the one to report
            ended = False
    return ended


class CannotShare(RuntimeError):
    """Memory that another process cannot open; says why."""


class Sharing(Protocol):
    """How a kind of device shows its memory to other processes of the host.

    What the vendor's driver does and no more: ``SharedMemory`` keeps account.
    """

    #: Of the device type, as DLPack numbers them.
    dlpack_type: int

    def identity(self, device: torch.device) -> str:
        """Names a device the same way in every process that can see it."""

    def obstacle(self, device: torch.device, identity: str) -> str:
        """Why ``device`` cannot map memory of another one, "" if nothing is known against it."""

    def export(self, address: int, device: torch.device) -> tuple[bytes, int, int]:
        """The allocation that an address lies in: handle, first address, bytes.

        Raises:
            CannotShare: other processes cannot open it.
        """

    def map(self, handle: bytes, device: torch.device) -> int:
        """Opens an allocation of another process for ``device``; gives its first address.

        Raises:
            CannotShare: it cannot be opened.
        """

    def unmap(self, address: int, device: torch.device) -> None:
        """Undoes ``map``. May block until work over the memory has ended; holds no GIL."""

    def export_event(self, event: Event) -> tuple[bytes, Any]:
        """An event that another process can wait for, reached after ``event``.

        Returns:
            Its handle, and what has to be kept for as long as the other process uses it.

        Raises:
            CannotShare: events cannot be shared.
        """

    def import_event(self, handle: bytes, device: torch.device) -> Event:
        """Another process's event. Raises CannotShare."""


class Accelerator(Protocol):
    """One kind of device."""

    @property
    def device_type(self) -> str:
        """As torch names it."""

    @property
    def transports(self) -> Sequence[str]:
        """Names of the transports that serve two processes which both have such devices.

        Best first. Where none serves, the bytes go through host memory.
        """

    @property
    def sharing(self) -> SharedMemory | None:
        """None where other processes cannot open its memory."""

    def unavailable(self) -> str:
        """Why this process has no such device; "" if it has one."""

    def current_device(self) -> torch.device:
        """The device that this thread's work goes to, with its index."""

    def segment(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """The address and bytes of the device allocation that a tensor lies in; None: not known."""

    def record(self, device: torch.device) -> Event:
        """An event at the end of what this thread's current stream on ``device`` has so far."""

    def new_stream(self, device: torch.device) -> Any:
        """A private stream of ``device``, for ``on``: the user's work is never given to it."""

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Makes a stream the current one of the thread that enters it, until it leaves."""

    def aside(self) -> AbstractContextManager[None]:
        """Around calls of torch on a device, which otherwise may disturb what other threads do."""

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Flat uint8 memory on a device, for use on this thread's current stream."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Flat uint8 host memory that devices copy from and to at full speed."""

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Makes host memory that is mapped here what ``pinned`` gives.

        Returns:
            What undoes it, to be called before the memory is unmapped.

        Raises:
            RuntimeError: it cannot be pinned; says why.
        """

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
        after: Sequence[Event] = (),
    ) -> Event:
        """Begins to copy flat (target, source) pairs.

        Each side lies on ``device`` or in host memory, which is pinned (``pinned``).

        The copies run on a private stream, after the events in ``after`` and nothing else. The
        caller has waited for what writes the sources; for targets on a device, ``after`` holds an
        event recorded when their memory was taken. The pairs are kept until the copy has ended.
        """
