"""The consumer of RDT objects: brings the tensors of values that Ray deserializes."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ray._private import ray_constants
from ray.exceptions import RayTaskError

from ray.experimental.rdt.common import descriptor, ray_core
from ray.experimental.rdt.common.thread_role import must_not_block, without_turn
from ray.experimental.rdt.consumer import argument_context, targets
from ray.experimental.rdt.consumer.deferred import Deferred, Puller
from ray.experimental.rdt.consumer.fetcher import FetchedValue, Fetcher, Request, as_fetch_error
from ray.experimental.rdt.consumer.recovery import Recovery, Result
from ray.experimental.rdt.serialization.envelope import open_envelope

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt._tensors import Table
    from ray.experimental.rdt.producer.tensor_store import TensorStore

#: The metadata of values that are neither RDT objects nor errors.
_PLAIN_METADATA = (
    ray_constants.OBJECT_METADATA_TYPE_PYTHON,
    ray_constants.OBJECT_METADATA_TYPE_RAW,
    ray_constants.OBJECT_METADATA_TYPE_CROSS_LANGUAGE,
)

#: One request of a batch: the object's key, and the position that has targets of its own, if any.
_Slot = tuple[bytes, "int | None"]


class Consumer:
    """The consumer side of one process.

    Attributes:
        targets: The tensors and devices that users want objects received into.
    """

    def __init__(self, store: TensorStore, fetcher: Fetcher, recovery: Recovery):
        self._store = store
        self._fetcher = fetcher
        self._recovery = recovery
        self._puller = Puller()
        self.targets = targets.Targets()

    def fetch(
        self,
        serialized: Sequence[Any],
        refs: Sequence[Any],
        timeout_s: float | None = None,
        into: Mapping[int, Sequence[torch.Tensor]] = MappingProxyType({}),
    ) -> dict[int, Result]:
        """Fetch the tensors of all RDT values in a batch.

        Runs on: consumer, the thread that deserializes, before Ray's deserialization lock.

        Args:
            serialized: (data, metadata, transport) of each object.
            refs: Their references; None where there is none.
            timeout_s: The user's timeout, if any.
            into: By position in the batch, tensors to receive into.

        Returns:
            By position in the batch: the input of Ray's deserializer for the value, or the error
            that replaces it.

        Raises:
            GetTimeoutError: The user's timeout passed first.
            ValueError: A target does not fit its tensor, or is for no RDT object. Nothing has
                moved.
        """
        began = time.monotonic()
        # One request for each object, and one more for each that has targets of its own.
        requests: dict[_Slot, Request] = {}
        slots: dict[int, _Slot] = {}
        results: dict[int, Result] = {}
        for index, ((data, metadata, _), ref) in enumerate(zip(serialized, refs)):
            ref = None if ref is None or ref.is_nil() else ref
            object_id = "" if ref is None else ref.hex()
            if descriptor.is_rdt(metadata):
                try:
                    envelope = open_envelope(metadata, data)
                    target = self._target(object_id, envelope.table, into.get(index))
                except ImportError as error:  # torch is not installed
                    failed = descriptor.decode(metadata)
                    results[index] = as_fetch_error(object_id, failed, error)
                    continue
                slot = slots[index] = envelope.head.key, index if index in into else None
                requests.setdefault(slot, Request(object_id, envelope, target, ref))
            elif metadata in _PLAIN_METADATA:
                self.targets.refuse_plain(object_id)
        arrivals = self._receive(list(requests.values()), began, timeout_s)
        by_slot = dict(zip(requests, arrivals))
        return results | {index: by_slot[slot] for index, slot in slots.items()}

    def _receive(
        self, requests: Sequence[Request], began: float, timeout_s: float | None
    ) -> list[Result]:
        # No local name for the errors: their tracebacks lead to this frame and would keep the
        # references of the lost objects alive until a collection.
        arrivals = self._recovery.replace_lost(
            requests, self._fetcher.fetch(requests, timeout_s), began, timeout_s
        )
        for request, arrival in zip(requests, arrivals):
            if isinstance(arrival, FetchedValue):
                self.targets.received(request.object_id, request.target)
        return arrivals

    def fetch_or_defer(
        self, serialized: Sequence[Any], refs: Sequence[Any]
    ) -> dict[int, Result | Deferred]:
        """Fetch for the core, whose io thread and event loops must not wait.

        Runs on: consumer, the thread on which the core deserializes.

        Returns:
            As ``fetch``, with a ``Deferred`` for each value whose tensors are in another process.
        """
        if not must_not_block():
            into = argument_context.targets_of_running_task(serialized)
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
        """Fetch one by one; the error of a target that does not fit replaces the value.

        Ray discards what is raised here.

        Runs on: Ray's io thread, or an event loop.
        """
        results: dict[int, Result] = {}
        for index, (value, ref) in enumerate(zip(serialized, refs)):
            try:
                found = self.fetch([value], [ref])
            except ValueError as error:
                found = {0: RayTaskError("ray.get", traceback.format_exc(), error)}
            if found:
                results[index] = found[0]
        return results

    def _has_to_move(self, metadata: bytes) -> bool:
        if not descriptor.is_rdt(metadata):
            return False
        head = descriptor.decode(metadata)
        is_here = head.is_eager or self._store.by_key(head.key) is not None
        return not is_here or argument_context.are_expected()

    def _deserialize(self, value: Any, ref: Any, into: Sequence[torch.Tensor] | None) -> Any:
        """Fetch and deserialize one value. Runs on: an rdt-pull thread."""
        arrived = self.fetch([value], [ref], into={} if into is None else {0: into})
        with without_turn():
            return ray_core.deserialize(value, ref, arrived)

    def _target(
        self, object_id: str, table: Table, into: Sequence[torch.Tensor] | None
    ) -> targets.Target:
        if into is not None:
            return targets.into(into, table)
        return self.targets.of(object_id, table)

    def close(self) -> None:
        """End deferred pulls and forget targets. Runs on: the thread that shuts Ray down."""
        self._puller.close()
        self._puller = Puller()
        self.targets.clear()
