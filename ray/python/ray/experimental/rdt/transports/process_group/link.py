"""One process group of two: bytes from one producer to one consumer.

The consumer opens a link to receive from a producer. Each direction between two processes has its
own links, so two processes that connect at the same time need not negotiate. A link that fails is
closed and never used again; the next transfer gets a new one.

Threads: each transfer runs on a thread of its own, ``rdt-<backend>``. Gloo's waits cannot be ended
by Ctrl-C, nor by the loss of the peer once a message has begun to move. The caller waits for that
thread in slices, and abandons it on failure; gloo then ends it within ``peer_timeout_s``. The
process group is ended before the caller gets an error, so no more bytes are written.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import TransferFailed, TransferTimedOut
from ray.experimental.rdt.transports.base import (
    Buffers,
    Capabilities,
    Events,
    Peer,
    TransportUnavailable,
)
from ray.experimental.rdt.transports.calls import Call
from ray.experimental.rdt.transports.process_group import packing

if TYPE_CHECKING:
    import torch

#: Ranks in a link's process group.
CONSUMER, PRODUCER = 0, 1

MAX_TAG = 2**31 - 1  # gloo takes a C int


class Backend(Protocol):
    """The library that moves the bytes of links. Its methods import torch."""

    capabilities: Capabilities
    #: Whether tags keep transfers apart, so that one link can carry many at once.
    has_tags: bool

    def check_available(self) -> None:
        """Raise TransportUnavailable, with the reason, if this process cannot use the backend."""

    def make(
        self, store: Any, rank: int, size: int, timeout_s: float, has_collectives: bool
    ) -> Any:
        """Make a process group of ``size`` ranks. Blocks without the GIL until all are connected.

        Args:
            store: The store for the rendezvous of its ranks.
            rank: This process's rank.
            timeout_s: How long to wait for the other ranks, and for each operation.
            has_collectives: Whether it runs more than send and receive.
        """

    def kill(self, group: Any) -> None:
        """End a process group. When this returns, no more bytes are written."""

    def send(self, group: Any, tensor: torch.Tensor, tag: int) -> Any:
        """Begin to send from rank ``PRODUCER`` to rank ``CONSUMER``; return the work."""

    def receive(self, group: Any, tensor: torch.Tensor, tag: int) -> Any:
        """Begin to receive at rank ``CONSUMER`` from ``PRODUCER``; return the work."""

    def wait(self, work: Any, timeout_s: float) -> None:
        """Wait for a send or receive, without the GIL. Raises on failure and timeout."""

    def transfer_context(self, after: Events) -> AbstractContextManager[None]:
        """Return a context for the transfer's thread, whose work runs after the events."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return memory for messages."""

    def unsupported_reason(self, buffers: Buffers) -> str:
        """Return why a link cannot carry these buffers, "" if it can."""

    def pack(self, buffers: Buffers, slot: torch.Tensor) -> None:
        """Copy small buffers one after the other into ``slot``."""

    def unpack(self, slot: torch.Tensor, buffers: Buffers) -> None:
        """The reverse of ``pack``."""


_HANDSHAKE_TAG = 0
_HEADER_SLACK_S = 1.0
#: How long each end waits for the other's reason once a connection has broken. The consumer waits
#: longer, because it reports the failure.
_REASON_S = {CONSUMER: 1.0, PRODUCER: 0.1}


class LinkClosed(TransportUnavailable):
    """The link broke or was closed before the transfer ended. The transfer may be retried.

    An aborted transfer closes its link, which another transfer may have leased just before.
    """

    def __init__(self, message: str):
        super().__init__(message, retryable=True)


class TransferRefused(TransportUnavailable):
    """One end refused these buffers. Another lane may carry them.

    If the producer refused them, it has sent nothing and the link stays usable.
    """


class _InFlight(NamedTuple):
    """A posted message: the backend's work, its time limit and memory.

    ``packed`` are buffers to copy the received message into.
    """

    work: Any
    timeout_s: float
    memory: torch.Tensor
    packed: Buffers = ()


class _Transfer(Call):
    """One transfer, on a thread of its own, which its link can stop."""

    _stopping: TransferFailed | None = None

    def stop(self, error: TransferFailed) -> None:
        """Ask the transfer's thread to end after the messages in flight."""
        self._stopping = error

    def check(self) -> None:
        """Raise the error of ``stop`` if there is one."""
        if self._stopping is not None:
            raise self._stopping


