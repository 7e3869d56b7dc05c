"""The collective groups of actors that RDT transports use; see ``rdt.groups``."""

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
    """Makes a group of actors that are connected to one another.

    RDT objects of the group's transport then move between its members over these connections.
    Without a group, each pair connects by itself at the first transfer. An actor may be in any
    number of groups, and any process that holds the handles may make one.

    Args:
        actors: The members; their order gives the ranks. They must be alive and finish what they
            are busy with within ``RAY_RDT_GROUP_TIMEOUT_S`` (60 s).
        backend: "gloo" or "nccl", in lower or upper case, or one that every member and this process
            have registered by ``ray.util.collective.backend_registry.register_collective_backend``.
        name: The group's name, which no other group of this Ray namespace may have; a random one
            if None.

    Returns:
        A handle to the group. All members are connected.

    Raises:
        ValueError: the backend is unknown, an actor is given twice, or the name is in use.
        RuntimeError: an actor is dead, does not answer in time, or cannot use the backend; names
            it. Nothing of the group is left on the others.
    """
    return lifecycle.create(actors, backend, name)


@PublicAPI(stability="alpha")
def get_collective_groups(
    actors: list[ray.actor.ActorHandle] | None = None, backend: str | None = None
) -> list[CommunicatorHandle]:
    """Finds the groups of this Ray namespace that all given actors are in.

    Args:
        actors: The actors; none for all groups.
        backend: Only groups of this backend.

    Returns:
        Handles to the groups, whichever process made them.
    """
    return lifecycle.find(actors, backend)


@PublicAPI(stability="alpha")
def destroy_collective_group(group_or_name: CommunicatorHandle | str) -> None:
    """Ends a group, whichever process made it.

    Its transfers in progress fail, or go on over another lane. Members that have died are no error,
    and busy ones leave all the same. The same actors can be grouped again at once.

    Args:
        group_or_name: The group's handle or name.

    Raises:
        ValueError: there is no such group.
    """
    if isinstance(group_or_name, CommunicatorHandle):
        lifecycle.destroy(group_or_name.name)
    elif isinstance(group_or_name, str):
        lifecycle.destroy(group_or_name)
    else:
        raise ValueError(f"Expected CommunicatorHandle or str (group name), got {group_or_name!r}")


@PublicAPI(stability="alpha")
def destroy_all_collective_groups() -> None:
    """Ends all groups that this process has made."""
    lifecycle.destroy_all()
