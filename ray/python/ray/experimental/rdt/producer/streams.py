"""Generators whose items are RDT objects.

The core flags neither the items of a generator nor tells anybody when they go out of scope, and a
guard nested in an item can be freed before the caller knows the item. So the two ends of a stream
agree themselves:

* The call carries a ``StreamSpec`` as one more keyword. The producer wraps what the generator
  yields, stores each item's tensors under the stream, and tells the caller's agent where it is
  (``rdt.stream.open``).
* The caller *adopts* each item that it takes from the generator: it puts the item's value, which
  is small, again as an object of its own, which the core does flag, and tells the producer's agent
  that it owns the tensors. From there on the item lives and ends as every RDT object.
* When the caller's generator is gone, the producer frees what nobody has adopted
  (``rdt.stream.close``). A caller that dies closes its streams as well; see ``owners``.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ray._private.object_ref_generator import ObjectRefGenerator

from ray.experimental.rdt.common import descriptor, ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.serialized_value import SerializedValue
from ray.experimental.rdt.rpc.session import Session, agent_id_of

if TYPE_CHECKING:
    from ray.experimental.rdt.common.descriptor import Descriptor


#: The keyword under which a call of a generator carries its ``StreamSpec`` or ``DynamicSpec``.
STREAM_KEYWORD = "_ray_rdt_stream"


class StreamSpec(NamedTuple):
    """What the producer of a stream is told.

    Attributes:
        stream: Names the stream, in hex.
        transport: How its items travel.
        caller: The address of the caller's agent.
        objects_per_yield: How many items come in one yield, in a tuple or list if more than one.
    """

    stream: str
    transport: str
    caller: bytes
    objects_per_yield: int = 1

    def items_of(self, generator: Any) -> Any:
        """A generator of the same kind whose items are RDT objects.

        Runs on: producer, the thread or event loop of the task. What is no generator is given back:
        Ray reports that it should have been one.
        """
        if inspect.isgenerator(generator):
            return _items(generator, self)
        if inspect.isasyncgen(generator):
            return _async_items(generator, self)
        return generator

    def wrap(self, value: Any) -> Any:
        """What was yielded, so that each item in it becomes an RDT object."""
        if self.objects_per_yield == 1:
            return StreamItem(value, self)
        if not isinstance(value, (tuple, list)):
            return value  # Ray reports that it should be one of them.
        return tuple(StreamItem(each, self) for each in value)


# Producer.


class StreamItem:
    """One yielded value on its way out. Ray's serialization context knows the method's name."""

    def __init__(self, value: Any, spec: StreamSpec):
        self._value = value
        self._spec = spec

    def __ray_rdt_serialize__(self, context: Any) -> Any:
        """The serialized object. Runs on: producer, the thread that reports the item."""
        return ray_core.manager().producer.serialize_item(context, self._value, self._spec)


def _items(generator: Any, spec: StreamSpec) -> Iterator[Any]:
    with _producing(spec):
        sent = None
        while True:
            try:
                value = generator.send(sent)
            except StopIteration:
                return
            sent = yield spec.wrap(value)
            del value


async def _async_items(generator: Any, spec: StreamSpec) -> AsyncIterator[Any]:
    with _producing(spec):
        sent = None
        while True:
            try:
                value = await generator.asend(sent)
            except StopAsyncIteration:
                return
            sent = yield spec.wrap(value)
            del value


@contextmanager
def _producing(spec: StreamSpec) -> Iterator[None]:
    """A stream is open at its producer while the block runs."""
    produced = ray_core.manager().producer.streams
    produced.begin(spec)
    try:
        yield
    finally:
        produced.end(spec.stream)


@dataclass
class _Produced:
    """A stream at its producer.

    Attributes:
        caller: The id of the caller's agent.
        keys: The items that are stored.
        running: Tasks that make items for it.
        is_closed: Whether the caller takes no more.
    """

    caller: bytes
    keys: set[bytes] = field(default_factory=set)
    running: int = 0
    is_closed: bool = False


class ProducedStreams:
    """The streams that one process makes items for. Thread-safe.

    Args:
        session: What callers are told and heard through.
    """

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._streams: dict[str, _Produced] = {}
        self._stream_of: dict[bytes, str] = {}
        session.serve("rdt.stream.close", self._on_close)

    def __len__(self) -> int:
        return len(self._streams)

    def begin(self, spec: StreamSpec) -> None:
        """A task begins to make items. Runs on: producer, the thread of the task."""
        with self._lock:
            produced = self._streams.setdefault(spec.stream, _Produced(agent_id_of(spec.caller)))
            produced.running += 1
        body = {"stream": spec.stream, "address": self._session.address.hex()}
        self._session.send_oneway(spec.caller, "rdt.stream.open", body)

    def end(self, stream: str) -> None:
        """A task makes no more items."""
        with self._lock:
            self._streams[stream].running -= 1
            self._forget_if_over(stream)

    def add(self, stream: str, key: bytes) -> None:
        """An item has been stored. It is freed at once if nobody takes it any more."""
        with self._lock:
            produced = self._streams.get(stream)
            if produced is not None and not produced.is_closed:
                produced.keys.add(key)
                self._stream_of[key] = stream
                return
        self._session.agent.release(key)

    def dropped(self, key: bytes) -> None:
        """An object is not stored any more. Runs on: producer, the reaper thread."""
        with self._lock:
            stream = self._stream_of.pop(key, None)
            if stream is not None:
                self._streams[stream].keys.discard(key)
                self._forget_if_over(stream)

    def close_of(self, caller: bytes) -> None:
        """Closes the streams of a caller that died, by the id of its agent."""
        for stream in [
            name for name, entry in self._streams.copy().items() if entry.caller == caller
        ]:
            self._close(stream)

    def has_caller(self, caller: bytes) -> bool:
        """Whether any stream is made for the agent of this id."""
        return any(entry.caller == caller for entry in self._streams.copy().values())

    def _on_close(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        produced = self._streams.get(body["stream"])
        if produced is not None and produced.caller == peer_id:
            self._close(body["stream"])
        return {}

    def _close(self, stream: str) -> None:
        with self._lock:
            produced = self._streams.get(stream)
            if produced is None:
                return
            produced.is_closed = True
            keys = list(produced.keys)
            self._forget_if_over(stream)
        self._session.agent.release_unowned(keys)

    def _forget_if_over(self, stream: str) -> None:
        produced = self._streams[stream]
        if not produced.running and not produced.keys:
            del self._streams[stream]


# Caller.


class TakenStreams:
    """The streams that one process takes items from. Thread-safe.

    Args:
        session: What producers are heard and told through.
    """

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._producers: dict[str, set[bytes]] = {}
        self._gone: deque[str] = deque()
        session.serve("rdt.stream.open", self._on_open)
        session.on_tick(self._close_gone)

    def __len__(self) -> int:
        return len(self._producers)

    def begin(self, transport: str, objects_per_yield: int) -> Stream:
        """A stream for one call. Runs on: caller, the thread that called ``.remote()``."""
        self._close_gone()
        name, caller = os.urandom(16).hex(), self._session.address
        spec = StreamSpec(name, transport.lower(), caller, objects_per_yield)
        self._producers[spec.stream] = set()
        return Stream(spec, self._gone.append)

    def _on_open(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        address = bytes.fromhex(body["address"])
        with self._lock:
            producers = self._producers.get(body["stream"])
            if producers is not None:
                producers.add(address)
                return {}
        self._tell_close(address, body["stream"])
        return {}

    def _close_gone(self) -> None:
        while True:
            try:
                stream = self._gone.popleft()
            except IndexError:  # none, or another thread has taken the last
                return
            with self._lock:
                producers = self._producers.pop(stream, set())
            for address in producers:
                self._tell_close(address, stream)

    def _tell_close(self, address: bytes, stream: str) -> None:
        self._session.send_oneway(address, "rdt.stream.close", {"stream": stream})


class Stream:
    """One call whose items are RDT objects, at its caller.

    Args:
        spec: What the producer is told.
        on_gone: Called with the stream's name when no more items will be taken, from wherever the
            garbage collector runs.
    """

    num_returns = "streaming"

    def __init__(self, spec: StreamSpec, on_gone: Callable[[str], None]):
        self.spec = spec
        self._on_gone = on_gone

    def __del__(self) -> None:
        self._on_gone(self.spec.stream)

    def add_to(self, flat_arguments: list[Any]) -> list[Any]:
        """The flattened arguments of the call with the spec as one more keyword."""
        return [*flat_arguments, STREAM_KEYWORD, self.spec]

    def attach(self, generator: Any, actor: Any = None) -> Any:
        """Makes the call's ``ObjectRefGenerator`` adopt its items.

        Args:
            generator: What the call has returned.
            actor: The handle of the actor that makes the items, None if it is a task.
        """
        generator.__class__ = RDTObjectRefGenerator
        generator._rdt_stream, generator._rdt_actor, generator._rdt_left = self, actor, deque()
        return generator


class RDTObjectRefGenerator(ObjectRefGenerator):
    """Ray's generator of references, each of which the caller has adopted."""

    _rdt_stream: Stream
    # Keeps the producer alive until all items are adopted; None if that is a task.
    _rdt_actor: Any
    # Items on their way to a caller that was cancelled: the next call takes them first.
    _rdt_left: deque[asyncio.Future[Any]]

    def _next_sync(self, timeout_s: float | None = None) -> Any:
        try:
            ref = super()._next_sync(timeout_s)
        except StopIteration:
            self._rdt_actor = None
            raise
        return self._adopt(ref)

    def _adopt(self, ref: Any) -> Any:
        return _adopt(ref, self._rdt_stream.spec.transport, self._rdt_actor)

    async def _suppress_exceptions(self, ref: Any) -> None:
        """Waits until an item is there. Ray's own would pull it as well."""
        await ref._ready()

    async def _next_async(self, timeout_s: float | None = None) -> Any:
        if self._rdt_left:
            adopting = self._rdt_left.popleft()
        else:
            try:
                ref = await super()._next_async(timeout_s)
            except StopAsyncIteration:
                self._rdt_actor = None
                raise
            # The value may be in a store that has to be asked, so not on the event loop.
            adopting = asyncio.ensure_future(asyncio.to_thread(self._adopt, ref))
        try:
            return await asyncio.shield(adopting)
        except asyncio.CancelledError:
            self._rdt_left.appendleft(adopting)
            raise
        finally:
            del adopting  # the frame lives as long as an error that passed through it


def _adopt(item: Any, transport: str, actor: Any) -> Any:
    """A reference of the caller's own to the same value. Runs on: caller, any thread.

    What needs no freeing is given back: an error, a value without tensors or with its bytes inside.

    Args:
        item: The reference that Ray's generator gives.
        transport: The transport that the user named.
        actor: The handle of the actor that made the item, None if it was a task.
    """
    if item.is_nil():
        return item
    data, metadata, _ = ray_core.get_objects([item], -1)[0]
    if not metadata or not descriptor.is_rdt(metadata):
        return item
    head: Descriptor = descriptor.decode(metadata)
    if head.is_eager:
        return item
    # As it came; holds the item, and so what is nested in it.
    value = SerializedValue(data, metadata, [item])
    adopted = ray_core.put_object(value, transport.upper())
    ray_core.manager().owner.adopt(adopted, head, actor)
    return adopted
