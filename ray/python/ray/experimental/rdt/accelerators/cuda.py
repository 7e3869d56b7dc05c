"""NVIDIA GPUs, through torch.

Not run on a GPU so far: written from the documentation of torch and CUDA.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.base import Event
from ray.experimental.rdt.accelerators.cuda_sharing import CudaSharing

if TYPE_CHECKING:
    import torch

_FIRST_LOOK_S = 20e-6
_LAST_LOOK_S = 1e-3


class CudaEvent:
    """See ``Event``.

    CUDA has no wait with a deadline, so the event is looked at, after growing pauses of at most a
    millisecond; a wait of CUDA's own could also not be ended by Ctrl-C.

    Args:
        event: A recorded ``torch.cuda.Event``.
        device: Where it was recorded.
    """

    def __init__(self, event: Any, device: torch.device):
        self._event = event
        self._device = device

    def wait(self, timeout_s: float) -> None:
        """See ``Event``."""
        deadline, pause = time.monotonic() + timeout_s, _FIRST_LOOK_S
        while not self._event.query():
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"{self._device} did not finish what it was given within {timeout_s:g} s"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK_S)

    def order(self) -> None:
        """See ``Event``."""
        import torch

        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaAccelerator:
    """See ``Accelerator``. Each device has one side stream, made at its first copy."""

    device_type = "cuda"
    transports = ("cuda_ipc", "nixl", "nccl")

    def __init__(self) -> None:
        self.sharing = CudaSharing()
        self._lock = threading.Lock()
        self._side_streams: dict[int, torch.cuda.Stream] = {}

    def unavailable(self) -> str:
        """See ``Accelerator``."""
        try:
            import torch
        except ImportError as error:
            return f"this process cannot import torch: {error}"
        return "" if torch.cuda.is_available() else "this process has no NVIDIA GPU"

    def current_device(self) -> torch.device:
        """See ``Accelerator``."""
        import torch

        return torch.device("cuda", torch.cuda.current_device())

    def segment(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """See ``Accelerator``. Asks the driver through NVIDIA's cuda-bindings, if installed."""
        import torch

        try:
            driver = importlib.import_module("cuda.bindings.driver")
        except ImportError:
            return None
        with torch.cuda.device(tensor.device):
            error, start, nbytes = driver.cuMemGetAddressRange(tensor.data_ptr())
        return None if int(error) else (int(start), int(nbytes))

    def record(self, device: torch.device) -> Event:
        """See ``Accelerator``."""
        import torch

        return recorded(torch.cuda.current_stream(device), device)

    def new_stream(self, device: torch.device) -> torch.cuda.Stream:
        """See ``Accelerator``. torch has 32 for each device and gives them out in turns."""
        import torch

        make: Any = torch.cuda.Stream
        stream: torch.cuda.Stream = make(device)
        return stream

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """See ``Accelerator``."""
        import torch

        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            yield

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """See ``Accelerator``."""
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See ``Accelerator``. torch keeps freed pinned memory for the next that asks."""
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device
    ) -> Event:
        """See ``Accelerator``."""
        import torch

        side = self._side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(side), torch.no_grad():
            for target, source in pairs:
                # A copy may outlast the wait for it: memory that is freed then is not given out
                # again before the copy has run.
                for tensor in (target, source):
                    if tensor.is_cuda:
                        tensor.record_stream(side)
                target.copy_(source, non_blocking=True)
        return recorded(side, device)

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        import torch

        index = torch.cuda.current_device() if device.index is None else device.index
        with self._lock:
            if index not in self._side_streams:
                self._side_streams[index] = self.new_stream(torch.device("cuda", index))
            return self._side_streams[index]


def recorded(stream: torch.cuda.Stream, device: torch.device) -> CudaEvent:
    """An event at the end of what a stream of ``device`` has so far. Runs on: any thread."""
    import torch

    make: Any = torch.cuda.Event
    event = make()
    event.record(stream)
    return CudaEvent(event, device)
