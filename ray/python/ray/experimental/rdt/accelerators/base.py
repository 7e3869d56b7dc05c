"""The seam between RDT and a kind of device.

Device work is queued, and a queue (stream) runs on its own time. RDT waits for events only, never
for a device as a whole: a reader for the event recorded when the producer gave the tensor to RDT, a
writer for the one recorded when the consumer took the memory. Copies run on private streams, so
they never wait for what the user's streams are given later. All methods may be called from any
thread; those that block hold no GIL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

#: What another process needs to open shared memory of a device; carried as JSON.
Handle = dict[str, Any]


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
    deadline, ended = time.monotonic() + timeout_s, True
    for event in events:
        try:
            event.wait(max(0.0, deadline - time.monotonic()))
        except Exception:  # the failure that led here is the one to report
            ended = False
    return ended


class Sharing(Protocol):
    """How a kind of device shows its memory to other processes of the host."""

    def identity(self, device: torch.device) -> str:
        """Names a device the same way in every process that can see it."""

    def find(self, identity: str) -> torch.device | None:
        """The device of that name as this process sees it, None if it does not."""

    def can_copy(self, target: torch.device, source: torch.device) -> bool:
        """Whether one device can write what lies on the other without going through the host."""

    def share(self, buffer: torch.Tensor) -> tuple[Handle, Any]:
        """Lets one other process open a flat buffer, once.

        Returns:
            The handle, and what has to be kept until the other process has closed the memory.

        Raises:
            RuntimeError: this memory cannot be shared; says why.
        """

    def open(self, handle: Handle, device: torch.device) -> torch.Tensor:
        """Another process's buffer; closed when the tensor dies. Raises RuntimeError."""

    def revoke(self, handle: Handle) -> None:
        """Undoes ``share`` for a process that died before it had opened the memory."""


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
    def sharing(self) -> Sharing | None:
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
