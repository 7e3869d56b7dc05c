"""The owner of RDT objects: records them, tells producers to free them, submits their calls."""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ray._common.ray_option_utils import task_options

import ray
from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.descriptor import Descriptor, Location
from ray.experimental.rdt.common.real_threads import Lock
from ray.experimental.rdt.owner import object_directory
from ray.experimental.rdt.owner.argument_pins import ArgumentPins
from ray.experimental.rdt.owner.reconstruction import Reconstruction, call_method, refs_in
from ray.experimental.rdt.owner.streams import Stream, TakenStreams
from ray.experimental.rdt.producer.streams import DynamicCall
from ray.experimental.rdt.rpc import process_directory, protocol
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.user import registered

#: The GCS is asked again for the address of an unknown actor after this time.
_LOOK_UP_AGAIN_S = 1.0


@dataclass(frozen=True)
class OwnerServices:
    """Services of one session that an owner uses."""

    session: Session
    streams: TakenStreams
    hints: HintSender


class Owner:
    """The owner side of one process.

    Args:
        services: Returns the services of this process's session; begins a session if there is none.
        peek: Returns the services if a session has begun, else None.
    """

    def __init__(
        self, services: Callable[[], OwnerServices], peek: Callable[[], OwnerServices | None]
    ):
        self._services = services
        self._peek = peek
        self._directory = object_directory.ObjectDirectory()
        self._lock = Lock()
        self._small_to_claim: deque[object_directory.Own] = deque()
        self._unneeded_handles: deque[Any] = deque()
        self._pins = ArgumentPins()
        self.reconstruction = Reconstruction(self.find)

    # Calls.

    def submit(
        self,
        invocation: Callable[[Any, Any], Any],
        args: Any,
        kwargs: Any,
        actor: Any,
        transport: str,
        again: tuple[str, dict[str, Any]] | None = None,
    ) -> Any:
        """Submit an actor task whose returns are RDT objects.

        Runs on: owner, the thread that called ``.remote()``.

        Args:
            again: If the call may be retried: the method's name and the call's options.
        """
        # The core's io thread carries instructions out and must not wait for a session to begin.
        self._services()
        self._unneeded_handles.clear()
        registered.refresh(transport)
        recipe = None
        if again:
            call = functools.partial(call_method, actor._actor_id, *again)
            retries = again[1]["max_task_retries"]
            recipe, args, kwargs = self.reconstruction.begin(
                call, retries, args, kwargs, actor._actor_id.hex()
            )
        producer, handle = actor._actor_id.binary(), _handle_to_keep(actor)
        with self._lock:
            submit = self._directory.begin_submit()
        try:
            returned = invocation(args, kwargs)
            refs = refs_in(returned)
            with self._lock:
                for ref in refs:
                    self._directory.submitted(ref.hex(), producer, transport, handle)
            if recipe is not None:
                self.reconstruction.keep(recipe, refs)
            return returned
        finally:
            self._apply(self._directory.end_submit, submit)

    def submit_task(
        self,
        invocation: Callable[[Any, Any], Any],
        again: Callable[[Any, Any], Any],
        args: Any,
        kwargs: Any,
        retries: int | None,
    ) -> Any:
        """Submit a normal task whose returns are RDT objects.

        Runs on: owner, the thread that called ``.remote()``.

        Args:
            again: Submits it another time, in the same way.
            retries: How often it may run again, None for Ray's default.
        """
        if retries == 0:
            return invocation(args, kwargs)
        self._services()
        recipe, args, kwargs = self.reconstruction.begin(again, retries or 0, args, kwargs)
        returned = invocation(args, kwargs)
        if retries is None:
            # Ray reads its default from the environment when it submits the first task.
            recipe.retries = task_options["max_retries"].default_value
        if recipe.retries:
            self.reconstruction.keep(recipe, refs_in(returned))
        return returned

    def open_stream(
        self, transport: str, num_returns: Any, objects_per_yield: int | None, retry_exceptions: Any
    ) -> Stream | DynamicCall:
        """Prepare a call of a generator: ``num_returns`` is "streaming" or "dynamic".

        Runs on: owner, the thread that called ``.remote()``.
        """
        registered.refresh(transport)
        if num_returns == "dynamic":
            return DynamicCall(transport, retry_exceptions)
        return self._services().streams.begin(transport, objects_per_yield or 1)

    def note_arguments(self, actor: Any, args: Iterable[Any]) -> None:
        """Note which RDT objects are passed to an actor.

        Runs on: owner, the thread that called ``.remote()``, for every actor call.
        """
        if not len(self._directory):
            return
        for argument in args:
            if isinstance(argument, ray.ObjectRef):
                actor_id = actor._actor_id.binary()
                self._apply(self._directory.passed_to, argument.hex(), actor_id)

    def hold_arguments(self, args: Iterable[Any], returned: Any) -> None:
        """Keep a normal task's RDT arguments in scope until the task has ended.

        Runs on: the thread that submits the task. See ``argument_pins``.
        """
        held = [
            argument
            for argument in args
            if isinstance(argument, ray.ObjectRef) and argument.tensor_transport() is not None
        ]
        if held:
            self._pins.hold(held, returned)

    # Events of objects.

    def record_put(self, object_id: str, transport: str, location: Location) -> None:
        """Record an object that this process has put. Runs on: owner, the user's thread."""
        with self._lock:
            self._directory.submitted(object_id, ray_core.actor_id(), transport)
            self._directory.created(object_id, location)

    def adopt(self, ref: Any, descriptor: Descriptor, actor: Any) -> None:
        """Record an item of a stream that this process has put again as its own object.

        Runs on: owner, the thread that took the item.

        Args:
            actor: The handle of the actor that made it, None if it was a task.
        """
        location = Location(descriptor.address, descriptor.key, descriptor.nbytes)
        handle = _handle_to_keep(actor)
        with self._lock:
            self._directory.submitted(ref.hex(), None, descriptor.transport, handle)
        self._apply(self._directory.created, ref.hex(), location)
        # Also of a small one at once: a stream that closes frees the objects without owner.
        self._services().session.agent.own(location.address, location.key)

    def created(self, object_id: str, location: Location | None) -> None:
        """Note the reply of the task that made an object.

        Runs on: owner, core io thread. Returns at once.
        """
        self._apply(self._directory.created, object_id, location)

    def out_of_scope(self, object_id: str) -> None:
        """Note that the last reference to an object is gone.

        Runs on: owner, core io thread. Returns at once.
        """
        self._apply(self._directory.out_of_scope, object_id)

    # Questions.

    def row(self, object_id: str) -> object_directory.Row | None:
        """Return this owner's record of an object, None if it does not own the object."""
        return self._directory.row(object_id)

    def may_own(self, object_id: str, key: bytes) -> bool:
        """Tell whether this process owns an object's copy, or may own it later."""
        with self._lock:
            return self._directory.may_own(object_id, key)

    def find(self, key: bytes) -> str:
        """Return the id (hex) of the object whose copy has this key, "" if none has."""
        with self._lock:
            return self._directory.find(key)

    def stats(self) -> dict[str, int]:
        return {
            "directory_rows": len(self._directory),
            "held_arguments": len(self._pins),
            "recipes": len(self.reconstruction),
        }

    def _apply(
        self, event: Callable[..., Sequence[object_directory.Instruction]], *args: Any
    ) -> None:
        """Report an event to the directory; carry out its instructions."""
        with self._lock:
            instructions = event(*args)
        services = self._peek() if instructions else None
        for instruction in instructions:
            if isinstance(instruction, object_directory.ReleaseHandle):
                self._release_handle(instruction, services)
            elif services is None:
                pass  # Ray is shutting down
            elif isinstance(instruction, object_directory.Free):
                location = instruction.location
                services.session.agent.free(location.address, location.key)
            elif isinstance(instruction, object_directory.Own):
                self._claim(instruction, services)
            elif isinstance(instruction, object_directory.Hint):
                services.hints.send(instruction.actor_id, instruction.location)
            elif isinstance(instruction, object_directory.WarnShared):
                _warn_shared(instruction.object_id)

    def _release_handle(
        self, instruction: object_directory.ReleaseHandle, services: OwnerServices | None
    ) -> None:
        """Release an actor's handle on another thread, because that runs code of Ray.

        The handle of an object that is still in use may wait for the next submit or tick.
        """
        self._unneeded_handles.append(instruction.take())
        if instruction.is_last and services is not None:
            services.session.run_in_background(self._unneeded_handles.clear)

    def _claim(self, instruction: object_directory.Own, services: OwnerServices) -> None:
        """Tell a producer that this process owns an object; of a small one at the next tick.

        Most small objects do not live that long, and the message costs more than their transfer.
        """
        location = instruction.location
        if location.nbytes <= settings().eager_bytes:
            self._small_to_claim.append(instruction)
        else:
            services.session.agent.own(location.address, location.key)

    def on_tick(self) -> None:
        """Send delayed claims and release handles. Runs on: owner, the reaper thread."""
        services = self._peek()
        while services is not None and self._small_to_claim:
            small = self._small_to_claim.popleft()
            if self.may_own(small.object_id, small.location.key):
                services.session.agent.own(small.location.address, small.location.key)
        self._unneeded_handles.clear()

    def close(self) -> None:
        """Free all objects. Runs on: the thread that shuts Ray down, before the session ends."""
        self._pins.clear()
        self.reconstruction.clear()
        self._apply(self._directory.close)
        self._small_to_claim.clear()
        self._unneeded_handles.clear()


