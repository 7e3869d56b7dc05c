"""Hints: an owner tells a consumer's process which object its next task will ask for.

A hinted object is pulled while the consumer is still busy with something else, inside a budget of
memory. Only a hint: whatever is lost, late or refused here, the fetch pulls the object itself.

An actor's process writes its agent's address to Ray's GCS under its actor id when its session
begins; owners look it up once.
"""

from __future__ import annotations

import base64
import logging
import time
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ray.experimental import internal_kv
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.consumer.receive_buffers import allocate
from ray.experimental.rdt.consumer.transfer import AgentPull
from ray.experimental.rdt.owner.object_directory import Location
from ray.experimental.rdt.rpc.session import KV_NAMESPACE, Session
from ray.experimental.rdt.transports.selection import Unnamed, ways

logger = logging.getLogger("ray.rdt")

#: Below this a pull takes less than the hint costs.
MIN_HINTED_BYTES = 1 << 20

#: An unknown actor's address is asked for again after this.
_ASK_AGAIN_S = 1.0

#: So many objects that were asked for are remembered: a late hint pulls none of them again.
_REMEMBERED_KEYS = 4096


class HintSender:
    """The owner's side. Runs on: the thread that submits and the core io thread; never blocks.

    Args:
        session: Sends the hints.
    """

    def __init__(self, session: Session):
        self._session = session
        self._addresses: dict[bytes, tuple[bytes | None, float]] = {}

    def send(self, actor_id: bytes, location: Location) -> None:
        """Hints an object to an actor, if the actor's agent is known; else looks that up."""
        if location.nbytes < MIN_HINTED_BYTES or location.regions is None:
            return
        address, asked = self._addresses.get(actor_id, (None, -_ASK_AGAIN_S))
        if address is not None:
            if address != location.address:
                self._send(address, location)
        elif time.monotonic() - asked >= _ASK_AGAIN_S:
            self._addresses[actor_id] = (None, time.monotonic())
            self._session.run_in_background(self._look_up, actor_id)

    def _look_up(self, actor_id: bytes) -> None:
        """Runs on: an rdt-call thread."""
        found = internal_kv._internal_kv_get(_agent_key(actor_id), namespace=KV_NAMESPACE)
        self._addresses[actor_id] = (found, time.monotonic())

    def _send(self, address: bytes, location: Location) -> None:
        body = {
            "key": location.key.hex(),
            "address": base64.b64encode(location.address).decode(),
            "regions": location.regions,
        }
        self._session.tell(address, "rdt.hint", body, repeats=False)


@dataclass
class _Hinted:
    pull: AgentPull
    nbytes: int
    until: Deadline


class HintedPulls:
    """The consumer's side: objects pulled before their task asks.

    Args:
        session: Brings the hints and pulls.
        unnamed: Says where the agent's lanes are not the first choice: there, hints are let go.
    """

    def __init__(self, session: Session, unnamed: Unnamed):
        self._session = session
        self._unnamed = unnamed
        self._lock = threading.Lock()
        self._pulls: dict[bytes, _Hinted] = {}
        self._asked: OrderedDict[bytes, None] = OrderedDict()
        session.serve("rdt.hint", self._on_hint)
        session.on_close(self.clear)

    @property
    def nbytes(self) -> int:
        """Memory that hinted objects take now."""
        return sum(hinted.nbytes for hinted in list(self._pulls.values()))

    def take(self, key: bytes) -> AgentPull | None:
        """The pull of an object that was hinted, which the caller finishes. Runs on: any thread.

        A hint that comes later is too late, and is passed over.
        """
        with self._lock:
            self._asked[key] = None
            if len(self._asked) > _REMEMBERED_KEYS:
                self._asked.popitem(last=False)
            hinted = self._pulls.pop(key, None)
        return hinted.pull if hinted is not None else None

    def park(self, key: bytes, pull: AgentPull, nbytes: int) -> bool:
        """Keeps a pull whose user has run out of patience, for the next who asks.

        Runs on: consumer, the fetching thread.

        Returns:
            Whether there was room for it.
        """
        until = Deadline.after(settings().fetch_timeout_s)
        with self._lock:
            has_room = self.nbytes + nbytes <= settings().hint_bytes
            if has_room and key not in self._pulls:
                self._pulls[key] = _Hinted(pull, nbytes, until)
                return True
        return False

    def clear(self) -> None:
        """Gives all up. Runs on: whoever shuts Ray down."""
        self._drop(list(self._pulls))

    def drop_stale(self) -> None:
        """Gives up what no task has asked for. Runs on: the reaper thread, now and then."""
        self._drop([key for key, hinted in list(self._pulls.items()) if hinted.until.has_passed()])

    def _drop(self, keys: list[bytes]) -> None:
        for key in keys:
            pull = self.take(key)
            if pull is not None:
                pull.abandon()

    def _on_hint(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: an rdt-call thread."""
        key = bytes.fromhex(body["key"])
        address = base64.b64decode(body["address"])
        if not all(self._unnamed.obstacle(name, address) for name in ways("auto", "cpu")):
            return {}
        regions = array("Q", body["regions"])
        nbytes = sum(regions)
        with self._lock:
            is_room = self.nbytes + nbytes <= settings().hint_bytes
            if key not in self._pulls and key not in self._asked and is_room:
                landing = allocate(self._session, regions)
                pull = AgentPull(self._session, address, key, landing)
                until = Deadline.after(settings().fetch_timeout_s)
                self._pulls[key] = _Hinted(pull, nbytes, until)
        return {}


def publish(session: Session, actor_id: bytes) -> None:
    """Lets owners find this actor's agent. A restarted actor replaces the entry."""
    key = _agent_key(actor_id)
    internal_kv._internal_kv_put(key, session.address, overwrite=True, namespace=KV_NAMESPACE)


def _agent_key(actor_id: bytes) -> bytes:
    return b"agent:" + actor_id.hex().encode()
