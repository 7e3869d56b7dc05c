"""Ends the waits of canceled tasks.

Ray cancels a normal task by an interrupt, and defers the interrupt while it deserializes the task's
arguments. Ray does not interrupt methods of actors that are not coroutines. A pull may take long,
so every wait for tensors is divided into slices and checks for cancellation between them.
"""

from __future__ import annotations

from ray.experimental.rdt.common import ray_core


def raise_if_cancelled() -> None:
    """Raise KeyboardInterrupt, as Ray does, if this thread's task is canceled.

    Runs on: any thread. It does nothing on threads without a task, and in async actors, where
    asyncio cancels coroutines.
    """
    if not ray_core.is_worker() or ray_core.actor_is_asyncio():
        return
    if ray_core.task_is_canceled():
        raise KeyboardInterrupt
