"""Values whose tensors are still to come, for threads that must not wait for them.

Ray's core deserializes on two kinds of thread that have to go on at once: its io thread, for
``await ref`` and ``ref.future()``, and an async actor's event loops, for the arguments of calls.
There an object that has to be pulled becomes a ``Deferred``. An ``rdt-pull`` thread pulls and
deserializes it, and ``when_here`` and ``call_when_here`` put the value in before any code of the
user's sees it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError, RaySystemError, RayTaskError

from ray.experimental.rdt.common.real_threads import Future, Lock
from ray.experimental.rdt.common.thread_pool import DaemonThreads

if TYPE_CHECKING:
    import torch

Tensors = Sequence["torch.Tensor"]

#: Pulls at the same time in one process, and of them from one producer: one that is silent leaves
#: the others their turn. More of them wait.
_PULL_THREADS, _FROM_ONE_PRODUCER = 64, 16

_IO_THREAD = "worker.io"


class Deferred:
    """A value whose pull begins when somebody first asks for it.

    A ``RayError`` stands for itself, as in Ray's deserializer.

    Args:
        start: Lets a thread bring the value, into the given tensors if there are any.
    """

    def __init__(self, start: Callable[[Tensors | None], Future[Any]]):
        self._start = start
        self._lock = Lock()
        self._future: Future[Any] | None = None
        self._into: Tensors | None = None

    def into(self, tensors: Tensors | None) -> None:
        """Says where the value's tensors go; comes before ``start``."""
        self._into = tensors

    def start(self) -> Future[Any]:
        """Begins the pull unless it has begun. Returns at once."""
        with self._lock:
            if self._future is None:
                self._future = self._start(self._into)
            return self._future

    def result(self) -> Any:
        """The value, or the error to give in its place. Blocks as long as a fetch may."""
        return _outcome(self.start())

    def then(self, callback: Callable[[Any], None]) -> None:
        """Calls back with ``result()``, on the rdt-pull thread."""
        # The future keeps the callback, so nothing that leads back to the future may be in it.
        self.start().add_done_callback(lambda future: callback(_outcome(future)))

    async def arrive(self) -> Any:
        """As ``result``; suspends the caller's coroutine, whose cancellation leaves the pull."""
        await asyncio.wait([asyncio.wrap_future(self.start())])
        return self.result()


