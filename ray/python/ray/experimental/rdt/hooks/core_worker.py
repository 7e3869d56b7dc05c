"""Ray's core worker, with callbacks that never make its io thread wait for tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray._raylet import CoreWorker

from ray.experimental.rdt.hooks.deferred_calls import when_here


class RDTCoreWorker(CoreWorker):
    """What ``global_worker.core_worker`` is."""

    def set_get_async_callback(self, object_ref: Any, user_callback: Callable[[Any], None]) -> None:
        """Calls back with an object's value once it is there: ``await ref``, ``ref.future()``.

        Runs on: any thread. The callback runs on the core's io thread, or on an rdt-pull thread if
        tensors had to be pulled.
        """
        super().set_get_async_callback(object_ref, when_here(user_callback))
