"""Admission control of a producer's store: the limit ``RAY_RDT_STORE_BYTES``.

At the limit a return waits for objects to be freed. If that takes too long, or the thread must not
wait, the tensors go inside a plain Ray object, which Ray's object store keeps and spills.
"""

from __future__ import annotations

import logging

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.common.thread_role import must_not_block
from ray.experimental.rdt.producer.tensor_store import TensorStore
from ray.experimental.rdt.serialization.layout import Captured

logger = logging.getLogger("ray.rdt")


class AdmissionControl:
    """Admits objects to one process's store.

    Attributes:
        refused: The number of objects that were not admitted.
    """

    def __init__(self, store: TensorStore):
        self.refused = 0
        self._store = store
        self._lock = threading.Lock()
        self._logged: set[type[RDTError]] = set()

    def admit(self, captured: Captured) -> bool:
        """Return whether an object may be stored; wait for room if necessary.

        Objects whose value contains the tensors' bytes are small and always admitted. So are
        objects with tensors on devices, which cannot go through Ray's object store.

        Runs on: producer, the thread of the task; waits without the GIL. Never waits on event
        loops, on the core's io thread and in async actors, whose calls all return on one thread.

        Raises:
            RDTError: There is no room, and ``RAY_RDT_STRICT_TRANSPORT=1`` forbids the fallback.
        """
        options = settings()
        nbytes = captured.table.nbytes
        if nbytes <= options.eager_bytes or captured.table.devices:
            return True
        # The common case. It needs no search for shared memory.
        if self._store.nbytes + nbytes <= options.store_bytes:
            return True
        wait_s = options.store_wait_s if may_wait() else 0.0
        if self._store.await_room(captured, options.store_bytes, wait_s):
            return True
        full = (
            f"RDT store is full: it holds {self._store.nbytes} bytes, another {nbytes} do not fit "
            f"below RAY_RDT_STORE_BYTES={options.store_bytes}, and too little was freed within "
            f"{wait_s:g} s (RAY_RDT_STORE_WAIT_S)"
        )
        self.refuse(full, "Drop ObjectRefs sooner, or raise the limit.")
        return False

    def refuse(self, full: str, advice: str, kind: type[RDTError] = RDTError) -> None:
        """Count an object that falls back to Ray's object store; log the first of each kind.

        Args:
            kind: The error if the fallback is forbidden.

        Raises:
            RDTError: ``RAY_RDT_STRICT_TRANSPORT=1`` forbids the fallback.
        """
        if settings().strict_transport:
            raise kind(
                f"{full}; RAY_RDT_STRICT_TRANSPORT=1 forbids the fallback to Ray's object store. "
                f"{advice}"
            )
        with self._lock:
            self.refused += 1
            is_first = kind not in self._logged
            self._logged.add(kind)
        if is_first:
            logger.warning(
                "%s: such objects go through Ray's object store. %s Logged once; "
                "ray.experimental.rdt.stats() counts them as plain_objects.",
                *(full, advice),
            )


def may_wait() -> bool:
    """Tell whether the thread of the running task may wait until memory is freed."""
    return not must_not_block() and not ray_core.actor_is_asyncio()
