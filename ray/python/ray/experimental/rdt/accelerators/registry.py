"""The kinds of devices that RDT knows, and the streams that write what this process sends.

No kind imports torch before it is used.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from ray.experimental.rdt.accelerators.base import Accelerator
from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline

if TYPE_CHECKING:
    import torch

_FACTORIES = {"cuda": ("ray.experimental.rdt.accelerators.cuda", "CudaAccelerator")}

_lock = threading.Lock()
_made: dict[str, Accelerator] = {}

#: A stream that the user named. It writes what this process sends, as the current one does.
_named: torch.cuda.Stream | None = None


def of(device_type: str) -> Accelerator | None:
    """Return the accelerator of a torch device type, None if unknown. Runs on: any thread."""
    known = _made.get(device_type)
    if known is not None or device_type not in _FACTORIES:
        return known
    with _lock:
        if device_type not in _made:
            module, factory = _FACTORIES[device_type]
            make = getattr(importlib.import_module(module), factory)
            _made[device_type] = cast(Accelerator, make())
        return _made[device_type]


def usable(device_type: str) -> Accelerator | None:
    """Return the accelerator of a type if this process has such a device."""
    accelerator = of(device_type)
    return None if accelerator is None or accelerator.unavailable_reason() else accelerator


def usable_types() -> list[str]:
    """Return the types of devices that this process has. Runs on: any thread."""
    return sorted(name for name in {*_FACTORIES, *_made} if usable(name) is not None)


def record(tensors: Iterable[torch.Tensor]) -> list[Event]:
    """Return an event for each device of the tensors. Runs on: any thread."""
    events = []
    for device in {tensor.device for tensor in tensors if not tensor.is_cpu}:
        accelerator = of(device.type)
        if accelerator is not None:
            events.append(accelerator.record(device))
    return events


@contextlib.contextmanager
def capture_safe(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Enter ``Accelerator.capture_safe`` for the devices of some tensors."""
    with contextlib.ExitStack() as stack:
        for name in {tensor.device.type for tensor in tensors if not tensor.is_cpu}:
            accelerator = of(name)
            if accelerator is not None:
                stack.enter_context(accelerator.capture_safe())
        yield


@contextlib.contextmanager
def copying(tensors: Iterable[torch.Tensor], timeout_s: float) -> Iterator[None]:
    """Let torch copy into tensors in the context; wait for devices at its end.

    Raises TimeoutError if a device does not finish them.
    """
    written = [tensor for tensor in tensors if not tensor.is_cpu]
    with capture_safe(written):
        yield
        deadline = Deadline.after(timeout_s)
        for event in record(written):
            event.wait(deadline.left_s())


def register(accelerator: Accelerator) -> None:
    """Add a kind of device to this process. Raises ValueError if its type is known already."""
    with _lock:
        if accelerator.device_type in _made or accelerator.device_type in _FACTORIES:
            raise ValueError(f"RDT knows devices of type {accelerator.device_type!r} already")
        _made[accelerator.device_type] = accelerator


def name_stream(stream: torch.cuda.Stream | None) -> None:
    """Name one more stream of this process for ``record_writers``, None for no such stream."""
    global _named
    _named = stream


def record_writers(tensors: Sequence[torch.Tensor]) -> list[Event]:
    """Return events at the current ends of the writers of these tensors. Runs on: any thread."""
    events = record(tensors)
    named = _named
    if named is not None and any(tensor.device == named.device for tensor in tensors):
        accelerator = of(named.device.type)
        if accelerator is not None:
            with accelerator.on(named):
                events.append(accelerator.record(named.device))
    return events


def make_writers_wait(event: Event, device: torch.device) -> None:
    """Make later work of a device's writers wait for an event. Runs on: any thread."""
    event.make_stream_wait()
    named, accelerator = _named, of(device.type)
    if named is not None and named.device == device and accelerator is not None:
        with accelerator.on(named):
            event.make_stream_wait()
