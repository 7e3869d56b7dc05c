"""What the rest of Ray calls. One object per process: ``global_worker.rdt_manager``.

It joins the parts: capture and store at the producer, the directory at the owner, fetch at the
consumer. Making it starts nothing; the session begins when something has to be stored or moved.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from ray._common.ray_option_utils import task_options
from ray._private import ray_constants
from ray.exceptions import RayTaskError

from ray.experimental.rdt.common import descriptor, ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.common.thread_role import must_not_block, without_turn
from ray.experimental.rdt.consumer import argument_context as arguments
from ray.experimental.rdt.consumer import targets
from ray.experimental.rdt.consumer.deferred import Deferred, Puller
from ray.experimental.rdt.consumer.fetcher import Arrival, Fetcher, Request, as_fetch_error
from ray.experimental.rdt.consumer.prefetcher import Prefetcher
from ray.experimental.rdt.consumer.recovery import Remakes, Result
from ray.experimental.rdt.consumer.targets import Targets
from ray.experimental.rdt.groups import service as groups
from ray.experimental.rdt.producer.dynamic_generator import DynamicCall
from ray.experimental.rdt.observe.explainer import Explainer
from ray.experimental.rdt.observe.metrics import Gauges
from ray.experimental.rdt.owner.argument_pins import ArgumentHolder
from ray.experimental.rdt.owner.object_directory import (
    Directory,
    Free,
    Hint,
    Instruction,
    LetGo,
    Location,
    Own,
    Row,
    WarnShared,
)
from ray.experimental.rdt.owner.prefetch_hints import HintSender, regions_to_hint
from ray.experimental.rdt.owner.recipes import Lineage, call_method, refs_in
from ray.experimental.rdt.producer.admission import Room
from ray.experimental.rdt.producer.orphan_collector import ClaimWatch
from ray.experimental.rdt.producer.owner_monitor import OwnerWatch, publish_worker
from ray.experimental.rdt.producer.snapshots import Snapshots
from ray.experimental.rdt.producer.streams import ProducedStreams, Stream, StreamSpec, TakenStreams
from ray.experimental.rdt.producer.tensor_store import Store, StoredObject
from ray.experimental.rdt.producer.transport_server import Server
from ray.experimental.rdt.rpc import process_directory, session
from ray.experimental.rdt.serialization import capture
from ray.experimental.rdt.serialization.capture import Captured, Skeleton, Wanted
from ray.experimental.rdt.session_services import Links
from ray.experimental.rdt.transports.base import Shipment, Transport, TransportUnavailable
from ray.experimental.rdt.transports.registry import Transports
from ray.experimental.rdt.transports.selection import AutoTransportPolicy
from ray.experimental.rdt.transports.user import registered
from ray.experimental.rdt.transports.user.registered import BUILT_IN_TRANSPORTS
from ray.experimental.rdt.transports.user.transport import UserTransport, own_actor_handle

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.transports.nixl.transport import NixlTransport

logger = logging.getLogger("ray.rdt")

#: Of values that are no RDT objects, and no errors.
_PLAIN_METADATA = (
    ray_constants.OBJECT_METADATA_TYPE_PYTHON,
    ray_constants.OBJECT_METADATA_TYPE_RAW,
    ray_constants.OBJECT_METADATA_TYPE_CROSS_LANGUAGE,
)


@dataclass(frozen=True)
class Outgoing:
    """A value between its serialization and its storing. False if it has no tensors."""

    captured: Captured
    head: Descriptor | None

    def __bool__(self) -> bool:
        return bool(self.captured)


class RDTManager:
    """RDT's face to Ray's worker.

    Attributes:
        store: What this process produced.
        rdt_store: The same by object id, as Ray's own tests use it.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.rdt_store = StoreByObjectId(self)
        self._room = Room(self.store)
        self._snapshots = Snapshots(self._room, self._find_nixl)
        self._directory = Directory()
        self._directory_lock = threading.Lock()
        self._small_to_own: deque[Own] = deque()
        self._handles_to_let_go: deque[Any] = deque()
        self._holder = ArgumentHolder()
        self._lineage = Lineage(self._find)
        self._fetcher = Fetcher(self.store, self._links)
        self._remakes = Remakes(self._lineage, self._fetcher, self._session)
        self._targets = Targets()
        self._puller = Puller()
        self._links_lock = threading.Lock()
        self._known_links: Links | None = None

    # Producer.

    def serialize(self, context: Any, value: Any, transport: str) -> tuple[Any, Outgoing]:
        """Serializes what a task returned or a user put.

        Runs on: producer, the thread of the task.

        Args:
            context: The worker's ``SerializationContext``.
            value: The value.
            transport: The transport's name, any case.

        Returns:
            The serialized object for Ray, and what ``keep`` takes once the object has an id.
        """
        if isinstance(value, (bytes, RayTaskError)):
            return context.serialize(value), Outgoing(Captured(), None)
        taken = self._take(context, value, transport)
        if taken is None:
            return context.serialize(value), Outgoing(Captured(), None)
        skeleton, captured, shipment = taken
        head = self._describe(captured, transport) if captured else None
        return capture.pack(skeleton, captured, head, shipment), Outgoing(captured, head)

    def _take(
        self, context: Any, value: Any, transport: str
    ) -> tuple[Skeleton, Captured, bytes] | None:
        """Takes the tensors out; the last is what a user's transport sends along, else b"".

        None where there is no room for them: the value is to go as a plain one.
        """
        users = self.users_transport(transport)
        skeleton, captured = capture.take(context, value, _wanted(users))
        if not self._room.is_given(captured):
            return None
        if transport.upper() == "NIXL" and not self._snapshots.take(captured):
            return None
        if users is None or not captured:
            return skeleton, captured, b""
        captured.parcel = parcel = users.describe(capture.carriers(captured))
        shipment = Shipment(
            parcel.object_id,
            parcel.metadata,
            len(parcel.tensors),
            own_actor_handle(),
            bool(captured.addresses),
        )
        try:
            return skeleton, captured, capture.pickle_shipment(context, skeleton, shipment)
        except BaseException:
            users.withdraw(parcel)
            raise

    def users_transport(self, transport: str) -> UserTransport | None:
        """The transport of this name if a user wrote it. Raises RDTError if it cannot be had."""
        if transport.upper() in BUILT_IN_TRANSPORTS:
            return None
        registered.refresh(transport.upper())
        try:
            return self._links().transports.users(transport.lower())
        except TransportUnavailable as error:
            raise RDTError(str(error)) from error

    def keep(self, object_id: str, outgoing: Outgoing) -> bytes:
        """Stores a value's tensors until the owner frees them.

        Runs on: producer, the thread of the task.

        Returns:
            What the owner's ``set_tensor_transport_metadata_...`` gets, pickled.
        """
        if outgoing.head is None:
            return pickle.dumps(None)
        self._store(object_id, outgoing.captured, outgoing.head)
        self._links().claims.add(object_id, outgoing.head.key)
        return pickle.dumps(_location(outgoing.head, outgoing.captured))

    def put_object(self, ref: Any, outgoing: Outgoing) -> None:
        """Stores and records what ``ray.put`` made. Runs on: producer, the user's thread."""
        if outgoing.head is None:
            return
        self._store(ref.hex(), outgoing.captured, outgoing.head)
        with self._directory_lock:
            self._directory.submitted(ref.hex(), ray_core.actor_id(), outgoing.head.transport)
            self._directory.created(ref.hex(), _location(outgoing.head, outgoing.captured))

    def serialize_guarded(self, context: Any, value: Any, transport: str, origin: bytes) -> Any:
        """Serializes a value that the core does not flag; see ``guarded``.

        Runs on: producer, the thread of the task.

        Args:
            context: The worker's ``SerializationContext``.
            value: The value.
            transport: The transport's name, any case.
            origin: The id of the object that the value is for.
        """
        if isinstance(value, (bytes, RayTaskError)):
            return context.serialize(value)
        taken = self._take(context, value, transport)
        if taken is None:
            return context.serialize(value)
        skeleton, captured, shipment = taken
        if not captured:
            return capture.pack(skeleton, captured, None)
        outgoing = Outgoing(captured, self._describe(captured, transport, origin))
        guard = self._put_guard(context, transport)
        self.put_object(guard, outgoing)
        skeleton.contained_refs.add(guard)
        return capture.pack(skeleton, captured, outgoing.head, shipment)

    def serialize_item(self, context: Any, value: Any, spec: StreamSpec) -> Any:
        """Serializes an item of a generator; see ``streams``.

        Runs on: producer, the thread that reports the item.
        """
        if isinstance(value, (bytes, RayTaskError)):
            return context.serialize(value)
        taken = self._take(context, value, spec.transport)
        if taken is None:
            return context.serialize(value)
        skeleton, captured, shipment = taken
        if not captured:
            return capture.pack(skeleton, captured, None)
        head = self._describe(captured, spec.transport)
        if not head.is_eager:
            self._store(f"an item of stream {spec.stream}", captured, head)
            self._links().produced.add(spec.stream, head.key)
        return capture.pack(skeleton, captured, head, shipment)

    def produced_streams(self) -> ProducedStreams:
        """The streams that this process makes items for."""
        return self._links().produced

    def _put_guard(self, context: Any, transport: str) -> Any:
        guard = ray_core.put_object(context.serialize(b""), transport)
        # Tells the core that the guard leaves this process inside another object.
        ray_core.export_ref(guard)
        return guard

    def _describe(self, captured: Captured, transport: str, origin: bytes = b"") -> Descriptor:
        nbytes = captured.table.nbytes
        return Descriptor(
            key=os.urandom(descriptor.KEY_BYTES),
            nbytes=nbytes,
            producer=_own_id(),
            transport=transport.lower(),
            address=self._session().address,
            is_eager=captured.parcel is None
            and nbytes <= settings().eager_bytes
            and not captured.table.devices,
            is_user_defined=captured.parcel is not None,
            origin=origin,
        )

    def _store(self, object_id: str, captured: Captured, head: Descriptor) -> StoredObject:
        links = self._links()
        stored = self.store.add(head.key, object_id, captured, head.transport)
        links.session.agent.register(
            head.key, *captured.host_spans(), stored.token, captured.guards
        )
        return stored

    # Owner.

    def submit(
        self,
        invocation: Callable[[Any, Any], Any],
        args: Any,
        kwargs: Any,
        actor: Any,
        transport: str,
        again: tuple[str, dict[str, Any]] | None = None,
    ) -> Any:
        """Submits a task whose returns are RDT objects.

        Runs on: owner, the thread that called ``.remote()``.

        Args:
            invocation: Submits it.
            args: Its arguments.
            kwargs: The same by keyword.
            actor: The handle of the actor whose method is called.
            transport: The transport that the user named.
            again: If the call may be retried: the method's name and the call's options.

        Returns:
            What ``invocation(args, kwargs)`` returns.
        """
        # Before the core's io thread has to carry anything out: a session takes a while to begin.
        self.begin()
        self._handles_to_let_go.clear()
        registered.refresh(transport)
        recipe = None
        if again:
            call = functools.partial(call_method, actor._actor_id, *again)
            retries = again[1]["max_task_retries"]
            recipe, args, kwargs = self._lineage.begin(
                call, retries, args, kwargs, actor._actor_id.hex()
            )
        producer, handle = actor._actor_id.binary(), _handle_to_keep(actor)
        with self._directory_lock:
            submit = self._directory.begin_submit()
        try:
            returned = invocation(args, kwargs)
            refs = refs_in(returned)
            with self._directory_lock:
                for ref in refs:
                    self._directory.submitted(ref.hex(), producer, transport, handle)
            if recipe is not None:
                self._lineage.keep(recipe, refs)
            return returned
        finally:
            with self._directory_lock:
                frees = self._directory.end_submit(submit)
            self._carry_out(frees)

    def submit_task(
        self,
        invocation: Callable[[Any, Any], Any],
        again: Callable[[Any, Any], Any],
        args: Any,
        kwargs: Any,
        retries: int | None,
    ) -> Any:
        """Submits a normal task whose returns are RDT objects.

        Runs on: owner, the thread that called ``.remote()``.

        Args:
            invocation: Submits it.
            again: Submits it another time, in the same way.
            args: Its arguments.
            kwargs: The same by keyword.
            retries: How often it may run again, None for Ray's default.
        """
        if retries == 0:
            return invocation(args, kwargs)
        self.begin()
        recipe, args, kwargs = self._lineage.begin(again, retries or 0, args, kwargs)
        returned = invocation(args, kwargs)
        if retries is None:
            # The submit has just taken it out of the environment.
            recipe.retries = task_options["max_retries"].default_value
        if recipe.retries:
            self._lineage.keep(recipe, refs_in(returned))
        return returned

    def open_stream(
        self,
        transport: str,
        num_returns: Any,
        objects_per_yield: int | None = None,
        retry_exceptions: Any = None,
    ) -> Stream | DynamicCall:
        """For a call of a generator: ``num_returns`` is "streaming" or "dynamic".

        Runs on: owner, the thread that called ``.remote()``.
        """
        registered.refresh(transport)
        if num_returns == "dynamic":
            return DynamicCall(transport, retry_exceptions)
        return self._links().taken.begin(transport, objects_per_yield or 1)

    def adopt(self, ref: Any, head: Descriptor, actor: Any) -> None:
        """Records an item of a stream that this process has put again as its own object.

        Runs on: owner, the thread that took the item.

        Args:
            ref: The object.
            head: Where its tensors are.
            actor: The handle of the actor that made it, None if it was a task.
        """
        location = Location(head.address, head.key, head.nbytes)
        handle = _handle_to_keep(actor)
        with self._directory_lock:
            self._directory.submitted(ref.hex(), None, head.transport, handle)
            todo = self._directory.created(ref.hex(), location)
        self._carry_out(todo)
        # Also of a small one at once: a stream that closes frees what nobody owns.
        self._session().agent.own(location.address, location.key)

    def note_arguments(self, actor: Any, args: Iterable[Any]) -> None:
        """Notes which RDT objects go to an actor.

        Runs on: owner, the thread that called ``.remote()``, for every actor call.
        """
        if not len(self._directory):
            return
        import ray

        for argument in args:
            if isinstance(argument, ray.ObjectRef):
                with self._directory_lock:
                    todo = self._directory.passed_to(argument.hex(), actor._actor_id.binary())
                self._carry_out(todo)

    def hold_arguments(self, args: Iterable[Any], returned: Any) -> None:
        """Keeps a normal task's RDT arguments alive until the task has ended; see ``holder``.

        Runs on: whoever submits the task.
        """
        import ray

        held = [
            argument
            for argument in args
            if isinstance(argument, ray.ObjectRef) and argument.tensor_transport() is not None
        ]
        if held:
            self._holder.hold(held, returned)

    def set_tensor_transport_metadata_and_trigger_queued_operations(
        self, object_id: str, location: Location | None
    ) -> None:
        """The reply of the task that made the object has come.

        Runs on: owner, core io thread. Returns at once.
        """
        with self._directory_lock:
            frees = self._directory.created(object_id, location)
        self._carry_out(frees)

    def queue_or_free_object_primary_copy(self, object_id: str) -> None:
        """The last reference to the object is gone.

        Runs on: owner, core io thread. Returns at once.
        """
        with self._directory_lock:
            frees = self._directory.out_of_scope(object_id)
        self._targets.forget(object_id)
        self._carry_out(frees)

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        current = session.peek()
        for instruction in instructions:
            if isinstance(instruction, LetGo):
                self._let_go(instruction)
            elif current is None:
                pass  # Ray is shutting down: nobody needs to be told
            elif isinstance(instruction, Free):
                location = instruction.location
                current.agent.free(location.address, location.key)
            elif isinstance(instruction, Own):
                self._own(instruction)
            elif isinstance(instruction, Hint):
                self._links().hints.send(instruction.actor_id, instruction.location)
            elif isinstance(instruction, WarnShared):
                _warn_shared(instruction.object_id)

    def _let_go(self, instruction: LetGo) -> None:
        """Lets go of an actor's handle on another thread, for Ray's code runs then.

        While the object is in use, that has time until the next submit or tick.
        """
        self._handles_to_let_go.append(instruction.take())
        current = session.peek()
        if instruction.is_last and current is not None:
            current.run_in_background(self._handles_to_let_go.clear)

    def _own(self, instruction: Own) -> None:
        """Tells a producer that an object is ours; of a small one, at the session's next tick.

        Most small objects do not live that long, and telling costs more than moving them.
        """
        if instruction.location.nbytes <= settings().eager_bytes:
            self._small_to_own.append(instruction)
        else:
            self._session().agent.own(instruction.location.address, instruction.location.key)

    def _own_small(self) -> None:
        """Runs on: owner, the reaper thread."""
        while self._small_to_own:
            small = self._small_to_own.popleft()
            if self._may_own(small.object_id, small.location.key):
                self._session().agent.own(small.location.address, small.location.key)

    def is_managed_object(self, object_id: str) -> bool:
        """Whether this process owns an RDT object of this id (hex)."""
        return self._directory.row(object_id) is not None

    def get_rdt_metadata(self, object_id: str) -> Row | None:
        """What this owner knows of an object, None if it is not its own."""
        return self._directory.row(object_id)

    # Consumer.

    def fetch(
        self,
        serialized: Sequence[Any],
        refs: Sequence[Any],
        timeout_s: float | None = None,
        into: Mapping[int, Sequence[torch.Tensor]] = MappingProxyType({}),
    ) -> dict[int, Result]:
        """Fetches the tensors of all RDT values in a batch.

        Runs on: consumer, the thread that deserializes, before Ray's deserialization lock.

        Args:
            serialized: (data, metadata, transport) of each object.
            refs: Their references; None where there is none.
            timeout_s: The user's timeout, if any.
            into: By position in the batch, tensors to receive into.

        Returns:
            By position in the batch: what Ray's deserializer needs for the value, or the error to
            give in its place.

        Raises:
            GetTimeoutError: the user's timeout passed first.
            ValueError: a target does not fit its tensor, or is for no RDT object; nothing has
                moved.
        """
        began = time.monotonic()
        # One request for each object, and one more for each that has targets of its own.
        requests: dict[_Slot, Request] = {}
        sources: dict[_Slot, Any] = {}
        keys: dict[int, _Slot] = {}
        results: dict[int, Result] = {}
        for index, ((data, metadata, _), ref) in enumerate(zip(serialized, refs)):
            object_id = "" if ref is None or ref.is_nil() else ref.hex()
            if descriptor.is_rdt(metadata):
                try:
                    request = self._request(object_id, metadata, data, into.get(index))
                except ImportError as error:  # torch is not here
                    head = descriptor.decode(metadata)
                    results[index] = as_fetch_error(object_id, head, error)
                    continue
                keys[index] = request.envelope.head.key, index if index in into else None
                if keys[index] not in requests:
                    requests[keys[index]] = request
                    sources[keys[index]] = ref
            elif metadata in _PLAIN_METADATA:
                self._targets.refuse_plain(object_id)
        wanted = list(requests.values())
        arrivals = self._remakes.replace_lost(
            wanted,
            list(sources.values()),
            self._fetcher.fetch(wanted, timeout_s),
            began,
            timeout_s,
        )
        for request, arrival in zip(wanted, arrivals):
            if isinstance(arrival, Arrival):
                self._targets.received(request.object_id, request.target)
        by_key = dict(zip(requests, arrivals))
        return results | {index: by_key[key] for index, key in keys.items()}

    def fetch_or_defer(
        self, serialized: Sequence[Any], refs: Sequence[Any]
    ) -> dict[int, Result | Deferred]:
        """As ``fetch``, for the core: on its io thread and on event loops nothing is waited for.

        Runs on: consumer, the thread on which the core deserializes.

        Returns:
            As ``fetch``; ``Deferred`` in place of values that have to be pulled.
        """
        if not must_not_block():
            into = arguments.of_running_task(serialized)
            return dict(self.fetch(serialized, refs, into=into))
        at_once = list(serialized)
        late: dict[int, Deferred] = {}
        for index, (value, ref) in enumerate(zip(serialized, refs)):
            if self._has_to_move(value[1]):
                deserialize = functools.partial(self._deserialize, value, ref)
                producer = descriptor.decode(value[1]).address
                late[index] = self._puller.defer(deserialize, producer)
                at_once[index] = (None, b"", None)
        return self._fetch_each(at_once, refs) | late

    def _fetch_each(self, serialized: Sequence[Any], refs: Sequence[Any]) -> dict[int, Result]:
        """As ``fetch`` of what is here; a target that does not fit becomes the value.

        Nobody hears what is raised here.

        Runs on: Ray's io thread, or an event loop.
        """
        results: dict[int, Result] = {}
        for index, (value, ref) in enumerate(zip(serialized, refs)):
            found = self._fetch_or_fail(value, ref)
            if found:
                results[index] = found[0]
        return results

    def _fetch_or_fail(self, value: Any, ref: Any) -> Mapping[int, Result]:
        try:
            return self.fetch([value], [ref])
        except ValueError as error:
            return {0: RayTaskError("ray.get", traceback.format_exc(), error)}

    def _has_to_move(self, metadata: bytes) -> bool:
        if not descriptor.is_rdt(metadata):
            return False
        head = descriptor.decode(metadata)
        is_here = head.is_eager or self.store.by_key(head.key) is not None
        return not is_here or arguments.are_expected()

    def _deserialize(self, value: Any, ref: Any, into: Sequence[torch.Tensor] | None) -> Any:
        """Runs on: an rdt-pull thread."""
        arrived = self.fetch([value], [ref], into={} if into is None else {0: into})
        with without_turn():
            return ray_core.deserialize(value, ref, arrived)

    def _request(
        self, object_id: str, metadata: bytes, data: Any, into: Sequence[torch.Tensor] | None
    ) -> Request:
        envelope = capture.open_envelope(metadata, data)
        if into is not None:
            return Request(object_id, envelope, targets.into(into, envelope.table))
        return Request(object_id, envelope, self._targets.of(object_id, envelope.table))

    @property
    def has_targets(self) -> bool:
        """Whether a user wants the tensors of some object in a certain place, in this process."""
        return len(self._targets) > 0

    def set_targets(self, object_id: str, tensors: Sequence[torch.Tensor]) -> None:
        """The tensors that ``ray.get`` of this object receives into, in this process."""
        self._targets.set_tensors(object_id, tensors)

    def set_target_device(self, object_id: str, device: str) -> None:
        """The device that ``ray.get`` of this object puts its tensors on, in this process."""
        self._targets.set_device(object_id, device)

    # Life.

    def stats(self) -> dict[str, int]:
        """See ``ray.experimental.rdt.stats``."""
        links = self._known_links
        counters = {
            "stored_objects": len(self.store),
            "stored_bytes": self.store.nbytes,
            "hinted_bytes": links.prefetcher.nbytes if links is not None else 0,
            "plain_objects": self._room.refused,
            "directory_rows": len(self._directory),
            "held_arguments": len(self._holder),
            "recipes": len(self._lineage),
            "exposed": links.server.exposed if links is not None else 0,
            "streams": len(links.produced) + len(links.taken) if links is not None else 0,
        }
        current = session.peek()
        return counters | (current.agent.stats() if current is not None else {})

    def begin(self) -> None:
        """Begins this process's session if it has none. Takes a while: not for the io thread."""
        self._links()

    def begin_nixl(self) -> None:
        """Starts nixl in the background, which takes up to a second; for who will use it."""
        threading.Thread(target=self._begin_nixl, name="rdt-nixl-begin").start()

    def _begin_nixl(self) -> None:
        """Runs on: an rdt-nixl-begin thread."""
        try:
            cast("NixlTransport", self.transport("nixl")).begin()
        except Exception:  # said when an object would go over it, or Ray is shutting down
            logger.debug("RDT could not start nixl ahead of time", exc_info=True)

    def transport(self, name: str) -> Transport:
        """A transport of this process by its lower-case name. Raises TransportUnavailable."""
        return self._links().transports.get(name)

    def make_nixl_pool(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Makes the pool that objects over nixl are copied into; returns its memory.

        Raises:
            ValueError: there is one, or the size is not above 0.
        """
        return self._snapshots.make_pool(nbytes, device)

    def _find_nixl(self) -> NixlTransport | None:
        links = self._known_links
        return cast("NixlTransport | None", links and links.transports.peek("nixl"))

    def explainer(self) -> Explainer:
        """Tells which way tensors take from and to this process."""
        return self._links().explainer

    def _session(self) -> session.Session:
        return self._links().session

    def _links(self) -> Links:
        """This process's session and its parts, begun if there are none."""
        current = session.current()
        links = self._known_links
        if links is None or links.session is not current:
            with self._links_lock:
                links = self._known_links
                if links is None or links.session is not current:
                    links = self._known_links = self._join(current)
        return links

    def _join(self, current: session.Session) -> Links:
        transports = Transports(current)
        produced, taken = ProducedStreams(current), TakenStreams(current)
        server = Server(current, self.store, transports, produced)
        policy = AutoTransportPolicy(current)
        hints, prefetcher = HintSender(current), Prefetcher(current, policy)
        explainer = Explainer(current, transports, policy)
        claims = ClaimWatch(current, self._is_stored, self._may_own)
        links = Links(
            *(current, transports, policy, server, hints, prefetcher, produced, taken),
            *(explainer, claims),
        )
        # Bound to this session's server: a release may come while the session ends.
        current.on_released(lambda tokens: self._on_released(links, tokens))
        current.on_tick(links.prefetcher.drop_stale)
        current.on_tick(self._own_small)
        current.on_tick(self._handles_to_let_go.clear)
        current.on_close(transports.close)
        groups.attach(current, transports.get)  # type: ignore[arg-type]
        OwnerWatch(current, produced)
        self._lineage.serve(current)
        Gauges(current, self.stats)
        publish_worker(current, ray_core.worker_id())
        actor_id = ray_core.actor_id()
        if actor_id is not None:
            current.run_in_background(process_directory.publish_actor, actor_id, current.address)
        return links

    def _is_stored(self, key: bytes) -> bool:
        return self.store.by_key(key) is not None

    def _may_own(self, object_id: str, key: bytes) -> bool:
        with self._directory_lock:
            return self._directory.may_own(object_id, key)

    def _find(self, key: bytes) -> str:
        with self._directory_lock:
            return self._directory.find(key)

    def _on_released(self, links: Links, tokens: list[int]) -> None:
        """Runs on: producer, the reaper thread."""
        for stored in self.store.drop(tokens):
            links.server.withdraw(stored)

    def shutdown(self) -> None:
        """Ends this process's part in RDT. Runs on: ``ray.shutdown``'s thread."""
        self._holder.clear()
        self._lineage.clear()
        self._puller.close()
        self._puller = Puller()
        with self._directory_lock:
            todo = self._directory.close()
        self._small_to_own.clear()
        self._carry_out(todo)
        self._handles_to_let_go.clear()
        session.end()
        self.store.clear()
        self._snapshots.drop_pool()
        self._targets.clear()


#: Of a request in a batch: the object's key, and the position that has targets of its own, if any.
_Slot = tuple[bytes, int | None]

_making = threading.Lock()


def make_manager(worker: Any) -> None:
    """Makes the manager of Ray's worker, once, whichever threads ask. Runs on: any thread."""
    with _making:
        if worker._rdt_manager is None:
            worker._rdt_manager = RDTManager()


class StoreByObjectId:
    """The store by object id (hex), under the names that Ray's own tests use."""

    def __init__(self, manager: RDTManager):
        self._manager = manager

    def has_object(self, object_id: str) -> bool:
        return self._manager.store.by_id(object_id) is not None

    def has_tensor(self, tensor: torch.Tensor) -> bool:
        try:
            self._manager.store.wait_freed(tensor, 0)
        except TimeoutError:
            return True
        return False

    def get_num_objects(self) -> int:
        return len(self._manager.store)

    def wait_and_get_object(
        self, object_id: str, timeout: float | None = None
    ) -> list[torch.Tensor]:
        return self._manager.store.wait_object(object_id, timeout).captured.tensors

    def add_object_primary(
        self, object_id: str, tensors: list[torch.Tensor], transport: str
    ) -> Location:
        users = self._manager.users_transport(transport)
        captured = capture.arrange(tensors, wanted=_wanted(users))
        if users is not None:
            captured.parcel = users.describe(capture.carriers(captured))
        head = self._manager._describe(captured, transport)
        self._manager._store(object_id, captured, head)
        return _location(head, captured)

    def pop_object(self, object_id: str) -> list[torch.Tensor]:
        stored = self._manager.store.by_id(object_id)
        if stored is None:
            raise KeyError(f"RDT object {object_id} is not stored here")
        self._manager._session().agent.release(stored.key)
        return stored.captured.tensors


def _location(head: Descriptor, captured: Captured) -> Location:
    regions = regions_to_hint(head, captured.table)
    return Location(head.address, head.key, head.nbytes, regions, head.is_eager)


def _wanted(users: UserTransport | None) -> Wanted | None:
    return None if users is None else Wanted(users.data_type, users.capabilities.devices)


def _handle_to_keep(actor: Any) -> Any:
    """The handle that keeps an object's producer alive; None for this process, or a task's."""
    return None if actor is None or actor._actor_id.binary() == ray_core.actor_id() else actor


def _own_id() -> bytes:
    """Names this process in descriptors: its actor id, or the start of its worker id."""
    own = ray_core.actor_id() or ray_core.worker_id()
    return own[: descriptor.PRODUCER_BYTES]


def _warn_shared(object_id: str) -> None:
    warnings.warn(
        f"RDT ObjectRef({object_id}) has been passed to the actor that made it and to others. "
        "The maker gets its own tensor, not a copy: what it changes in place is what later "
        "consumers receive.",
        UserWarning,
        stacklevel=_levels_to_user(),
    )


def _levels_to_user() -> int:
    """How far up the caller's caller is that is not Ray: whose line a warning should name."""
    ours = os.path.dirname(os.path.dirname(os.path.dirname(__file__))) + os.sep
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    return level
