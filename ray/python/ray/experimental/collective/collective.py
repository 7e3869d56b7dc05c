"""Public functions for collective groups of actors; see ``rdt.groups``."""

from __future__ import annotations

from ray.experimental.collective.communicator import CommunicatorHandle
from ray.util.annotations import PublicAPI

import ray
from ray.experimental.rdt.groups import lifecycle


@PublicAPI(stability="alpha")
def create_collective_group(
    actors: list[ray.actor.ActorHandle],
    backend: str,
    name: str | None = None,
) -> CommunicatorHandle:
    """Create a group of connected actors.

    RDT objects that use the transport of the group move between its members over the connections
    of the group. Without a group, each pair of processes connects at its first transfer. An actor
    may be in any number of groups. Any process that holds the handles may create a group.

    Args:
        actors: The members. Their order defines the ranks. They must be alive and finish their
            running tasks within ``RAY_RDT_GROUP_TIMEOUT_S`` (60 s).
        backend: "gloo" or "nccl", in lower or upper case. A backend of your own must be registered
            in every member and in this process, with
            ``ray.util.collective.backend_registry.register_collective_backend``.
        name: The name of the group, unique in its Ray namespace. None selects a random name.

    Returns:
        A handle to the group, whose members are all connected.

    Raises:
        ValueError: The backend is unknown, an actor is given twice, or the name is in use.
        RuntimeError: An actor is dead, does not answer in time, or cannot use the backend. The
            message names the actor, and no part of the group remains on the others.
    """
    return lifecycle.create(actors, backend, name)


@PublicAPI(stability="alpha")
def get_collective_groups(
    actors: list[ray.actor.ActorHandle] | None = None, backend: str | None = None
) -> list[CommunicatorHandle]:
    """Return the groups of this Ray namespace that contain all given actors.

    Args:
        actors: The actors. None or an empty list returns all groups.
        backend: If given, only groups of this backend are returned.

    Returns:
        Handles to the groups. The groups may have been created by other processes.
    """
    return lifecycle.find(actors, backend)


@PublicAPI(stability="alpha")
def destroy_collective_group(group_or_name: CommunicatorHandle | str) -> None:
    """Destroy a group. Any process may call this function.

    In-flight transfers of the group fail or continue over a fallback lane. Dead members are not an
    error, and busy members leave as well. The same actors can form a new group immediately.

    Args:
        group_or_name: The handle or the name of the group.

    Raises:
        ValueError: The group does not exist.
    """
    if isinstance(group_or_name, CommunicatorHandle):
        lifecycle.destroy(group_or_name.name)
    elif isinstance(group_or_name, str):
        lifecycle.destroy(group_or_name)
    else:
        raise ValueError(f"Expected CommunicatorHandle or str (group name), got {group_or_name!r}")


@PublicAPI(stability="alpha")
def destroy_all_collective_groups() -> None:
    """Destroy all groups that this process created."""
    lifecycle.destroy_all()
