"""Arrays other than torch tensors, and other objects with large buffers, carried as tensors.

``RAY_RDT_ARRAY_BYTES`` enables this. Objects that export memory by the buffer protocol and pickle
it out of band (numpy arrays, pandas objects, Arrow buffers) are pickled as usual, with tensors over
the same memory in place of the buffers. Arrays with DLPack and the array API (jax, cupy) become
tensors and, at the consumer, arrays of their own type again. Nothing is copied.
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
        # A serializer that the user registered takes precedence.
        if type(obj) not in self.dispatch_table:
            reduced = reduce(obj, settings().array_bytes)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


def are_arrays_wanted() -> bool:
    """Tell whether the user enabled it and this process has torch, whose tensors replace arrays."""
    if not settings().array_bytes:
        return False
    try:
        importlib.import_module("torch")
    except ImportError:
        return False
    return True


def reduce(value: Any, least_bytes: int) -> tuple[Any, ...] | None:
    """Reduce a value to a form with tensors over its memory.

    Runs on: producer, the thread that pickles.

    Args:
        least_bytes: Smaller buffers stay in the value.

    Returns:
        The result of ``__reduce_ex__`` with tensors in it; None if the value is pickled as usual.
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
    """Tell whether a value exports at least so much memory."""
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
    """A buffer that is pickled as a tensor over its memory and unpickled as a buffer."""

    def __init__(self, memory: memoryview):
        self._memory = memory

    def __reduce__(self) -> tuple[Any, ...]:
        return _buffer_over, (_tensor_over(self._memory), self._memory.readonly)


def _tensor_over(memory: memoryview) -> torch.Tensor:
    """Return a flat uint8 tensor over memory that it keeps alive.

    torch warns of read-only memory, but not of ctypes arrays.
    """
    import numpy
    import torch

    address = numpy.frombuffer(memory, numpy.uint8).ctypes.data
    held = (ctypes.c_uint8 * memory.nbytes).from_address(address)
    held.memory = memory  # type: ignore[attr-defined]
    return torch.frombuffer(held, dtype=torch.uint8)


def _buffer_over(tensor: torch.Tensor, is_readonly: bool) -> memoryview:
    """Runs on: consumer, the thread that deserializes."""
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
