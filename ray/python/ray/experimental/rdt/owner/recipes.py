"""How an owner makes an object again that was lost with its producer.

Ray's core forgets a task once it has a reply with the value inside, as every RDT value is. So the
owner keeps a *recipe* of each call that Ray may retry: what was called, with which arguments, and
how often it may be called again. A recipe is there as long as one of its objects is.

As Ray's own lineage, a recipe holds calls and not tensors. Of its arguments it keeps

* what is small, as it was serialized for the call: the caller may change it afterwards;
* RDT objects of this owner by name, with their recipes: they are freed as if it did not know them,
  and made again when they are needed;
* other references, which keep their objects alive.

Runs on: owner. Recipes are kept by the thread that called ``.remote()``, used by the thread that
fetches, or by an rdt-call thread for other processes, and dropped by Ray's thread for references
that ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.exceptions import GetTimeoutError

from ray.experimental.rdt.common import descriptor, ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.interrupts import raise_if_interrupt
from ray.experimental.rdt.common.serialized_value import SerializedValue
from ray.experimental.rdt.rpc.process_directory import is_worker_alive
from ray.experimental.rdt.rpc.session import Session, agent_id_of

if TYPE_CHECKING:
    import ray

#: Larger arguments are not kept. Ray keeps larger ones in its object store, and not for retries of
#: tasks that have ended.
_MOST_ARGUMENT_BYTES = 100 << 10

#: An object whose making takes more calls, one after the other, does not know the first of them.
_MOST_CALLS = 100

#: How long the owner waits for a value that it owns, which is there already.
_VALUE_MS = 1000

#: Nobody can change these after the call.
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes)

#: How the id of what stands for an actor's handle begins.
_HANDLE_PREFIX = "ff" * 8

_WAITS_FOR_ITSELF = (
    "the actor that would have to make it, or something that it takes, waits for it itself; let "
    "another process get it first"
)

MADE, REFUSED, ALIVE, UNKNOWN = "made", "refused", "alive", "unknown"


@dataclass(frozen=True)
class Outcome:
    """What an owner says to who asks for a lost object.

    Attributes:
        state: MADE: there is another object in its place. REFUSED: there will be none. ALIVE: Ray
            does not know of its producer's death. UNKNOWN: this process is not its owner.
        ref: MADE: the object to take.
        reason: REFUSED: why.
    """

    state: str
    ref: Any = None
    reason: str = ""


class CannotRemakeError(Exception):
    """A call cannot be made again; the text says why."""


@dataclass(frozen=True)
class Reference:
    """An argument that is an object: its id in hex, and the transport that its reference names."""

    object_id: str
    transport: str | None


@dataclass(frozen=True)
class Frozen:
    """An argument as it was serialized for the call, and the references in it."""

    data: bytes
    metadata: bytes
    references: tuple[Reference, ...]


@dataclass
class Recipe:
    """One call that may be made again.

    Attributes:
        call: Makes it, with arguments as ``.remote()`` takes them.
        args: Its arguments: immutable values, ``Reference`` and ``Frozen``.
        kwargs: The same by keyword.
        retries: How often it may be made again, -1 for any number of times.
        actor: The id (hex) of the actor that runs it, "" if it is a normal task.
        obstacle: Why it cannot be made again, "" if it can.
        pins: What the arguments need to be kept alive, by id.
        ingredients: The recipes of arguments that this owner made, and which return each is.
        depth: How many calls there are to make, one after the other, if all is gone.
        live: How many of its objects are in scope.
        successors: What was made in their place, None before. One whose own object is gone is None.
    """

    call: Callable[[Any, Any], Any]
    args: list[Any]
    kwargs: dict[str, Any]
    retries: int
    actor: str = ""
    obstacle: str = ""
    pins: dict[str, Any] = field(default_factory=dict)
    ingredients: dict[str, tuple[Recipe, int]] = field(default_factory=dict)
    depth: int = 1
    live: int = 0
    successors: list[Any] | None = None

    def require(self, object_id: str, entry: tuple[Recipe, int]) -> None:
        """Notes that an argument was made by another call."""
        if entry[0].depth < _MOST_CALLS:
            self.ingredients[object_id] = entry
            self.depth = max(self.depth, entry[0].depth + 1)

    def why_not(self) -> str:
        """Why the call cannot be made again, "" if it can."""
        return self.obstacle or ("" if self.retries else "all its retries are used up")

    def is_of(self, actor: str) -> bool:
        """Whether it is a call of this actor's method."""
        return bool(actor) and self.actor == actor

    def use_up(self) -> int:
        """Counts one retry down; returns how many the call that is made has left."""
        self.retries -= self.retries > 0
        return self.retries


