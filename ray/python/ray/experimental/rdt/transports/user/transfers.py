"""The transfers of one process over a user's transport, and their actors as its code gets them.

Either side may end a transfer. A process receives at most one object at a time over a transport,
and sends at most one. A consumer takes the lock for receiving before it asks its producer, which
takes the lock for sending. A transfer that has both goes on, so transfers cannot wait for each
other in a circle.

Request: ``USER_END`` of ``rpc/protocol.py``. The answer has the reason for which this side had
failed before, "" for none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import TransferFailed, is_interrupt, raise_if_interrupt
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.calls import SLICE_S, Call

#: How long a peer may take to answer for which reason it failed.
_ANSWER_S = 5.0

#: Ended transfers that are remembered, because a request for them may still arrive.
_REMEMBERED_ENDS = 256


class TransferEnded(TransferFailed):
    """The other side ended a transfer. ``retryable`` if only the connection broke."""


class Transfer(Call):
    """The part that the user's code of this process has in one transfer.

    Attributes:
        id: The same on both sides.
        peer_id: The agent of the other side.
    """

    def __init__(self, transfer_id: str, peer_id: bytes, method: str):
        super().__init__(method)
        self.id = transfer_id
        self.peer_id = peer_id


class Transfers:
    """The transfers of one process over one transport. Thread-safe.

    Attributes:
        receiving: Held while an object is received.
        sending: Held while an object is sent.
    """

    def __init__(self, session: Session, name: str):
        self._session = session
        self._end_op = protocol.of_transport(protocol.USER_END, name)
        self._lock = threading.Lock()
        self._is_closed = False
        self._running: dict[str, Transfer] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self.receiving = threading.Lock()
        self.sending = threading.Lock()
        session.serve(self._end_op, self._on_end)
        session.on_peer_lost(self._on_peer_lost)

    @contextmanager
    def running(self, transfer_id: str, peer_id: bytes, method: str) -> Iterator[Transfer]:
        """Let peers end a transfer while the context lasts."""
        transfer = Transfer(transfer_id, peer_id, method)
        with self._lock:
            if self._is_closed:
                raise TransferEnded("Ray is shutting down", "stopped")
            if transfer_id in self._ended:
                transfer.end(error=TransferEnded("the consumer gave up"))
            self._running[transfer_id] = transfer
        try:
            yield transfer
        finally:
            with self._lock:
                del self._running[transfer_id]
                if transfer.error is not None and not isinstance(transfer.error, TransferEnded):
                    self._remember_end(transfer_id, _reason(transfer.error))
                transfer.error = None  # its traceback refers to the frame that waited

    def report_failure(self, peer: bytes, transfer_id: str, error: BaseException) -> None:
        """End the other side's part of a transfer that failed here."""
        if not isinstance(error, TransferEnded):
            body = protocol.UserEnd(transfer=transfer_id, reason=_reason(error))
            self._session.send_oneway(peer, self._end_op, body)

    def find_cause(self, producer: bytes, transfer_id: str, error: BaseException) -> BaseException:
        """End the producer's part of a transfer that failed here; return the cause of the failure.

        A call of the user's code may fail because the producer's call did, or because the producer
        is gone, before either is known here.
        """
        is_own = isinstance(error, (TimeoutError, TransferEnded, TransportUnavailable))
        if is_own or is_interrupt(error) or not isinstance(error, Exception):
            self.report_failure(producer, transfer_id, error)
            return error
        try:
            body = protocol.UserEnd(transfer=transfer_id, reason=_reason(error))
            answer = self._session.call(producer, self._end_op, body, _ANSWER_S)
        except Exception as lost:  # the failure that led here is the one to report
            raise_if_interrupt(lost)
            return lost if isinstance(lost, TransferFailed) and lost.peer_lost else error
        return TransferEnded(answer["reason"]) if answer["reason"] else error

    def close(self) -> None:
        """End all transfers; none begins after this."""
        with self._lock:
            self._is_closed = True
            running = list(self._running.values())
        for transfer in running:
            transfer.end(error=TransferEnded("Ray is shutting down", "stopped"))

    def _on_end(self, peer_id: bytes, body: protocol.UserEnd) -> dict[str, Any]:
        """Answer ``USER_END``. Runs on: either side, an rdt-call thread."""
        transfer_id = body["transfer"]
        with self._lock:
            transfer = self._running.get(transfer_id)
            if transfer is None:
                reason = self._ended.get(transfer_id, "")
                if not reason:
                    self._remember_end(transfer_id, "")
                return {"reason": reason}
            if transfer.peer_id != peer_id:
                return {"reason": ""}
            transfer.end(error=TransferEnded(str(body["reason"])))
            error = transfer.error
        return {"reason": "" if isinstance(error, TransferEnded) else _reason(error)}

    def _remember_end(self, transfer_id: str, reason: str) -> None:
        """Remember that a transfer has ended. The lock is held."""
        self._ended[transfer_id] = reason
        if len(self._ended) > _REMEMBERED_ENDS:
            self._ended.popitem(last=False)

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: the reaper thread."""
        with self._lock:
            lost = [transfer for transfer in self._running.values() if transfer.peer_id == peer_id]
        for transfer in lost:
            transfer.end(error=TransferEnded("the connection to the other process broke", "broken"))


@contextmanager
def exclusively(lock: threading.Lock, deadline: Deadline) -> Iterator[None]:
    """Hold a lock for receiving or sending. Raises TimeoutError at the deadline."""
    while not lock.acquire(timeout=min(SLICE_S, deadline.left_s())):
        if deadline.has_passed():
            raise TimeoutError("another transfer of this process kept the transport busy")
        raise_if_cancelled()
    try:
        yield
    finally:
        lock.release()


def _reason(error: BaseException | None) -> str:
    return f"the other side failed: {type(error).__name__}: {error}"


def own_actor_handle() -> bytes | None:
    """Return the handle of this process's actor as Ray serializes it, None outside actors."""
    actor = ray_core.own_actor_handle()
    return None if actor is None else actor._serialization_helper()[0]


def own_actor_for_calls() -> Any:
    """Return the handle of this process's actor, None outside actors.

    Its ``__ray_call__`` runs on the calling thread: the main thread may be waiting for the caller,
    and then could not run a call of its own actor.
    """
    actor = ray_core.own_actor_handle()
    if actor is not None:
        actor.__ray_call__ = _CallInPlace()
    return actor


def actor_of(serialized: bytes | None) -> Any:
    """Return the actor of ``own_actor_handle``. The handle does not keep the actor alive."""
    import ray

    if serialized is None:
        return None
    return ray.actor.ActorHandle._deserialization_helper(serialized, True, None)


class _CallInPlace:
    """``__ray_call__`` of this process's own actor."""

    def options(self, **options: Any) -> _CallInPlace:
        return self

    def remote(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        import ray

        return ray.put(function(ray_core.actor(), *args, **kwargs))
