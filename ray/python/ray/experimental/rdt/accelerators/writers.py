"""Streams that write what this process sends: the current one, and one that the user named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.events import Event

if TYPE_CHECKING:
    import torch

_named: torch.cuda.Stream | None = None


def name_stream(stream: torch.cuda.Stream | None) -> None:
    """Names one more stream of this process that ``record`` records; None for no such stream."""
    global _named
    _named = stream


def record(tensors: Sequence[torch.Tensor]) -> list[Event]:
    """The ends of what the writers of these tensors have so far. Runs on: any thread."""
    events = accelerators.record(tensors)
    named = _named
    if named is not None and any(tensor.device == named.device for tensor in tensors):
        accelerator = accelerators.of(named.device.type)
        if accelerator is not None:
            with accelerator.on(named):
                events.append(accelerator.record(named.device))
    return events


def follow(event: Event, device: torch.device) -> None:
    """Order what a device's writers are given next after an event. Runs on: any thread."""
    event.order()
    named, accelerator = _named, accelerators.of(device.type)
    if named is not None and named.device == device and accelerator is not None:
        with accelerator.on(named):
            event.order()
