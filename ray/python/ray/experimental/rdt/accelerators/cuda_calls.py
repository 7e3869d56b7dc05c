"""Calls of the CUDA runtime that torch does not offer, through NVIDIA's package cuda-bindings.

torch's CUDA wheels install that package. Its calls return an error code first. They release the
GIL.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any


class CudaError(RuntimeError):
    """A call of CUDA failed, with code ``result`` as the runtime numbers it."""

    def __init__(self, call: str, result: Any):
        super().__init__(f"{call} failed: {getattr(result, 'name', result)}")
        self.result = int(result)


@functools.cache
def bindings() -> Any:
    """Return the module ``cuda.bindings.runtime``; None if not installed or not for this driver.

    Runs on: any thread, after torch has found a GPU.
    """
    runtime = _module("runtime")
    return None if runtime is None or int(runtime.cudaGetDeviceCount()[0]) else runtime


@functools.cache
def driver() -> Any:
    """Return the module ``cuda.bindings.driver``, None if ``bindings`` is None."""
    return None if bindings() is None else _module("driver")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError:
        return None


def checked(call: str, result: tuple[Any, ...]) -> Any:
    """Return the value of a call, or a tuple of them. Raises CudaError."""
    code, *values = result
    if int(code):
        raise CudaError(call, code)
    return values[0] if len(values) == 1 else tuple(values)


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Let this thread call CUDA as it likes while another thread captures a graph.

    A capture in torch's default mode, "global", otherwise ends with an error as soon as any thread
    allocates device memory or asks for an event. Without cuda-bindings it does.
    """
    runtime = bindings()
    if runtime is None:
        yield
        return
    exchange = runtime.cudaThreadExchangeStreamCaptureMode
    code, before = exchange(runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
    try:
        yield
    finally:
        if not int(code):
            exchange(before)


@contextlib.contextmanager
def current(index: int) -> Iterator[None]:
    """Make a GPU's primary context current on this thread, for calls that torch does not make."""
    import torch

    # torch does not touch the runtime where the index is the current one already, and a fresh
    # thread then has no context.
    with torch.cuda.device(index):
        checked("cudaSetDevice", bindings().cudaSetDevice(index))
        yield
