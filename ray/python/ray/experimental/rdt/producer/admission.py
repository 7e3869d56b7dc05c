"""Whether a producer may store one more object: the limit ``RAY_RDT_STORE_BYTES``.

At the limit a return waits for objects to be freed. When that takes too long, or where nothing may
wait, its tensors go inside a plain Ray object, which Ray's object store keeps and spills.
"""

from __future__ import annotations

import logging

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.common.thread_role import must_not_block
from ray.experimental.rdt.producer.tensor_store import Store
from ray.experimental.rdt.serialization.layout import Captured

logger = logging.getLogger("ray.rdt")


class Room:
    """The room in one process's store.

    Args:
        store: What the process produced.

    Attributes:
        refused: Objects for which there was none.
    """

    def __init__(self, store: Store):
        self.refused = 0
        self._store = store
        self._lock = threading.Lock()
        self._said: set[type[RDTError]] = set()

    def is_given(self, captured: Captured) -> bool:
        """Whether an object may be stored; waits for it.

        Objects that ride in their value and those with tensors on devices always may: the first
        take little, the second cannot go through Ray's object store.

        Runs on: producer, the thread of the task; waits without the GIL. Event loops, the core's io
        thread and async actors, whose calls all return on one thread of the core's, only look.

        Raises:
            RDTError: it may not, and ``RAY_RDT_STRICT_TRANSPORT=1`` forbids any other way.
        """
        options = settings()
        nbytes = captured.table.nbytes
        if nbytes <= options.eager_bytes or captured.table.devices:
            return True
        # Most often this is all: which memory it shares is not even looked for.
        if self._store.nbytes + nbytes <= options.store_bytes:
            return True
        patience_s = options.store_wait_s if may_wait() else 0.0
        if self._store.await_room(captured, options.store_bytes, patience_s):
            return True
        full = (
            f"RDT objects keep {self._store.nbytes} bytes of this process, another {nbytes} do not "
            f"fit below RAY_RDT_STORE_BYTES={options.store_bytes}, and too little was freed within "
            f"{patience_s:g} s (RAY_RDT_STORE_WAIT_S)"
        )
        self.refuse(full, "Drop ObjectRefs sooner, or raise the limit.")
        return False

    def refuse(self, full: str, advice: str, kind: type[RDTError] = RDTError) -> None:
        """Notes that an object goes through Ray's object store; says it once of each kind.

        Args:
            full: What had no room for it.
            advice: What the user can do.
            kind: The error, where nothing else may serve.

        Raises:
            RDTError: ``RAY_RDT_STRICT_TRANSPORT=1`` forbids that.
        """
        if settings().strict_transport:
            raise kind(
                f"{full}; RAY_RDT_STRICT_TRANSPORT=1 forbids the way through Ray's object store. "
                f"{advice}"
            )
        with self._lock:
            self.refused += 1
            is_first = kind not in self._said
            self._said.add(kind)
        if is_first:
            logger.warning(
                "%s: such objects go through Ray's object store. %s Said once; "
                "ray.experimental.rdt.stats() counts them as plain_objects.",
                *(full, advice),
            )


def may_wait() -> bool:
    """Whether the thread of the running task may wait for others to free something."""
    return not must_not_block() and not ray_core.actor_is_asyncio()
