"""Moves objects by the code of users: ``TensorTransportManager`` behind RDT's own requests.

The metadata that a user's code makes for an object travels in the Ray value, which Ray unpickles
anyhow; what it makes for one transfer (the communicator's) goes through Ray's GCS, as functions do.
Nothing that came over an agent's connection is unpickled.

Threads: the user's code runs on daemon threads ``rdt-user``, so that a call that hangs costs its
waiter the deadline and nobody else anything. ``extract_tensor_transport_metadata`` runs on the
thread of the task, whose devices and streams it sees. At most one receives and one sends at a time
in a process and for a transport. A consumer holds its own turn to receive before it asks for its
producer's turn to send; so whoever has both goes on, and turns cannot block each other in a circle.
"""

from __future__ import annotations

import base64
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.common.interrupts import is_interrupt, raise_if_interrupt
from ray.experimental.rdt.rpc.session import Session, agent_id_of
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
)
from ray.experimental.rdt.transports.base import (
    Capabilities,
    Parcel,
    Peer,
    Route,
    Shipment,
    TransportUnavailable,
)
from ray.experimental.rdt.transports.user import registered
from ray.experimental.rdt.transports.user.registered import RegisteredTransport

logger = logging.getLogger("ray.rdt")

#: Half of what users take for an id: as many hexadecimal digits as Ray's own have.
_OBJECT_ID_BYTES = 28

#: The longest wait in one piece: Ray cancels tasks without waking who waits.
_SLICE_S = 0.25

#: How long the user's code may take to abort, and to collect what is left when Ray shuts down.
_END_S = 5.0

#: Transfers that have ended and may still be asked for by a request that was on its way.
_REMEMBERED_ENDS = 256

#: Asks the producer's process: op and route in, its answer out.
Ask = Callable[[str, Route], Route]


class TransferEnded(TransferFailed):
    """The other side of a transfer ended it; ``retryable`` if only the connection broke."""


class _Call:
    """One call of the user's code that someone waits for. Ends once.

    Args:
        what: The method, for people.
    """

    def __init__(self, what: str):
        self.what = what
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._result: Any = None
        self.error: BaseException | None = None

    def start(self, action: Callable[[], Any]) -> None:
        """Runs the user's code, unless the call has ended before it could begin."""
        if self._ended.is_set():
            return
        threading.Thread(target=self._run, args=(action,), name="rdt-user").start()

    def _run(self, action: Callable[[], Any]) -> None:
        """Runs on: an rdt-user thread."""
        try:
            result = action()
        except BaseException as error:
            self.end(error=error)
        else:
            self.end(result)

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Gives the waiter its outcome; only the first counts."""
        with self._lock:
            if not self._ended.is_set():
                self._result, self.error = result, error
                self._ended.set()

    def wait(self, deadline: Deadline) -> Any:
        while not self._ended.wait(min(_SLICE_S, deadline.left_s())):
            if deadline.has_passed():
                raise TimeoutError(f"the transport's own {self.what} did not return in time")
            raise_if_cancelled()
        if self.error is not None:
            raise self.error
        return self._result


def _call(what: str, action: Callable[[], Any], deadline: Deadline) -> Any:
    """Runs the user's code on a thread of its own. Raises TimeoutError at the deadline."""
    call = _Call(what)
    call.start(action)
    return call.wait(deadline)


class _Transfer(_Call):
    """The user's part in one transfer, which the other side may end."""

    def __init__(self, transfer_id: str, peer_id: bytes, what: str):
        super().__init__(what)
        self.id = transfer_id
        self.peer_id = peer_id


