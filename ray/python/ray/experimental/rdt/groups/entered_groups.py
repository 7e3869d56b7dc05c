"""The groups of this process that ``ray.util.collective`` knows by name."""

from __future__ import annotations

from ray.experimental.rdt.groups.membership import Group
from ray.experimental.rdt.transports.process_group.transport import ProcessGroupTransport

#: The name of RDT's backend in ``ray.util.collective``.
BACKEND = "RDT"

#: Each group with the transport that moves its bytes. ``service.py`` changes it under a lock.
by_name: dict[str, tuple[Group, ProcessGroupTransport]] = {}
