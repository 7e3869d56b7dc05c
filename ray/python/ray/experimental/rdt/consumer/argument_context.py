"""Arguments that are received into tensors of the consumer; see ``api.receive_into``.

The declaration is an attribute of the function, so that it is pickled with the function. The
consumer looks up the tensors right before it fetches an argument's object. In a task or a method,
that is before Ray deserializes the arguments. In an async actor, Ray has already deserialized the
arguments on the event loop, and they are ``Deferred``.
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

#: By parameter name: its position (None if keyword-only) and the function that returns the tensors.
Declaration = dict[str, "tuple[int | None, Callable[..., Any]]"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def declare(function: Any, tensors_of: Mapping[str, Callable[..., Any]]) -> None:
    """Declare that a function's arguments are received into tensors.

    Raises:
        TypeError: It is not a function, or the tensors are not given by a function.
        ValueError: It has no such parameter, or is a constructor.
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


class _Actor:
    """The actor of this process."""

    has_declared = False


def note_method(method: Any) -> None:
    """Note a method of this process's actor, which may have a declaration."""
    if hasattr(method, _ATTRIBUTE):
        _Actor.has_declared = True


def are_expected() -> bool:
    """Tell whether a method of this process's actor has a declaration."""
    return _Actor.has_declared


def set_targets(method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Set the targets of a method's deferred arguments. Runs on: consumer, the event loop.

    Args:
        args: The actor and the positional arguments.
    """
    for name, (position, give) in getattr(method, _ATTRIBUTE, {}).items():
        value = kwargs.get(name)
        if position is not None and position < len(args):
            value = args[position]
        if isinstance(value, Deferred):
            value.into(_tensors(give, args[:1]))


def targets_of_running_task(serialized: Sequence[Any]) -> dict[int, list[torch.Tensor]]:
    """Return the targets of this task's arguments, by index in the values that Ray deserializes.

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
    """Return the function of this thread's task, and its actor if it is a method."""
    if not ray_core.is_worker():
        return None, ()
    name = ray_core.task_function_name()
    actor = ray_core.actor()
    if actor is not None:
        return getattr(type(actor), name.rpartition(".")[2], None), (actor,)
    known = ray_core.loaded_functions()
    # The last one loaded: a function that was redefined keeps its name.
    return next((each.function for each in reversed(known) if each.function_name == name), None), ()


def _labels(serialized: Sequence[Any]) -> Iterator[tuple[int, int | str]]:
    """Return the index of each value, and its position or its keyword."""
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