def _handle_to_keep(actor: Any) -> Any:
    """Return the handle that keeps an object's producer alive; None for this process or a task."""
    return None if actor is None or actor._actor_id.binary() == ray_core.actor_id() else actor


def _warn_shared(object_id: str) -> None:
    warnings.warn(
        f"RDT ObjectRef({object_id}) has been passed to its producer and to other processes. "
        "The producer gets its own tensors, not copies: in-place changes by it are visible to "
        "later consumers.",
        UserWarning,
        stacklevel=_levels_to_user(),
    )


def _levels_to_user() -> int:
    """Return the stack level of the user's line, for a warning of the caller."""
    ours = os.path.dirname(ray.__file__) + os.sep
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    return level


class HintSender:
    """Sends the hints of one owner: which object the next task of an actor will fetch.

    A hint only saves time. If it is lost, late or refused, the fetch pulls the object itself.

    Runs on: the thread that submits a call, and the core io thread. Never blocks.
    """

    def __init__(self, session: Session):
        self._session = session
        # By actor: the address of its agent, and when the GCS was last asked for it.
        self._addresses: dict[bytes, tuple[bytes | None, float]] = {}

    def send(self, actor_id: bytes, location: Location) -> None:
        """Hint an object to an actor whose agent is known; otherwise look up the agent."""
        if location.regions is None:
            return
        address, asked = self._addresses.get(actor_id, (None, -_LOOK_UP_AGAIN_S))
        if address == location.address:
            return
        if address is not None:
            regions = list(location.regions)
            body = protocol.Hint(key=location.key, address=location.address, regions=regions)
            self._session.send_oneway(address, protocol.HINT, body, idempotent=False)
        elif time.monotonic() - asked >= _LOOK_UP_AGAIN_S:
            self._addresses[actor_id] = (None, time.monotonic())
            self._session.run_in_background(self._look_up, actor_id)

    def _look_up(self, actor_id: bytes) -> None:
        """Runs on: an rdt-call thread."""
        found = process_directory.find_actor(actor_id)
        self._addresses[actor_id] = (found, time.monotonic())
