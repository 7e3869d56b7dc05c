"""Events of NVIDIA GPUs, through torch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.cuda_calls import relaxed
from ray.experimental.rdt.common.real_threads import sleep

if TYPE_CHECKING:
    import torch

_SPIN_S = 80e-6
_FIRST_PAUSE_S = 20e-6
_LAST_PAUSE_S = 1e-3


class CudaEvent:
    """See ``Event``.

    CUDA has no wait with a deadline, so the event is looked at: all the time at first, then after
    growing pauses of at most a millisecond. A wait of CUDA's own could not be ended by Ctrl-C.

    Args:
        event: A ``torch.cuda.Event``, recorded before any method is called.
        device: Where it is recorded.
        kept: Memory that the work before the event uses; let go when the event is found reached.
    """

    def __init__(self, event: Any, device: torch.device, kept: Any = None):
        self.event = event
        self.device = device
        self._kept = kept

    def is_reached(self) -> bool:
        with relaxed():
            return self._look()

    def wait(self, timeout_s: float) -> None:
        start, pause = time.monotonic(), _FIRST_PAUSE_S
        with relaxed():
            while not self._look():
                waited_s = time.monotonic() - start
                if waited_s >= timeout_s:
                    raise TimeoutError(
                        f"{self.device} did not finish what it was given within {timeout_s:g} s"
                    )
                if waited_s >= _SPIN_S:
                    sleep(min(pause, timeout_s - waited_s))
                    pause = min(2 * pause, _LAST_PAUSE_S)

    def _look(self) -> bool:
        is_reached = bool(self.event.query())
        if is_reached:
            self._kept = None
        return is_reached

    def make_stream_wait(self) -> None:
        import torch

        torch.cuda.current_stream(self.device).wait_event(self.event)


def recorded(stream: torch.cuda.Stream, device: torch.device) -> CudaEvent:
    """Return an event at the current end of a stream of ``device``. Runs on: any thread."""
    import torch

    event = torch.cuda.Event()
    with relaxed():
        event.record(stream)
    return CudaEvent(event, device)