class UserTransport:
    """One process's use of a transport that a user wrote.

    Args:
        session: Reaches the peers.
        entry: What the user registered.

    Attributes:
        manager: This process's instance of the user's class.
    """

    def __init__(self, session: Session, entry: RegisteredTransport):
        self._session = session
        self._entry = entry
        self.manager: TensorTransportManager = _call(
            "constructor", entry.manager_class, Deadline.after(settings().fetch_timeout_s)
        )
        self.data_type = entry.data_type
        self.capabilities = Capabilities(
            entry.name.lower(),
            frozenset(entry.devices),
            two_sided=not entry.manager_class.is_one_sided(),
            abortable=entry.manager_class.can_abort_transport(),
            is_user_defined=True,
        )
        self._lock = threading.Lock()
        self._is_closed = False
        self._running: dict[str, _Transfer] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._receiving = threading.Lock()
        self._sending = threading.Lock()
        self._live: dict[str, Parcel] = {}
        self._garbage: threading.SimpleQueue[Parcel | None] = threading.SimpleQueue()
        self._collector: threading.Thread | None = None
        self._end_op = f"rdt.end/{entry.name}"
        session.serve(self._end_op, self._on_end)
        session.on_peer_lost(self._on_peer_lost)

    # Producer.

    def describe(self, tensors: list[Any]) -> Parcel:
        """Has the user's code extract the metadata of a new object.

        Runs on: producer, the thread of the task.

        Raises:
            RDTError: the user's code raised; that is the cause.
            ValueError: it names a device that the transport was not registered for.
        """
        object_id = secrets.token_hex(_OBJECT_ID_BYTES)
        try:
            metadata = self.manager.extract_tensor_transport_metadata(object_id, tensors)
        except Exception as error:
            raise_if_interrupt(error)
            raise RDTError(
                f"transport {self.capabilities.name!r} could not describe an object: its "
                f"extract_tensor_transport_metadata raised {type(error).__name__}: {error}"
            ) from error
        parcel = Parcel(object_id, metadata, tensors)
        with self._lock:
            self._live[object_id] = parcel
        device = metadata.tensor_device if metadata.tensor_meta else None
        if device is not None and device not in self.capabilities.devices:
            self.withdraw(parcel)
            devices = ", ".join(sorted(self.capabilities.devices))
            raise ValueError(
                f"transport {self.capabilities.name!r} is registered for tensors on {devices}, but "
                f"its extract_tensor_transport_metadata says that these are on {device}"
            )
        return parcel

    def send(self, route: Route, parcel: Parcel, deadline: Deadline) -> None:
        """Sends an object to the consumer that made the route.

        Runs on: producer, an ``rdt-send`` thread. A send that fails ends the consumer's receive.
        """
        consumer = base64.b64decode(route["consumer"])
        sending = route["transfer"], agent_id_of(consumer), "send_multiple_tensors"
        with self._transfer(*sending) as transfer:
            communicator: Any = CommunicatorMetadata()
            if self._session.is_asker_lost():  # and was, before there was a transfer to end
                raise TransferEnded("the connection to the consumer broke", "broken")
            try:
                if route["note"]:
                    communicator = registered.read_note(route["note"])
                with self._turn(self._sending, deadline):
                    transfer.start(
                        lambda: self.manager.send_multiple_tensors(
                            parcel.tensors, parcel.metadata, communicator
                        )
                    )
                    self._wait(transfer, parcel.object_id, communicator, deadline)
            except BaseException as error:
                self._tell_end(consumer, transfer.id, error)
                raise

    def withdraw(self, parcel: Parcel) -> None:
        """Has the user's code give back what it took for an object. Returns at once.

        Runs on: producer, the reaper thread; the user's code on ``rdt-user-gc``.
        """
        with self._lock:
            if self._live.pop(parcel.object_id, None) is None:
                return
            if self._collector is None:
                self._collector = threading.Thread(target=self._collect, name="rdt-user-gc")
                self._collector.start()
        self._garbage.put(parcel)

    def _collect(self) -> None:
        """Runs on: the rdt-user-gc thread, until the transport is closed."""
        for parcel in iter(self._garbage.get, None):
            arguments = parcel.object_id, parcel.metadata, parcel.tensors
            action = partial(self.manager.garbage_collect, *arguments)
            try:
                _call("garbage_collect", action, Deadline.after(settings().fetch_timeout_s))
            except Exception:
                logger.warning(
                    "transport %r could not give back object %s",
                    *(self.capabilities.name, parcel.object_id),
                    exc_info=True,
                )
            del parcel, arguments, action

    # Consumer.

    def pull(
        self,
        peer: Peer,
        shipment: Shipment,
        targets: Sequence[Any] | None,
        ask: Ask,
        deadline: Deadline,
    ) -> list[Any]:
        """Has the user's code receive an object.

        Runs on: consumer, the thread that fetches; the user's code on ``rdt-user``. What a call
        that hangs writes after the deadline is out of our hands.

        Args:
            peer: Who has it.
            shipment: What came with the value.
            targets: Tensors to receive into, None for new ones.
            ask: Asks the peer's process to hold the object, or to send it.
            deadline: When the caller gives up.

        Raises:
            TransportUnavailable: this process or that one cannot use the transport.
            ValueError: it received something else than was sent.
        """
        communicator = self._communicator(shipment, deadline)
        receiving = secrets.token_hex(16), peer.agent_id, "receive"
        with (
            self._transfer(*receiving) as transfer,
            self._turn(self._receiving, deadline),
            _noted(transfer.id, communicator) as note,
        ):
            try:
                self._ask(ask, transfer, note)
                transfer.start(lambda: self._fetch(shipment, communicator, targets, deadline))
                received = self._wait(transfer, shipment.object_id, communicator, deadline)
            except BaseException as error:
                culprit = self._blame(peer.address, transfer.id, error)
                if culprit is error:
                    raise
                raise culprit from error
        if not isinstance(received, (list, tuple)) or len(received) != shipment.size:
            count = len(received) if isinstance(received, (list, tuple)) else type(received)
            raise ValueError(
                f"transport {self.capabilities.name!r} received {count} tensors, "
                f"{shipment.size} were sent"
            )
        return list(received)

    def _blame(self, producer: bytes, transfer_id: str, error: BaseException) -> BaseException:
        """Ends the producer's part of a transfer that failed here; returns what made it fail.

        A call of the user's code may fail because the producer's did, or because that is gone, and
        before either is known here.
        """
        is_own = isinstance(error, (TimeoutError, TransferEnded, TransportUnavailable))
        if is_own or is_interrupt(error) or not isinstance(error, Exception):
            self._tell_end(producer, transfer_id, error)
            return error
        try:
            body = {"transfer": transfer_id, "reason": _reason(error)}
            answer = self._session.call(producer, self._end_op, body, _END_S)
        except Exception as lost:
            raise_if_interrupt(lost)
            return lost if isinstance(lost, TransferFailed) and lost.peer_lost else error
        return TransferEnded(answer["reason"]) if answer["reason"] else error

    def _ask(self, ask: Ask, transfer: _Transfer, note: str) -> None:
        if not self.capabilities.two_sided:
            ask("rdt.expose", {})
            return
        own_address = base64.b64encode(self._session.address).decode()
        ask("rdt.send", {"transfer": transfer.id, "note": note, "consumer": own_address})

    def _fetch(
        self,
        shipment: Shipment,
        communicator: Any,
        targets: Sequence[Any] | None,
        deadline: Deadline,
    ) -> Any:
        """Runs on: an rdt-user thread."""
        request = self.manager.fetch_multiple_tensors(
            shipment.object_id,
            shipment.metadata,
            communicator,
            None if targets is None else list(targets),
        )
        left = deadline.left_s()
        return self.manager.wait_fetch_complete(request, left)

    def _communicator(self, shipment: Shipment, deadline: Deadline) -> Any:
        producer, consumer = _actor(shipment.producer), ray_core.own_actor_handle()
        if consumer is not None:
            # The main thread may be what waits here, and so could not run a call of its own actor.
            consumer.__ray_call__ = _CallHere()
            ask = partial(self.manager.actor_has_tensor_transport, consumer)
            if not _call("actor_has_tensor_transport", ask, deadline):
                raise TransportUnavailable(f"it says that actor {consumer} cannot use it")
        get = partial(self.manager.get_communicator_metadata, producer, consumer, self._entry.name)
        return _call("get_communicator_metadata", get, deadline)

    # Both.

    @contextmanager
    def _transfer(self, transfer_id: str, peer_id: bytes, what: str) -> Iterator[_Transfer]:
        transfer = _Transfer(transfer_id, peer_id, what)
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
                    self._note_end(transfer_id, _reason(transfer.error))

    @contextmanager
    def _turn(self, turn: threading.Lock, deadline: Deadline) -> Iterator[None]:
        while not turn.acquire(timeout=min(_SLICE_S, deadline.left_s())):
            if deadline.has_passed():
                raise TimeoutError("another transfer of this process kept the transport busy")
            raise_if_cancelled()
        try:
            yield
        finally:
            turn.release()

    def _wait(
        self, transfer: _Transfer, object_id: str, communicator: Any, deadline: Deadline
    ) -> Any:
        """Waits for the user's code; if that fails, aborts it where it can be."""
        try:
            return transfer.wait(deadline)
        except BaseException:
            if self.capabilities.abortable:
                self._abort(object_id, communicator)
            raise

    def _abort(self, object_id: str, communicator: Any) -> None:
        abort = partial(self.manager.abort_transport, object_id, communicator)
        try:
            _call("abort_transport", abort, Deadline.after(_END_S))
        except Exception as error:
            raise_if_interrupt(error)
            name = self.capabilities.name
            logger.warning("transport %r could not abort %s", name, object_id, exc_info=True)

    def _tell_end(self, peer: bytes, transfer_id: str, error: BaseException) -> None:
        if not isinstance(error, TransferEnded):
            body = {"transfer": transfer_id, "reason": _reason(error)}
            self._session.send_oneway(peer, self._end_op, body)

    def _on_end(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """The other side has failed. Answers with what had failed here before, "" for nothing."""
        transfer_id = body["transfer"]
        with self._lock:
            transfer = self._running.get(transfer_id)
            if transfer is None:
                return {"reason": self._ended.get(transfer_id) or self._note_end(transfer_id, "")}
        if transfer.peer_id != peer_id:
            return {"reason": ""}
        transfer.end(error=TransferEnded(str(body["reason"])))
        error = transfer.error
        return {"reason": "" if isinstance(error, TransferEnded) else _reason(error)}

    def _note_end(self, transfer_id: str, reason: str) -> str:
        """Holds ``_lock``."""
        self._ended[transfer_id] = reason
        if len(self._ended) > _REMEMBERED_ENDS:
            self._ended.popitem(last=False)
        return reason

    def _on_peer_lost(self, peer_id: bytes) -> None:
        with self._lock:
            lost = [transfer for transfer in self._running.values() if transfer.peer_id == peer_id]
        for transfer in lost:
            transfer.end(error=TransferEnded("the connection to the other process broke", "broken"))

    def close(self) -> None:
        """Ends all transfers and gives all objects back. Runs on: whoever shuts Ray down."""
        with self._lock:
            self._is_closed = True
            running, live = list(self._running.values()), list(self._live.values())
        for transfer in running:
            transfer.end(error=TransferEnded("Ray is shutting down", "stopped"))
        for parcel in live:
            self.withdraw(parcel)
        self._garbage.put(None)
        if self._collector is not None:
            self._collector.join(_END_S)


class _CallHere:
    """``__ray_call__`` of this process's own actor, run by the thread that calls it."""

    def options(self, **options: Any) -> _CallHere:
        return self

    def remote(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        import ray

        return ray.put(function(ray_core.actor(), *args, **kwargs))


def _reason(error: BaseException | None) -> str:
    return f"the other side failed: {type(error).__name__}: {error}"


@contextmanager
def _noted(transfer_id: str, communicator: Any) -> Iterator[str]:
    """Keeps a communicator's metadata in the GCS for the producer; "" if there is none to tell."""
    if type(communicator) is CommunicatorMetadata:
        yield ""
        return
    registered.publish_note(transfer_id, communicator)
    try:
        yield transfer_id
    finally:
        registered.drop_note(transfer_id)


def own_actor_handle() -> bytes | None:
    """The handle of this process's actor as Ray serializes it, None if it is none."""
    actor = ray_core.own_actor_handle()
    return None if actor is None else actor._serialization_helper()[0]


def _actor(serialized: bytes | None) -> Any:
    """The handle does not keep the actor alive."""
    import ray

    if serialized is None:
        return None
    return ray.actor.ActorHandle._deserialization_helper(serialized, True, None)
