"""Values whose tensors have not arrived, for threads that must not wait.

Ray's core deserializes on two kinds of thread that must not block: its io thread, for ``await ref``
and ``ref.future()``, and the event loops of an async actor, for the arguments of calls. There, an
object that must be pulled becomes a ``Deferred``. An ``rdt-pull`` thread pulls and deserializes it.
``hooks/actor_calls.py`` passes the value on to the user's code when it has arrived.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.exceptions import RaySystemError, RayTaskError

from ray.experimental.rdt.common.real_threads import Future, Lock
from ray.experimental.rdt.common.thread_pool import DaemonThreads
from ray.experimental.rdt.common.thread_role import turn

if TYPE_CHECKING:
    import torch

Tensors = Sequence["torch.Tensor"]

#: The most concurrent pulls of one process, and from one producer. A silent producer thus leaves
#: threads for the others.
_PULL_THREADS, _FROM_ONE_PRODUCER = 64, 16


class Deferred:
    """A value whose pull begins at the first request.

    The value may be a ``RayError``, as in Ray's deserializer.
    """

    def __init__(self, start: Callable[[Tensors | None], Future[Any]]):
        self._start = start
        self._lock = Lock()
        self._future: Future[Any] | None = None
        self._into: Tensors | None = None

    def into(self, tensors: Tensors | None) -> None:
        """Set the target tensors; comes before ``start``."""
        self._into = tensors

    def start(self) -> Future[Any]:
        """Start the pull if it has not started. Returns at once."""
        with self._lock:
            if self._future is None:
                self._future = self._start(self._into)
            return self._future

    def result(self) -> Any:
        """Return the value, or the error in its place. Blocks as long as a fetch may."""
        return _outcome(self.start())

    def then(self, callback: Callable[[Any], None]) -> None:
        """Call back with ``result()``, on the rdt-pull thread."""
        # The future keeps the callback, so the callback must not refer to the future.
        self.start().add_done_callback(lambda future: callback(_outcome(future)))

    async def arrive(self) -> Any:
        """Suspend the coroutine until the value arrives. Cancellation does not end the pull."""
        await asyncio.wait([asyncio.wrap_future(self.start())])
        return self.result()


class Puller:
    """The rdt-pull threads of one process."""

    def __init__(self) -> None:
        self._threads = DaemonThreads(_PULL_THREADS, "rdt-pull")
        self._lock = Lock()
        # By producer: the number of pulls with a thread, and the pulls that wait for one.
        self._begun: Counter[bytes] = Counter()
        self._waiting: dict[bytes, deque[tuple[Future[Any], Callable[[], Any]]]] = {}

    def defer(self, deserialize: Callable[[Tensors | None], Any], producer: bytes) -> Deferred:
        """Return a value that a thread will deserialize, into the given tensors if any."""
        return Deferred(lambda into: self._submit(producer, partial(_value_of, deserialize, into)))

    def _submit(self, producer: bytes, action: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._begun[producer] < _FROM_ONE_PRODUCER:
                self._threads.submit(self._work, producer)
                self._begun[producer] += 1
            self._waiting.setdefault(producer, deque()).append((future, action))
        return future

    def _work(self, producer: bytes) -> None:
        """Run one pull from a producer. Runs on: an rdt-pull thread."""
        with self._lock:
            waiting = self._waiting.get(producer)
            future, action = waiting.popleft() if waiting else (None, None)
        try:
            if future is not None and action is not None and future.set_running_or_notify_cancel():
                future.set_result(action())
        finally:  # the user's callbacks may raise
            self._end_turn(producer)

    def _end_turn(self, producer: bytes) -> None:
        with self._lock:
            # The next pull goes to the end of the queue, behind those of other producers.
            if self._waiting.get(producer):
                self._threads.submit(self._work, producer)
                return
            self._waiting.pop(producer, None)
            self._begun[producer] -= 1
            if not self._begun[producer]:
                del self._begun[producer]

    def close(self) -> None:
        """End the threads after their pulls. Runs on: the thread that shuts Ray down."""
        with self._lock:
            left, self._waiting = self._waiting, {}
            self._threads.close()
        for waiting in left.values():
            for future, _ in waiting:
                future.cancel()


def _outcome(future: concurrent.futures.Future[Any]) -> Any:
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        return RaySystemError("Ray was shut down while an RDT object was in flight")


def _value_of(deserialize: Callable[[Tensors | None], Any], into: Tensors | None) -> Any:
    """Return the value, or the error in its place. Runs on: an rdt-pull thread."""
    with turn():
        try:
            return deserialize(into)
        except Exception as error:  # the user's classes are unpickled, and may raise any
            return RayTaskError("ray.get", traceback.format_exc(), error)
        except BaseException as error:  # such as SystemExit of a class that is unpickled
            return RaySystemError(error, traceback.format_exc())
