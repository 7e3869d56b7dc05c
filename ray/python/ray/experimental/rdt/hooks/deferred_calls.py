"""Calls and callbacks with ``Deferred`` values: the user's code receives the values themselves."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from ray.exceptions import RayError

from ray.experimental.rdt.consumer.deferred import Deferred


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
