"""What RDT adds to the calls of actor methods where they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ray.experimental.rdt import arguments, deferred

#: The keyword under which a call of a generator carries its ``StreamSpec``.
STREAM_KEYWORD = "_ray_rdt_stream"


def with_rdt(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Ray's executor of one actor method, for calls with late arguments or RDT items as well.

    Runs on: consumer or producer, the thread or event loop of the task.
    """
    method = execute.method  # type: ignore[attr-defined]
    if arguments.is_declared(method):
        arguments.expect_methods()

    @functools.wraps(execute)
    def call(actor: Any, *args: Any, **kwargs: Any) -> Any:
        if deferred.are_here(args) and deferred.are_here(kwargs.values()):
            return run(actor, *args, **kwargs)
        arguments.direct(method, (actor, *args), kwargs)
        return deferred.call_when_here(method, run, (actor, *args), kwargs)

    def run(actor: Any, *args: Any, **kwargs: Any) -> Any:
        spec = kwargs.pop(STREAM_KEYWORD, None)
        result = execute(actor, *args, **kwargs)
        if spec is None:
            return result
        from ray.experimental.rdt import streams

        return streams.items_of(result, streams.StreamSpec(*spec))

    return call
