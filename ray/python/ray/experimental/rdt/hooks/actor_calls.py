"""What RDT adds to the calls of actor methods where they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.consumer import argument_context
from ray.experimental.rdt.hooks.deferred_calls import are_here, call_when_here
from ray.experimental.rdt.producer.streams import STREAM_KEYWORD

#: Whether a method of this process's actor names nixl, until its constructor has been called.
_has_to_begin_nixl = False


def note_method(method: Callable[..., Any]) -> None:
    """Knows a method of this process's actor. Runs on: the actor, before its constructor."""
    global _has_to_begin_nixl
    if argument_context.is_declared(method):
        argument_context.expect_methods()
    if getattr(method, "__ray_tensor_transport__", None) == "NIXL":
        _has_to_begin_nixl = True


def is_special(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has late arguments or RDT items; any other one is Ray's own affair.

    So is the first, the constructor's, of an actor whose methods name nixl.

    Ray's executor asks, so that ordinary calls have no frame of ours in their tracebacks.
    """
    is_here = are_here(args) and are_here(kwargs.values())
    return not is_here or STREAM_KEYWORD in kwargs or _has_to_begin_nixl


def call(
    execute: Callable[..., Any],
    method: Callable[..., Any],
    actor: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Makes a special call.

    Runs on: consumer or producer, the thread or event loop of the task.

    Args:
        execute: Ray's executor of the method.
        method: What the user wrote.
        actor: The actor.
        args: Positional arguments.
        kwargs: The same by keyword.
    """
    global _has_to_begin_nixl
    begins_nixl, _has_to_begin_nixl = _has_to_begin_nixl, False

    def run(actor: Any, *args: Any, **kwargs: Any) -> Any:
        spec = kwargs.pop(STREAM_KEYWORD, None)
        result = execute(actor, *args, **kwargs)
        if begins_nixl:
            # Not before: a constructor may set what nixl reads from the environment.
            ray_core.manager().begin_nixl()
        return result if spec is None else spec.items_of(result)

    if are_here(args) and are_here(kwargs.values()):
        return run(actor, *args, **kwargs)
    argument_context.direct(method, (actor, *args), kwargs)
    return call_when_here(method, run, (actor, *args), kwargs)
