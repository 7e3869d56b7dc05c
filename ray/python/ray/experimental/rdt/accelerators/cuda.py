"""NVIDIA GPUs, through torch.

Every call runs in the capture mode "relaxed" of its thread: while a thread of the user's captures a
CUDA graph in torch's default mode, "global", a query of an event or an allocation on any other
thread would end the capture with an error. NVIDIA's package cuda-bindings, which torch's CUDA
wheels install, has that call and makes the private streams. Without it streams come from torch's
pool, and users have to capture in the mode "thread_local".

Not run on a GPU so far, as the other ``cuda_`` modules: written from the documentation and sources
of torch, CUDA and cuda-bindings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators.cuda_calls import (
    CudaEvent,
    bindings,
    checked,
    current,
    driver,
    recorded,
    relaxed,
)
from ray.experimental.rdt.accelerators.cuda_sharing import CudaSharing
from ray.experimental.rdt.accelerators.events import Event, SideStreams
from ray.experimental.rdt.accelerators.shared_memory import SharedMemory

if TYPE_CHECKING:
    import torch

#: Pairs below this are copied by one kernel for many of them.
_SMALL_NBYTES = 1 << 20


class CudaAccelerator:
    """See ``Accelerator``."""

    device_type = "cuda"
    transports: tuple[str, ...] = ("cuda_ipc", "nixl", "nccl")

    def __init__(self) -> None:
        self.sharing: SharedMemory | None = SharedMemory(CudaSharing(self.new_stream))
        self._side_streams: SideStreams[torch.cuda.Stream] = SideStreams()

    def unavailable_reason(self) -> str:
        try:
            import torch
        except ImportError as error:
            return f"this process cannot import torch: {error}"
        return "" if torch.cuda.is_available() else "this process has no NVIDIA GPU"

    def current_device(self) -> torch.device:
        import torch

        return torch.device("cuda", torch.cuda.current_device())

    def segment(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """See ``Accelerator``. Not known without NVIDIA's cuda-bindings."""
        calls = driver()
        if calls is None:
            return None
        with relaxed(), current(tensor.get_device()):
            error, start, nbytes = calls.cuMemGetAddressRange(tensor.data_ptr())
        return None if int(error) else (int(start), int(nbytes))

    def record(self, device: torch.device) -> Event:
        """See ``Accelerator``.

        An event that a captured graph has recorded cannot be waited for: a thread that captures,
        while a tensor dies for instance, gets one of the default stream.
        """
        import torch

        with torch.cuda.device(device):
            is_capturing = torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.default_stream if is_capturing else torch.cuda.current_stream
        return recorded(stream(device), device)

    def new_stream(self, device: torch.device) -> torch.cuda.Stream:
        """See ``Accelerator``.

        torch's own 32 streams of a device are given out in turns, to the user as well. The stream
        is never destroyed: torch's allocator may name it for as long as the process lives.
        """
        import torch

        runtime = bindings()
        if runtime is None:
            return torch.cuda.Stream(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        with relaxed(), current(index):
            flags = runtime.cudaStreamNonBlocking
            raw = checked("cudaStreamCreateWithFlags", runtime.cudaStreamCreateWithFlags(flags))
        return torch.cuda.ExternalStream(int(raw), device=torch.device("cuda", index))

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        import torch

        with relaxed(), torch.cuda.device(stream.device), torch.cuda.stream(stream):
            yield

    def capture_safe(self) -> contextlib.AbstractContextManager[None]:
        return relaxed()

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        import torch

        with relaxed():
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See ``Accelerator``. torch keeps freed pinned memory for the next that asks."""
        import torch

        with relaxed():
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """See ``Accelerator``. For all GPUs that the process sees; needs cuda-bindings."""
        runtime = bindings()
        if runtime is None:
            raise RuntimeError("NVIDIA's package cuda-bindings is not installed")
        address, flags = memory.data_ptr(), runtime.cudaHostRegisterPortable
        with relaxed():
            checked("cudaHostRegister", runtime.cudaHostRegister(address, memory.nbytes, flags))

        def undo() -> None:
            with relaxed():
                runtime.cudaHostUnregister(address)

        return undo

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
        after: Sequence[Event] = (),
    ) -> Event:
        import torch

        event = CudaEvent(torch.cuda.Event(), device, list(pairs))

        def begin(side: torch.cuda.Stream) -> None:
            for earlier in after:
                if isinstance(earlier, CudaEvent):  # others are about memory of other devices
                    side.wait_event(earlier.event)
            try:
                with self.on(side), torch.inference_mode():
                    _copy_all(pairs)
            finally:
                event.event.record(side)

        direction = tuple(tensor.is_cuda for tensor in pairs[0]) if pairs else ()
        with relaxed():
            return self._side_streams.run(
                (device, direction), lambda: self.new_stream(device), event, begin
            )


def _copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give the copies to the current stream."""
    import torch

    few: list[tuple[torch.Tensor, torch.Tensor]] = []
    for target, source in pairs:
        if target.is_cuda and source.is_cuda and target.numel() < _SMALL_NBYTES:
            few.append((target, source))
        else:
            target.copy_(source, non_blocking=True)
    if few:
        targets, sources = zip(*few)
        torch._foreach_copy_(targets, sources, non_blocking=True)
