"""Returns of normal tasks as RDT objects. Ray's core does not flag them as such.

The core calls RDT only for the returns of actor methods and for puts; for items of generators see
``producer/streams.py``. RDT therefore wraps the function of a normal task, so that its returns
serialize themselves. Each such value contains a *guard*: a reference to a small flagged put of this
process. Ray's reference counter frees the guard when the value's last reference is gone. RDT then
frees the tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.transports.user import registered

if TYPE_CHECKING:
    from ray.remote_function import RemoteFunction

Function = Callable[..., Any]


class GuardedValue:
    """A task's return that serializes itself. Ray's serialization context calls the method."""

    def __init__(self, value: Any, transport: str, index: int = 0):
        self._value = value
        self._transport = transport
        self._index = index

    def __ray_rdt_serialize__(self, context: Any) -> Any:
        """Return the serialized value. Runs on: producer, the thread of the task."""
        # The id of a return is the task's id and an index from 1.
        origin = ray_core.task_id() + (self._index + 1).to_bytes(4, "little")
        producer = ray_core.manager().producer
        return producer.serialize(context, self._value, self._transport, origin)[0]


def submit(
    remote_function: RemoteFunction,
    transport: str,
    args: Any,
    kwargs: Any,
    runtime_env_info: Any,
    options: dict[str, Any],
) -> Any:
    """Submit a normal task whose returns, or items, are RDT objects.

    Runs on: caller, the thread that called ``.remote()``.

    Args:
        runtime_env_info: As ``RemoteFunction._remote`` takes it.
        options: The task's other options.

    Raises:
        ValueError: The transport does not exist, or the returns cannot be RDT objects.
    """
    from ray.experimental.rdt.util import normalize_and_validate_tensor_transport

    name = normalize_and_validate_tensor_transport(transport)
    registered.refresh(name)
    num_returns = options.get("num_returns")
    if num_returns is None and inspect.isgeneratorfunction(remote_function._function):
        num_returns = "streaming"
    variant = _variant(remote_function, name, num_returns)

    def begin(args: Any, kwargs: Any) -> Any:
        """Submit the task within the trace span that has already begun.

        If Ray traces, ``kwargs`` contains the context of the user's ``.remote()`` call.
        """
        submit_untraced = inspect.unwrap(type(variant)._remote)
        return submit_untraced(variant, args, kwargs, runtime_env_info, **options)

    if num_returns is None or isinstance(num_returns, int):
        return _submit(begin, args, kwargs, options.get("max_retries"))
    call = ray_core.manager().open_stream(
        name, num_returns, options.get("_num_objects_per_yield"), options.get("retry_exceptions")
    )
    options["num_returns"] = call.num_returns
    return call.attach(begin(args, {**(kwargs or {}), ray_core.STREAM_KEYWORD: call.spec}))


def _submit(begin: Callable[[Any, Any], Any], args: Any, kwargs: Any, max_retries: Any) -> Any:
    def submit_again(args: Any, kwargs: Any) -> Any:
        return _submit(begin, args, kwargs, max_retries)

    return ray_core.manager().owner.submit_task(begin, submit_again, args, kwargs, max_retries)


def _variant(remote_function: RemoteFunction, transport: str, num_returns: Any) -> RemoteFunction:
    """Return the remote function whose returns are RDT objects, created once for each transport."""
    variants: dict[Any, RemoteFunction] = remote_function.__dict__.setdefault("_rdt_variants", {})
    if (transport, num_returns) in variants:
        return variants[transport, num_returns]
    from ray.remote_function import RemoteFunction
    from ray.util.tracing.tracing_helper import _is_tracing_enabled

    options = dict(remote_function._default_options)
    options.pop("tensor_transport", None)
    user_function = remote_function._function
    function = _guard(user_function, transport, num_returns)
    if not _is_tracing_enabled():  # the descriptor of a traced function names Ray's own file
        function.__module__ = _module_of(user_function)
    variant = RemoteFunction(remote_function._language, function, None, options)
    variant._function_name = remote_function._function_name
    return variants.setdefault((transport, num_returns), variant)


def _module_of(function: Function) -> str:
    """Return the module for Ray's descriptor of a function: for a driver, its file's name."""
    name = None
    if function.__module__ == "__main__":
        with suppress(TypeError):  # a function that is not Python's has no file
            name = inspect.getmodulename(inspect.getfile(function))
    return name or function.__module__


def _guard(function: Function, transport: str, num_returns: Any) -> Function:
    """Wrap a task's function so that each of its returns, or items, is an RDT object."""
    if num_returns in ("streaming", "dynamic"):
        return _guard_items(function, num_returns)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _guard_result(function(*args, **kwargs), transport, num_returns)

    return call


def _guard_items(function: Function, num_returns: str) -> Function:
    def items(*args: Any, **kwargs: Any) -> Any:
        spec = kwargs.pop(ray_core.STREAM_KEYWORD)
        return spec.items_of(function(*args, **kwargs))

    def stream(*args: Any, **kwargs: Any) -> Any:
        yield from items(*args, **kwargs)

    call = functools.wraps(function)(stream if num_returns == "streaming" else items)
    # Ray checks the arguments of a call against the signature.
    signature = inspect.signature(function)
    mark = inspect.Parameter(ray_core.STREAM_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = [p for p in signature.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind == inspect.Parameter.VAR_KEYWORD]
    call.__signature__ = signature.replace(parameters=[*own, mark, *rest])  # type: ignore[attr-defined]
    return call


def _guard_result(result: Any, transport: str, num_returns: Any) -> Any:
    if num_returns in (None, 1):
        return GuardedValue(result, transport)
    if num_returns == 0:
        return result
    if isinstance(result, (list, tuple)):
        return [GuardedValue(item, transport, index) for index, item in enumerate(result)]
    return result  # Ray reports that the number of returns is wrong.
