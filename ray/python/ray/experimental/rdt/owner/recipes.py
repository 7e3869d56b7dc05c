"""Records of calls that an owner can repeat. Pure bookkeeping; ``reconstruction.py`` uses it.

A recipe exists as long as one of the objects that its call returned. It holds the call and no
tensors. Of the arguments it keeps

* small values, as they were serialized for the call: the caller may change them afterwards;
* RDT objects of this owner by id, with their recipes: their memory is freed as usual, and they are
  reconstructed when they are needed;
* other references, which keep their objects alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray._raylet import RawSerializedObject

#: Larger arguments are not kept. Ray puts larger ones into its object store and does not keep them
#: for retries of tasks that have ended.
MAX_ARGUMENT_BYTES = 100 << 10

#: The longest chain of calls that is repeated to reconstruct one object.
_MAX_DEPTH = 100

#: Types of immutable values.
IMMUTABLE = (type(None), bool, int, float, complex, str, bytes)


@dataclass(frozen=True)
class Reference:
    """An argument that is an object: its id in hex, and the transport of its reference."""

    object_id: str
    transport: str | None


@dataclass(frozen=True)
class SerializedArgument:
    """An argument as it was serialized for the call, and the references in it."""

    data: bytes
    metadata: bytes
    references: tuple[Reference, ...]


@dataclass
class Recipe:
    """One call that can be repeated.

    Attributes:
        call: Repeats it, with arguments as ``.remote()`` takes them.
        args: Its arguments: immutable values, ``Reference`` and ``SerializedArgument``.
        kwargs: The same by keyword.
        retries: How often it may be repeated, -1 for no limit.
        actor: The id (hex) of the actor that runs it, "" if it is a normal task.
        unavailable_reason: Why it cannot be repeated, "" if it can.
        pins: References that keep the arguments alive, by id.
        dependencies: The recipes of arguments that this owner's calls returned, with the index of
            the return.
        depth: The length of the longest chain of calls to repeat.
        in_scope: How many of its objects are in scope.
        replacements: The objects of the repeated call, None before. An entry is None if the object
            that it replaces is out of scope.
    """

    call: Callable[[Any, Any], Any]
    args: list[Any]
    kwargs: dict[str, Any]
    retries: int
    actor: str = ""
    unavailable_reason: str = ""
    pins: dict[str, Any] = field(default_factory=dict)
    dependencies: dict[str, tuple[Recipe, int]] = field(default_factory=dict)
    depth: int = 1
    in_scope: int = 0
    replacements: list[Any] | None = None

    def depend_on(self, object_id: str, entry: tuple[Recipe, int]) -> None:
        """Note that another recorded call returned an argument."""
        if entry[0].depth < _MAX_DEPTH:
            self.dependencies[object_id] = entry
            self.depth = max(self.depth, entry[0].depth + 1)

    def refusal(self) -> str:
        """Return why the call cannot be repeated now, "" if it can."""
        return self.unavailable_reason or ("" if self.retries else "all its retries are used up")

    def runs_on(self, actor: str) -> bool:
        return bool(actor) and self.actor == actor

    def use_retry(self) -> int:
        """Count one retry; return how many the repeated call has left."""
        self.retries -= self.retries > 0
        return self.retries


class Recipes:
    """The recipes of one owner, by the ids (hex) of the objects in scope.

    Not thread-safe: the caller holds a lock, and drops the returned objects outside it.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Recipe, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, object_ids: Sequence[str], recipe: Recipe) -> None:
        """Keep a recipe for the objects that its call returned, in their order."""
        recipe.in_scope = len(object_ids)
        for index, object_id in enumerate(object_ids):
            self._entries[object_id] = recipe, index

    def of(self, object_id: str) -> tuple[Recipe, int] | None:
        """Return an object's recipe, and the index of the return."""
        return self._entries.get(object_id)

    def drop(self, object_id: str) -> list[Any]:
        """Forget an object that is out of scope. Return everything that is no longer needed."""
        entry = self._entries.pop(object_id, None)
        if entry is None:
            return []
        recipe, index = entry
        recipe.in_scope -= 1
        garbage: list[Any] = [recipe]
        if recipe.replacements is not None:
            garbage.append(recipe.replacements[index])
            recipe.replacements[index] = None
        if not recipe.in_scope and recipe.pins:
            # Other recipes may still depend on it, and they do not keep its arguments alive.
            recipe.unavailable_reason = (
                "arguments of the call that returned one of its arguments are out of scope"
            )
            garbage.append(recipe.pins)
            recipe.pins = {}
        return garbage

    def clear(self) -> list[Any]:
        """Forget everything. Return what is no longer needed."""
        entries, self._entries = self._entries, {}
        return [entries]


class Argument:
    """An argument that is serialized once, for the call and its recipe.

    Ray's serialization context calls the method below.
    """

    def __init__(self, value: Any, serialized: SerializedValue | None = None):
        self._value = value
        self.serialized = serialized

    def __repr__(self) -> str:
        return repr(self._value)

    def __ray_rdt_serialize__(self, context: Any) -> Any:
        """Return the serialized argument. Runs on: the thread that calls ``.remote()``."""
        if self.serialized is not None:
            return self.serialized
        made = context.serialize(self._value)
        if made.total_bytes > MAX_ARGUMENT_BYTES:
            return made
        self.serialized = SerializedValue(
            made.to_bytes(), made.metadata, made.contained_object_refs
        )
        return self.serialized


class SerializedValue(RawSerializedObject):
    """A copy of a result of ``SerializationContext.serialize``. Ray's core stores it unchanged."""

    def __init__(self, data: Any, metadata: bytes, contained_refs: Sequence[Any]):
        self.data = bytes(data)
        super().__init__(self.data)
        self._own_metadata = metadata
        self._contained_refs = list(contained_refs)

    @property
    def metadata(self) -> bytes:
        return self._own_metadata

    @property
    def contained_object_refs(self) -> list[Any]:
        return self._contained_refs
