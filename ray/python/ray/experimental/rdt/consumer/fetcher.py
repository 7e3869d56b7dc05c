"""Brings the tensors of RDT values to the process that deserializes them.

Runs on: consumer, the thread that deserializes; blocks without the GIL and holds no lock. All
objects of a batch move at once. Bytes land in their final memory: a block of the receive pool or
the user's own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.exceptions import GetTimeoutError, RayError

from ray.experimental.rdt.accelerators.device_failures import is_device_failure, is_out_of_memory
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.errors import (
    FetchContext,
    RDTChecksumError,
    RDTFetchError,
    RDTFetchTimedOutError,
    RDTProducerDiedError,
)
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.common.interrupts import raise_if_interrupt
from ray.experimental.rdt.consumer import transfer as lanes
from ray.experimental.rdt.consumer.device_transfer import PerDevice
from ray.experimental.rdt.consumer.receive_buffers import move
from ray.experimental.rdt.consumer.targets import ANYWHERE, Target
from ray.experimental.rdt.rpc.checksums import ChecksumMismatch
from ray.experimental.rdt.serialization.envelope import Envelope

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.producer.tensor_store import Store
    from ray.experimental.rdt.session_services import Links


@dataclass(frozen=True)
class Request:
    """One object to fetch.

    Attributes:
        object_id: Its id in hex, "" if the value came without a reference.
        envelope: The value as it arrived.
        target: The user's target.
    """

    object_id: str
    envelope: Envelope
    target: Target = ANYWHERE


@dataclass(frozen=True)
class Arrival:
    """A value whose tensors are here. Ray's deserializer calls ``unpickle``."""

    envelope: Envelope
    tensors: Sequence[torch.Tensor]

    def unpickle(self) -> list[Any]:
        return self.envelope.restore(self.tensors)


class Fetcher:
    """Fetches for one process.

    Args:
        store: What this process produced itself.
        links: Gives the process's session and its parts; called only if bytes have to move.
    """

    def __init__(self, store: Store, links: Callable[[], Links]):
        self._store = store
        self._links = links

    def fetch(
        self, requests: Sequence[Request], timeout_s: float | None
    ) -> list[Arrival | RayError]:
        """Fetches all at once.

        Args:
            requests: The objects.
            timeout_s: The user's patience, None for only RDT's own.

        Returns:
            For each request its arrival or the error to give to the user in its place.

        Raises:
            GetTimeoutError: the user's timeout passed first.
        """
        patience = _fetch_deadline(timeout_s)
        transfers: list[lanes.Transfer | RayError] = []
        try:
            for request in requests:
                transfers.append(self._begin(request, patience))
            return [
                self._finish(request, transfer, patience)
                for request, transfer in zip(requests, transfers)
            ]
        except GetTimeoutError:
            # As in plain Ray, what is on its way goes on: the user may ask again.
            for request, transfer in zip(requests, transfers):
                if isinstance(transfer, lanes.FromAgent):
                    transfer.leave_to(self._links().prefetcher, request.envelope.head)
            raise
        finally:
            for transfer in transfers:
                if not isinstance(transfer, RayError):
                    transfer.abandon()

    def _begin(self, request: Request, patience: FetchDeadline) -> lanes.Transfer | RayError:
        return _attempt(request, lambda: self._start(request, patience.deadline), patience)

    def _start(self, request: Request, deadline: Deadline) -> lanes.Transfer:
        head = request.envelope.head
        stored = self._store.by_key(head.key)
        if stored is not None:
            for event in stored.captured.events:
                event.order()
            return lanes.Here(stored.captured, request.target.tensors)
        if request.envelope.eager is not None:
            return lanes.Eager(request.envelope, request.target.tensors)
        if request.envelope.table.devices:
            return PerDevice(self._links(), request.envelope, request.target, deadline)
        return lanes.choose(self._links(), request.envelope, request.target.tensors, deadline)

    def _finish(
        self, request: Request, transfer: lanes.Transfer | RayError, patience: FetchDeadline
    ) -> Arrival | RayError:
        if isinstance(transfer, RayError):
            return transfer

        def finish() -> Arrival:
            tensors = transfer.finish(patience.deadline)
            device = request.target.device
            if device is not None:
                left_s = patience.deadline.left_s()
                tensors = move(tensors, device, left_s)
            return Arrival(request.envelope, tensors)

        return _attempt(request, finish, patience, lambda: transfer.lane)


@dataclass(frozen=True)
class FetchDeadline:
    """Until when a fetch may take, and whether that is the user's limit or RDT's own."""

    deadline: Deadline
    is_of_user: bool

    def is_over(self, error: Exception) -> bool:
        """Whether the user's time ended a step that failed like this."""
        is_late = isinstance(error, TimeoutError) or self.deadline.has_passed()
        return self.is_of_user and is_late and not _is_final(error)


