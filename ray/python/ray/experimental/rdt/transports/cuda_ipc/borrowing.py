"""Tensors of a consumer over a producer's own memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators.base import Accelerator
from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.accelerators.shared_memory import SharedMemory
from ray.experimental.rdt.accelerators.sharing import CannotShare
from ray.experimental.rdt.transports.base import Peer, Route, TransportUnavailable
from ray.experimental.rdt.transports.cuda_ipc import layouts
from ray.experimental.rdt.transports.cuda_ipc.imports import Import, Imports

if TYPE_CHECKING:
    import torch


class Borrowing:
    """See ``base.Borrowing``.

    Args:
        accelerator: The devices.
        memory: The shared memory of this process.
        imports: The memory of producers that this process has mapped.
        domain: The sharing domain of this process.
        device: The device that will use the memory.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        memory: SharedMemory,
        imports: Imports,
        domain: str,
        device: torch.device,
    ):
        self._accelerator = accelerator
        self._memory = memory
        self._imports = imports
        self._device = device
        self._is_over = False
        self.asked: Route = {
            "place": domain,
            "device": memory.driver.identity(device),
            "pid": os.getpid(),
            "loan": os.urandom(16).hex(),
        }

    def take(self, peer: Peer, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        """See ``base.Borrowing``."""
        self._is_over = True
        imported = Import(peer, self.asked["loan"])
        try:
            return self._tensors(imported, lent, sizes)
        except BaseException:  # also Ctrl-C: the producer keeps the memory until it is released
            self._imports.release(imported)
            raise

    def abandon(self, peer: Peer) -> None:
        """See ``base.Borrowing``."""
        if not self._is_over:
            self._is_over = True
            self._imports.release(Import(peer, self.asked["loan"]))

    def _tensors(self, imported: Import, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        layout = layouts.decode(lent)
        starts: dict[int, int] = {}
        filled = [i for i, nbytes in enumerate(sizes) if nbytes]
        self._imports.map(imported, layout, filled, self._device, starts)
        open_event = self._memory.driver.import_event
        try:
            events = [open_event(handle, self._device) for handle in lent["events"]]
        except CannotShare as error:
            raise TransportUnavailable(f"the producer's event cannot be opened: {error}") from error
        for event in events:
            event.make_stream_wait()
        self._imports.keep(imported)
        self._imports.expect_release()
        lease = _Lease(self._accelerator, self._imports, imported, self._device, events)
        tensors = [
            self._memory.tensor(
                starts[layout.indices[i]] + layout.offsets[i], nbytes, self._device, lease
            )
            if nbytes
            else self._accelerator.empty(0, self._device)
            for i, nbytes in enumerate(sizes)
        ]
        self._memory.check_owners(tensors)
        return tensors


@dataclass(eq=False)
class _Lease:
    """Borrowed memory, kept until the last tensor over it is gone.

    Attributes:
        accelerator: The devices.
        imports: The memory of producers that this process has mapped.
        imported: The memory.
        device: The device of the tensors.
        events: Events of the producer that streams here wait for.
    """

    accelerator: Accelerator
    imports: Imports
    imported: Import
    device: torch.device
    events: Sequence[Event]

    def __del__(self) -> None:
        """Release the memory after the work that the current stream has.

        Runs on: the thread that dropped the last tensor. It may be anywhere in its code and hold
        any lock, so this takes none.
        """
        if not sys.is_finalizing():
            self.imported.events = [self.accelerator.record(self.device)]
            self.imports.put_released(self.imported)
