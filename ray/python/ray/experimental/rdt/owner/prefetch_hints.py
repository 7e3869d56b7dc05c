"""Prefetch hints: an owner tells a consumer's process which object its next task will fetch.

A hint only saves time. If it is lost, late or refused, the fetch pulls the object itself.
"""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING

from ray.experimental.rdt.owner.object_directory import Location
from ray.experimental.rdt.rpc import process_directory
from ray.experimental.rdt.rpc.session import Session

if TYPE_CHECKING:
    from ray.experimental.rdt._tensors import Table
    from ray.experimental.rdt.common.descriptor import Descriptor

#: A smaller pull takes less time than its hint.
_MIN_NBYTES = 1 << 20

#: The hint lists the sizes of all regions. With more regions it costs more than it saves.
_MAX_REGIONS = 256

#: The GCS is asked again for the address of an unknown actor after this time.
_LOOK_UP_AGAIN_S = 1.0


def regions_to_hint(head: Descriptor, table: Table) -> tuple[int, ...] | None:
    """Return the region sizes that a hint of this object carries, None if it is not hinted.

    A hinted object comes over the agent's lanes, which serve no device memory and no other
    transport than "auto".
    """
    is_hinted = (
        head.transport == "auto"
        and head.nbytes >= _MIN_NBYTES
        and len(table.regions) <= _MAX_REGIONS
        and not table.devices
    )
    return tuple(table.regions) if is_hinted else None


class HintSender:
    """Sends the hints of one owner.

    Runs on: the thread that submits a call, and the core io thread. Never blocks.

    Args:
        session: Sends the hints.
    """

    def __init__(self, session: Session):
        self._session = session
        # By actor: the address of its agent, and when the GCS was last asked for it.
        self._addresses: dict[bytes, tuple[bytes | None, float]] = {}

    def send(self, actor_id: bytes, location: Location) -> None:
        """Hint an object to an actor whose agent is known; otherwise look up the agent."""
        if location.regions is None:
            return
        address, asked = self._addresses.get(actor_id, (None, -_LOOK_UP_AGAIN_S))
        if address is not None:
            if address != location.address:
                self._send(address, location)
        elif time.monotonic() - asked >= _LOOK_UP_AGAIN_S:
            self._addresses[actor_id] = (None, time.monotonic())
            self._session.run_in_background(self._look_up, actor_id)

    def _look_up(self, actor_id: bytes) -> None:
        """Runs on: an rdt-call thread."""
        found = process_directory.find_actor(actor_id)
        self._addresses[actor_id] = (found, time.monotonic())

    def _send(self, address: bytes, location: Location) -> None:
        body = {
            "key": location.key.hex(),
            "address": base64.b64encode(location.address).decode(),
            "regions": location.regions,
        }
        self._session.send_oneway(address, "rdt.hint", body, idempotent=False)
