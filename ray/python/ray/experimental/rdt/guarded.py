"""RDT values that Ray's core does not flag: returns of normal tasks.

The core calls RDT only for the returns of actor methods and for puts. A normal task's function is
wrapped, so that what it returns says by itself that it stays here. Such a value holds a *guard*: a
small put of this process, flagged, nested in the value. Ray's own reference counter frees the guard
when the value's last reference is gone, and the guard's end frees the tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.remote_function import RemoteFunction

Function = Callable[..., Any]


class GuardedValue:
    """A value on its way out of a task. Ray's serialization context knows the method's name."""

    def __init__(self, value: Any, transport: str):
        self._value = value
        self._transport = transport

    def __ray_rdt_serialize__(self, context: Any) -> Any:
        """The serialized object. Runs on: producer, the thread of the task."""
        import ray

        manager = ray._private.worker.global_worker.rdt_manager
        return manager.serialize_guarded(context, self._value, self._transport)


def guard_returns(function: Function, transport: str, num_returns: Any) -> Function:
    """Wraps a task's function so that each of its returns is an RDT object."""
    if inspect.isgeneratorfunction(function) or num_returns in ("dynamic", "streaming"):
        raise ValueError(
            f"tensor_transport={transport!r} is for tasks that return their values; the items of a "
            "generator go through Ray's object store"
        )

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _guard_result(function(*args, **kwargs), transport, num_returns)

    return call


def _guard_result(result: Any, transport: str, num_returns: Any) -> Any:
    if num_returns in (None, 1):
        return GuardedValue(result, transport)
    if num_returns == 0:
        return result
    if isinstance(result, (list, tuple)):
        return [GuardedValue(item, transport) for item in result]
    return result  # Ray reports that the number of returns is wrong.


def with_transport(
    remote_function: RemoteFunction, transport: str, num_returns: Any
) -> RemoteFunction:
    """The remote function whose returns are RDT objects; made once for each transport.

    Runs on: whoever submits the task.

    Raises:
        ValueError: no such transport, or the function is a generator.
    """
    from ray.experimental.rdt.util import normalize_and_validate_tensor_transport

    name = normalize_and_validate_tensor_transport(transport)
    variants: dict[Any, RemoteFunction] = remote_function.__dict__.setdefault("_rdt_variants", {})
    if (name, num_returns) not in variants:
        variants[name, num_returns] = _make_variant(remote_function, name, num_returns)
    return variants[name, num_returns]


def _make_variant(
    remote_function: RemoteFunction, transport: str, num_returns: Any
) -> RemoteFunction:
    from ray.remote_function import RemoteFunction

    options = dict(remote_function._default_options)
    options.pop("tensor_transport", None)
    function = guard_returns(remote_function._function, transport, num_returns)
    return RemoteFunction(remote_function._language, function, None, options)
