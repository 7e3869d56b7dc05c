"""A pool of daemon threads, which do not delay the exit of their process.

Python waits for the threads of ``concurrent.futures`` before it runs exit handlers such as Ray's.
An action of RDT may wait for a peer for as long as a fetch may take.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ray.experimental.rdt.common import real_threads as threading

logger = logging.getLogger("ray.rdt")

_Task = tuple[Callable[..., Any], tuple[Any, ...]]


class DaemonThreads:
    """Up to ``count`` threads, started on demand. Thread-safe.

    Args:
        count: The maximum number of threads; more actions wait.
    """

    def __init__(self, count: int, name: str):
        self._count = count
        self._name = name
        self._tasks: threading.SimpleQueue[_Task | None] = threading.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._begun = 0
        self._is_closed = False

    def submit(self, action: Callable[..., Any], *args: Any) -> None:
        """Run an action on a thread; log the error that it raises.

        Raises:
            RuntimeError: The threads are closed.
        """
        with self._lock:
            if self._is_closed:
                raise RuntimeError(f"threads {self._name} have been closed")
            self._tasks.put((action, args))
            if self._idle.acquire(blocking=False) or self._begun == self._count:
                return
            name = f"{self._name}_{self._begun}"
            self._begun += 1
        threading.Thread(target=self._work, name=name).start()

    def close(self) -> None:
        """End the threads after their current actions; drop waiting actions. Returns at once."""
        with self._lock:
            self._is_closed = True
            while not self._tasks.empty():
                self._tasks.get_nowait()
            for _ in range(self._begun):
                self._tasks.put(None)

    def _next(self) -> _Task | None:
        try:
            return self._tasks.get_nowait()
        except threading.Empty:
            self._idle.release()
            return self._tasks.get()

    def _work(self) -> None:
        """Runs on: each of the threads."""
        while (task := self._next()) is not None:
            action, args = task
            try:
                action(*args)
            except BaseException:  # the thread has to run further actions
                logger.warning("RDT background task %s failed", action, exc_info=True)
            del task, action, args
