"""Ray's core worker, with callbacks that do not block its io thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray._raylet import CoreWorker

from ray.experimental.rdt.consumer.deferred import Deferred


class RDTCoreWorker(CoreWorker):
    """The class of ``global_worker.core_worker``."""

    def set_get_async_callback(self, object_ref: Any, user_callback: Callable[[Any], None]) -> None:
        """Call back with an object's value when it has arrived: ``await ref``, ``ref.future()``.

        Runs on: any thread. The callback runs on the core's io thread, or on an rdt-pull thread if
        tensors were pulled.
        """

        def deliver(value: Any) -> None:
            if isinstance(value, Deferred):
                value.then(user_callback)
            else:
                user_callback(value)

        super().set_get_async_callback(object_ref, deliver)