class Link:
    """A connected process group of two, and its transfers.

    Args:
        link_id: The same at both ends.
        scope: The id of the collective group it belongs to, "" for none.
        rank: ``CONSUMER`` or ``PRODUCER``.
        store: Its store, kept alive here: torch does not keep a store written in Python.
        on_close: Called once, with the link and the reason, after it has closed.
    """

    def __init__(
        self,
        link_id: str,
        peer: Peer,
        scope: str,
        rank: int,
        backend: Backend,
        group: Any,
        store: Any,
        on_close: Callable[[Link, str], None],
    ):
        self.id = link_id
        self.peer = peer
        self.scope = scope
        self.leased_until: Deadline | None = None  # guarded by the transport
        self._rank = rank
        self._backend = backend
        self._group = group
        self._store = store
        self._on_close = on_close
        self._lock = threading.Lock()
        self._closed = ""
        self._ended = threading.Event()
        self._killed = threading.Event()
        self._transfers: set[_Transfer] = set()
        self._tag = _HANDSHAKE_TAG

    @property
    def is_closed(self) -> bool:
        """Return whether it was closed."""
        return bool(self._closed)

    def next_tag(self) -> int:
        """Return a tag for one transfer. Runs on: consumer, any thread."""
        with self._lock:
            self._tag = self._tag % (MAX_TAG - 1) + 1
            return self._tag

    # Transfers.

    def handshake(self, timeout_s: float) -> None:
        """Move one byte to check that both ends are connected. Runs on: both, any thread.

        After a TransferFailed the link is closed.
        """

        def move(running: _Transfer) -> None:
            byte = self._backend.empty(1)
            self._backend.wait(self._post(byte, _HANDSHAKE_TAG), timeout_s + _HEADER_SLACK_S)

        self._run(move, Deadline.after(timeout_s))

    def send(self, tag: int, buffers: Buffers, deadline: Deadline) -> None:
        """Send one transfer. Runs on: producer; blocks until the buffers may change again.

        Buffers that the backend cannot carry are refused, and the consumer gets the reason. After a
        TransferFailed the link is closed.
        """
        self._run(lambda running: self._send(running, tag, buffers, deadline), deadline)

    def receive(self, tag: int, buffers: Buffers, deadline: Deadline, after: Events = ()) -> None:
        """Receive one transfer. Runs on: consumer; blocks until all bytes are in place.

        Raises:
            TransferRefused: The producer refused these buffers, or the backend cannot write them.
                In the second case the link is closed, which stops the producer.
            TransferFailed: The transfer failed. No more bytes are written.
        """
        refusal = self._backend.unsupported_reason(buffers)
        if refusal:
            self.close(refusal)
            raise TransferRefused(refusal)
        self._run(lambda running: self._receive(running, tag, buffers, deadline), deadline, after)

    def _send(self, running: _Transfer, tag: int, buffers: Buffers, deadline: Deadline) -> None:
        """Runs on: producer, the transfer's thread."""
        import torch

        refusal = self._backend.unsupported_reason(buffers)
        header = packing.Header.describing(tag, [b.numel() for b in buffers])
        if refusal:
            header, buffers = packing.Header.refusing(tag, refusal), ()
        message = self._backend.empty(packing.HEADER_NBYTES)
        message.copy_(torch.frombuffer(bytearray(header.encode()), dtype=torch.uint8))
        # Messages follow the header at once: after a wait this thread may get the GIL late.
        timeout_s = deadline.left_s() + _HEADER_SLACK_S
        self._stream(running, tag, buffers, _InFlight(self._post(message, tag), timeout_s, message))

    def _receive(self, running: _Transfer, tag: int, buffers: Buffers, deadline: Deadline) -> None:
        """Runs on: consumer, the transfer's thread."""
        message = self._backend.empty(packing.HEADER_NBYTES)
        self._backend.wait(self._post(message, tag), deadline.left_s() + _HEADER_SLACK_S)
        header = packing.Header.decode(bytes(message.tolist()))
        if header.refusal:
            raise TransferRefused(header.refusal)
        expected = packing.Header.describing(tag, [b.numel() for b in buffers])
        if header != expected:
            raise TransferFailed(f"expected {expected}, the producer sends {header}")

        self._stream(running, tag, buffers)

    def _stream(self, running: _Transfer, tag: int, buffers: Buffers, *begun: _InFlight) -> None:
        """Move all messages of a plan in order, ``WINDOW`` at once, after those in ``begun``.

        Packed messages take turns on the slots. So many are in flight at most, in order, that the
        next slot is always free.
        """
        messages = list(packing.plan([b.numel() for b in buffers]))
        count = min(sum(message.is_packed for message in messages), packing.WINDOW)
        slots = itertools.cycle([self._backend.empty(packing.SLOT_NBYTES) for _ in range(count)])
        window = deque(begun)

        def retire() -> None:
            first = window.popleft()
            self._backend.wait(first.work, first.timeout_s)
            with running.lock:  # nothing is written after the caller was told of the end
                running.check()
                if first.packed:
                    self._backend.unpack(first.memory, first.packed)

        for message in messages:
            if len(window) == packing.WINDOW:
                retire()
            running.check()
            packed: Buffers = ()
            if not message.is_packed:
                stop = message.start + message.nbytes
                memory = buffers[message.first][message.start : stop]
            else:
                memory = next(slots)[: message.nbytes]
                packed = buffers[message.first : message.last]
                if self._rank == PRODUCER:
                    self._backend.pack(packed, memory)
                    packed = ()
            work = self._post(memory, tag)
            window.append(_InFlight(work, settings().peer_timeout_s, memory, packed))
        while window:
            retire()

    def _post(self, tensor: torch.Tensor, tag: int) -> Any:
        group = self._group
        if group is None:
            raise LinkClosed(self._closed)
        if self._rank == PRODUCER:
            return self._backend.send(group, tensor, tag)
        return self._backend.receive(group, tensor, tag)

    # Running and closing.

    def _run(
        self, transfer: Callable[[_Transfer], None], deadline: Deadline, after: Events = ()
    ) -> None:
        """Run a transfer on a thread of its own and wait for it, interruptibly."""

        def work() -> None:
            """Runs on: the transfer's thread."""
            with context:
                transfer(running)

        name = self._backend.capabilities.name
        running = _Transfer(name, f"rdt-{name}")
        with self._lock:
            if self._closed:
                raise LinkClosed(self._closed)
            self._transfers.add(running)
        try:
            context = self._backend.transfer_context(after)
            running.start(work)
            self._await(running, deadline)
        except TransferRefused:
            raise
        except BaseException as error:  # also Ctrl-C: the other end must not wait for this one
            self.close(f"{type(error).__name__}: {error}")
            raise
        finally:
            running.error = None  # its traceback refers to this frame
            with self._lock:
                self._transfers.discard(running)

    def _await(self, running: _Transfer, deadline: Deadline) -> None:
        if not running.ends_by(deadline):
            name = self._backend.capabilities.name
            raise TransferTimedOut(f"not all bytes came over {name} in time")
        if isinstance(running.error, TransferFailed):
            raise running.error
        if running.error is not None:
            # The other end often closes a link before its reason arrives.
            if self._ended.wait(_REASON_S[self._rank]):
                raise LinkClosed(self._closed) from running.error
            raise LinkClosed(_in_short(running.error)) from running.error

    def close(self, reason: str, grace_s: float = 0.0) -> None:
        """End the link; transfers in progress fail with the reason. Idempotent.

        When it returns, no more bytes are written. This holds for later callers too, which may be
        about to report the failure to the user.

        Runs on: any thread but a transfer's own; blocks for up to ``grace_s``, which messages in
        flight may take to end, and a little, or for as long as another thread closes the link.
        """
        with self._lock:
            is_first = not self._closed
            if is_first:
                self._closed = reason
                self._ended.set()
            transfers = list(self._transfers)
        if not is_first:
            self._killed.wait(settings().peer_timeout_s)
            return
        error = LinkClosed(self._closed)
        for running in transfers:
            running.stop(error)
        deadline = Deadline.after(grace_s)
        for running in transfers:
            running.ended.wait(deadline.left_s())
        group, self._group = self._group, None
        try:
            self._backend.kill(group)
            for running in transfers:
                running.end(error=error)
        finally:
            self._killed.set()
        self._on_close(self, reason)


def _in_short(error: BaseException) -> str:
    """Return a torch error without its source file and its advice."""
    return re.sub(r"^\[[^]]*\] ", "", str(error)).split(". ")[0]
