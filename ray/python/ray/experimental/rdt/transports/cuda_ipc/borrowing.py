"""Tensors of a consumer over a producer's own memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
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


class Borrower:
    """Borrows memory of producers. Thread-safe.

    Args:
        accelerator: The devices.
        memory: The shared memory of this process.
        imports: The memory of producers that this process has mapped.
        domain: The sharing domain of this process.
    """

    def __init__(
        self, accelerator: Accelerator, memory: SharedMemory, imports: Imports, domain: str
    ):
        self._accelerator = accelerator
        self._memory = memory
        self.imports = imports
        self._domain = domain

    def begin(self, device: torch.device) -> Borrowing:
        """See ``Lending.borrow``."""
        asked = {
            "place": self._domain,
            "device": self._memory.identity(device),
            "pid": os.getpid(),
        }
        return Borrowing(self, device, asked)

    def take(
        self, imported: Import, lent: Route, sizes: Sequence[int], device: torch.device
    ) -> list[torch.Tensor]:
        """See ``Borrowing.take``. Runs on: consumer, the fetching thread."""
        layout = layouts.decode(lent)
        starts: dict[int, int] = {}
        filled = [i for i, nbytes in enumerate(sizes) if nbytes]
        self.imports.map(imported, layout, filled, device, starts)
        try:
            events = [self._memory.import_event(handle, device) for handle in lent["events"]]
        except CannotShare as error:
            raise TransportUnavailable(f"the producer's event cannot be opened: {error}") from error
        for event in events:
            event.order()
        self.imports.keep(imported)
        self.imports.expect_release()
        lease = _Lease(self, imported, device, events)
        tensors = [
            self._memory.tensor(
                starts[layout.indices[i]] + layout.offsets[i], nbytes, device, lease
            )
            if nbytes
            else self._accelerator.empty(0, device)
            for i, nbytes in enumerate(sizes)
        ]
        self._memory.check_owners(tensors)
        return tensors

    def on_last_tensor_gone(self, imported: Import, device: torch.device) -> None:
        """Release memory after the work that the current stream has.

        Runs on: the thread that dropped the last tensor. It may be anywhere in its code and hold
        any lock, so this takes none.
        """
        imported.events = [self._accelerator.record(device)]
        self.imports.put_released(imported)


class _Lease:
    """Keeps borrowed memory until the last tensor over it is gone.

    Args:
        borrower: Borrowed the memory.
        imported: The memory.
        device: The device of the tensors.
        events: Events of the producer that streams here wait for.
    """

    def __init__(
        self, borrower: Borrower, imported: Import, device: torch.device, events: Sequence[Event]
    ):
        self._borrower = borrower
        self._imported = imported
        self._device = device
        self._events = events

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._borrower.on_last_tensor_gone(self._imported, self._device)


class Borrowing:
    """See ``base.Borrowing``.

    Args:
        borrower: Borrows the memory.
        device: The device that will use it.
        asked: The facts about this process that the producer needs.
    """

    def __init__(self, borrower: Borrower, device: torch.device, asked: Route):
        self._borrower = borrower
        self._device = device
        self._loan = os.urandom(16).hex()
        self._is_over = False
        self.asked = {**asked, "loan": self._loan}

    def take(self, peer: Peer, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        """See ``base.Borrowing``."""
        self._is_over = True
        imported = Import(peer, self._loan)
        try:
            return self._borrower.take(imported, lent, sizes, self._device)
        except BaseException:
            self._borrower.imports.release(imported)
            raise

    def abandon(self, peer: Peer) -> None:
        """See ``base.Borrowing``."""
        if not self._is_over:
            self._is_over = True
            self._borrower.imports.release(Import(peer, self._loan))
