"""The kinds of devices that RDT knows. torch is imported by none before it is asked for."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
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


def of(device_type: str) -> Accelerator | None:
    """The accelerator of a torch device type; None if RDT does not know it. Runs on: any thread."""
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
    """The accelerator of a type of which this process has a device."""
    accelerator = of(device_type)
    return None if accelerator is None or accelerator.unavailable_reason() else accelerator


def usable_types() -> list[str]:
    """The types of devices that this process has. Runs on: any thread."""
    return sorted(name for name in {*_FACTORIES, *_made} if usable(name) is not None)


def record(tensors: Iterable[torch.Tensor]) -> list[Event]:
    """An event for each device that some of the tensors are on. Runs on: any thread."""
    events = []
    for device in {tensor.device for tensor in tensors if not tensor.is_cpu}:
        accelerator = of(device.type)
        if accelerator is not None:
            events.append(accelerator.record(device))
    return events


@contextlib.contextmanager
def aside(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Around calls of others that work on tensors; see ``Accelerator.aside``."""
    with contextlib.ExitStack() as stack:
        for name in {tensor.device.type for tensor in tensors if not tensor.is_cpu}:
            accelerator = of(name)
            if accelerator is not None:
                stack.enter_context(accelerator.aside())
        yield


@contextlib.contextmanager
def copying(tensors: Iterable[torch.Tensor], timeout_s: float) -> Iterator[None]:
    """Around copies into tensors by torch; waits for those on devices at the end.

    Raises:
        TimeoutError: a device does not finish them.
    """
    written = [tensor for tensor in tensors if not tensor.is_cpu]
    with aside(written):
        yield
        deadline = Deadline.after(timeout_s)
        for event in record(written):
            event.wait(deadline.left_s())


def register(accelerator: Accelerator) -> None:
    """Make RDT carry tensors of another kind of device, in this process.

    Raises:
        ValueError: the device type is known already.
    """
    with _lock:
        if accelerator.device_type in _made or accelerator.device_type in _FACTORIES:
            raise ValueError(f"RDT knows devices of type {accelerator.device_type!r} already")
        _made[accelerator.device_type] = accelerator
