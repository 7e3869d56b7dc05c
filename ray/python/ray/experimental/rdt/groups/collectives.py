"""Registration of groups for the operations of ``ray.util.collective``.

``ray.experimental.collective.allreduce`` and the others look up a group by name in the member's
process. Each group is registered there with RDT's backend.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.groups import entered_groups
from ray.experimental.rdt.groups.entered_groups import BACKEND
from ray.experimental.rdt.groups.membership import Group
from ray.experimental.rdt.transports.process_group.transport import ProcessGroupTransport

logger = logging.getLogger("ray.rdt")

#: Held while a group is registered or unregistered.
_lock = threading.Lock()


def enter(group: Group, transport: ProcessGroupTransport) -> None:
    """Register a group. Runs on: member, any thread.

    Raises:
        RuntimeError: The actor has registered a group of that name itself.
    """
    ray_collective = _ray_collective()
    if ray_collective is None:
        return
    with _lock:
        entered_groups.by_name[group.name] = (group, transport)
        try:
            size = len(group.members)
            ray_collective.init_collective_group(size, group.rank, BACKEND, group.name)
        except BaseException:
            # The actor's own group: ``leave`` must not destroy it.
            del entered_groups.by_name[group.name]
            raise


def leave(group: Group) -> None:
    """Reverse ``enter``, also for a group that was never registered.

    Runs on: any thread, after the transport was disconnected from the group. Before that, a
    collective operation that waits for another member would block this call.
    """
    with _lock:
        entered = entered_groups.by_name.get(group.name)
        if entered is None or entered[0] != group:
            return
        ray_collective = _ray_collective()
        if ray_collective.is_group_initialized(group.name):
            ray_collective.destroy_collective_group(group.name)
        del entered_groups.by_name[group.name]


@functools.cache
def _ray_collective() -> Any:
    """Return Ray's module with RDT's backend; None if a module that it needs is missing."""
    try:
        from ray.util.collective import collective
        from ray.util.collective.backend_registry import register_collective_backend

        from ray.experimental.rdt.groups.ray_group import RDTGroup
    except ImportError as error:
        logger.info("groups have no collective operations in this process: %s", error)
        return None
    register_collective_backend(BACKEND, RDTGroup)
    return collective
