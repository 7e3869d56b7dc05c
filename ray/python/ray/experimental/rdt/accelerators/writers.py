"""Streams that write what this process sends: the current one, and one that the user named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.base import Event

if TYPE_CHECKING:
    import torch

_named: torch.cuda.Stream | None = None


def name_stream(stream: torch.cuda.Stream | None) -> None:
    """Names one more stream of this process that ``record`` records; None for no such stream."""
    global _named
    _named = stream


def record(device: torch.device) -> list[Event]:
    """An event at the end of what each of a device's writers has so far. Runs on: any thread."""
    accelerator = accelerators.of(device.type)
    if accelerator is None:
        return []
    events = [accelerator.record(device)]
    named = _named
    if named is not None and named.device == device:
        with accelerator.on(named):
            events.append(accelerator.record(device))
    return events
