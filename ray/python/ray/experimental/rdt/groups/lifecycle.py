"""Creation, lookup and destruction of collective groups of actors.

Any process that holds the actors' handles can create a group. The first request to each actor is a
task, which returns the address of its agent. All other requests go to the agents (``service``), so
that a group of busy actors can be destroyed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.groups import entered_groups, records
from ray.experimental.rdt.groups.membership import Member
from ray.experimental.rdt.groups.service import GroupService, MemberFailed

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.experimental.collective.communicator import CommunicatorHandle

BACKENDS = {"gloo": "gloo", "torch_gloo": "gloo", "nccl": "nccl"}


def create(
    actors: Sequence[ActorHandle], backend: str, name: str | None = None
) -> CommunicatorHandle:
    """Create a group of actors; all are connected to each other when this returns.

    Runs on: creator, the user's thread; blocks for up to ``RAY_RDT_GROUP_TIMEOUT_S``.

    Args:
        actors: The members in rank order.
        backend: "gloo", "nccl" or one that is registered with ``ray.util.collective``, any case.
        name: The name of the group; None for a name that is not in use.

    Raises:
        ValueError: The backend is unknown, an actor is given twice, or the name is in use.
        RuntimeError: An actor is dead, does not answer, or cannot join; the text names the actor.
            The members have left the group.
    """
    from ray.experimental.collective.communicator import CommunicatorHandle

    deadline = Deadline.after(settings().group_timeout_s)
    backend = normalized(backend)
    _check_actors(actors)
    _check_hardware(backend)
    record = _reserve(actors, backend, uuid.uuid4().hex if name is None else name)
    try:
        if backend in BACKENDS:
            members = _run_on_all(actors, deadline, _introduce_member, backend)
            _service().form(record.id, record.name, backend, members, deadline)
        else:
            # ``ray.util.collective`` alone uses such a group, so the members need no address.
            _run_on_all(actors, deadline, _join_users_group, len(actors), backend, record.name)
            members = [Member(b"", b"", actor_id) for actor_id in record.actor_ids]
    except MemberFailed as failure:
        records.remove(record.name)
        actor = actors[failure.rank]
        raise RuntimeError(
            f"{actor} could not join collective group {record.name!r}: {failure.reason}"
        ) from failure
    except BaseException:  # also after an interrupt: the name must be free again
        records.remove(record.name)
        raise
    handle = CommunicatorHandle(list(actors), record.name, backend)
    _service().handles[record.id] = handle
    records.publish(replace(record, members=tuple(members)))
    return handle


def find(
    actors: Sequence[ActorHandle] | None = None, backend: str | None = None
) -> list[CommunicatorHandle]:
    """Return the groups of this Ray namespace that all these actors are in.

    Runs on: any process, any thread; asks the GCS.
    """
    given = {actor._ray_actor_id.hex(): actor for actor in actors or ()}
    wanted = None if backend is None else normalized(backend)
    own = ray_core.manager().peek_groups()
    return [
        (own and own.handles.get(record.id)) or _handle(record, given)
        for record in records.ready()
        if given.keys() <= set(record.actor_ids) and wanted in (None, record.backend)
    ]


def destroy(name: str) -> None:
    """Destroy a group that any process created. Dead members are no error.

    Runs on: any process, any thread; blocks briefly, also when members are busy.

    Raises:
        ValueError: There is no group of this name.
    """
    record = records.read(name)
    if record is None or not record.is_ready or not records.remove(name):
        raise ValueError(
            f"No group with name {name} found. It may have been destroyed already, or belong to "
            "another Ray namespace."
        )
    own = _service()
    own.handles.pop(record.id, None)
    if record.backend in BACKENDS:
        own.dissolve(record.id, record.members, f"collective group {name!r} was destroyed")
    else:
        _leave_users(record)


def destroy_all() -> None:
    """Destroy all groups of this process. Other processes may have destroyed some before."""
    own = ray_core.manager().peek_groups()
    for record in list(records.ready()):
        if own is not None and record.id in own.handles:
            destroy(record.name)


def normalized(backend: str) -> str:
    """Return a backend's name in lower case; in upper case if a user has registered the backend.

    Raises:
        ValueError: There is no such backend; the text lists the backends.
    """
    known = BACKENDS.get(backend.lower()) if isinstance(backend, str) else None
    if known is not None:
        return known
    from ray.util.collective import backend_registry

    users = str(backend).upper()
    if users != entered_groups.BACKEND and backend_registry._global_registry.is_registered(users):
        return users
    raise ValueError(
        f"Unknown backend {backend!r} for a collective group; known: gloo, nccl, and those that "
        "this process has given to ray.util.collective.backend_registry.register_collective_backend"
    )


def _check_actors(actors: Sequence[ActorHandle]) -> None:
    if not actors:
        raise ValueError("A collective group needs at least one actor")
    seen = set()
    for actor in actors:
        if not isinstance(actor, ray.actor.ActorHandle):
            raise ValueError(f"Expected actor handles, got {actor!r}")
        if actor._ray_actor_id in seen:
            raise ValueError(f"All actors must be unique, but {actor} was given twice")
        seen.add(actor._ray_actor_id)


def _check_hardware(backend: str) -> None:
    """Raise RuntimeError if nccl cannot work on this cluster, before any actor is asked."""
    if backend != "nccl":
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1 or any(node["Resources"].get("GPU") for node in nodes):
        return
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(
            f"Backend nccl needs torch, which cannot be imported: {error}"
        ) from error
    if not torch.cuda.is_available():
        raise RuntimeError("Backend nccl needs NVIDIA GPUs, and this machine has none")


def _reserve(actors: Sequence[ActorHandle], backend: str, name: str) -> records.Record:
    """Reserve the name. A group whose actors are all dead does not keep its name."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"The name of a collective group must be a string, got {name!r}")
    record = records.Record(
        id=uuid.uuid4().hex,
        name=name,
        backend=backend,
        actor_ids=tuple(actor._ray_actor_id.hex() for actor in actors),
        handles=tuple(actor._serialization_helper()[0] for actor in actors),
    )
    if records.reserve(record):
        return record
    holder = records.read(name)
    if holder is None or not holder.may_live():
        records.remove(name)
        if records.reserve(record):
            return record
    raise ValueError(
        f"The name {name!r} is in use by another collective group; destroy that one first"
    )


