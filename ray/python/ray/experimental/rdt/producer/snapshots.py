"""Copies of nixl objects in the pool of ``register_nixl_memory_pool``.

A program with a pool may overwrite its tensors as soon as they are put or returned. So the copy is
made at that time, and consumers read the copy on every lane.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.errors import NixlOutOfMemoryError, RDTError
from ray.experimental.rdt.producer.tensor_store import AdmissionControl, may_wait
from ray.experimental.rdt.serialization.layout import Captured, region_bytes
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.nixl.pool import Copies, MemoryPool

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.transports.nixl.transport import NixlTransport

#: Returns this process's nixl transport, None if it has not been used.
FindNixl = Callable[[], "NixlTransport | None"]


class Snapshots:
    """Copies objects into the memory pool of one process, if there is a pool."""

    def __init__(self, admission: AdmissionControl, find_nixl: FindNixl):
        self._admission = admission
        self._find_nixl = find_nixl
        self._lock = threading.Lock()
        self._pool: MemoryPool | None = None

    def make_pool(self, nbytes: int, device: torch.device | str) -> torch.Tensor:
        """Create the pool; return its memory.

        Raises:
            ValueError: The pool exists, or the size is not positive.
        """
        if nbytes <= 0:
            raise ValueError(f"a nixl memory pool needs a size above 0, not {nbytes}")
        with self._lock:
            if self._pool is not None:
                raise ValueError("this process has a nixl memory pool already; it can have one")
            self._pool = MemoryPool(nbytes, device)
            return self._pool.memory

    def drop_pool(self) -> None:
        """Drop the pool. Objects in it keep its memory. Runs on: the thread that shuts Ray down."""
        with self._lock:
            self._pool = None

    def take(self, captured: Captured) -> bool:
        """Copy an object into the pool if there is one and it takes the object.

        The pool does not take objects whose value contains the tensors' bytes, objects with memory
        that the user has registered, and objects with tensors on another device than the pool's.

        Runs on: producer, the thread of the task. Waits for room, for devices if the pool is in
        host memory, and for all work of devices after ``set_nixl_cuda_stream(None)``.

        Returns:
            False if there is no room and the object has to go through Ray's object store.

        Raises:
            NixlOutOfMemoryError: There is no room, and the object cannot go through Ray's object
                store, or ``RAY_RDT_STRICT_TRANSPORT=1`` forbids it.
            ValueError: A tensor is on another device than the stream of ``set_nixl_cuda_stream``.
        """
        pool, table = self._pool, captured.table
        if pool is None or (table.nbytes <= settings().eager_bytes and not table.devices):
            return True
        buffers = [region_bytes(captured, region) for region in range(len(table.regions))]
        if not self._takes(pool, buffers):
            return True
        wait_s = settings().store_wait_s if may_wait() else 0.0
        copies = pool.take([buffer.numel() for buffer in buffers], wait_s)
        if copies is None:
            self._refuse(pool, captured, wait_s)
            return False
        self._copy(captured, copies, buffers)
        return True

    def _takes(self, pool: MemoryPool, buffers: Sequence[torch.Tensor]) -> bool:
        device = pool.memory.device
        if device.type != "cpu" and any(buffer.device != device for buffer in buffers):
            return False
        nixl = self._find_nixl()
        return nixl is None or not nixl.has_registered(buffers)

    def _refuse(self, pool: MemoryPool, captured: Captured, wait_s: float) -> None:
        nbytes, waited = captured.table.nbytes, ""
        if nbytes <= pool.memory.numel():
            waited = f" within {wait_s:g} s (RAY_RDT_STORE_WAIT_S)"
        full = (
            f"the nixl memory pool of {pool.memory.numel()} bytes had no room for an object of "
            f"{nbytes} bytes{waited}"
        )
        advice = "Drop ObjectRefs sooner, or register a larger pool."
        if captured.table.devices:
            raise NixlOutOfMemoryError(
                f"{full}, and tensors on devices cannot go through Ray's object store. {advice}"
            )
        self._admission.refuse(full, advice, NixlOutOfMemoryError)

    def _copy(self, captured: Captured, copies: Copies, buffers: Sequence[torch.Tensor]) -> None:
        """Replace an object's buffers by copies.

        Later work on the streams that write the tensors runs after the copies.
        """
        pairs = list(zip(copies.buffers, buffers))
        for copy, buffer in pairs:
            if buffer.is_cpu:
                copy.copy_(buffer)
        nixl, deadline = self._find_nixl(), Deadline.after(settings().fetch_timeout_s / 2)
        devices = {buffer.device for buffer in buffers if not buffer.is_cpu}
        if nixl is not None and devices:
            try:
                nixl.check_writers(buffers)
            except TransportUnavailable as error:
                raise RDTError(
                    f"an object cannot be copied into the nixl memory pool: {error}"
                ) from error
        events = []
        for device in devices:
            here = [pair for pair in pairs if pair[1].device == device]
            accelerator = accelerators.of(device.type)
            assert accelerator is not None, f"RDT took a tensor on {device}"
            event = accelerator.copy(here, device, captured.events)
            accelerators.make_writers_wait(event, device)
            events.append(event)
        if all(copy.is_cpu for copy in copies.buffers):
            for event in events:
                event.wait(deadline.left_s())
            events = []
        captured.addresses = array("Q", [copy.data_ptr() for copy in copies.buffers])
        captured.copies, captured.events = copies, events
