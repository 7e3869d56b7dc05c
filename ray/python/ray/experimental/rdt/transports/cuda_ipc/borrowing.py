"""Tensors of a consumer over a producer's own memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators.shared_memory import CannotShare, Layout
from ray.experimental.rdt.transports.base import Events, Peer, Route, TransportUnavailable
from ray.experimental.rdt.transports.cuda_ipc.imports import Import, Imports

if TYPE_CHECKING:
    import torch


class Borrowing:
    """See ``base.Borrowing``. ``domain`` is this process's ``pid_domain``."""

    def __init__(self, imports: Imports, domain: str, device: torch.device):
        self._imports = imports
        self._device = device
        self._is_over = False
        self.asked: Route = {
            "place": domain,
            "device": imports.memory.driver.identity(device),
            "pid": os.getpid(),
            "loan": os.urandom(16).hex(),
        }

    def take(self, peer: Peer, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        self._is_over = True
        imported = Import(peer, self.asked["loan"])
        try:
            return self._tensors(imported, lent, sizes)
        except BaseException:  # also Ctrl-C: the producer keeps the memory until it is released
            self._imports.release(imported)
            raise

    def abandon(self, peer: Peer) -> None:
        if not self._is_over:
            self._is_over = True
            self._imports.release(Import(peer, self.asked["loan"]))

    def _tensors(self, imported: Import, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        memory, device = self._imports.memory, self._device
        layout = Layout.decode(lent)
        starts: dict[int, int] = {}
        filled = [i for i, nbytes in enumerate(sizes) if nbytes]
        self._imports.map(imported, layout, filled, device, starts)
        try:
            events = [memory.driver.import_event(handle, device) for handle in lent["events"]]
        except CannotShare as error:
            raise TransportUnavailable(f"the producer's event cannot be opened: {error}") from error
        for event in events:
            event.make_stream_wait()
        self._imports.keep(imported)
        self._imports.expect_release()
        lease = _Lease(self._imports, imported, device, events)
        tensors = []
        for nbytes, index, offset in zip(sizes, layout.indices, layout.offsets):
            if nbytes:
                tensors.append(memory.tensor(starts[index] + offset, nbytes, device, lease))
            else:
                tensors.append(self._imports.accelerator.empty(0, device))
        memory.check_owners(tensors)
        return tensors


@dataclass(eq=False)
class _Lease:
    """Borrowed memory, kept until the last tensor over it is gone.

    ``events`` are the producer's, which streams here wait for.
    """

    imports: Imports
    imported: Import
    device: torch.device
    events: Events

    def __del__(self) -> None:
        """Release the memory after the work that the current stream has.

        Runs on: the thread that dropped the last tensor. It may be anywhere in its code and hold
        any lock, so this takes none.
        """
        if not sys.is_finalizing():
            self.imported.events = [self.imports.accelerator.record(self.device)]
            self.imports.put_released(self.imported)
