"""Calls of a user's code on threads of their own.

A call that hangs then costs its caller the deadline, and other threads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.deadline import Deadline

#: The longest wait in one piece: Ray cancels tasks without waking threads that wait.
SLICE_S = 0.25


class Call:
    """One call of the user's code that a thread waits for. Ends once.

    Args:
        method: The name of the method, for messages.
    """

    def __init__(self, method: str):
        self._method = method
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._result: Any = None
        self.error: BaseException | None = None

    def start(self, action: Callable[[], Any]) -> None:
        """Run the user's code, unless the call has already ended."""
        if self._ended.is_set():
            return
        threading.Thread(target=self._run, args=(action,), name="rdt-user").start()

    def _run(self, action: Callable[[], Any]) -> None:
        """Runs on: an rdt-user thread."""
        try:
            result = action()
        except BaseException as error:  # stored for the caller, who waits for it
            self.end(error=error)
        else:
            self.end(result)

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Give the waiting thread its result. Only the first call counts."""
        with self._lock:
            if not self._ended.is_set():
                self._result, self.error = result, error
                self._ended.set()

    def wait(self, deadline: Deadline) -> Any:
        """Return the result, or raise the error. Raises TimeoutError at the deadline."""
        while not self._ended.wait(min(SLICE_S, deadline.left_s())):
            if deadline.has_passed():
                raise TimeoutError(f"the transport's own {self._method} did not return in time")
            raise_if_cancelled()
        if self.error is not None:
            raise self.error
        return self._result


def call(method: str, action: Callable[[], Any], deadline: Deadline) -> Any:
    """Run the user's code on a thread of its own. Raises TimeoutError at the deadline."""
    made = Call(method)
    made.start(action)
    return made.wait(deadline)
