"""Tensors in memory that consumers of the host can map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: Takes a number of bytes; returns writable memory in a file.
Allocate = Callable[[int], Any]

#: A file that several tensors share. Each file is a descriptor.
_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 64
#: Smaller tensors do not begin at a page: consumers read them.
_MIN_MAPPED_BYTES = 1 << 20
_PAGE = 4096

_EMPTY = frozenset({torch.empty, torch.empty_like, torch.empty_strided})
_FACTORIES = _EMPTY | {
    torch.arange,
    torch.clone,
    torch.eye,
    torch.full,
    torch.full_like,
    torch.linspace,
    torch.ones,
    torch.ones_like,
    torch.rand,
    torch.rand_like,
    torch.randint,
    torch.randint_like,
    torch.randn,
    torch.randn_like,
    torch.tensor,
    torch.zeros,
    torch.zeros_like,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.cpu,
    torch.Tensor.to,
}


class Shareable(TorchFunctionMode):
    """Context in which torch's factory functions create host tensors in files.

    Runs on: the thread that enters it; other threads are not affected.
    """

    def __init__(self, allocate: Allocate) -> None:
        super().__init__()
        self._allocate = allocate
        self._chunk: Any = None
        self._used = _CHUNK_BYTES

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in _FACTORIES or not _is_movable(result):
            return result
        storage = result.untyped_storage().data_ptr()
        if any(isinstance(a, torch.Tensor) and _storage(a) == storage for a in args):
            return result  # a view of an argument
        with torch.no_grad():
            moved = self._place(result)
            if function not in _EMPTY:
                moved.copy_(result)
        return moved.requires_grad_(result.requires_grad)

    def _place(self, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same dtype, shape and, if it is dense, strides."""
        nbytes = like.numel() * like.element_size()
        memory, offset = self._take(nbytes)
        flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=offset)
        if like.untyped_storage().nbytes() == nbytes:
            return flat.as_strided(like.size(), like.stride())
        return flat.view(like.size())

    def _take(self, nbytes: int) -> tuple[Any, int]:
        if nbytes > _CHUNK_BYTES // 2:
            return self._allocate(nbytes), 0
        alignment = _PAGE if nbytes >= _MIN_MAPPED_BYTES else _ALIGNMENT
        start = math.ceil(self._used / alignment) * alignment
        if start + nbytes > _CHUNK_BYTES:
            self._chunk, start = self._allocate(_CHUNK_BYTES), 0
        self._used = start + nbytes
        return self._chunk, start


def _is_movable(result: Any) -> bool:
    return (
        type(result) is torch.Tensor
        and result.device.type == "cpu"
        and result.layout is torch.strided
        and result.grad_fn is None
        and not result.is_quantized
        and result.numel() > 0
    )


def _storage(tensor: torch.Tensor) -> int:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()
