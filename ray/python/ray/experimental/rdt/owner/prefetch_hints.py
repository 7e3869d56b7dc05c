"""Prefetch hints: an owner tells a consumer's process which object its next task will fetch.

A hint only saves time. If it is lost, late or refused, the fetch pulls the object itself.
"""

from __future__ import annotations

import time

from ray.experimental.rdt.common.location import Location
from ray.experimental.rdt.rpc import process_directory, protocol
from ray.experimental.rdt.rpc.session import Session

#: The GCS is asked again for the address of an unknown actor after this time.
_LOOK_UP_AGAIN_S = 1.0


class HintSender:
    """Sends the hints of one owner.

    Runs on: the thread that submits a call, and the core io thread. Never blocks.
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
        if address == location.address:
            return
        if address is not None:
            regions = list(location.regions)
            body = protocol.Hint(key=location.key, address=location.address, regions=regions)
            self._session.send_oneway(address, protocol.HINT, body, idempotent=False)
        elif time.monotonic() - asked >= _LOOK_UP_AGAIN_S:
            self._addresses[actor_id] = (None, time.monotonic())
            self._session.run_in_background(self._look_up, actor_id)

    def _look_up(self, actor_id: bytes) -> None:
        """Runs on: an rdt-call thread."""
        found = process_directory.find_actor(actor_id)
        self._addresses[actor_id] = (found, time.monotonic())
