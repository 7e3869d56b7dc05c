"""Arrays that are no torch tensors, and other objects with large buffers, as tensors.

``RAY_RDT_ARRAY_BYTES`` asks for it. What exports its memory by the buffer protocol and pickles it
out of band (numpy arrays, what holds them as pandas does, Arrow buffers) is pickled as it always
is, with tensors over the same memory in place of its buffers. What speaks DLPack and the array API
(jax, cupy) becomes a tensor and, at the consumer, an array of its own kind again. Nothing is
copied.
"""

from __future__ import annotations

import ctypes
import importlib
import pickle
import sys
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt._tensors import Pickler
from ray.experimental.rdt.common.config import settings

if TYPE_CHECKING:
    import torch


class ArrayPickler(Pickler):
    """Ray's pickler, with placeholders for tensors and for the memory of other arrays.

    Runs on: producer, the thread that runs the user's task.
    """

    def reducer_override(self, obj: Any) -> Any:
        # What the user registered a serializer for is pickled by that.
        if type(obj) not in self.dispatch_table:
            reduced = reduce(obj, settings().array_bytes)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


def are_arrays_wanted() -> bool:
    """Whether the user asks for it, and this process has torch, whose tensors stand for arrays."""
    if not settings().array_bytes:
        return False
    try:
        importlib.import_module("torch")
    except ImportError:
        return False
    return True


def reduce(value: Any, least_bytes: int) -> tuple[Any, ...] | None:
    """How to pickle a value so that a pickler which carries tensors carries its memory.

    Runs on: producer, the thread that pickles.

    Args:
        value: Anything but a tensor.
        least_bytes: Less memory than this stays in the value.

    Returns:
        What ``__reduce_ex__`` returns, with tensors in it; None for what is pickled as ever.
    """
    if hasattr(type(value), "__dlpack__") and not _is_numpy(value):
        return _reduce_by_dlpack(value, least_bytes)
    if not _exports(value, least_bytes):
        return None
    call, args, *rest = value.__reduce_ex__(5)
    return call, tuple(_carried(arg, least_bytes) for arg in args), *rest


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _exports(value: Any, least_bytes: int) -> bool:
    """Whether it exports so much memory."""
    if _is_numpy(value):
        return bool(value.nbytes >= least_bytes)  # also of dtypes that memoryview does not know
    try:
        return memoryview(value).nbytes >= least_bytes
    except (TypeError, ValueError, BufferError):
        return False


def _carried(argument: Any, least_bytes: int) -> Any:
    if not isinstance(argument, pickle.PickleBuffer):
        return argument
    memory = argument.raw()
    return _Carried(memory) if memory.nbytes >= least_bytes else argument


class _Carried:
    """Stands for a buffer: pickled as a tensor over its memory, unpickled as a buffer again."""

    def __init__(self, memory: memoryview):
        self._memory = memory

    def __reduce__(self) -> tuple[Any, ...]:
        return _buffer_over, (_tensor_over(self._memory), self._memory.readonly)


def _tensor_over(memory: memoryview) -> torch.Tensor:
    """A flat uint8 tensor over memory, which it keeps alive. torch warns of read-only memory."""
    import numpy
    import torch

    address = numpy.frombuffer(memory, numpy.uint8).ctypes.data
    held = (ctypes.c_uint8 * memory.nbytes).from_address(address)
    held.memory = memory  # type: ignore[attr-defined]
    return torch.frombuffer(held, dtype=torch.uint8)


def _buffer_over(tensor: torch.Tensor, is_readonly: bool) -> memoryview:
    """Runs on: consumer, the thread that deserializes. Memory that the consumer got is its own."""
    memory = memoryview(tensor.numpy())  # type: ignore[arg-type]
    return memory.toreadonly() if is_readonly else memory


def _reduce_by_dlpack(value: Any, least_bytes: int) -> tuple[Any, ...] | None:
    namespace = getattr(value, "__array_namespace__", None)
    if namespace is None or getattr(value, "nbytes", 0) < least_bytes:
        return None
    import torch

    try:
        return _from_dlpack, (namespace().__name__, torch.utils.dlpack.from_dlpack(value))
    except (BufferError, RuntimeError, TypeError, ValueError):
        return None  # a dtype, device or layout that DLPack or torch does not know


def _from_dlpack(namespace: str, tensor: torch.Tensor) -> Any:
    """Runs on: consumer, the thread that deserializes."""
    return importlib.import_module(namespace).from_dlpack(tensor)