class Recipes:
    """The recipes of one owner, by the ids (hex) of the objects in scope. Pure bookkeeping.

    Not thread-safe: its caller holds a lock, and lets go of what the methods return outside of it.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Recipe, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, object_ids: Sequence[str], recipe: Recipe) -> None:
        """Keeps a recipe for the objects that its call returned, in their order."""
        recipe.live = len(object_ids)
        for index, object_id in enumerate(object_ids):
            self._entries[object_id] = recipe, index

    def of(self, object_id: str) -> tuple[Recipe, int] | None:
        """An object's recipe, and which of its returns it is."""
        return self._entries.get(object_id)

    def drop(self, object_id: str) -> list[Any]:
        """The object's last reference is gone. Returns what is not needed any more."""
        entry = self._entries.pop(object_id, None)
        if entry is None:
            return []
        recipe, index = entry
        recipe.live -= 1
        garbage: list[Any] = [recipe]
        if recipe.successors is not None:
            garbage.append(recipe.successors[index])
            recipe.successors[index] = None
        if not recipe.live and recipe.pins:
            # It may stay as an ingredient of others, which do not keep these alive.
            recipe.obstacle = "arguments of the call that made one of its arguments are gone"
            garbage.append(recipe.pins)
            recipe.pins = {}
        return garbage

    def clear(self) -> list[Any]:
        entries, self._entries = self._entries, {}
        return [entries]


class Argument:
    """An argument on its way into a call, which is serialized once, for call and recipe.

    Ray's serialization context knows the method's name.
    """

    def __init__(self, value: Any, serialized: SerializedValue | None = None):
        self._value = value
        self.serialized = serialized

    def __repr__(self) -> str:
        return repr(self._value)

    def __ray_rdt_serialize__(self, context: Any) -> Any:
        """The serialized argument. Runs on: the thread that calls ``.remote()``."""
        if self.serialized is not None:
            return self.serialized
        made = context.serialize(self._value)
        if made.total_bytes > _MOST_ARGUMENT_BYTES:
            return made
        self.serialized = SerializedValue(
            made.to_bytes(), made.metadata, made.contained_object_refs
        )
        return self.serialized


