"""What would move an object between two processes, and why nothing else would.

A consumer judges each way as the fetch does, from what its agent knows of the producer's and from
what the producer answers to one request:

* ``rdt.offers`` {transport, devices}: for each type of device (null: all that it has) the
  transports of ``ways.ways``, each with what is in its way there, "" for nothing.
* ``rdt.explain`` {question}: a third process asks a consumer; the answer is an explanation.

Neither handler waits for another process's Python. Nothing is moved.
"""

from __future__ import annotations

import base64
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.interrupts import raise_if_interrupt
from ray.experimental.rdt.consumer.transfer import check_carries
from ray.experimental.rdt.rpc.session import agent_id_of
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.process_group.transport import ProcessGroupTransport
from ray.experimental.rdt.transports.selection import STAGED, AutoTransportPolicy, ways
from ray.experimental.rdt.transports.user.registered import BUILT_IN_TRANSPORTS

if TYPE_CHECKING:
    from ray.experimental.rdt.rpc.session import Session
    from ray.experimental.rdt.transports.registry import Transports

#: For each type of device the transports to try, and what is in their way at the producer.
Offers = Mapping[str, Mapping[str, str]]

#: The agent's lanes between two processes, best first, and what speaks for each.
_LANES = {
    "cma": "on one host, and the kernel lets this process read the producer's memory",
    "shm": "on one host",
    "tcp": "the producer's agent can be reached",
}


