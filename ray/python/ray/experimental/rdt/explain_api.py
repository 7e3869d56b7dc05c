"""Public function that reports the transport selection for an object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.util.annotations import PublicAPI

from ray.experimental.rdt.api import current_manager
from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.util import normalize_and_validate_tensor_transport

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    import ray
    from ray.experimental.rdt.observe.explainer import Explanation, Question


@PublicAPI(stability="alpha")
def explain(
    what: ray.ObjectRef | tuple[Any, ActorHandle],
    *,
    transport: str = "auto",
    timeout: float = 30.0,
) -> Explanation:
    """Explain which transport or lane would carry an object, and why the others would not.

    No tensor is moved. The form of the first argument selects the transfer:

    * ``explain(ref)``: a ``ray.get`` in this process
    * ``explain((ref, actor))``: the object as an argument of a method of the actor
    * ``explain((producer, consumer))``: results of one actor as arguments of another

    An actor answers between two of its tasks.

    Runs on: any process, any thread except that of an event loop. Blocks.

    Args:
        what: A reference, or a pair whose first part is a reference or the producing actor and
            whose second part is the consuming actor.
        transport: The named transport, for a pair of actors. A reference knows its own.
        timeout: Seconds for the whole call. The time until the object exists counts.

    Returns:
        For each type of device, all transports and lanes in the order in which RDT tries them.
        ``str`` of it is a table.

    Raises:
        TypeError: The argument is neither a reference nor such a pair.
        GetTimeoutError: The object does not exist yet, or an actor is busy.
        RayActorError: An actor is dead.
    """
    import ray
    from ray.experimental.rdt.observe.explainer import plain

    source, consumer = what if isinstance(what, tuple) else (what, None)
    is_actor = isinstance(source, ray.actor.ActorHandle)
    if not is_actor and not isinstance(source, ray.ObjectRef):
        raise TypeError(f"explain takes an ObjectRef or a pair of actors, not {what!r}")
    is_pair = isinstance(consumer, ray.actor.ActorHandle)
    if not is_pair and (is_actor or consumer is not None):
        raise TypeError(f"the second of a pair is the consuming actor, not {consumer!r}")
    deadline = Deadline.after(timeout)
    to = "this process" if consumer is None else str(consumer)
    question: Question | None
    if is_actor:
        name = normalize_and_validate_tensor_transport(transport).lower()
        question = _about_actor(source, to, name, deadline)
    else:
        question = _about_object(source, to, deadline)
    if question is None:
        return plain(f"ObjectRef({source.hex()}) to {to}")
    explainer = current_manager().explainer()
    if consumer is None:
        return explainer.explain(question, deadline)
    return explainer.ask(_address_of(consumer, deadline), question, deadline)


def _about_actor(producer: ActorHandle, to: str, transport: str, deadline: Deadline) -> Question:
    from ray.experimental.rdt.consumer.planner import TransferObject
    from ray.experimental.rdt.observe.explainer import Question
    from ray.experimental.rdt.transports.user.registered import BUILT_IN_TRANSPORTS

    address = _address_of(producer, deadline)
    offers = current_manager().explainer().offers(address, transport, None, deadline)
    is_user_defined = transport.upper() not in BUILT_IN_TRANSPORTS
    obj = TransferObject(transport, is_user_defined=is_user_defined)
    return Question(f"transport {transport!r} from {producer} to {to}", address, offers, obj)


def _about_object(ref: ray.ObjectRef, to: str, deadline: Deadline) -> Question | None:
    """Return the question about an object, None if it is not an RDT object."""
    from ray.experimental.rdt.common import descriptor
    from ray.experimental.rdt.consumer.planner import TransferObject
    from ray.experimental.rdt.observe.explainer import Question
    from ray.experimental.rdt.serialization.envelope import open_envelope

    left_ms = int(1e3 * deadline.left_s())
    ((data, metadata, _),) = ray_core.get_objects([ref], left_ms)
    if not descriptor.is_rdt(metadata):
        return None
    envelope = open_envelope(metadata, data)
    head, table = envelope.head, envelope.table
    devices = sorted({table.devices.get(region, "cpu") for region in range(len(table.regions))})
    explainer = current_manager().explainer()
    offers = explainer.offers_or_why_not(head.address, head.transport, devices or ["cpu"], deadline)
    return Question(
        f"RDT object {ref.hex()} of {head.nbytes} bytes, transport {head.transport!r} to {to}",
        head.address,
        offers,
        TransferObject.of(envelope),
    )


def _address_of(actor: ActorHandle, deadline: Deadline) -> bytes:
    from ray.exceptions import GetTimeoutError

    import ray

    if ray.get_runtime_context().get_actor_id() == actor._ray_actor_id.hex():
        return _own_address()
    left = deadline.left_s()
    try:
        address: bytes = ray.get(actor.__ray_call__.remote(_own_address), timeout=left)
    except GetTimeoutError as error:
        raise GetTimeoutError(
            f"{actor} did not answer in time: it is asked between two of its tasks"
        ) from error
    return address


def _own_address(instance: Any = None) -> bytes:
    """Return the address of this process's agent. Runs on: the actor in question, as a task."""
    return current_manager().explainer().address