def _run_on_all(
    actors: Sequence[ActorHandle], deadline: Deadline, task: Callable[..., Any], *args: Any
) -> list[Any]:
    """Run a function on every actor, for this process's own actor directly.

    Args:
        task: The function. It gets the actor's instance or None, the rank, and ``args``.

    Raises:
        RuntimeError: An actor did not answer or failed; the text names the actor.
    """
    own_id = ray.get_runtime_context().get_actor_id()
    pending = {
        actor.__ray_call__.remote(task, rank, *args): rank
        for rank, actor in enumerate(actors)
        if actor._ray_actor_id.hex() != own_id
    }
    own_ranks = set(range(len(actors))) - set(pending.values())
    answers = {rank: task(None, rank, *args) for rank in own_ranks}
    # Pending tasks are not canceled: a canceled task can leave a hole in the order of an actor's
    # tasks, for which Ray then waits for 30 s. A late introduction does nothing.
    while pending:
        done, _ = ray.wait(list(pending), timeout=deadline.left_s())
        if not done:
            raise _silent([actors[rank] for rank in pending.values()])
        rank = pending.pop(done[0])
        answers[rank] = _answer_of(actors[rank], done[0])
    return [answers[rank] for rank in range(len(actors))]


def _join_users_group(instance: Any, rank: int, world_size: int, backend: str, name: str) -> None:
    """Runs on: member, as a task of the actor."""
    from ray.util import collective

    collective.init_collective_group(world_size, rank, backend, name)


def _leave_users(record: records.Record) -> None:
    """Make all living members leave; busy members leave later."""
    own_id = ray.get_runtime_context().get_actor_id()
    left = [
        actor.__ray_call__.remote(_leave_users_group, record.name)
        for actor in _handle(record, {}).actors
        if actor._ray_actor_id.hex() != own_id
    ]
    if own_id in record.actor_ids:
        _leave_users_group(None, record.name)
    if left:
        ray.wait(left, num_returns=len(left), timeout=settings().group_timeout_s)


def _leave_users_group(instance: Any, name: str) -> None:
    """Runs on: member, as a task of the actor."""
    from ray.util import collective

    collective.destroy_collective_group(name)


def _answer_of(actor: ActorHandle, ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.ActorDiedError as error:
        raise RuntimeError(f"{actor} is dead and cannot join a collective group") from error
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            error = error.cause or error
        raise RuntimeError(f"{actor} cannot join a collective group: {error}") from error


def _silent(actors: list[ActorHandle]) -> RuntimeError:
    names = ", ".join(str(actor) for actor in actors)
    return RuntimeError(
        f"No answer within {settings().group_timeout_s:g} s from {names}: an actor joins a "
        "collective group between two tasks, so it must not be busy for longer "
        "(RAY_RDT_GROUP_TIMEOUT_S)"
    )


def _introduce_member(instance: Any, rank: int, backend: str) -> Member:
    """Runs on: member, as a task of the actor."""
    return _service().introduce(backend)


def _service() -> GroupService:
    service: GroupService = ray_core.manager().groups()
    return service


def _handle(record: records.Record, given: dict[str, ActorHandle]) -> CommunicatorHandle:
    """Return a handle to a group of another process. It does not keep the actors alive."""
    from ray.experimental.collective.communicator import CommunicatorHandle

    actors = [
        given.get(actor_id) or ray.actor.ActorHandle._deserialization_helper(serialized, True)
        for actor_id, serialized in zip(record.actor_ids, record.handles)
    ]
    return CommunicatorHandle(actors, record.name, record.backend)
