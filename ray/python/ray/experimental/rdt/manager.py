"""Entry points called by Ray's worker. One object per process: ``global_worker.rdt_manager``.

Creating it starts nothing. The session begins when an object is stored, moved or awaited.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from ray.experimental.rdt import session_parts
from ray.experimental.rdt.common.real_threads import Lock, Thread
from ray.experimental.rdt.consumer.consumer import Consumer
from ray.experimental.rdt.consumer.fetcher import Fetcher
from ray.experimental.rdt.consumer.recovery import Recovery
from ray.experimental.rdt.groups.service import GroupService
from ray.experimental.rdt.observe.explainer import Explainer
from ray.experimental.rdt.owner.owner import Owner, OwnerServices
from ray.experimental.rdt.producer.producer import Producer, StoreByObjectId
from ray.experimental.rdt.session_parts import CurrentParts
from ray.experimental.rdt.transports.base import Transport

if TYPE_CHECKING:
    from ray.experimental.rdt.transports.nixl.transport import NixlTransport

logger = logging.getLogger("ray.rdt")


class RDTManager:
    """The three parties of one process, for Ray's worker.

    Attributes:
        rdt_store: The stored tensors by object id, for Ray's own tests.
    """

    def __init__(self) -> None:
        parts = self._parts = CurrentParts(
            lambda current: session_parts.build(current, self.producer, self.owner, self.stats)
        )
        self.owner = Owner(lambda: parts.get().owner, self._peek_owner)
        self.producer = Producer(
            lambda: parts.get().producer, self._find_nixl, self.owner.record_put
        )
        store = self.producer.store
        fetcher = Fetcher(store, lambda: parts.get().consumer)
        recovery = Recovery(self.owner.reconstruction, fetcher, lambda: parts.get().session)
        self.consumer = Consumer(store, fetcher, recovery)
        self.rdt_store = StoreByObjectId(self.producer)
        # What Ray's worker and core call at a producer ...
        self.serialize = self.producer.serialize
        self.keep = self.producer.keep
        self.put_object = self.producer.put_object
        # ... at an owner ...
        self.submit = self.owner.submit
        self.open_stream = self.owner.open_stream
        self.note_arguments = self.owner.note_arguments
        self.hold_arguments = self.owner.hold_arguments
        self.get_rdt_metadata = self.owner.row
        self.set_tensor_transport_metadata_and_trigger_queued_operations = self.owner.created
        # ... and at a consumer.
        self.fetch = self.consumer.fetch
        self.fetch_or_defer = self.consumer.fetch_or_defer

    def queue_or_free_object_primary_copy(self, object_id: str) -> None:
        """Note that the last reference to an object is gone. Runs on: owner, core io thread."""
        self.consumer.targets.forget(object_id)
        self.owner.out_of_scope(object_id)

    def is_managed_object(self, object_id: str) -> bool:
        """Tell whether this process owns an RDT object of this id (hex)."""
        return self.owner.row(object_id) is not None

    @property
    def has_targets(self) -> bool:
        """Tell whether a user wants some object received into tensors or on a device."""
        return len(self.consumer.targets) > 0

    def stats(self) -> dict[str, int]:
        parts = self._parts.peek()
        of_session = {"hinted_bytes": 0, "exposed": 0, "streams": 0}
        return {
            **self.producer.stats(),
            **self.owner.stats(),
            **(of_session if parts is None else parts.stats()),
        }

    def begin_nixl(self) -> None:
        """Start nixl in the background, because that takes up to a second."""
        Thread(target=self._begin_nixl, name="rdt-nixl-begin").start()

    def _begin_nixl(self) -> None:
        """Runs on: an rdt-nixl-begin thread."""
        try:
            cast("NixlTransport", self.transport("nixl")).endpoint()
        except Exception:  # reported when an object would use it, or Ray is shutting down
            logger.debug("RDT could not start nixl ahead of time", exc_info=True)

    def transport(self, name: str) -> Transport:
        """Return a transport of this process by lower-case name. Raises TransportUnavailable."""
        return self._parts.get().producer.transports.get(name)

    def _peek_owner(self) -> OwnerServices | None:
        parts = self._parts.peek()
        return None if parts is None else parts.owner

    def _find_nixl(self) -> NixlTransport | None:
        parts = self._parts.peek()
        return cast("NixlTransport | None", parts and parts.producer.transports.peek("nixl"))

    def explainer(self) -> Explainer:
        return self._parts.get().explainer

    def groups(self) -> GroupService:
        """Return the part that creates collective groups; begin a session if there is none."""
        return self._parts.get().groups

    def peek_groups(self) -> GroupService | None:
        """Return the part that creates collective groups, None if no session has begun."""
        parts = self._parts.peek()
        return None if parts is None else parts.groups

    def shutdown(self) -> None:
        """End this process's part in RDT. Runs on: the thread of ``ray.shutdown``."""
        self.consumer.close()
        self.owner.close()
        self._parts.end()
        self.producer.close()


_creating = Lock()


def make_manager(worker: Any) -> None:
    """Create the manager of Ray's worker, once for all threads. Runs on: any thread."""
    with _creating:
        if worker._rdt_manager is None:
            worker._rdt_manager = RDTManager()