class Lineage:
    """Keeps and uses the recipes of this process. Thread-safe.

    Args:
        find: Gives the id (hex) of the object of this process that has this key, "" if none has.
    """

    def __init__(self, find: Callable[[bytes], str]) -> None:
        self._find = find
        self._recipes = Recipes()
        self._lock = threading.Lock()
        # One call at a time is made again, so that none is twice.
        self._remaking = threading.Lock()

    def __len__(self) -> int:
        return len(self._recipes)

    def serve(self, session: Session) -> None:
        """Answers those who ask for lost objects of this owner."""
        session.serve("rdt.remake", self._on_remake)

    def begin(
        self,
        call: Callable[[Any, Any], Any],
        retries: int,
        args: Any,
        kwargs: Any,
        actor: str = "",
    ) -> tuple[Recipe, list[Any], dict[str, Any]]:
        """Begins the recipe of a call.

        Args:
            call: Makes the call anew.
            retries: How often it may; -1 for any number of times.
            args: The call's arguments.
            kwargs: The same by keyword.
            actor: The id (hex) of the actor whose method it is, "" for a normal task.

        Returns:
            The recipe, and the arguments to make the call with; then comes ``keep``.
        """
        given = [_given(value) for value in args or ()]
        named = {name: _given(value) for name, value in (kwargs or {}).items()}
        return Recipe(call, given, named, retries, actor), given, named

    def keep(self, recipe: Recipe, refs: Sequence[Any]) -> None:
        """Keeps a recipe for what its call has returned."""
        recipe.args = [self._kept(recipe, value) for value in recipe.args]
        recipe.kwargs = {name: self._kept(recipe, value) for name, value in recipe.kwargs.items()}
        with self._lock:
            self._recipes.add([ref.hex() for ref in refs], recipe)
        for ref in refs:
            if not ray_core.call_when_out_of_scope(ref, self._on_out_of_scope):
                self._on_out_of_scope(ref.binary())

    def _kept(self, recipe: Recipe, value: Any) -> Any:
        """An argument as the recipe holds it."""
        if isinstance(value, Argument):
            if value.serialized is None:
                recipe.obstacle = (
                    f"the call that made it had an argument of more than {_MOST_ARGUMENT_BYTES} "
                    "bytes, which is not kept; pass an ObjectRef of it"
                )
                return None
            made = value.serialized
            nested = [self._reference(recipe, ref) for ref in made.contained_object_refs]
            return Frozen(made.data, made.metadata, tuple(nested))
        if isinstance(value, _IMMUTABLE):
            return value
        return self._reference(recipe, value)

    def _reference(self, recipe: Recipe, ref: Any) -> Reference:
        object_id, transport = ref.hex(), ref.tensor_transport()
        entry = self._recipes.of(object_id)
        if entry is not None:
            recipe.require(object_id, entry)
        elif not object_id.startswith(_HANDLE_PREFIX) and not (transport and _is_own(ref)):
            recipe.pins[object_id] = ref
        return Reference(object_id, transport)

    def _on_out_of_scope(self, object_id: bytes) -> None:
        """Runs on: Ray's thread for references that ended."""
        with self._lock:
            garbage = self._recipes.drop(object_id.hex())
        del garbage

    def clear(self) -> None:
        """Forgets everything. Runs on: whoever shuts Ray down."""
        with self._lock:
            garbage = self._recipes.clear()
        del garbage

    def remake(self, object_id: str, key: bytes, busy: str = "") -> Outcome:
        """Makes a lost object again, once however many ask.

        Blocks for an answer of Ray's GCS.

        Args:
            object_id: Its id in hex; "" where the value came without one.
            key: Of the lost copy, which shows that who asks had the value.
            busy: The id (hex) of an actor that does nothing else until it has the object, or "".
        """
        object_id = object_id or self._find(key)
        if not object_id or not _is_own(ray_core.uncounted_ref(object_id)):
            return Outcome(UNKNOWN)
        try:
            return self._remake(object_id, key, busy)
        except CannotRemakeError as error:
            return Outcome(REFUSED, reason=str(error))
        except Exception as error:  # of Ray's, or of what the user's code does at a call
            raise_if_interrupt(error)
            return Outcome(REFUSED, reason=f"{type(error).__name__}: {error}")

    def _remake(self, object_id: str, key: bytes, busy: str) -> Outcome:
        ref = ray_core.ref(object_id)
        head = _head_of(ref)
        if head is None or head.key != key:
            return Outcome(MADE, ref)  # it is another copy by now
        entry = self._recipes.of(object_id)
        if entry is None:
            raise CannotRemakeError("its call may not be made again")
        if ray_core.reconstruction_is_disabled():
            raise CannotRemakeError("the job is configured to make nothing again")
        if entry[0].successors is None and is_worker_alive(agent_id_of(head.address)):
            return Outcome(ALIVE)
        return Outcome(MADE, self._successor(*entry, busy))

    def _successor(self, recipe: Recipe, index: int, busy: str) -> ray.ObjectRef:
        """What stands in the place of one of a call's objects. Raises CannotRemakeError."""
        with self._remaking:
            if recipe.successors is None:
                recipe.successors = self._make(recipe, busy)
            ref = recipe.successors[index]
        if ref is None:
            raise CannotRemakeError("nobody refers to it any more")
        if recipe.is_of(busy) and not ray_core.is_created(ref):
            raise CannotRemakeError(_WAITS_FOR_ITSELF)
        return ref

    def _make(self, recipe: Recipe, busy: str) -> list[Any]:
        """Makes a call again; returns what it returns."""
        why = recipe.why_not() or (_WAITS_FOR_ITSELF if recipe.is_of(busy) else "")
        if why:
            raise CannotRemakeError(why)
        args = [self._given_again(recipe, value, busy) for value in recipe.args]
        kwargs = {
            name: self._given_again(recipe, value, busy) for name, value in recipe.kwargs.items()
        }
        refs = refs_in(recipe.call(args, kwargs))
        left = recipe.use_up()
        for heir, _ in filter(None, (self._recipes.of(ref.hex()) for ref in refs)):
            heir.retries = left
        return refs

    def _given_again(self, recipe: Recipe, value: Any, busy: str) -> Any:
        if isinstance(value, Reference):
            return self._argument(recipe, value, busy)
        if isinstance(value, Frozen):
            refs = [self._nested(recipe, reference) for reference in value.references]
            return Argument(None, SerializedValue(value.data, value.metadata, refs))
        return value

    def _argument(self, recipe: Recipe, reference: Reference, busy: str) -> ray.ObjectRef:
        """The object that an argument names, or what stands in its place."""
        object_id = reference.object_id
        pinned = recipe.pins.get(object_id)
        if pinned is not None:
            return pinned
        entry = recipe.ingredients.get(object_id)
        if not _is_in_scope(object_id):
            if entry is None:
                raise CannotRemakeError(_gone(object_id))
            return self._make(entry[0], busy)[entry[1]]
        ref = ray_core.ref(object_id, reference.transport)
        while entry is not None and _is_lost(ref):
            # The call would find out by itself, but wait for it in the way of the one it needs.
            recipe, index = entry
            if recipe.successors is None:
                recipe.successors = self._make(recipe, busy)
            ref = recipe.successors[index]
            entry = self._recipes.of(ref.hex())
        return ref

    def _nested(self, recipe: Recipe, reference: Reference) -> ray.ObjectRef:
        """The object of a reference inside an argument: it cannot be replaced by another."""
        pinned = recipe.pins.get(reference.object_id)
        if pinned is not None:
            return pinned
        if not _is_in_scope(reference.object_id):
            raise CannotRemakeError(_gone(reference.object_id))
        return ray_core.ref(reference.object_id, reference.transport)

    def _on_remake(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: owner, an rdt-call thread."""
        outcome = self.remake(body["object_id"], bytes.fromhex(body["key"]), body["busy"])
        answer = {"state": outcome.state, "reason": outcome.reason}
        if outcome.ref is None:
            return answer
        object_id, owner, status = ray_core.export_ref(outcome.ref)
        return answer | {"object_id": object_id.hex(), "owner": owner.hex(), "status": status.hex()}


def call_method(
    actor_id: Any, method: str, options: dict[str, Any], args: list[Any], kwargs: dict[str, Any]
) -> Any:
    """Calls a method of an actor as before.

    A recipe holds no handle: it keeps no actor alive.
    """
    return getattr(ray_core.actor_handle(actor_id), method)._remote(args, kwargs, **options)


def refs_in(returned: Any) -> list[ray.ObjectRef]:
    """The references in what ``.remote()`` returned."""
    import ray

    candidates: Iterable[Any] = returned if isinstance(returned, list) else [returned]
    return [ref for ref in candidates if isinstance(ref, ray.ObjectRef)]


def borrow(answer: dict[str, Any]) -> ray.ObjectRef:
    """The reference that an owner's answer names. Runs on: consumer.

    The owner keeps the object while the lost one is in scope, so nothing has to tell it of this.
    """
    names = ("object_id", "owner", "status")
    ref: ray.ObjectRef = ray_core.import_ref(*(bytes.fromhex(answer[name]) for name in names))
    return ref


def _given(value: Any) -> Any:
    """An argument as the call is to be made with it."""
    import ray

    if isinstance(value, (ray.ObjectRef, Argument)):
        return value
    is_small = not isinstance(value, (str, bytes)) or len(value) <= _MOST_ARGUMENT_BYTES
    return value if type(value) in _IMMUTABLE and is_small else Argument(value)


def _is_own(ref: Any) -> bool:
    return ray_core.owner_of(ref) == ray_core.worker_id()


def _is_in_scope(object_id: str) -> bool:
    """Whether somebody refers to an object."""
    ref = ray_core.uncounted_ref(object_id)
    try:
        return ray_core.call_when_out_of_scope(ref, _ignore)
    except ValueError:  # not this process's own
        return ray_core.owner_of(ref) is not None


def _ignore(object_id: bytes) -> None:
    pass


def _is_lost(ref: Any) -> bool:
    """Whether an object of this owner's was made by a process that is dead."""
    head = _head_of(ref)
    return head is not None and not is_worker_alive(agent_id_of(head.address))


def _gone(object_id: str) -> str:
    return f"the call that made it took object {object_id}, which is gone; keep an ObjectRef to it"


def _head_of(ref: Any) -> Descriptor | None:
    """The descriptor of an object of this owner's, None if it has none or is not there yet."""
    if not ray_core.is_created(ref):
        return None
    try:
        _, metadata, _ = ray_core.get_objects([ref], _VALUE_MS)[0]
    except GetTimeoutError:
        return None
    return descriptor.decode(metadata) if descriptor.is_rdt(metadata) else None
