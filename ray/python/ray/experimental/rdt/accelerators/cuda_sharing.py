"""GPU memory that processes of one host open from each other, through CUDA IPC.

The calls are those of CUDA's driver and runtime, so memory of any library can be shared that was
allocated by ``cudaMalloc``: torch's, cupy's, jax's. Memory of ``cudaMallocAsync`` pools and of the
virtual memory calls, on which torch builds its expandable segments, has no such handle;
the error names it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.cuda_calls import (
    CudaError,
    CudaEvent,
    bindings,
    checked,
    current,
    driver,
    relaxed,
)
from ray.experimental.rdt.accelerators.device_failures import is_device_failure
from ray.experimental.rdt.accelerators.events import Event, SideStreams
from ray.experimental.rdt.accelerators.shared_memory import CannotShare

if TYPE_CHECKING:
    import torch

_HANDLE_NBYTES = 64
_DLPACK_CUDA = 2


class CudaSharing:
    """See ``Sharing``. ``new_stream`` makes a private stream of a GPU."""

    dlpack_type = _DLPACK_CUDA

    def __init__(self, new_stream: Callable[[torch.device], torch.cuda.Stream]):
        self._new_stream = new_stream
        self._side_streams: SideStreams[torch.cuda.Stream] = SideStreams()

    def identity(self, device: torch.device) -> str:
        import torch

        return str(torch.cuda.get_device_properties(device).uuid)

    def unreachable_reason(self, device: torch.device, identity: str) -> str:
        """See ``Sharing``. CUDA opens memory of a GPU that this process does not see, too."""
        import torch

        for index in range(torch.cuda.device_count()):
            other = torch.device("cuda", index)
            if other != device and self.identity(other) == identity:
                if torch.cuda.can_device_access_peer(device, other):
                    return ""
                return f"{device} cannot reach the memory of {other}"
        return ""

    def export(self, address: int, device: torch.device) -> tuple[bytes, int, int]:
        runtime, driver = _modules()
        with relaxed(), current(device.index):
            reason = _why_not(driver, address)
            if reason:
                raise CannotShare(reason)
            try:
                start, nbytes = checked(
                    "cuMemGetAddressRange", driver.cuMemGetAddressRange(driver.CUdeviceptr(address))
                )
                call = runtime.cudaIpcGetMemHandle(int(start))
                handle = checked("cudaIpcGetMemHandle", call)
            except CudaError as error:
                raise _refusal(error) from error
        return ctypes.string_at(handle.getPtr(), _HANDLE_NBYTES), int(start), int(nbytes)

    def map(self, handle: bytes, device: torch.device) -> int:
        runtime, _ = _modules()
        # The one attribute of this type, "reserved", is not in every version of cuda-bindings.
        opened = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(opened.getPtr(), handle, _HANDLE_NBYTES)
        with relaxed(), current(device.index):
            try:
                flags = runtime.cudaIpcMemLazyEnablePeerAccess
                call = runtime.cudaIpcOpenMemHandle(opened, flags)
                return int(checked("cudaIpcOpenMemHandle", call))
            except CudaError as error:
                raise _refusal(error) from error

    def unmap(self, address: int, device: torch.device) -> None:
        runtime, _ = _modules()
        with relaxed(), current(device.index):
            checked("cudaIpcCloseMemHandle", runtime.cudaIpcCloseMemHandle(address))

    def export_event(self, event: Event) -> tuple[bytes, Any]:
        """See ``Sharing``. Recorded on a private stream that waits for ``event``."""
        import torch

        assert isinstance(event, CudaEvent)
        shared, device = torch.cuda.Event(interprocess=True), event.device

        def begin(side: torch.cuda.Stream) -> None:
            side.wait_event(event.event)
            shared.record(side)

        with relaxed():
            self._side_streams.run(
                device, lambda: self._new_stream(device), CudaEvent(shared, device), begin
            )
            try:
                return bytes(shared.ipc_handle()), shared
            except RuntimeError as error:
                raise _refusal(error) from error

    def import_event(self, handle: bytes, device: torch.device) -> Event:
        import torch

        with relaxed(), torch.cuda.device(device):
            try:
                return CudaEvent(torch.cuda.Event.from_ipc_handle(device, handle), device)
            except RuntimeError as error:
                raise _refusal(error) from error


def _modules() -> tuple[Any, Any]:
    found = bindings(), driver()
    if None in found:
        raise CannotShare(
            "the package cuda-bindings, which torch's CUDA wheels bring along, is not installed or "
            "not made for this driver"
        )
    return found


def _refusal(error: RuntimeError) -> RuntimeError:
    """Return the error of a failed call: CannotShare, or the same if the GPU has failed."""
    return error if is_device_failure(error) else CannotShare(str(error))


def _why_not(driver: Any, address: int) -> str:
    """Return why the memory at an address has no IPC handle, "" if no reason is known."""
    attribute = driver.CUpointer_attribute

    def ask(name: str) -> int:
        which = getattr(attribute, f"CU_POINTER_ATTRIBUTE_{name}")
        code, value = driver.cuPointerGetAttribute(which, driver.CUdeviceptr(address))
        return -1 if int(code) or value is None else int(value)

    if ask("IS_LEGACY_CUDA_IPC_CAPABLE") != 0:
        return ""
    if ask("IS_MANAGED") == 1:
        return "it is managed memory (cudaMallocManaged), which CUDA IPC does not share"
    if ask("MEMPOOL_HANDLE") > 0:
        return (
            "it comes from a pool of cudaMallocAsync, which CUDA IPC does not share "
            "(PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync, or cupy's asynchronous pool)"
        )
    if _is_expandable(address):
        return (
            "it lies in an expandable segment, which CUDA IPC does not share "
            "(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)"
        )
    return "it was not allocated by cudaMalloc, and CUDA IPC shares no other memory"


def _is_expandable(address: int) -> bool:
    """Return whether torch's allocator has the address in an expandable segment."""
    import torch

    return any(
        segment.get("is_expandable", False)
        and segment["address"] <= address < segment["address"] + segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
    )
