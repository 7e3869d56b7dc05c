"""Making, finding and ending collective groups, in terms of actors.

Any process that holds the actors' handles can do so. The first contact with each actor is a task,
since that is how an actor is reached and known to be able; the rest goes between the processes
(``service``), so that a group of busy actors can be destroyed.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.groups import entered_groups, records, service
from ray.experimental.rdt.groups.membership import Member
from ray.experimental.rdt.groups.records import Record
from ray.experimental.rdt.groups.service import MemberFailed

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.experimental.collective.communicator import CommunicatorHandle

BACKENDS = {"gloo": "gloo", "torch_gloo": "gloo", "nccl": "nccl"}


def create(
    actors: Sequence[ActorHandle], backend: str, name: str | None = None
) -> CommunicatorHandle:
    """Makes a group of actors, all connected to one another when this returns.

    Runs on: creator, the user's thread; blocks for up to ``RAY_RDT_GROUP_TIMEOUT_S``.

    Args:
        actors: The members in rank order.
        backend: "gloo", "nccl" or one that is registered with ``ray.util.collective``, any case.
        name: What it will be called; None for a name that is not in use.

    Raises:
        ValueError: an unknown backend, an actor given twice, or a name in use.
        RuntimeError: an actor is dead, does not answer, or cannot join; names it. Nothing of the
            group is left.
    """
    from ray.experimental.collective.communicator import CommunicatorHandle

    deadline = Deadline.after(settings().group_timeout_s)
    backend = normalized(backend)
    _check_actors(actors)
    _check_hardware(backend)
    record = _reserve(actors, backend, uuid.uuid4().hex if name is None else name)
    try:
        if backend in BACKENDS:
            members = _introduce(actors, backend, deadline)
            _begin_session().form(record.id, record.name, backend, members, deadline)
        else:
            members = _join_users(actors, record, deadline)
    except MemberFailed as failure:
        records.remove(record.name)
        actor = actors[failure.rank]
        raise RuntimeError(
            f"{actor} could not join collective group {record.name!r}: {failure.reason}"
        ) from failure
    except BaseException:
        records.remove(record.name)
        raise
    ready = Record(
        record.id, record.name, backend, record.actor_ids, record.handles, tuple(members)
    )
    handle = CommunicatorHandle(list(actors), record.name, backend)
    _begin_session().keep(record.id, handle)
    records.publish(ready)
    return handle


def find(
    actors: Sequence[ActorHandle] | None = None, backend: str | None = None
) -> list[CommunicatorHandle]:
    """The groups, made by any process of this Ray namespace, that all these actors are in.

    Runs on: any process, any thread; asks the GCS.
    """
    given = {actor._ray_actor_id.hex(): actor for actor in actors or ()}
    wanted = None if backend is None else normalized(backend)
    own = service.peek()
    return [
        (own.kept(record.id) if own is not None else None) or _handle(record, given)
        for record in records.ready()
        if given.keys() <= set(record.actor_ids) and wanted in (None, record.backend)
    ]


def destroy(name: str) -> None:
    """Ends a group, made by any process. Dead members are no error.

    Runs on: any process, any thread; blocks briefly, also when members are busy.

    Raises:
        ValueError: there is no group of this name.
    """
    record = records.read(name)
    if record is None or not record.is_ready or not records.remove(name):
        raise ValueError(
            f"No group with name {name} found. It may have been destroyed already, or belong to "
            "another Ray namespace."
        )
    own = _begin_session()
    own.let_go(record.id)
    if record.backend in BACKENDS:
        own.dissolve(record.id, record.members, f"collective group {name!r} was destroyed")
    else:
        _leave_users(record)


def destroy_all() -> None:
    """Ends all groups that this process has made. Those that others have ended are no error."""
    own = service.peek()
    mine = set(own.kept_ids()) if own is not None else set()
    for record in list(records.ready()):
        if record.id in mine:
            destroy(record.name)


def normalized(backend: str) -> str:
    """The lower-case name of a backend; of one that a user has registered, the upper-case one.

    Raises:
        ValueError: there is none of this name; lists those there are.
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
    """Raises RuntimeError where it is plain, before any actor is asked, that nccl cannot work."""
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


