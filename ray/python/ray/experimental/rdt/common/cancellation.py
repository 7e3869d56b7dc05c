"""Ends waits of tasks that have been cancelled.

Ray cancels a normal task by an interrupt, and defers that while it deserializes the task's
arguments; calls of actors that are no coroutines are not interrupted at all. A pull may take long,
so every wait for tensors looks for itself, between two slices of its waiting.
"""

from __future__ import annotations

from ray.experimental.rdt.common import ray_core


def raise_if_cancelled() -> None:
    """Raises KeyboardInterrupt, as Ray's own cancelling does, if this thread's task is cancelled.

    Runs on: any thread; those that run no task, and coroutines, which asyncio cancels, go on.
    """
    if not ray_core.is_worker() or ray_core.actor_is_asyncio():
        return
    if ray_core.task_is_canceled():
        raise KeyboardInterrupt
