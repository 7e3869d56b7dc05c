"""What RDT adds to the calls of actor methods where they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.experimental.rdt import arguments, deferred

#: The keyword under which a call of a generator carries its ``StreamSpec`` or ``DynamicSpec``.
STREAM_KEYWORD = "_ray_rdt_stream"


def note_method(method: Callable[..., Any]) -> None:
    """Knows a method of this process's actor. Runs on: consumer, before its first call."""
    if arguments.is_declared(method):
        arguments.expect_methods()


def is_special(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has late arguments or RDT items; any other one is Ray's own affair.

    Ray's executor asks, so that ordinary calls have no frame of ours in their tracebacks.
    """
    is_here = deferred.are_here(args) and deferred.are_here(kwargs.values())
    return not is_here or STREAM_KEYWORD in kwargs


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

    def run(actor: Any, *args: Any, **kwargs: Any) -> Any:
        spec = kwargs.pop(STREAM_KEYWORD, None)
        result = execute(actor, *args, **kwargs)
        return result if spec is None else spec.items_of(result)

    if deferred.are_here(args) and deferred.are_here(kwargs.values()):
        return run(actor, *args, **kwargs)
    arguments.direct(method, (actor, *args), kwargs)
    return deferred.call_when_here(method, run, (actor, *args), kwargs)