def _reserve(actors: Sequence[ActorHandle], backend: str, name: str) -> Record:
    """Takes the name. A group that has outlived all its actors does not keep it."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"The name of a collective group must be a string, got {name!r}")
    record = Record(
        id=uuid.uuid4().hex,
        name=name,
        backend=backend,
        actor_ids=tuple(actor._ray_actor_id.hex() for actor in actors),
        handles=tuple(actor._serialization_helper()[0] for actor in actors),
    )
    if records.reserve(record):
        return record
    holder = records.read(name)
    if holder is None or not records.is_any_alive(holder.actor_ids):
        records.remove(name)
        if records.reserve(record):
            return record
    raise ValueError(
        f"The name {name!r} is in use by another collective group; destroy that one first"
    )


def _introduce(actors: Sequence[ActorHandle], backend: str, deadline: Deadline) -> list[Member]:
    """Reaches every actor once, by a task, and learns how its process is reached directly."""
    own_id = ray.get_runtime_context().get_actor_id()
    answers: dict[int, tuple[bytes, bytes]] = {}
    pending: dict[Any, int] = {}
    for rank, actor in enumerate(actors):
        if actor._ray_actor_id.hex() == own_id:
            answers[rank] = _introduce_here(backend)
        else:
            pending[actor.__ray_call__.remote(_answer_introduction, backend)] = rank
    answers |= _collect(actors, pending, deadline)
    return [Member(*answers[rank], actor._ray_actor_id.hex()) for rank, actor in enumerate(actors)]


def _collect(
    actors: Sequence[ActorHandle], pending: dict[Any, int], deadline: Deadline
) -> dict[int, Any]:
    """The answers to tasks by rank. Raises RuntimeError, which names an actor that gave none."""
    answers: dict[int, Any] = {}
    # What is not answered is not cancelled: a cancelled task can leave a hole in the order of an
    # actor's tasks, for which Ray then waits for 30 s. A late introduction does nothing.
    while pending:
        left = deadline.left_s()
        done, _ = ray.wait(list(pending), timeout=left)
        if not done:
            raise _silent([actors[rank] for rank in pending.values()])
        rank = pending.pop(done[0])
        answers[rank] = _answer_of(actors[rank], done[0])
    return answers


def _join_users(actors: Sequence[ActorHandle], record: Record, deadline: Deadline) -> list[Member]:
    """Has actors join a group of a backend that a user has registered, as Ray's alpha does.

    It is ``ray.util.collective``'s alone: no process of it has to be reached directly.
    """
    own_id = ray.get_runtime_context().get_actor_id()
    group = (len(actors), record.backend, record.name)
    pending = {
        actor.__ray_call__.remote(_join_users_group, rank, *group): rank
        for rank, actor in enumerate(actors)
        if actor._ray_actor_id.hex() != own_id
    }
    if own_id in record.actor_ids:
        _join_users_group(None, record.actor_ids.index(own_id), *group)
    _collect(actors, pending, deadline)
    return [Member(b"", b"", actor_id) for actor_id in record.actor_ids]


def _join_users_group(instance: Any, rank: int, world_size: int, backend: str, name: str) -> None:
    """Runs on: member, as a task of the actor."""
    from ray.util import collective

    collective.init_collective_group(world_size, rank, backend, name)


def _leave_users(record: Record) -> None:
    """Has the members leave that are still alive; busy ones do so later."""
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


def _answer_introduction(instance: Any, backend: str) -> tuple[bytes, bytes]:
    """Runs on: member, as a task of the actor."""
    return _introduce_here(backend)


def _introduce_here(backend: str) -> tuple[bytes, bytes]:
    return _begin_session().introduce(backend)


def _begin_session() -> service.GroupService:
    ray_core.manager().begin()  # attaches the service
    begun = service.peek()
    assert begun is not None
    return begun


def _handle(record: Record, given: dict[str, ActorHandle]) -> CommunicatorHandle:
    """A handle to a group that another process has made; it does not keep the actors alive."""
    from ray.experimental.collective.communicator import CommunicatorHandle

    actors = [
        given.get(actor_id) or ray.actor.ActorHandle._deserialization_helper(serialized, True)
        for actor_id, serialized in zip(record.actor_ids, record.handles)
    ]
    return CommunicatorHandle(actors, record.name, record.backend)