@dataclass(frozen=True)
class Way:
    """One lane or transport.

    Attributes:
        name: Its name.
        serves: Whether it can move the tensors, as far as both sides can tell beforehand.
        reason: Why it can, or what is in its way.
    """

    name: str
    serves: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """How tensors would get from one process to another. ``str`` of it is for people.

    Attributes:
        subject: What is to be moved, from where to where.
        transport: The transport that was named; "" for a plain object.
        ways: By type of device at the producer, all ways, in the order in which they are tried.
    """

    subject: str
    transport: str
    ways: Mapping[str, Sequence[Way]]

    def used(self, device_type: str = "cpu") -> str | None:
        """The name of the way that would be taken, None if nothing serves."""
        return next((way.name for way in self.ways.get(device_type, ()) if way.serves), None)

    def __str__(self) -> str:
        lines = [self.subject]
        for device_type, tried in self.ways.items():
            used = self.used(device_type)
            lines.append(f"  tensors on {device_type}: {used or 'nothing serves'}")
            for way in tried:
                mark = "used" if way.name == used else "could" if way.serves else "no"
                lines.append(f"    {way.name:<12} {mark:<5} {way.reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Question:
    """What a consumer needs to know to judge.

    Attributes:
        subject: See ``Explanation``.
        address: The producer's agent.
        transport: The named transport, lower case.
        offers: What the producer can do.
        nbytes: The object's size, None where there is no object.
        is_eager: Whether its bytes ride in the value.
        is_foreign: Whether it is data of a user's transport that nothing else can move.
    """

    subject: str
    address: bytes
    transport: str
    offers: Offers
    nbytes: int | None = None
    is_eager: bool = False
    is_foreign: bool = False


class Explainer:
    """One process's part: says what it offers, and judges as a consumer.

    Attributes:
        address: This process's agent.

    Args:
        session: Brings the requests.
        transports: This process's.
        policy: Rules out those that nobody named.
    """

    def __init__(self, session: Session, transports: Transports, policy: AutoTransportPolicy):
        self.address = session.address
        self._session = session
        self._transports = transports
        self._policy = policy
        session.serve("rdt.offers", self._on_offers)
        session.serve("rdt.explain", self._on_explain)

    def offers(
        self, address: bytes, transport: str, devices: Sequence[str] | None, deadline: Deadline
    ) -> Offers:
        """What the agent at an address can do as a producer. Runs on: any thread; blocks.

        Raises:
            AgentError, TimeoutError: it cannot be asked.
        """
        body = {"transport": transport, "devices": None if devices is None else list(devices)}
        return self._session.call(address, "rdt.offers", body, _left(deadline))

    def offers_or_why_not(
        self, address: bytes, transport: str, devices: Sequence[str], deadline: Deadline
    ) -> Offers:
        """As ``offers``; for a producer that cannot be asked, that as what is in the way."""
        from ray.experimental.rdt._agent import AgentError

        tried = {each: ways(transport, each) for each in devices}
        if not any(tried.values()):
            return {each: {} for each in devices}  # the agent's lanes only: nothing to ask for
        try:
            return self.offers(address, transport, devices, deadline)
        except (AgentError, TimeoutError) as error:
            raise_if_interrupt(error)
            why = f"it cannot be asked: {error}"
            return {each: dict.fromkeys(names, why) for each, names in tried.items()}

    def ask(self, consumer: bytes, question: Question, deadline: Deadline) -> Explanation:
        """What the consumer whose agent is at an address would do. Runs on: any thread; blocks."""
        body = asdict(replace(question, address=b""))
        body |= {
            "address": base64.b64encode(question.address).decode(),
            "timeout_s": _left(deadline),
        }
        answer = self._session.call(consumer, "rdt.explain", body, _left(deadline))
        found = {
            device_type: [Way(**way) for way in tried]
            for device_type, tried in answer["ways"].items()
        }
        return Explanation(answer["subject"], answer["transport"], found)

    def judge(self, question: Question, deadline: Deadline) -> Explanation:
        """What this process would do as the consumer. Runs on: any thread; blocks."""
        found = {
            device_type: self._judge(question, device_type, dict(obstacles), deadline)
            for device_type, obstacles in question.offers.items()
        }
        return Explanation(question.subject, question.transport, found)

    def _on_offers(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        devices = body["devices"]
        if devices is None:
            devices = ["cpu", *accelerators.usable_types()]
        return {
            device_type: {
                name: self._obstacle(name, device_type)
                for name in ways(body["transport"], device_type)
            }
            for device_type in devices
        }

    def _on_explain(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: consumer, an rdt-call thread."""
        deadline = Deadline.after(float(body.pop("timeout_s")))
        question = Question(**{**body, "address": base64.b64decode(body["address"])})
        return asdict(self.judge(question, deadline))

    def _judge(
        self, question: Question, device_type: str, obstacles: dict[str, str], deadline: Deadline
    ) -> list[Way]:
        tried = [self._same_process(question), _in_value(question)]
        for name, obstacle in obstacles.items():
            tried.append(self._transport(question, name, device_type, obstacle))
        if device_type == "cpu" and question.is_foreign:
            tried += [Way(lane, False, "moves torch tensors only") for lane in _LANES]
        elif device_type == "cpu":
            tried += self._agents_lanes(question, deadline)
        names = {way.name for way in tried}
        tried += [
            Way(name, False, f"not named; the named transport is {question.transport!r}")
            for name in map(str.lower, BUILT_IN_TRANSPORTS)
            if name not in names and name != "auto"
        ]
        tried.append(_object_store)
        return _obey_strict(question.transport, tried)

    def _same_process(self, question: Question) -> Way:
        if agent_id_of(question.address) == self._session.agent.agent_id:
            return Way("inproc", True, "the consumer made it: it gets the very tensors")
        return Way("inproc", False, "the producer is another process")

    def _transport(
        self, question: Question, name: str, device_type: str, producers_obstacle: str
    ) -> Way:
        obstacle = ""
        if name not in (question.transport, STAGED):
            obstacle = self._policy.unavailable_reason(name, question.address)
        if obstacle:
            return Way(name, False, obstacle)
        obstacle = self._obstacle(name, device_type)
        if obstacle:
            return Way(name, False, f"at the consumer: {obstacle}")
        if producers_obstacle:
            return Way(name, False, f"at the producer: {producers_obstacle}")
        return Way(name, True, f"both sides have it, and it carries tensors on {device_type}")

    def _obstacle(self, name: str, device_type: str) -> str:
        """What is in the way of a transport in this process, "" if nothing."""
        try:
            transport = self._transports.get(name)
            if name != STAGED:
                check_carries(transport, device_type)
            if isinstance(transport, ProcessGroupTransport):
                transport.check_available()
        except TransportUnavailable as error:
            return str(error)
        return ""

    def _agents_lanes(self, question: Question, deadline: Deadline) -> list[Way]:
        reasons = self._lane_reasons(question.address, deadline)
        return [
            Way(lane, reasons[lane] == "ok", why if reasons[lane] == "ok" else reasons[lane])
            for lane, why in _LANES.items()
        ]

    def _lane_reasons(self, address: bytes, deadline: Deadline) -> dict[str, str]:
        """For each lane of the agent "ok" or what is in its way."""
        from ray.experimental.rdt._agent import AgentError

        agent, nothing = self._session.agent, array("Q")
        # The lanes are judged once the agents are connected, which a pull of no object does.
        try:
            agent.pull(address, os.urandom(16), nothing, nothing).wait(_left(deadline))
        except (AgentError, TimeoutError) as error:
            raise_if_interrupt(error)
            if not isinstance(error, AgentError) or error.code != "not_found":
                return dict.fromkeys(_LANES, f"the producer's agent cannot be reached: {error}")
        return dict(agent.explain(address))


_object_store = Way(
    "object store", False, "RDT never copies tensors there; without a transport Ray does"
)


def plain(subject: str) -> Explanation:
    """Of a value without tensors that RDT carries."""
    reason = "the value has no tensors that RDT carries: it goes as any Ray object"
    return Explanation(subject, "", {"cpu": [Way("object store", True, reason)]})


def _in_value(question: Question) -> Way:
    if question.is_eager:
        return Way("eager", True, f"the {question.nbytes} bytes ride in the value")
    limit = settings().eager_bytes
    if question.nbytes is None:
        return Way("eager", False, f"for objects of up to {limit} bytes in host memory only")
    return Way("eager", False, f"the {question.nbytes} bytes are not in the value")


def _obey_strict(transport: str, tried: list[Way]) -> list[Way]:
    """Rules out what comes after a named transport that cannot serve, where that is an error."""
    names = [way.name for way in tried]
    if not settings().strict_transport or transport not in names:
        return tried
    at = names.index(transport) + 1
    why = "RAY_RDT_STRICT_TRANSPORT=1 forbids any lane but the named transport"
    forbidden = [replace(way, serves=False, reason=why) for way in tried[at:]]
    return tried[:at] + forbidden


def _left(deadline: Deadline) -> float:
    return deadline.left_s()
