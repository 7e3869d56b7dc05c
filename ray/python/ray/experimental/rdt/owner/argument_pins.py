"""Argument pins: the RDT arguments of normal tasks stay in scope until the tasks have ended.

Ray's core copies a small argument into the task and then drops its reference to the object. The
value of an RDT object is small, but the task still has to pull its tensors. (For actor tasks the
core keeps the reference.)

Thread: ``rdt-holder``, which waits in Ray for the tasks' returns and sleeps while there are none.
"""

from __future__ import annotations

from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline

#: One wait in Ray takes this long; then tasks that were submitted meanwhile are included.
_WAIT_S = 0.25


class ArgumentPins:
    """The pinned arguments of one process. Thread-safe; ``hold`` returns at once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[Any, list[Any]] = {}
        self._unreturned: list[tuple[Deadline, list[Any]]] = []
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._held) + len(self._unreturned)

    def hold(self, arguments: list[Any], returned: list[Any]) -> None:
        """Hold references until a task has ended.

        Args:
            arguments: The task's RDT arguments.
            returned: The task's returns. The end of a task without returns is unknown, so its
                arguments are held for the time limit of a fetch.
        """
        with self._changed:
            if returned:
                self._held[returned[-1]] = arguments
            else:
                deadline = Deadline.after(settings().fetch_timeout_s)
                self._unreturned.append((deadline, arguments))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rdt-holder")
                self._thread.start()
            self._changed.notify_all()

    def clear(self) -> None:
        """Release all references. Runs on: the thread that shuts Ray down."""
        with self._changed:
            self._held.clear()
            self._unreturned.clear()
            self._thread = None
            self._changed.notify_all()

    def _run(self) -> None:
        """Runs on: the rdt-holder thread, until there is another or none."""
        import ray

        while True:
            with self._changed:
                while self._is_current() and not len(self):
                    self._changed.wait()
                if not self._is_current():
                    return
                tasks = list(self._held)
                self._unreturned = [
                    entry for entry in self._unreturned if not entry[0].has_passed()
                ]
                if not tasks:
                    self._changed.wait(_WAIT_S)
            if tasks:
                self._release_ended(ray, tasks)

    def _is_current(self) -> bool:
        return self._thread is not None and self._thread.is_current()

    def _release_ended(self, ray: Any, tasks: list[Any]) -> None:
        try:
            ended, _ = ray.wait(tasks, num_returns=len(tasks), timeout=_WAIT_S, fetch_local=False)
        except Exception:  # Ray is shutting down, which ends all tasks
            self.clear()
            return
        with self._changed:
            for task in ended:
                self._held.pop(task, None)
