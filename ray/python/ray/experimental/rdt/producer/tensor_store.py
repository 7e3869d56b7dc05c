"""The tensors of a producer's RDT objects, until their owners free them.

Thread-safe. Only ``await_room``, ``wait_freed`` and ``wait_object`` block. The store holds
references: it makes no copies, registrations or exports.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.common.thread_role import must_not_block
from ray.experimental.rdt.serialization.layout import Captured

if TYPE_CHECKING:
    import torch

_SLICE_S = 0.25


@dataclass(frozen=True)
class StoredObject:
    """The tensors of one object.

    Attributes:
        key: The object's key at this process's agent.
        transport: The transport that the user named.
        token: Identifies the object in the agent's events.
    """

    key: bytes = field(repr=False)
    object_id: str
    captured: Captured
    transport: str
    token: int


class TensorStore:
    """The stored objects of one process, by key, by token and by object id."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._by_key: dict[bytes, StoredObject] = {}
        self._by_token: dict[int, StoredObject] = {}
        self._by_id: dict[str, StoredObject] = {}
        self._memory_users: Counter[bytes] = Counter()
        self._memory_nbytes: dict[bytes, int] = {}
        self._borrowed: Counter[bytes] = Counter()
        self._released: set[bytes] = set()
        self._last_token = 0
        self._nbytes = 0
        self._full_since: float | None = None

    @property
    def nbytes(self) -> int:
        """Host memory of the stored objects. Those over the same storages count once."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, key: bytes, object_id: str, captured: Captured, transport: str) -> StoredObject:
        """Store the tensors of an object.

        Runs on: producer, the thread that ran the task. The caller registers the regions with the
        agent under the returned token afterwards.
        """
        with self._changed:
            self._last_token += 1
            stored = StoredObject(key, object_id, captured, transport, self._last_token)
            self._by_key[key] = self._by_token[stored.token] = self._by_id[object_id] = stored
            memory, nbytes = _memory_of(captured)
            known = self._memory_nbytes.get(memory, 0)
            self._memory_users[memory] += 1
            self._memory_nbytes[memory] = max(known, nbytes)
            self._nbytes += max(0, nbytes - known)
            self._changed.notify_all()
        return stored

    def await_room(self, captured: Captured, limit: int, wait_s: float) -> bool:
        """Wait until one more object fits below a limit; return whether it does.

        The wait time counts from the moment when the store was first full after the last object had
        left. So a store that no object leaves delays one return, and not each of many in turn.

        Runs on: producer, the thread of the task; blocks without the GIL. Threads that are admitted
        at the same moment may exceed the limit together.

        Args:
            limit: The limit for ``nbytes``.
            wait_s: The longest wait, 0 to return at once.
        """
        memory, nbytes = _memory_of(captured)

        def has_room() -> bool:
            return self._nbytes + nbytes - self._memory_nbytes.get(memory, 0) <= limit

        with self._changed:
            if has_room():
                return True
            if nbytes > limit:
                return False
            if self._full_since is None:
                self._full_since = time.monotonic()
            return self._wait(has_room, self._full_since + wait_s - time.monotonic())

    def by_key(self, key: bytes) -> StoredObject | None:
        return self._by_key.get(key)

    def by_id(self, object_id: str) -> StoredObject | None:
        return self._by_id.get(object_id)

    def borrow(self, key: bytes) -> StoredObject | None:
        """Keep an object, freed or not, until ``give_back``. None if it is not stored any more."""
        with self._changed:
            stored = self._by_key.get(key)
            if stored is not None:
                self._borrowed[key] += 1
            return stored

    def give_back(self, key: bytes) -> list[StoredObject]:
        """End one ``borrow``; return the object if nothing else kept it."""
        with self._changed:
            self._borrowed[key] -= 1
            if self._borrowed[key]:
                return []
            del self._borrowed[key]
            if key not in self._released:
                return []
            self._released.discard(key)
            dropped = [self._forget(self._by_key[key])]
            self._changed.notify_all()
        return dropped

    def drop(self, tokens: Sequence[int]) -> list[StoredObject]:
        """Drop objects whose memory the agent does not read any more.

        Borrowed objects stay until they are given back.

        Runs on: producer, the reaper thread. The returned objects keep the tensors alive, so that
        those die outside the store's lock.
        """
        with self._changed:
            known = [self._by_token[token] for token in tokens if token in self._by_token]
            kept = {stored.key for stored in known if stored.key in self._borrowed}
            self._released |= kept
            dropped = [self._forget(stored) for stored in known if stored.key not in kept]
            self._changed.notify_all()
        return dropped

    def _forget(self, stored: StoredObject) -> StoredObject:
        del self._by_key[stored.key], self._by_token[stored.token]
        if self._by_id.get(stored.object_id) is stored:
            del self._by_id[stored.object_id]
        memory, _ = _memory_of(stored.captured)
        self._memory_users[memory] -= 1
        if not self._memory_users[memory]:
            del self._memory_users[memory]
            self._nbytes -= self._memory_nbytes.pop(memory)
        self._full_since = None
        return stored

    def clear(self) -> list[StoredObject]:
        """Drop all objects, borrowed or not. Runs on: the thread that shuts Ray down."""
        with self._changed:
            self._borrowed.clear()
            self._released.clear()
        return self.drop(list(self._by_token))

    def wait_freed(self, tensor: torch.Tensor, timeout_s: float | None) -> None:
        """Block until no stored object uses the tensor's storage.

        Raises:
            TimeoutError: An object still uses it after ``timeout_s`` seconds.
        """
        users: set[bytes] = set()

        def is_freed() -> bool:
            # Search all objects only when the users found before are gone.
            if self._by_key.keys().isdisjoint(users):
                users.clear()
                users.update(k for k, o in self._by_key.items() if o.captured.uses(tensor))
            return not users

        if not self._wait(is_freed, timeout_s):
            raise TimeoutError(
                f"the tensor is still in use by RDT objects after {timeout_s} s; drop every "
                "ObjectRef that holds it, or wait longer"
            )

    def wait_object(self, object_id: str, timeout_s: float | None) -> StoredObject:
        """Block until the object is stored here. Raises TimeoutError."""
        if not self._wait(lambda: object_id in self._by_id, timeout_s):
            raise TimeoutError(f"RDT object {object_id} is not here after {timeout_s} s")
        return self._by_id[object_id]

    def _wait(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else Deadline.after(timeout_s)
        with self._changed:
            while not is_done():
                left = None if deadline is None else deadline.left_s()
                if left is not None and left <= 0:
                    return False
                # In slices: the flag that cancels a task does not end a wait.
                self._changed.wait(_SLICE_S if left is None else min(left, _SLICE_S))
                raise_if_cancelled()
        return True


def _memory_of(captured: Captured) -> tuple[bytes, int]:
    """Return a key for the storages of an object, and its bytes of host memory."""
    table = captured.table
    nbytes = sum(captured.host_spans()[1]) if table.devices else table.nbytes
    return captured.layout.storages.tobytes(), nbytes


logger = logging.getLogger("ray.rdt")


class AdmissionControl:
    """Admits objects to one process's store, up to the limit ``RAY_RDT_STORE_BYTES``.

    At the limit a return waits for objects to be freed. If that takes too long, or the thread must
    not wait, the tensors go inside a plain Ray object, which Ray's object store keeps and spills.

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
