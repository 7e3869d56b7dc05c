"""The fetch of the tensors of RDT values, for the process that deserializes them.

Runs on: consumer, the thread that deserializes. Blocks without the GIL and holds no lock. All
objects of a batch are transferred at once. Bytes are received into their final memory: a block of
the receive pool or the user's own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.exceptions import GetTimeoutError, RayError

from ray.experimental.rdt.accelerators.device_failures import is_device_failure, is_out_of_memory
from ray.experimental.rdt.common import errors
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.failures import TransferFailed, raise_if_interrupt
from ray.experimental.rdt.consumer.agent_transfer import AgentTransfer
from ray.experimental.rdt.consumer.device_transfer import DeviceTransfer
from ray.experimental.rdt.consumer.fallback import TransportFallbackChain, describe_peer
from ray.experimental.rdt.consumer.planner import Candidate, Kind, TransferObject, plan_transfer
from ray.experimental.rdt.consumer.receive_buffers import HostDestination, move
from ray.experimental.rdt.consumer.targets import ANYWHERE, Target
from ray.experimental.rdt.consumer.transfer import (
    InlineTransfer,
    LocalTransfer,
    Transfer,
    TransferServices,
)
from ray.experimental.rdt.consumer.transport_transfer import TransportAttempt
from ray.experimental.rdt.consumer.user_transfer import UserTransfer
from ray.experimental.rdt.rpc.checksums import ChecksumMismatch
from ray.experimental.rdt.serialization.envelope import Envelope
from ray.experimental.rdt.transports.selection import default_transports

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.producer.tensor_store import TensorStore


@dataclass(frozen=True)
class Request:
    """One object to fetch.

    Attributes:
        object_id: Its id in hex, "" if the value came without a reference.
        target: The place that the user chose for the tensors.
        ref: Its reference, None if the value came without one.
    """

    object_id: str
    envelope: Envelope
    target: Target = ANYWHERE
    ref: Any = None


@dataclass(frozen=True)
class FetchedValue:
    """A value whose tensors have arrived. Ray's deserializer calls ``unpickle``."""

    envelope: Envelope
    tensors: Sequence[torch.Tensor]

    def unpickle(self) -> list[Any]:
        return self.envelope.restore(self.tensors)


class Fetcher:
    """The fetches of one process.

    Args:
        services: Returns the parts of the session; called only if bytes have to be transferred.
    """

    def __init__(self, store: TensorStore, services: Callable[[], TransferServices]):
        self._store = store
        self._services = services

    def fetch(
        self, requests: Sequence[Request], timeout_s: float | None
    ) -> list[FetchedValue | RayError]:
        """Fetch all objects at once.

        Args:
            timeout_s: The user's limit, None for only RDT's own.

        Returns:
            For each request its arrival, or the error that the user gets in its place.

        Raises:
            GetTimeoutError: The user's timeout passed first.
        """
        limit = FetchDeadline.after(timeout_s)
        transfers: list[Transfer | RayError] = []
        try:
            for request in requests:
                start = partial(self._start, request, limit.deadline)
                transfers.append(_attempt(request, start, limit))
            return [
                self._finish(request, transfer, limit)
                for request, transfer in zip(requests, transfers)
            ]
        except GetTimeoutError:
            # As in plain Ray, pulls in progress continue: the user may ask again.
            for transfer in transfers:
                if isinstance(transfer, TransportFallbackChain):
                    transfer.park(self._services().prefetcher.park)
            raise
        finally:
            for transfer in transfers:
                if not isinstance(transfer, RayError):
                    transfer.abandon()

    def _start(self, request: Request, deadline: Deadline) -> Transfer:
        transfer = self._plan(request)
        try:
            transfer.start(deadline)
        except BaseException:  # also if the task was cancelled, so that no byte is written later
            transfer.abandon()
            raise
        return transfer

    def _plan(self, request: Request) -> Transfer:
        """Return the transfer of an object, not started."""
        envelope, target = request.envelope, request.target
        stored = self._store.by_key(envelope.head.key)
        obj = TransferObject.of(envelope, is_local=stored is not None)
        if obj.is_local or obj.is_inline:
            first = next(c for c in plan_transfer(obj, None) if c.serves)
            if first.kind is Kind.LOCAL:
                assert stored is not None
                return LocalTransfer(stored.captured, target.tensors)
            return InlineTransfer(envelope, target.tensors)
        if envelope.table.devices and not obj.is_foreign:
            return DeviceTransfer(self._services(), envelope, target)
        return _host_transfer(self._services(), request, obj)

    def _finish(
        self, request: Request, transfer: Transfer | RayError, limit: FetchDeadline
    ) -> FetchedValue | RayError:
        if isinstance(transfer, RayError):
            return transfer

        def finish() -> FetchedValue:
            tensors = transfer.finish(limit.deadline)
            device = request.target.device
            if device is not None:
                left_s = limit.deadline.left_s()
                tensors = move(tensors, device, left_s)
            return FetchedValue(request.envelope, tensors)

        return _attempt(request, finish, limit, lambda: transfer.lane)


