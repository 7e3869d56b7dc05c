"""GPU memory that processes of one host open from each other, through torch's CUDA IPC.

torch counts references: each ``share`` has to be matched by one ``open`` in another process, and
the shared storage's memory is not given back before that has been closed. So each buffer is shared
anew for each reader, through a storage of its own that owns nothing: whatever becomes of the count,
the user's storage is not touched. That the memory lives meanwhile is the caller's concern.

Not run on a GPU so far: written from the documentation and sources of torch.
"""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.base import Handle

if TYPE_CHECKING:
    import torch

#: Fields of what ``reduce_tensor`` gives that travel as they are, and those that are bytes.
_PLAIN = {
    "storage_nbytes": 8,
    "storage_offset": 9,
    "counter_offset": 12,
    "is_event_needed": 14,
}
_BYTES = {"storage": 7, "counter": 11, "event": 13}


class CudaSharing:
    """See ``Sharing``."""

    def identity(self, device: torch.device) -> str:
        """See ``Sharing``."""
        import torch

        return str(torch.cuda.get_device_properties(device).uuid)

    def find(self, identity: str) -> torch.device | None:
        """See ``Sharing``."""
        import torch

        devices = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
        return next((device for device in devices if self.identity(device) == identity), None)

    def can_copy(self, target: torch.device, source: torch.device) -> bool:
        """See ``Sharing``."""
        import torch

        return target == source or torch.cuda.can_device_access_peer(target, source)

    def share(self, buffer: torch.Tensor) -> tuple[Handle, Any]:
        """See ``Sharing``."""
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        reduce: Any = reduce_tensor
        # All of the storage: torch's allocator knows memory by the address that it gave out.
        storage = buffer.untyped_storage()
        unowned = _Unowned(storage.data_ptr(), storage.nbytes())
        alias = torch.as_tensor(unowned, device=buffer.device)
        try:
            # torch records an event on the current stream, or waits for that stream alone.
            with torch.cuda.device(buffer.device):
                _, fields = reduce(alias)
        except RuntimeError as error:
            if _is_expandable(buffer):
                raise RuntimeError(
                    "the memory lies in an expandable segment "
                    f"(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True), which this torch and "
                    f"driver cannot share: {error}"
                ) from error
            raise
        handle = {name: fields[at] for name, at in _PLAIN.items()}
        handle |= {name: base64.b64encode(fields[at]).decode() for name, at in _BYTES.items()}
        offset = buffer.data_ptr() - storage.data_ptr()
        handle |= {"offset": offset, "nbytes": buffer.numel(), "allocator": _allocator()}
        return handle, alias

    def open(self, handle: Handle, device: torch.device) -> torch.Tensor:
        """See ``Sharing``. The current stream waits for the producer's event."""
        import torch
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        rebuild: Any = rebuild_cuda_tensor
        raw = {name: base64.b64decode(handle[name]) for name in _BYTES}
        try:
            with torch.cuda.device(device):
                tensor = rebuild(
                    torch.Tensor,
                    (handle["nbytes"],),
                    (1,),
                    handle["offset"],
                    torch.UntypedStorage,
                    torch.uint8,
                    device.index,
                    raw["storage"],
                    handle["storage_nbytes"],
                    handle["storage_offset"],
                    False,
                    raw["counter"],
                    handle["counter_offset"],
                    raw["event"],
                    handle["is_event_needed"],
                )
        except RuntimeError as error:
            if "expandable_segments:True" in handle["allocator"]:
                raise RuntimeError(
                    "the producer's memory may lie in an expandable segment "
                    f"(PYTORCH_CUDA_ALLOC_CONF={handle['allocator']}): {error}"
                ) from error
            raise
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def revoke(self, handle: Handle) -> None:
        """See ``Sharing``."""
        import torch

        storage: Any = torch.UntypedStorage
        counter = base64.b64decode(handle["counter"])
        storage._release_ipc_counter(counter, handle["counter_offset"], device="cuda")


class _Unowned:
    """GPU memory at an address, for torch to look at and not to own."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _is_expandable(buffer: torch.Tensor) -> bool:
    import torch

    address = buffer.data_ptr()
    snapshot: Any = torch.cuda.memory_snapshot
    return any(
        segment.get("is_expandable", False)
        and segment["address"] <= address < segment["address"] + segment["total_size"]
        for segment in snapshot()
    )


def _allocator() -> str:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    return ",".join(filter(None, map(os.environ.get, names)))
