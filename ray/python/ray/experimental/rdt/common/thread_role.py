"""Roles of the running thread: Ray's io thread and event loops must not block.

One rdt-pull thread at a time runs RDT's Python; see ``without_turn``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.experimental.rdt.common.real_threads import Lock

_IO_THREAD = "worker.io"

#: Held by the rdt-pull thread that runs RDT's Python. Many threads that wait for the GIL would
#: delay the event loop.
_turn = Lock()


@contextmanager
def turn() -> Iterator[None]:
    """Run RDT's Python on an rdt-pull thread, one thread at a time."""
    with _turn:
        _thread.has_turn = True
        try:
            yield
        finally:
            _thread.has_turn = False


@contextmanager
def without_turn() -> Iterator[None]:
    """Let another rdt-pull thread run during a wait or the user's code.

    The user's code runs under Ray's deserialization lock. It may fetch objects itself, and those
    fetches must not wait for a turn.
    """
    if not _thread.has_turn:
        yield
        return
    _thread.has_turn = False
    _turn.release()
    try:
        yield
    finally:
        _turn.acquire()
        _thread.has_turn = True


def is_on_pull_thread() -> bool:
    """Tell whether the running thread is an rdt-pull thread, without streams of the user."""
    return _thread.has_turn


class _Thread(threading.local):
    """Properties of the running thread."""

    has_turn = False

    def __init__(self) -> None:
        # A Python thread inherits the name of the thread that starts it.
        is_of_core = isinstance(threading.current_thread(), threading._DummyThread)
        name = Path("/proc/thread-self/comm").read_text().strip()
        self.is_io = is_of_core and name == _IO_THREAD


_thread = _Thread()


def must_not_block() -> bool:
    """Tell whether the running thread is Ray's io thread or has a running event loop."""
    return _thread.is_io or asyncio._get_running_loop() is not None
