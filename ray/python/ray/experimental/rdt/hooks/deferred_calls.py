"""Calls and callbacks whose values may be ``Deferred``: user code gets the values themselves."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from ray.exceptions import RayError

from ray.experimental.rdt.consumer.deferred import Deferred


def when_here(callback: Callable[[Any], None]) -> Callable[[Any], None]:
    """A callback for values as the core gives them, which passes on the values themselves."""

    def deliver(value: Any) -> None:
        if isinstance(value, Deferred):
            value.then(callback)
        else:
            callback(value)

    return deliver


def are_here(arguments: Iterable[Any]) -> bool:
    """Whether none of them is still to come."""
    return not any(type(argument) is Deferred for argument in arguments)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LateCall:
    """The call of a plain method whose arguments are still to come; await it for its result.

    Ray's ``sync_to_async`` knows it by the attribute.
    """

    __ray_rdt_late_call__ = True

    def __init__(self, call: Coroutine[Any, Any, Any]):
        self._call = call

    def __await__(self) -> Any:
        return self._call.__await__()


def call_when_here(
    method: Callable[..., Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a method of an async actor once its arguments are there.

    Runs on: consumer, the event loop or (generators, Ray's own methods) the thread of the task.

    Args:
        method: What the user wrote: tells which kind of call it is.
        call: What to call.
        args: Positional arguments, ``Deferred`` ones among them.
        kwargs: The same by keyword.

    Returns:
        What the core expects of such a method: a coroutine, an async generator, or for a plain
        method a ``LateCall``, or its result where no event loop runs.
    """
    if inspect.isasyncgenfunction(method):
        return _generate(call, args, kwargs)
    if inspect.iscoroutinefunction(method):
        return _await(call, args, kwargs)
    if asyncio._get_running_loop() is not None:
        return LateCall(_call(call, args, kwargs))
    here = [_checked(_result(value)) for value in args]
    return call(*here, **{name: _checked(_result(value)) for name, value in kwargs.items()})


async def _generate(call: Callable[..., Any], args: Any, kwargs: Any) -> AsyncIterator[Any]:
    args, kwargs = await _arrive(args, kwargs)
    generator = call(*args, **kwargs)
    try:
        item = await generator.asend(None)
        while True:
            item = await generator.asend((yield item))
    except StopAsyncIteration:
        return
    finally:
        await generator.aclose()


async def _await(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    args, kwargs = await _arrive(args, kwargs)
    return await call(*args, **kwargs)


async def _call(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    args, kwargs = await _arrive(args, kwargs)
    return call(*args, **kwargs)


async def _arrive(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Deferred):
            value.start()
    here = [_checked(await _arrived(value)) for value in args]
    return tuple(here), {name: _checked(await _arrived(value)) for name, value in kwargs.items()}


async def _arrived(value: Any) -> Any:
    return await value.arrive() if isinstance(value, Deferred) else value


def _result(value: Any) -> Any:
    return value.result() if isinstance(value, Deferred) else value


def _checked(value: Any) -> Any:
    """A failed argument fails the call, as in plain Ray."""
    if isinstance(value, RayError):
        raise value
    return value
