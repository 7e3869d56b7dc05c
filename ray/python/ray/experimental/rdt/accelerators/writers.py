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
    """Name one more stream of this process for ``record``, None for no such stream."""
    global _named
    _named = stream


def record(tensors: Sequence[torch.Tensor]) -> list[Event]:
    """Return events at the current ends of the writers of these tensors. Runs on: any thread."""
    events = accelerators.record(tensors)
    named = _named
    if named is not None and any(tensor.device == named.device for tensor in tensors):
        accelerator = accelerators.of(named.device.type)
        if accelerator is not None:
            with accelerator.on(named):
                events.append(accelerator.record(named.device))
    return events


def follow(event: Event, device: torch.device) -> None:
    """Make later work of a device's writers wait for an event. Runs on: any thread."""
    event.make_stream_wait()
    named, accelerator = _named, accelerators.of(device.type)
    if named is not None and named.device == device and accelerator is not None:
        with accelerator.on(named):
            event.make_stream_wait()
