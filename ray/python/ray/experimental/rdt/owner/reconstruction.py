"""Reconstructs objects that were lost with their producer, at their owner.

Ray's core forgets a task once it has a reply that contains the value, and every RDT value is
contained in the reply. The owner therefore keeps a recipe of each call that Ray may retry.

Runs on: owner. The thread that called ``.remote()`` keeps recipes. The thread that fetches uses
them, or an rdt-call thread for other processes. Ray's thread for references that went out of scope
drops them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.exceptions import GetTimeoutError

from ray.experimental.rdt.common import descriptor, ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.failures import raise_if_interrupt
from ray.experimental.rdt.owner import recipes
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.process_directory import is_worker_alive
from ray.experimental.rdt.rpc.session import Session, agent_id_of

if TYPE_CHECKING:
    import ray

#: Time to read a value that this process owns. The value has been created already.
_VALUE_MS = 1000

#: The first characters of the object id that stands for an actor's handle.
_HANDLE_PREFIX = "ff" * 8

_DEADLOCK = (
    "the actor that runs the call, or one that the call depends on, waits for the object itself; "
    "let another process get it first"
)

RECONSTRUCTED, REFUSED, ALIVE, NOT_OWNER = "reconstructed", "refused", "alive", "not owner"


@dataclass(frozen=True)
class Outcome:
    """An owner's answer to a request for a lost object.

    Attributes:
        state: RECONSTRUCTED: another object replaces it. REFUSED: no object will replace it. ALIVE:
            Ray does not report its producer as dead. NOT_OWNER: this process does not own it.
        ref: RECONSTRUCTED: the object to take.
        reason: REFUSED: the reason.
    """

    state: str
    ref: Any = None
    reason: str = ""


class CannotReconstructError(Exception):
    """Raised if a call cannot be repeated; the text is the reason."""


class Reconstruction:
    """Keeps and uses the recipes of this process. Thread-safe.

    Args:
        find: Returns the id (hex) of the object of this process that has this key, "" if none has.
    """

    def __init__(self, find: Callable[[bytes], str]) -> None:
        self._find = find
        self._recipes = recipes.Recipes()
        self._lock = threading.Lock()
        # Held while calls are repeated, so that no call is repeated twice.
        self._repeating = threading.Lock()

    def __len__(self) -> int:
        return len(self._recipes)

    def serve(self, session: Session) -> None:
        """Answer the requests of other processes for lost objects."""
        session.serve(protocol.RECONSTRUCT, self._on_reconstruct)

    def begin(
        self, call: Callable[[Any, Any], Any], retries: int, args: Any, kwargs: Any, actor: str = ""
    ) -> tuple[recipes.Recipe, list[Any], dict[str, Any]]:
        """Begin the recipe of a call.

        Args:
            retries: How often it may be repeated, -1 for no limit.
            actor: The id (hex) of the actor whose method it is, "" for a normal task.

        Returns:
            The recipe, and the arguments for the call. ``keep`` follows.
        """
        given = [_prepare(value) for value in args or ()]
        named = {name: _prepare(value) for name, value in (kwargs or {}).items()}
        return recipes.Recipe(call, given, named, retries, actor), given, named

    def keep(self, recipe: recipes.Recipe, refs: Sequence[Any]) -> None:
        """Keep a recipe for the objects that its call returned."""
        recipe.args = [self._record(recipe, value) for value in recipe.args]
        recipe.kwargs = {name: self._record(recipe, value) for name, value in recipe.kwargs.items()}
        with self._lock:
            self._recipes.add([ref.hex() for ref in refs], recipe)
        for ref in refs:
            if not ray_core.call_when_out_of_scope(ref, self._on_out_of_scope):
                self._on_out_of_scope(ref.binary())

    def _record(self, recipe: recipes.Recipe, value: Any) -> Any:
        """Return an argument as the recipe keeps it."""
        if isinstance(value, recipes.Argument):
            if value.serialized is None:
                recipe.unavailable_reason = (
                    "the call that returned it had an argument of more than "
                    f"{recipes.MAX_ARGUMENT_BYTES} bytes, "
                    "which is not kept; pass an ObjectRef of it"
                )
                return None
            made = value.serialized
            nested = [self._record_ref(recipe, ref) for ref in made.contained_object_refs]
            return recipes.SerializedArgument(made.data, made.metadata, tuple(nested))
        if isinstance(value, recipes.IMMUTABLE):
            return value
        return self._record_ref(recipe, value)

    def _record_ref(self, recipe: recipes.Recipe, ref: Any) -> recipes.Reference:
        object_id, transport = ref.hex(), ref.tensor_transport()
        entry = self._recipes.of(object_id)
        if entry is not None:
            recipe.depend_on(object_id, entry)
        elif not object_id.startswith(_HANDLE_PREFIX) and not (transport and _is_own(ref)):
            recipe.pins[object_id] = ref
        return recipes.Reference(object_id, transport)

    def _on_out_of_scope(self, object_id: bytes) -> None:
        """Runs on: Ray's thread for references that went out of scope."""
        with self._lock:
            garbage = self._recipes.drop(object_id.hex())
        del garbage

    def clear(self) -> None:
        """Forget everything. Runs on: the thread that shuts Ray down."""
        with self._lock:
            garbage = self._recipes.clear()
        del garbage

    def reconstruct(self, object_id: str, key: bytes, waiting_actor: str = "") -> Outcome:
        """Reconstruct a lost object, once for all consumers.

        Blocks for an answer of Ray's GCS.

        Args:
            object_id: Its id in hex; "" if the consumer received the value without an id.
            key: The key of the lost copy. It proves that the consumer had the value.
            waiting_actor: The id (hex) of an actor that runs nothing else until it has the object,
                or "".
        """
        object_id = object_id or self._find(key)
        if not object_id or not _is_own(ray_core.uncounted_ref(object_id)):
            return Outcome(NOT_OWNER)
        try:
            return self._reconstruct(object_id, key, waiting_actor)
        except CannotReconstructError as error:
            return Outcome(REFUSED, reason=str(error))
        except Exception as error:  # of Ray, or of the user's code that a call runs
            raise_if_interrupt(error)
            return Outcome(REFUSED, reason=f"{type(error).__name__}: {error}")

    def _reconstruct(self, object_id: str, key: bytes, waiting_actor: str) -> Outcome:
        ref = ray_core.ref(object_id)
        head = _descriptor_of(ref)
        if head is None or head.key != key:
            return Outcome(RECONSTRUCTED, ref)  # a newer copy has replaced the lost one
        entry = self._recipes.of(object_id)
        if entry is None:
            raise CannotReconstructError("its call may not be retried")
        if ray_core.reconstruction_is_disabled():
            raise CannotReconstructError("the job disables object reconstruction")
        if entry[0].replacements is None and is_worker_alive(agent_id_of(head.address)):
            return Outcome(ALIVE)
        return Outcome(RECONSTRUCTED, self._replacement(*entry, waiting_actor))

    def _replacement(self, recipe: recipes.Recipe, index: int, waiting_actor: str) -> ray.ObjectRef:
        """Return the object that replaces one of a call's objects."""
        with self._repeating:
            if recipe.replacements is None:
                recipe.replacements = self._repeat(recipe, waiting_actor)
            ref = recipe.replacements[index]
        if ref is None:
            raise CannotReconstructError("no reference to it is left")
        if recipe.runs_on(waiting_actor) and not ray_core.is_created(ref):
            raise CannotReconstructError(_DEADLOCK)
        return ref

    def _repeat(self, recipe: recipes.Recipe, waiting_actor: str) -> list[Any]:
        """Repeat a call; return the references that it returns."""
        reason = recipe.refusal() or (_DEADLOCK if recipe.runs_on(waiting_actor) else "")
        if reason:
            raise CannotReconstructError(reason)
        args = [self._restore(recipe, value, waiting_actor) for value in recipe.args]
        kwargs = {
            name: self._restore(recipe, value, waiting_actor)
            for name, value in recipe.kwargs.items()
        }
        refs = refs_in(recipe.call(args, kwargs))
        left = recipe.use_retry()
        for entry in (self._recipes.of(ref.hex()) for ref in refs):
            if entry is not None:
                entry[0].retries = left
        return refs

    def _restore(self, recipe: recipes.Recipe, value: Any, waiting_actor: str) -> Any:
        """Return an argument for the repeated call."""
        if isinstance(value, recipes.Reference):
            entry = recipe.dependencies.get(value.object_id)
            return self._restore_ref(recipe, value, entry, waiting_actor)
        if isinstance(value, recipes.SerializedArgument):
            # No other object can replace a reference inside an argument.
            refs = [self._restore_ref(recipe, each, None, "") for each in value.references]
            return recipes.Argument(None, recipes.SerializedValue(value.data, value.metadata, refs))
        return value

    def _restore_ref(
        self,
        recipe: recipes.Recipe,
        reference: recipes.Reference,
        entry: tuple[recipes.Recipe, int] | None,
        waiting_actor: str,
    ) -> ray.ObjectRef:
        """Return the object of an argument, or the object that replaces it.

        ``entry`` names the call that can be repeated for a replacement; None if there is none.
        """
        object_id = reference.object_id
        pinned = recipe.pins.get(object_id)
        if pinned is not None:
            return pinned
        if not _is_in_scope(object_id):
            if entry is None:
                raise CannotReconstructError(
                    f"the call that returned it took object {object_id}, which is out of scope; "
                    "keep an ObjectRef to it"
                )
            return self._repeat(entry[0], waiting_actor)[entry[1]]
        ref = ray_core.ref(object_id, reference.transport)
        while entry is not None and _is_lost(ref):
            # The repeated call would find the loss itself. But it would then wait for the argument
            # on the actor that may have to reconstruct it.
            recipe, index = entry
            if recipe.replacements is None:
                recipe.replacements = self._repeat(recipe, waiting_actor)
            ref = recipe.replacements[index]
            entry = self._recipes.of(ref.hex())
        return ref

    def _on_reconstruct(self, peer_id: bytes, body: protocol.Reconstruct) -> dict[str, Any]:
        """Runs on: owner, an rdt-call thread."""
        outcome = self.reconstruct(body["object_id"], body["key"], body["waiting_actor"])
        answer = {"state": outcome.state, "reason": outcome.reason}
        if outcome.ref is None:
            return answer
        object_id, owner, status = ray_core.export_ref(outcome.ref)
        return answer | {"object_id": object_id, "owner": owner, "status": status}


