"""Generators whose items are RDT objects: the caller's half.

The caller *adopts* each item that it takes from the generator. It puts the item's value, which is
small, as an object of its own that Ray's core flags as an RDT object, and tells the producer's
agent that it owns the tensors. From then on, the item is like every other RDT object. See
``producer/streams.py`` for the producer's half.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from ray._private.object_ref_generator import ObjectRefGenerator

from ray.experimental.rdt.common import descriptor, ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.owner.recipes import SerializedValue
from ray.experimental.rdt.producer.streams import StreamSpec
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import Session


class TakenStreams:
    """The streams from which a process takes items. Thread-safe."""

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._producers: dict[str, set[bytes]] = {}
        self._gone: deque[str] = deque()
        session.serve(protocol.STREAM_OPEN, self._on_open)
        session.on_tick(self._close_gone)

    def __len__(self) -> int:
        return len(self._producers)

    def begin(self, transport: str, objects_per_yield: int) -> Stream:
        """Return a new stream. Runs on: caller, the thread that called ``.remote()``."""
        self._close_gone()
        name, caller = os.urandom(16).hex(), self._session.address
        spec = StreamSpec(name, transport.lower(), caller, objects_per_yield)
        self._producers[spec.stream] = set()
        return Stream(spec, self._gone.append)

    def _on_open(self, peer_id: bytes, body: protocol.StreamOpen) -> dict[str, Any]:
        address = body["address"]
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
        body = protocol.StreamClose(stream=stream)
        self._session.send_oneway(address, protocol.STREAM_CLOSE, body)


class Stream:
    """One call whose items are RDT objects, at its caller.

    Args:
        on_gone: Called with the stream's name when no more items will be taken, on the thread that
            collects garbage.
    """

    num_returns = "streaming"

    def __init__(self, spec: StreamSpec, on_gone: Callable[[str], None]):
        self.spec = spec
        self._on_gone = on_gone

    def __del__(self) -> None:
        self._on_gone(self.spec.stream)

    def add_to(self, flat_arguments: list[Any]) -> list[Any]:
        """Return the flattened arguments of the call with the spec as one more keyword."""
        return [*flat_arguments, ray_core.STREAM_KEYWORD, self.spec]

    def attach(self, generator: Any, actor: Any = None) -> Any:
        """Make the call's ``ObjectRefGenerator`` adopt its items."""
        generator.__class__ = RDTObjectRefGenerator
        generator._rdt_stream, generator._rdt_actor, generator._rdt_left = self, actor, deque()
        return generator


class RDTObjectRefGenerator(ObjectRefGenerator):
    """Ray's generator of references; the caller adopts each item that it takes."""

    _rdt_stream: Stream
    # Keeps the producer alive until all items are adopted; None if the producer is a task.
    _rdt_actor: Any
    # Items for callers that were canceled: the next call takes them first.
    _rdt_left: deque[asyncio.Future[Any]]

    def _next_sync(self, timeout_s: float | None = None) -> Any:
        try:
            ref = super()._next_sync(timeout_s)
        except StopIteration:
            self._rdt_actor = None
            raise
        return _adopt(ref, self._rdt_stream.spec.transport, self._rdt_actor)

    async def _suppress_exceptions(self, ref: Any) -> None:
        """Wait until an item exists. Ray's own method would pull the item as well."""
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
            # Ray's object store may hold the value, so the event loop must not wait for it.
            transport, actor = self._rdt_stream.spec.transport, self._rdt_actor
            adopting = asyncio.ensure_future(asyncio.to_thread(_adopt, ref, transport, actor))
        try:
            return await asyncio.shield(adopting)
        except asyncio.CancelledError:
            self._rdt_left.appendleft(adopting)
            raise
        finally:
            del adopting  # the frame lives as long as an error that passed through it


def _adopt(item: Any, transport: str, actor: Any) -> Any:
    """Return a reference of the caller's own to the same value. Runs on: caller, any thread.

    Return the item itself if nothing has to be freed: an error, a value without tensors, or a value
    that contains the bytes of its tensors.

    Args:
        actor: The handle of the actor that made the item, None if it was a task.
    """
    if item.is_nil():
        return item
    data, metadata, _ = ray_core.get_objects([item], -1)[0]
    if not metadata or not descriptor.is_rdt(metadata):
        return item
    head: descriptor.Descriptor = descriptor.decode(metadata)
    if head.is_eager:
        return item
    # The serialized value, unchanged. It keeps the item and the references in it alive.
    value = SerializedValue(data, metadata, [item])
    adopted = ray_core.put_object(value, transport.upper())
    ray_core.manager().owner.adopt(adopted, head, actor)
    return adopted
