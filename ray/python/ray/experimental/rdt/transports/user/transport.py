"""Objects that the code of users moves: ``TensorTransportManager`` behind RDT's own requests.

The metadata that a user's code extracts for an object travels in the Ray value, which Ray unpickles
in any case. The communicator's metadata for one transfer goes through Ray's GCS, as functions do.
RDT unpickles no bytes that arrived over an agent's connection.

Threads: the user's code runs on daemon threads ``rdt-user``. ``extract_tensor_transport_metadata``
runs on the thread of the task, whose devices and streams it sees.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.common.failures import raise_if_interrupt
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import Session, agent_id_of
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
)
from ray.experimental.rdt.transports import base
from ray.experimental.rdt.transports.calls import call
from ray.experimental.rdt.transports.user import registered, transfers

logger = logging.getLogger("ray.rdt")

#: Half the length of the object IDs that users get: they have as many hex digits as Ray's own.
_OBJECT_ID_BYTES = 28

#: How long the user's code may take to abort, and to free objects when Ray shuts down.
_END_S = 5.0

#: Asks the producer's process: op and route in, its answer out.
Ask = Callable[[str, base.Route], base.Route]


class UserTransport:
    """The use that one process makes of a user's transport, with ``manager``, the user's object."""

    def __init__(self, session: Session, entry: registered.RegisteredTransport):
        self._session = session
        self._entry = entry
        self.manager: TensorTransportManager = call(
            "constructor", entry.manager_class, Deadline.after(settings().fetch_timeout_s)
        )
        self.data_type = entry.data_type
        self.capabilities = base.Capabilities(
            entry.name.lower(),
            frozenset(entry.devices),
            two_sided=not entry.manager_class.is_one_sided(),
            abortable=entry.manager_class.can_abort_transport(),
            is_user_defined=True,
        )
        self._transfers = transfers.Transfers(session, entry.name)
        self._lock = threading.Lock()
        self._live: dict[str, base.UserObject] = {}
        self._freed: threading.SimpleQueue[base.UserObject | None] = threading.SimpleQueue()
        self._freer: threading.Thread | None = None

    # Producer.

    def describe(self, tensors: list[Any]) -> base.UserObject:
        """Extract the metadata of a new object by the user's code.

        Runs on: producer, the thread of the task.

        Raises:
            RDTError: The user's code raised; its error is the cause.
            ValueError: The metadata names a device that the transport was not registered for.
        """
        object_id = secrets.token_hex(_OBJECT_ID_BYTES)
        try:
            metadata = self.manager.extract_tensor_transport_metadata(object_id, tensors)
        except Exception as error:  # the user's code may raise anything
            raise_if_interrupt(error)
            raise RDTError(
                f"transport {self.capabilities.name!r} could not describe an object: its "
                f"extract_tensor_transport_metadata raised {type(error).__name__}: {error}"
            ) from error
        user_object = base.UserObject(object_id, metadata, tensors)
        with self._lock:
            self._live[object_id] = user_object
        device = metadata.tensor_device if metadata.tensor_meta else None
        if device is not None and device not in self.capabilities.devices:
            self.withdraw(user_object)
            devices = ", ".join(sorted(self.capabilities.devices))
            raise ValueError(
                f"transport {self.capabilities.name!r} is registered for tensors on {devices}, but "
                f"its extract_tensor_transport_metadata says that these are on {device}"
            )
        return user_object

    def send(self, route: base.Route, user_object: base.UserObject, deadline: Deadline) -> None:
        """Send an object to the consumer that made the route.

        Runs on: producer, an ``rdt-send`` thread. A failed send ends the consumer's receive.
        """
        consumer = route["consumer"]
        sending = route["transfer"], agent_id_of(consumer), "send_multiple_tensors"
        with self._transfers.running(*sending) as transfer:
            communicator: Any = CommunicatorMetadata()
            if self._session.is_asker_lost():  # before there was a transfer to end
                raise transfers.TransferEnded("the connection to the consumer broke", "broken")
            try:
                if route["note"]:
                    communicator = registered.read_note(route["note"])
                with transfers.exclusively(self._transfers.sending, deadline):
                    transfer.start(
                        lambda: self.manager.send_multiple_tensors(
                            user_object.tensors, user_object.metadata, communicator
                        )
                    )
                    self._wait(transfer, user_object.object_id, communicator, deadline)
            except BaseException as error:  # the consumer waits, whatever failed
                self._transfers.report_failure(consumer, transfer.id, error)
                raise

    def withdraw(self, user_object: base.UserObject) -> None:
        """Free an object by the user's code. Returns at once.

        Runs on: producer, the reaper thread; the user's code on ``rdt-user-gc``.
        """
        with self._lock:
            if self._live.pop(user_object.object_id, None) is None:
                return
            if self._freer is None:
                self._freer = threading.Thread(target=self._run_freer, name="rdt-user-gc")
                self._freer.start()
        self._freed.put(user_object)

    def _run_freer(self) -> None:
        """Runs on: the rdt-user-gc thread, until the transport is closed."""
        for user_object in iter(self._freed.get, None):
            arguments = user_object.object_id, user_object.metadata, user_object.tensors
            action = partial(self.manager.garbage_collect, *arguments)
            try:
                call("garbage_collect", action, Deadline.after(settings().fetch_timeout_s))
            except Exception:  # other objects are freed all the same
                logger.warning(
                    "transport %r could not free object %s",
                    *(self.capabilities.name, user_object.object_id),
                    exc_info=True,
                )
            del user_object, arguments, action

    # Consumer.

    def pull(
        self,
        peer: base.Peer,
        user_description: base.UserDescription,
        targets: Sequence[Any] | None,
        ask: Ask,
        deadline: Deadline,
    ) -> list[Any]:
        """Receive an object by the user's code.

        Runs on: consumer, the fetching thread; the user's code on ``rdt-user``. A call that hangs
        may still write after the deadline.

        Args:
            targets: Tensors to receive into, None for new ones.
            ask: Asks the peer's process to hold the object, or to send it.

        Raises:
            TransportUnavailable: One of the processes cannot use the transport.
            ValueError: The user's code returned another number of tensors than was sent.
        """

        def fetch() -> Any:
            """Runs on: an rdt-user thread."""
            wanted = None if targets is None else list(targets)
            request = self.manager.fetch_multiple_tensors(
                user_description.object_id, user_description.metadata, communicator, wanted
            )
            return self.manager.wait_fetch_complete(request, deadline.left_s())

        communicator = self._communicator(user_description, deadline)
        receiving = secrets.token_hex(16), peer.agent_id, "receive"
        with (
            self._transfers.running(*receiving) as transfer,
            transfers.exclusively(self._transfers.receiving, deadline),
            _noted(transfer.id, communicator) as note,
        ):
            try:
                if self.capabilities.two_sided:
                    own = self._session.address
                    ask(protocol.SEND, {"transfer": transfer.id, "note": note, "consumer": own})
                else:
                    ask(protocol.EXPOSE, {})
                transfer.start(fetch)
                received = self._wait(transfer, user_description.object_id, communicator, deadline)
            except BaseException as error:  # the producer waits, whatever failed
                cause = self._transfers.find_cause(peer.address, transfer.id, error)
                if cause is error:
                    raise
                raise cause from error
        if not isinstance(received, (list, tuple)) or len(received) != user_description.size:
            count = len(received) if isinstance(received, (list, tuple)) else type(received)
            raise ValueError(
                f"transport {self.capabilities.name!r} received {count} tensors, "
                f"{user_description.size} were sent"
            )
        return list(received)

    def _communicator(self, user_description: base.UserDescription, deadline: Deadline) -> Any:
        producer, consumer = (
            transfers.actor_of(user_description.producer),
            transfers.own_actor_for_calls(),
        )
        if consumer is not None:
            ask = partial(self.manager.actor_has_tensor_transport, consumer)
            if not call("actor_has_tensor_transport", ask, deadline):
                raise base.TransportUnavailable(f"it says that actor {consumer} cannot use it")
        get = partial(self.manager.get_communicator_metadata, producer, consumer, self._entry.name)
        return call("get_communicator_metadata", get, deadline)

    def _wait(
        self, transfer: transfers.Transfer, object_id: str, communicator: Any, deadline: Deadline
    ) -> Any:
        """Wait for the user's code; if it fails, abort it where it is abortable."""
        try:
            return transfer.wait(deadline)
        except BaseException:  # also Ctrl-C: the user's call still runs
            if self.capabilities.abortable:
                self._abort(object_id, communicator)
            raise

    def _abort(self, object_id: str, communicator: Any) -> None:
        abort = partial(self.manager.abort_transport, object_id, communicator)
        try:
            call("abort_transport", abort, Deadline.after(_END_S))
        except Exception as error:  # the failure that led here is the one to report
            raise_if_interrupt(error)
            name = self.capabilities.name
            logger.warning("transport %r could not abort %s", name, object_id, exc_info=True)

    def close(self) -> None:
        """End all transfers and free all objects. Runs on: the thread that shuts Ray down."""
        self._transfers.close()
        with self._lock:
            live = list(self._live.values())
        for user_object in live:
            self.withdraw(user_object)
        self._freed.put(None)
        if self._freer is not None:
            self._freer.join(_END_S)


@contextmanager
def _noted(transfer_id: str, communicator: Any) -> Iterator[str]:
    """Keep a communicator's metadata in the GCS for the producer; give "" if there is none."""
    if type(communicator) is CommunicatorMetadata:
        yield ""
        return
    registered.publish_note(transfer_id, communicator)
    try:
        yield transfer_id
    finally:
        registered.drop_note(transfer_id)
