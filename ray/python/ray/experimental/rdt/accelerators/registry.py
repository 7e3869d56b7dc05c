"""The kinds of devices that RDT knows. torch is imported by none before it is asked for."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from ray.experimental.rdt.accelerators.base import Accelerator, Event

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
    return None if accelerator is None or accelerator.unavailable() else accelerator


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


def register(accelerator: Accelerator) -> None:
    """Makes RDT carry tensors of another kind of device, in this process.

    Raises:
        ValueError: the device type is known already.
    """
    with _lock:
        if accelerator.device_type in _made or accelerator.device_type in _FACTORIES:
            raise ValueError(f"RDT knows devices of type {accelerator.device_type!r} already")
        _made[accelerator.device_type] = accelerator
