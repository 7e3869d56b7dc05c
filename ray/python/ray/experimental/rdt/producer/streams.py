"""Generators whose items are RDT objects: the producer's half.

Ray's core does not flag the items of a generator as RDT objects and does not report when they go
out of scope. A guard nested in an item can be freed before the caller knows the item. The caller
and the producer of a stream therefore agree with each other:

* The call carries a ``StreamSpec`` as one more keyword. The producer wraps the yielded values,
  stores each item's tensors under the stream, and reports its address to the caller's agent
  (``rdt.stream.open``).
* The caller *adopts* each item that it takes from the generator: see ``owner/streams.py``.
* When the caller's generator is gone, the producer frees the items that were not adopted
  (``rdt.stream.close``). The streams of a caller that died are closed by ``owner_monitor.py``.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ray._private.object_ref_generator import DynamicObjectRefGenerator
from ray.exceptions import RayTaskError

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import Session, agent_id_of


class StreamSpec(NamedTuple):
    """The description of a stream that its producer receives.

    Attributes:
        stream: The name of the stream, in hex.
        caller: The address of the caller's agent.
        objects_per_yield: The number of items in one yield, in a tuple or list if more than one.
    """

    stream: str
    transport: str
    caller: bytes
    objects_per_yield: int = 1

    def items_of(self, generator: Any) -> Any:
        """Return a generator of the same kind whose items are RDT objects.

        Runs on: producer, the thread or event loop of the task. What is no generator is given back:
        Ray reports that it should have been one.
        """
        if inspect.isgenerator(generator):
            return _items(generator, self)
        if inspect.isasyncgen(generator):
            return _async_items(generator, self)
        return generator

    def wrap(self, value: Any) -> Any:
        """Mark each item of a yielded value as an RDT object."""
        if self.objects_per_yield == 1:
            return StreamItem(value, self)
        if not isinstance(value, (tuple, list)):
            return value  # Ray reports that it should be one of them.
        return tuple(StreamItem(each, self) for each in value)


class StreamItem:
    """A yielded item that serializes itself. Ray's serialization context calls the method below."""

    def __init__(self, value: Any, spec: StreamSpec):
        self._value = value
        self._spec = spec

    def __ray_rdt_serialize__(self, context: Any) -> Any:
        """Return the serialized item. Runs on: producer, the thread that reports the item."""
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
    """Keep a stream open at its producer while the block runs."""
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
        keys: The keys of the stored items.
        running: The number of tasks that make items for it.
        is_closed: Whether the caller takes no more items.
    """

    caller: bytes
    keys: set[bytes] = field(default_factory=set)
    running: int = 0
    is_closed: bool = False


class ProducedStreams:
    """The streams for which a process makes items. Thread-safe."""

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._streams: dict[str, _Produced] = {}
        self._stream_of: dict[bytes, str] = {}
        session.serve(protocol.STREAM_CLOSE, self._on_close)

    def __len__(self) -> int:
        return len(self._streams)

    def begin(self, spec: StreamSpec) -> None:
        """Register a task that makes items. Runs on: producer, the thread of the task."""
        with self._lock:
            produced = self._streams.setdefault(spec.stream, _Produced(agent_id_of(spec.caller)))
            produced.running += 1
        body = protocol.StreamOpen(stream=spec.stream, address=self._session.address)
        self._session.send_oneway(spec.caller, protocol.STREAM_OPEN, body)

    def end(self, stream: str) -> None:
        """Unregister a task that made items."""
        with self._lock:
            self._streams[stream].running -= 1
            self._forget_if_over(stream)

    def add(self, stream: str, key: bytes) -> None:
        """Register a stored item. If the stream is closed, free the item at once."""
        with self._lock:
            produced = self._streams.get(stream)
            if produced is not None and not produced.is_closed:
                produced.keys.add(key)
                self._stream_of[key] = stream
                return
        self._session.agent.release(key)

    def dropped(self, key: bytes) -> None:
        """Forget an object that is no longer stored. Runs on: producer, the reaper thread."""
        with self._lock:
            stream = self._stream_of.pop(key, None)
            if stream is not None:
                self._streams[stream].keys.discard(key)
                self._forget_if_over(stream)

    def close_of(self, caller: bytes) -> None:
        """Close the streams of a caller that died, by the id of its agent."""
        for stream, entry in self._streams.copy().items():
            if entry.caller == caller:
                self._close(stream)

    def has_caller(self, caller: bytes) -> bool:
        """Tell whether the agent of this id is the caller of any stream."""
        return any(entry.caller == caller for entry in self._streams.copy().values())

    def _on_close(self, peer_id: bytes, body: protocol.StreamClose) -> dict[str, Any]:
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


class DynamicSpec(NamedTuple):
    """A call with ``num_returns="dynamic"``, as its producer receives it.

    Ray runs such a generator to its end and gives its caller one reference, to a
    ``DynamicObjectRefGenerator`` of references. The core creates those and does not flag them as
    RDT objects. RDT's call therefore asks for a single return. The producer puts each item with the
    transport, owns it, and returns the same ``DynamicObjectRefGenerator``.

    Attributes:
        retried: The exceptions that make Ray run the task again.
    """

    transport: str
    retried: tuple[type[BaseException], ...]

    def items_of(self, generator: Any) -> DynamicObjectRefGenerator:
        """Return references to the items of a generator, and to the error that ended it.

        Runs on: producer, the thread of the task.

        Raises:
            ValueError: It is not a generator. Ray refuses async generators as well.
        """
        if not inspect.isgenerator(generator):
            raise ValueError(
                'a function with num_returns="dynamic" must return a generator, and this is '
                f'{type(generator).__name__}; async generators go with num_returns="streaming"'
            )
        import ray

        refs = []
        try:
            for value in generator:
                refs.append(ray.put(value, _tensor_transport=self.transport))
        except self.retried:
            raise
        except Exception as error:  # of the user's code, for the caller
            name = generator.__name__
            refs.append(ray.put(RayTaskError(name, traceback.format_exc(), error)))
        return DynamicObjectRefGenerator(refs)


class DynamicCall:
    """One call of such a generator, at its caller."""

    num_returns = 1

    def __init__(self, transport: str, retry_exceptions: Any):
        if isinstance(retry_exceptions, (list, tuple)):
            retried = tuple(retry_exceptions)
        else:
            retried = (Exception,) if retry_exceptions else ()
        self.spec = DynamicSpec(transport.lower(), retried)

    def add_to(self, flat_arguments: list[Any]) -> list[Any]:
        return [*flat_arguments, ray_core.STREAM_KEYWORD, self.spec]

    def attach(self, ref: Any, actor: Any = None) -> Any:
        """Return the result for the user. The items end with their owner, the actor."""
        return ref
