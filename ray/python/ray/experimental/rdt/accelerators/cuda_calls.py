"""Events, and calls of the CUDA runtime that torch does not offer, through cuda-bindings.

torch's CUDA wheels install NVIDIA's package cuda-bindings. Its calls return an error code first.
They release the GIL.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.common.real_threads import sleep

if TYPE_CHECKING:
    import torch

#: Pauses between two looks at an event: none at first, then growing ones.
_SPIN_S = 80e-6
_FIRST_PAUSE_S = 20e-6
_LAST_PAUSE_S = 1e-3


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