def call_method(
    actor_id: Any, method: str, options: dict[str, Any], args: list[Any], kwargs: dict[str, Any]
) -> Any:
    """Call a method of an actor by the actor's id.

    A recipe holds no handle, so that it keeps no actor alive.
    """
    return getattr(ray_core.actor_handle(actor_id), method)._remote(args, kwargs, **options)


def refs_in(returned: Any) -> list[ray.ObjectRef]:
    """Return the references in the result of ``.remote()``."""
    import ray

    candidates: Iterable[Any] = returned if isinstance(returned, list) else [returned]
    return [ref for ref in candidates if isinstance(ref, ray.ObjectRef)]


def borrow(answer: dict[str, Any]) -> ray.ObjectRef:
    """Return the reference in an owner's answer. Runs on: consumer.

    The owner keeps the object as long as the lost one is in scope.
    """
    names = ("object_id", "owner", "status")
    ref: ray.ObjectRef = ray_core.import_ref(*(answer[name] for name in names))
    return ref


def _prepare(value: Any) -> Any:
    """Return an argument as it is passed to the call."""
    import ray

    if isinstance(value, (ray.ObjectRef, recipes.Argument)):
        return value
    is_small = not isinstance(value, (str, bytes)) or len(value) <= recipes.MAX_ARGUMENT_BYTES
    return value if type(value) in recipes.IMMUTABLE and is_small else recipes.Argument(value)


def _is_own(ref: Any) -> bool:
    return ray_core.owner_of(ref) == ray_core.worker_id()


def _is_in_scope(object_id: str) -> bool:
    ref = ray_core.uncounted_ref(object_id)
    try:
        return ray_core.call_when_out_of_scope(ref, lambda object_id: None)
    except ValueError:  # another process owns it
        return ray_core.owner_of(ref) is not None


def _is_lost(ref: Any) -> bool:
    """Tell whether the producer of an object that this process owns is dead."""
    head = _descriptor_of(ref)
    return head is not None and not is_worker_alive(agent_id_of(head.address))


def _descriptor_of(ref: Any) -> descriptor.Descriptor | None:
    """Return the descriptor of an own object, None if it has none or is not created yet."""
    if not ray_core.is_created(ref):
        return None
    try:
        _, metadata, _ = ray_core.get_objects([ref], _VALUE_MS)[0]
    except GetTimeoutError:
        return None
    return descriptor.decode(metadata) if descriptor.is_rdt(metadata) else None
