"""Calls of code that may hang, on threads of their own.

A call that hangs costs its caller the time until the deadline, and other threads nothing.
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
    """One call of ``method`` that a thread waits for. Ends once.

    Attributes:
        ended: Set at its end.
        lock: Held while it ends.
        error: The error that ended it, None without one.
    """

    def __init__(self, method: str, thread_name: str = "rdt-user"):
        self._method = method
        self._thread_name = thread_name
        self._result: Any = None
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.error: BaseException | None = None

    def start(self, action: Callable[[], Any]) -> None:
        """Run the code, unless the call has already ended."""
        if not self.ended.is_set():
            threading.Thread(target=self._run, args=(action,), name=self._thread_name).start()

    def _run(self, action: Callable[[], Any]) -> None:
        """Runs on: a thread of its own."""
        try:
            result = action()
        except BaseException as error:  # stored for the caller, who waits for it
            self.end(error=error)
        else:
            self.end(result)

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Give the waiting thread its result. Only the first call counts."""
        with self.lock:
            if not self.ended.is_set():
                self._result, self.error = result, error
                self.ended.set()

    def ends_by(self, deadline: Deadline) -> bool:
        """Wait for the end; return False if the deadline passes before."""
        while not self.ended.wait(min(SLICE_S, deadline.left_s())):
            if deadline.has_passed():
                return False
            raise_if_cancelled()
        return True

    def wait(self, deadline: Deadline) -> Any:
        """Return the result, or raise the error. Raises TimeoutError at the deadline."""
        if not self.ends_by(deadline):
            raise TimeoutError(f"the transport's own {self._method} did not return in time")
        if self.error is not None:
            raise self.error
        return self._result


def call(
    method: str, action: Callable[[], Any], deadline: Deadline, thread_name: str = "rdt-user"
) -> Any:
    """Run code on a thread of its own. Raises TimeoutError at the deadline."""
    made = Call(method, thread_name)
    made.start(action)
    try:
        return made.wait(deadline)
    finally:
        made.error = None  # its traceback refers to this frame
