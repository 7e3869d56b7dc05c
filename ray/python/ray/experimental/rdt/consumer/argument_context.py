"""Arguments that are received into tensors which the consumer names; see ``api.receive_into``.

A function carries its declaration as an attribute, so that it travels with the function. It is
asked for the tensors right before an argument's object is fetched, in the consumer: on the thread
of a task or of a method, before Ray deserializes its arguments; on the event loop of an async
actor, where Ray has deserialized them already and they are ``Deferred``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray._private import ray_constants

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.consumer.deferred import Deferred

if TYPE_CHECKING:
    import torch

_ATTRIBUTE = "__ray_rdt_receive_into__"

#: By name of a parameter: its position (None if it has to be named) and what gives the tensors.
Declaration = dict[str, "tuple[int | None, Callable[..., Any]]"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def declare(function: Any, tensors_of: Mapping[str, Callable[..., Any]]) -> None:
    """Lets a function's arguments be received into tensors.

    Raises:
        TypeError: it is no function, or not told by a function which tensors they are.
        ValueError: it has no such parameter, or is a constructor.
    """
    if not inspect.isfunction(function):
        raise TypeError(
            f"receive_into is for functions and methods, below @ray.remote; got {function!r}"
        )
    if function.__name__ == "__init__":
        raise ValueError("an actor has no tensors to receive into before its constructor has run")
    parameters = inspect.signature(function).parameters
    declared: Declaration = {}
    for name, give in tensors_of.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.kind in _VARIABLE:
            raise ValueError(f"{function.__qualname__} has no parameter {name!r} of its own")
        if not callable(give):
            raise TypeError(f"receive_into({name}=) takes a function that gives the tensors")
        is_positional = parameter.kind in _POSITIONAL
        declared[name] = (list(parameters).index(name) if is_positional else None, give)
    setattr(function, _ATTRIBUTE, declared)


def is_declared(function: Any) -> bool:
    """Whether some of its arguments are received into tensors."""
    return hasattr(function, _ATTRIBUTE)


class _Actor:
    """Of this process."""

    has_declared = False


def expect_methods() -> None:
    """Notes that a method of this process's actor has declared something."""
    _Actor.has_declared = True


def are_expected() -> bool:
    """Whether arguments on the event loop of this process's actor may have tensors to go to."""
    return _Actor.has_declared


def direct(method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Tells the late arguments of a method where to go. Runs on: consumer, the event loop.

    Args:
        method: What the user wrote.
        args: The actor and the positional arguments.
        kwargs: The others.
    """
    for name, (position, give) in getattr(method, _ATTRIBUTE, {}).items():
        value = kwargs.get(name)
        if position is not None and position < len(args):
            value = args[position]
        if isinstance(value, Deferred):
            value.into(_tensors(give, args[:1]))


def of_running_task(serialized: Sequence[Any]) -> dict[int, list[torch.Tensor]]:
    """Where the arguments of this thread's task go, by index in what Ray deserializes for it.

    Runs on: consumer, the thread of the task.

    Args:
        serialized: (data, metadata, transport) of a label and a value for each argument.
    """
    function, owner = _running()
    declared: Declaration = getattr(function, _ATTRIBUTE, {})
    givers: dict[int | str, Callable[..., Any]] = {}
    for name, (position, give_it) in declared.items():
        givers[name] = give_it
        if position is not None:
            givers[position - len(owner)] = give_it
    into = {}
    for index, label in _labels(serialized) if declared else ():
        give = givers.get(label)
        tensors = None if give is None else _tensors(give, owner)
        if tensors is not None:
            into[index] = tensors
    return into


def _running() -> tuple[Any, tuple[Any, ...]]:
    """The function of this thread's task, and what it is called with before its arguments."""
    if not ray_core.is_worker():
        return None, ()
    name = ray_core.task_function_name()
    actor = ray_core.actor()
    if actor is not None:
        return getattr(type(actor), name.rpartition(".")[2], None), (actor,)
    known = ray_core.loaded_functions()
    # The last one loaded: a function that was defined anew keeps its name.
    return next((each.function for each in reversed(known) if each.function_name == name), None), ()


def _labels(serialized: Sequence[Any]) -> Iterator[tuple[int, int | str]]:
    """The index of each value, and its position or its keyword."""
    position = 0
    for index in range(0, len(serialized), 2):
        if serialized[index][1] == ray_constants.OBJECT_METADATA_TYPE_RAW:
            yield index + 1, position
            position += 1
        else:
            yield index + 1, ray_core.deserialize(serialized[index], None, {})


def _tensors(give: Callable[..., Any], owner: Sequence[Any]) -> list[torch.Tensor] | None:
    given = give(*owner)
    return None if given is None else list(given)