def _host_transfer(
    services: TransferServices, request: Request, obj: TransferObject
) -> TransportFallbackChain:
    """Return the transfer of an object in host memory, or of one that a user's transport moves."""
    envelope, targets = request.envelope, request.target.tensors
    session, head = services.session, envelope.head
    pull = services.prefetcher.take(head.key)
    destination = HostDestination(session, envelope.table, targets)

    def make(candidate: Candidate) -> Transfer:
        if candidate.kind is Kind.PREFETCHED:
            return AgentTransfer(session, head, destination, pull)
        if candidate.kind is Kind.AGENT:
            return AgentTransfer(session, head, destination)
        if obj.is_user_defined:
            return UserTransfer(services, envelope, targets)
        return TransportAttempt(services, candidate.name, head, "cpu", destination)

    obj = obj._replace(default_transports=default_transports("cpu"), is_prefetched=pull is not None)
    plan = plan_transfer(obj, services.policy.pair(head.address))
    return TransportFallbackChain(services, head, "cpu", plan, make)


@dataclass(frozen=True)
class FetchDeadline:
    """The deadline of a fetch, and whether it is the user's or RDT's own."""

    deadline: Deadline
    is_of_user: bool

    @classmethod
    def after(cls, timeout_s: float | None) -> FetchDeadline:
        """Return the deadline of a fetch with this timeout of the user's, None for no timeout."""
        own_s = settings().fetch_timeout_s
        if timeout_s is not None and 0 <= timeout_s < own_s:
            return cls(Deadline.after(timeout_s), True)
        return cls(Deadline.after(own_s), False)

    def is_over(self, error: Exception) -> bool:
        """Tell whether a step failed like this because the user's timeout passed."""
        is_late = isinstance(error, TimeoutError) or self.deadline.has_passed()
        return self.is_of_user and is_late and not _is_final(error)


def _attempt(
    request: Request,
    action: Callable[[], Any],
    limit: FetchDeadline,
    lane: Callable[[], str] = lambda: "",
) -> Any:
    """Run one step of a fetch. An error becomes the object's value, as in plain Ray."""
    try:
        return action()
    except Exception as error:  # of Ray, the agent, a library or the user's transport
        raise_if_interrupt(error)
        if limit.is_over(error):
            raise GetTimeoutError(
                f"ray.get timed out while RDT object {request.object_id} was in flight"
            ) from error
        return as_fetch_error(request.object_id, request.envelope.head, error, lane())


def as_fetch_error(
    object_id: str, head: Descriptor, error: Exception, lane: str = ""
) -> errors.RDTFetchError:
    """Return the error that the user gets for a failed fetch. Keeps the cause."""
    context = errors.FetchContext(object_id, head.transport, lane, describe_peer(head))
    failure = _classify(context, error)
    failure.__cause__ = error
    return failure


def _classify(context: errors.FetchContext, error: Exception) -> errors.RDTFetchError:
    failures = _failures(error)
    if isinstance(error, TimeoutError):
        return errors.RDTFetchTimedOutError(
            context,
            f"it did not arrive within {settings().fetch_timeout_s:g} s ({error}).",
            "Check whether the producer is stopped or its network is cut; the limit is "
            "RAY_rdt_fetch_fail_timeout_milliseconds.",
        )
    if any(each.peer_lost for each in failures):
        return errors.RDTProducerDiedError(
            context,
            f"the process that holds the tensors is gone ({error}).",
            "Create it again, or let Ray reconstruct it: set max_restarts and max_task_retries, "
            "or a task's max_retries.",
        )
    if isinstance(error, ChecksumMismatch):
        return errors.RDTChecksumError(
            context,
            f"{error}.",
            "Likely cause: a tensor was changed in place after the first consumer had pulled it "
            "(call wait_tensor_freed first). Otherwise suspect memory or network hardware.",
        )
    codes = {each.code for each in failures}
    if "not_found" in codes:
        return errors.RDTFetchError(
            context,
            "the producer does not hold it any more: every reference to it had gone out of scope, "
            "or its owner died.",
            "Keep an ObjectRef to it while others need it.",
        )
    if "changed" in codes:
        return errors.RDTFetchError(
            context,
            f"{error}.",
            "Free or resize a tensor's storage only when wait_tensor_freed says that nobody needs "
            "it, or return a clone.",
        )
    return errors.RDTFetchError(context, *_reason_and_advice(error))


def _reason_and_advice(error: Exception) -> tuple[str, str]:
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


def _failures(error: BaseException) -> list[TransferFailed]:
    """Return the typed failures among an error and its causes; a transport may wrap the agent's."""
    return [each for each in _chain(error) if isinstance(each, TransferFailed)]


def _is_final(error: BaseException) -> bool:
    """Tell whether more time would not bring the object either."""
    return any(each.peer_lost or each.code in ("not_found", "changed") for each in _failures(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: set[int] = set()
    # Users' code may raise an error that is its own cause.
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
