"""Threads, locks and queues of the operating system, even if a library has patched Python's.

gevent's ``monkey.patch_all`` replaces Python's threads and locks by greenlets. RDT waits in native
code, where one greenlet would block all others. RDT therefore uses the threads of this module. The
names and their meaning are those of ``threading``, ``queue``, ``concurrent.futures`` and ``time``.

A worker imports this module before the user's code. In a program that was patched earlier, gevent
provides the originals.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import sys
import threading
import time
from _queue import Empty, SimpleQueue
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import select
    from threading import Lock, RLock

__all__ = [
    "Condition",
    "Empty",
    "Event",
    "Future",
    "Lock",
    "Semaphore",
    "SimpleQueue",
    "Thread",
    "local",
    "poll",
    "sleep",
]

_T = TypeVar("_T")


def _original(module: str, name: str) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module, name)
    return getattr(importlib.import_module(module), name)


_start_new_thread = _original("_thread", "start_new_thread")
_get_ident = _original("_thread", "get_ident")
sleep: Callable[[float], None] = _original("time", "sleep")
poll: Callable[[], select.poll] = _original("select", "poll")

if not TYPE_CHECKING:
    Lock = _original("_thread", "allocate_lock")
    RLock = _original("_thread", "RLock")

#: Python's own: greenlets of one thread alternate within the user's code.
local = threading.local

#: The longest name of a thread in the kernel.
_NAME_LENGTH = 15


class Condition:
    """``threading.Condition`` with a reentrant lock."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._waiters: deque[Any] = deque()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> Condition:
        self._lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        waiter = Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        state = self._lock._release_save()  # type: ignore[attr-defined]
        is_notified = False
        try:
            is_notified = _acquire(waiter, timeout)
        finally:
            self._lock._acquire_restore(state)  # type: ignore[attr-defined]
            if not is_notified:
                with suppress(ValueError):
                    self._waiters.remove(waiter)
        return is_notified

    def wait_for(self, is_reached: Callable[[], _T], timeout: float | None = None) -> _T:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (reached := is_reached()):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
        return reached

    def notify_all(self) -> None:
        while self._waiters:
            # In this order, a signal handler that raises in between loses no waiter.
            with suppress(RuntimeError):  # a signal handler raised after the release
                self._waiters[0].release()
            self._waiters.popleft()


def _acquire(lock: Lock, timeout: float | None) -> bool:
    if timeout is None:
        return lock.acquire()
    return lock.acquire(timeout=min(max(0.0, timeout), threading.TIMEOUT_MAX))


class Event:
    """``threading.Event`` without ``clear``."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        with self._changed:
            self._is_set = True
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(self.is_set, timeout)


class Semaphore:
    """``threading.Semaphore``."""

    def __init__(self, value: int = 1):
        self._changed = Condition()
        self._value = value

    def acquire(self, blocking: bool = True) -> bool:
        with self._changed:
            while not self._value:
                if not blocking:
                    return False
                self._changed.wait()
            self._value -= 1
            return True

    def release(self) -> None:
        with self._changed:
            self._value += 1
            self._changed.notify_all()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class Future(concurrent.futures.Future[_T], Generic[_T]):
    """``concurrent.futures.Future``."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = Condition()  # type: ignore[assignment]


class Thread:
    """A daemon thread. Python lists it unless Python's threads are patched."""

    def __init__(self, target: Callable[..., Any], args: Sequence[Any] = (), name: str = ""):
        self._target = target
        self._args = args
        self._name = name
        self._ident = 0
        self._ended = Event()

    def start(self) -> None:
        if threading._allocate_lock is Lock:  # type: ignore[attr-defined]
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        else:
            _start_new_thread(self._run_named, ())

    def join(self, timeout: float) -> None:
        self._ended.wait(timeout)

    def is_current(self) -> bool:
        return bool(self._ident == _get_ident())

    def _run_named(self) -> None:
        Path("/proc/thread-self/comm").write_text(self._name[:_NAME_LENGTH])
        self._run()

    def _run(self) -> None:
        self._ident = _get_ident()
        try:
            self._target(*self._args)
        finally:
            del self._target, self._args
            self._ended.set()
