"""What the running thread may do: Ray's io thread and event loops must not block.

One rdt-pull thread at a time runs Python of RDT; see ``without_turn``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.experimental.rdt.common.real_threads import Lock

_IO_THREAD = "worker.io"

#: Held by the one rdt-pull thread that runs RDT's own Python. Many that want the GIL at once would
#: keep it from the event loop for long.
_turn = Lock()


@contextmanager
def turn() -> Iterator[None]:
    """Runs RDT's Python on an rdt-pull thread, one of them at a time."""
    with _turn:
        _thread.has_turn = True
        try:
            yield
        finally:
            _thread.has_turn = False


@contextmanager
def without_turn() -> Iterator[None]:
    """Around waits and the user's code: lets another rdt-pull thread run meanwhile.

    The user's code runs under Ray's deserialization lock and may fetch objects itself, which then
    waits for no turn.
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


def is_on_own_thread() -> bool:
    """Whether the running thread fetches a value for another one, whose streams are not its own."""
    return _thread.has_turn


class _Thread(threading.local):
    """What is known of the running thread."""

    has_turn = False

    def __init__(self) -> None:
        # A Python thread inherits the name of the thread that starts it.
        is_of_core = isinstance(threading.current_thread(), threading._DummyThread)
        name = Path("/proc/thread-self/comm").read_text().strip()
        self.is_io = is_of_core and name == _IO_THREAD


_thread = _Thread()


def must_not_block() -> bool:
    """Whether the running thread is Ray's io thread or has a running event loop."""
    return _thread.is_io or asyncio._get_running_loop() is not None
