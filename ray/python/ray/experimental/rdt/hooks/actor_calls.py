"""Actor methods with deferred arguments or RDT items, at the actor."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.consumer import argument_context
from ray.experimental.rdt.consumer.deferred import Deferred
from ray.experimental.rdt.producer import huge_pages

#: Whether a method of this process's actor names nixl, until its constructor has been called.
_has_to_begin_nixl = False


def note_method(method: Callable[..., Any]) -> None:
    """Note a method of this process's actor. Runs on: the actor, before its constructor."""
    global _has_to_begin_nixl
    argument_context.note_method(method)
    transport = getattr(method, "__ray_tensor_transport__", None)
    if transport == "NIXL":
        _has_to_begin_nixl = True
    if transport is not None:
        huge_pages.request_for_new_tensors()


def is_special(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether RDT has to make a call: it has deferred arguments or RDT items.

    The first call, the constructor's, of an actor whose methods name nixl counts as well. Ray makes
    all other calls itself, so that their tracebacks contain no frame of RDT.
    """
    is_here = have_arrived(args) and have_arrived(kwargs.values())
    return not is_here or ray_core.STREAM_KEYWORD in kwargs or _has_to_begin_nixl


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
        spec = kwargs.pop(ray_core.STREAM_KEYWORD, None)
        result = execute(actor, *args, **kwargs)
        if begins_nixl:
            # The constructor may set environment variables that nixl reads.
            ray_core.manager().begin_nixl()
        return result if spec is None else spec.items_of(result)

    if have_arrived(args) and have_arrived(kwargs.values()):
        return run(actor, *args, **kwargs)
    argument_context.set_targets(method, (actor, *args), kwargs)
    return call_when_arrived(method, run, (actor, *args), kwargs)


def have_arrived(arguments: Iterable[Any]) -> bool:
    """Tell whether none of the arguments is ``Deferred``."""
    return not any(type(argument) is Deferred for argument in arguments)


class DeferredCall:
    """The awaitable call of a plain method whose arguments have not arrived.

    Ray's ``sync_to_async`` recognizes it by the attribute.
    """

    __ray_rdt_late_call__ = True

    def __init__(self, call: Coroutine[Any, Any, Any]):
        self._call = call

    def __await__(self) -> Any:
        return self._call.__await__()


def call_when_arrived(
    method: Callable[..., Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a method of an async actor when its arguments have arrived.

    Runs on: consumer, the event loop or (generators, Ray's own methods) the thread of the task.

    Args:
        method: The user's method, which determines the kind of the call.

    Returns:
        The result that the core expects of such a method: a coroutine, an async generator, or for a
        plain method a ``DeferredCall``, or its result if no event loop runs.
    """
    if inspect.isasyncgenfunction(method):
        return _generate(call, args, kwargs)
    if inspect.iscoroutinefunction(method):
        return _await(call, args, kwargs)
    if asyncio._get_running_loop() is not None:
        return DeferredCall(_call(call, args, kwargs))
    here = [_checked(_result(value)) for value in args]
    return call(*here, **{name: _checked(_result(value)) for name, value in kwargs.items()})


async def _generate(call: Callable[..., Any], args: Any, kwargs: Any) -> AsyncIterator[Any]:
    generator = await _call(call, args, kwargs)
    try:
        item = await generator.asend(None)
        while True:
            item = await generator.asend((yield item))
    except StopAsyncIteration:
        return
    finally:
        await generator.aclose()


async def _await(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return await (await _call(call, args, kwargs))


async def _call(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Deferred):
            value.start()
    here = [_checked(await _arrived(value)) for value in args]
    named = {name: _checked(await _arrived(value)) for name, value in kwargs.items()}
    return call(*here, **named)


async def _arrived(value: Any) -> Any:
    return await value.arrive() if isinstance(value, Deferred) else value


def _result(value: Any) -> Any:
    return value.result() if isinstance(value, Deferred) else value


def _checked(value: Any) -> Any:
    """Raise the error of a failed argument, as Ray does."""
    if isinstance(value, RayError):
        raise value
    return value
