"""The actors of a transfer, as a user's transport gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.experimental.rdt.common import ray_core


def own_actor_handle() -> bytes | None:
    """Return the handle of this process's actor as Ray serializes it, None outside actors."""
    actor = ray_core.own_actor_handle()
    return None if actor is None else actor._serialization_helper()[0]


def own_actor_for_calls() -> Any:
    """Return the handle of this process's actor, None outside actors.

    Its ``__ray_call__`` runs on the calling thread: the main thread may be waiting for the caller,
    and then could not run a call of its own actor.
    """
    actor = ray_core.own_actor_handle()
    if actor is not None:
        actor.__ray_call__ = _CallInPlace()
    return actor


def actor_of(serialized: bytes | None) -> Any:
    """Return the actor of ``own_actor_handle``. The handle does not keep the actor alive."""
    import ray

    if serialized is None:
        return None
    return ray.actor.ActorHandle._deserialization_helper(serialized, True, None)


class _CallInPlace:
    """``__ray_call__`` of this process's own actor."""

    def options(self, **options: Any) -> _CallInPlace:
        return self

    def remote(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        import ray

        return ray.put(function(ray_core.actor(), *args, **kwargs))