class Puller:
    """The rdt-pull threads of one process."""

    def __init__(self) -> None:
        self._threads = DaemonThreads(_PULL_THREADS, "rdt-pull")
        self._lock = Lock()
        # By producer: pulls that have a thread or will get one, and what waits for its turn.
        self._begun: Counter[bytes] = Counter()
        self._waiting: dict[bytes, deque[tuple[Future[Any], Callable[[], Any]]]] = {}

    def defer(self, deserialize: Callable[[Tensors | None], Any], producer: bytes) -> Deferred:
        """A value that one of the threads will deserialize, into the given tensors if any."""
        return Deferred(lambda into: self._submit(producer, partial(_value_of, deserialize, into)))

    def _submit(self, producer: bytes, action: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._begun[producer] < _FROM_ONE_PRODUCER:
                self._threads.submit(self._work, producer)
                self._begun[producer] += 1
            self._waiting.setdefault(producer, deque()).append((future, action))
        return future

    def _work(self, producer: bytes) -> None:
        """One pull from a producer. Runs on: an rdt-pull thread."""
        with self._lock:
            waiting = self._waiting.get(producer)
            future, action = waiting.popleft() if waiting else (None, None)
        try:
            if future is not None and action is not None and future.set_running_or_notify_cancel():
                future.set_result(action())
        finally:  # callbacks of the user's may raise
            self._end_turn(producer)

    def _end_turn(self, producer: bytes) -> None:
        with self._lock:
            # The next one goes to the end of the queue, behind those of other producers.
            if self._waiting.get(producer):
                self._threads.submit(self._work, producer)
                return
            self._waiting.pop(producer, None)
            self._begun[producer] -= 1
            if not self._begun[producer]:
                del self._begun[producer]

    def close(self) -> None:
        """Ends the threads once their pulls have ended. Runs on: whoever shuts Ray down."""
        with self._lock:
            left, self._waiting = self._waiting, {}
            self._threads.close()
        for waiting in left.values():
            for future, _ in waiting:
                future.cancel()


def _outcome(future: concurrent.futures.Future[Any]) -> Any:
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        return RaySystemError("Ray was shut down while an RDT object was on its way")


def _value_of(deserialize: Callable[[Tensors | None], Any], into: Tensors | None) -> Any:
    """Runs on: an rdt-pull thread. What it raises is the value, so that nobody waits for ever."""
    with _turn:
        _thread.has_turn = True
        try:
            return deserialize(into)
        except Exception as error:
            return RayTaskError("ray.get", traceback.format_exc(), error)
        except BaseException as error:  # SystemExit of a class that is unpickled, say
            return RaySystemError(error, traceback.format_exc())
        finally:
            _thread.has_turn = False


#: Held by the one rdt-pull thread that runs RDT's own Python. Many that want the GIL at once would
#: keep it from the event loop for long.
_turn = Lock()


@contextmanager
def without_turn() -> Iterator[None]:
    """Around waits and the user's code: lets another rdt-pull thread run meanwhile.

    The user's code runs under Ray's deserialization lock and may fetch objects itself, which then
    waits for no turn.
    """
    if not _thread.has_turn:
        yield
        return
    _thread.has_turn = False
    _turn.release()
    try:
        yield
    finally:
        _turn.acquire()
        _thread.has_turn = True


def is_on_own_thread() -> bool:
    """Whether the running thread fetches a value for another one, whose streams are not its own."""
    return _thread.has_turn


class _Thread(threading.local):
    """What is known of the running thread."""

    has_turn = False

    def __init__(self) -> None:
        # A Python thread inherits the name of the thread that starts it.
        is_of_core = isinstance(threading.current_thread(), threading._DummyThread)
        name = Path("/proc/thread-self/comm").read_text().strip()
        self.is_io = is_of_core and name == _IO_THREAD


_thread = _Thread()


def must_not_block() -> bool:
    """Whether the running thread is Ray's io thread or has a running event loop."""
    return _thread.is_io or asyncio._get_running_loop() is not None


def when_here(callback: Callable[[Any], None]) -> Callable[[Any], None]:
    """A callback for values as the core gives them, which passes on the values themselves."""

    def deliver(value: Any) -> None:
        if isinstance(value, Deferred):
            value.then(callback)
        else:
            callback(value)

    return deliver


def are_here(arguments: Iterable[Any]) -> bool:
    """Whether none of them is still to come."""
    return not any(type(argument) is Deferred for argument in arguments)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LateCall:
    """The call of a plain method whose arguments are still to come; await it for its result.

    Ray's ``sync_to_async`` knows it by the attribute.
    """

    __ray_rdt_late_call__ = True

    def __init__(self, call: Coroutine[Any, Any, Any]):
        self._call = call

    def __await__(self) -> Any:
        return self._call.__await__()


def call_when_here(
    method: Callable[..., Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a method of an async actor once its arguments are there.

    Runs on: consumer, the event loop or (generators, Ray's own methods) the thread of the task.

    Args:
        method: What the user wrote: tells which kind of call it is.
        call: What to call.
        args: Positional arguments, ``Deferred`` ones among them.
        kwargs: The same by keyword.

    Returns:
        What the core expects of such a method: a coroutine, an async generator, or for a plain
        method a ``LateCall``, or its result where no event loop runs.
    """
    if inspect.isasyncgenfunction(method):
        return _generate(call, args, kwargs)
    if inspect.iscoroutinefunction(method):
        return _await(call, args, kwargs)
    if asyncio._get_running_loop() is not None:
        return LateCall(_call(call, args, kwargs))
    here = [_checked(_result(value)) for value in args]
    return call(*here, **{name: _checked(_result(value)) for name, value in kwargs.items()})


async def _generate(call: Callable[..., Any], args: Any, kwargs: Any) -> AsyncIterator[Any]:
    args, kwargs = await _arrive(args, kwargs)
    generator = call(*args, **kwargs)
    try:
        item = await generator.asend(None)
        while True:
            item = await generator.asend((yield item))
    except StopAsyncIteration:
        return
    finally:
        await generator.aclose()


async def _await(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    args, kwargs = await _arrive(args, kwargs)
    return await call(*args, **kwargs)


async def _call(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    args, kwargs = await _arrive(args, kwargs)
    return call(*args, **kwargs)


async def _arrive(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Deferred):
            value.start()
    here = [_checked(await _arrived(value)) for value in args]
    return tuple(here), {name: _checked(await _arrived(value)) for name, value in kwargs.items()}


async def _arrived(value: Any) -> Any:
    return await value.arrive() if isinstance(value, Deferred) else value


def _result(value: Any) -> Any:
    return value.result() if isinstance(value, Deferred) else value


def _checked(value: Any) -> Any:
    """A failed argument fails the call, as in plain Ray."""
    if isinstance(value, RayError):
        raise value
    return value