def _fetch_deadline(timeout_s: float | None) -> FetchDeadline:
    own = settings().fetch_timeout_s
    if timeout_s is not None and 0 <= timeout_s < own:
        return FetchDeadline(Deadline.after(timeout_s), True)
    return FetchDeadline(Deadline.after(own), False)


def _attempt(
    request: Request,
    action: Callable[[], Any],
    patience: FetchDeadline,
    lane: Callable[[], str] = lambda: "",
) -> Any:
    """Runs one step of a fetch; an error becomes the object's value, as in plain Ray."""
    try:
        return action()
    except Exception as error:
        raise_if_interrupt(error)
        if patience.is_over(error):
            raise GetTimeoutError(
                f"ray.get timed out while RDT object {request.object_id} was on its way"
            ) from error
        return as_fetch_error(request.object_id, request.envelope.head, error, lane())


def as_fetch_error(
    object_id: str, head: Descriptor, error: Exception, lane: str = ""
) -> RDTFetchError:
    """The error that the user sees for a failed fetch; keeps the cause."""
    context = FetchContext(object_id, head.transport, lane, lanes.describe_peer(head))
    failure = _classify(context, error)
    failure.__cause__ = error
    return failure


def _classify(context: FetchContext, error: Exception) -> RDTFetchError:
    failures = _failures(error)
    if isinstance(error, TimeoutError):
        return RDTFetchTimedOutError(
            context,
            f"it did not arrive within {settings().fetch_timeout_s:g} s ({error}).",
            "Look whether the producer is stopped or its network is cut; the limit is "
            "RAY_rdt_fetch_fail_timeout_milliseconds.",
        )
    if any(each.peer_lost for each in failures):
        return RDTProducerDiedError(
            context,
            f"the process that holds the tensors is gone ({error}).",
            "Make it again; max_restarts with max_task_retries, or a task's max_retries, let Ray "
            "do that.",
        )
    if isinstance(error, ChecksumMismatch):
        return RDTChecksumError(
            context,
            f"{error}.",
            "A tensor that is changed in place after the first consumer has pulled it does this: "
            "call wait_tensor_freed before. Else memory or network of one of the hosts is bad.",
        )
    return RDTFetchError(context, *_reason_and_advice(error, {each.code for each in failures}))


def _reason_and_advice(error: Exception, codes: set[str]) -> tuple[str, str]:
    if "not_found" in codes:
        return (
            "the producer does not hold it any more: every reference to it had gone out of scope, "
            "or its owner died.",
            "Keep an ObjectRef to it while others need it.",
        )
    if "changed" in codes:
        return (
            f"{error}.",
            "Free or resize a tensor's storage only when wait_tensor_freed says that nobody needs "
            "it, or return a clone.",
        )
    of_device = _reason_of_device(error)
    if of_device is not None:
        return of_device
    if isinstance(error, MemoryError):
        return (
            "this process could not get the memory to receive it into.",
            "Drop tensors that it holds, fetch fewer at a time, or give it more memory.",
        )
    if isinstance(error, ImportError):
        return (
            f"this process cannot hold tensors: {error}.",
            f"Install {error.name} in the environment of this worker.",
        )
    return f"{type(error).__name__}: {str(error).rstrip('.')}.", "See the cause above."


def _reason_of_device(error: Exception) -> tuple[str, str] | None:
    if is_out_of_memory(error):
        return (
            f"this process could not get the device memory to receive it into: {error}",
            "Drop tensors that this process or others hold on the device, fetch fewer at a time, "
            "receive into tensors that you have (set_target_for_ref), or share the producer's "
            'memory (tensor_transport="cuda_ipc", both on one GPU). torch keeps freed memory for '
            "itself: torch.cuda.empty_cache() gives it to other processes.",
        )
    if any(map(is_device_failure, _chain(error))):
        return (
            f"a device has failed, of this process or of the producer's: {error}.",
            "Every use of it by that process fails from now on: restart its actor. A kernel that "
            "ran before is the cause; CUDA_LAUNCH_BLOCKING=1 tells which.",
        )
    return None


def _failures(error: BaseException) -> list[TransferFailed]:
    """The typed failures among an error and its causes: a transport may wrap the agent's."""
    return [each for each in _chain(error) if isinstance(each, TransferFailed)]


def _is_final(error: BaseException) -> bool:
    """Tell whether more time would not bring the object either."""
    return any(each.peer_lost or each.code in ("not_found", "changed") for each in _failures(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    # Users' code may raise an error that is its own cause.
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
