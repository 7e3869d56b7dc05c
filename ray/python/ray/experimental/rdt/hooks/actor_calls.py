"""Actor methods with deferred arguments or RDT items, at the actor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.keywords import STREAM_KEYWORD
from ray.experimental.rdt.consumer import argument_context
from ray.experimental.rdt.hooks.deferred_calls import call_when_arrived, have_arrived

#: Whether a method of this process's actor names nixl, until its constructor has been called.
_has_to_begin_nixl = False


def note_method(method: Callable[..., Any]) -> None:
    """Note a method of this process's actor. Runs on: the actor, before its constructor."""
    global _has_to_begin_nixl
    argument_context.note_method(method)
    if getattr(method, "__ray_tensor_transport__", None) == "NIXL":
        _has_to_begin_nixl = True


def is_special(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether RDT has to make a call: it has deferred arguments or RDT items.

    The first call, the constructor's, of an actor whose methods name nixl counts as well. Ray makes
    all other calls itself, so that their tracebacks contain no frame of RDT.
    """
    is_here = have_arrived(args) and have_arrived(kwargs.values())
    return not is_here or STREAM_KEYWORD in kwargs or _has_to_begin_nixl


def call(
    execute: Callable[..., Any],
    method: Callable[..., Any],
    actor: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Make a special call.

    Runs on: consumer or producer, the thread or event loop of the task.
    """
    global _has_to_begin_nixl
    begins_nixl, _has_to_begin_nixl = _has_to_begin_nixl, False

    def run(actor: Any, *args: Any, **kwargs: Any) -> Any:
        spec = kwargs.pop(STREAM_KEYWORD, None)
        result = execute(actor, *args, **kwargs)
        if begins_nixl:
            # The constructor may set environment variables that nixl reads.
            ray_core.manager().begin_nixl()
        return result if spec is None else spec.items_of(result)

    if have_arrived(args) and have_arrived(kwargs.values()):
        return run(actor, *args, **kwargs)
    argument_context.set_targets(method, (actor, *args), kwargs)
    return call_when_arrived(method, run, (actor, *args), kwargs)
