"""Explanation of the transport selection between two processes.

The consumer runs the planner of the fetch (``consumer/planner.py``) with what its agent knows of
the producer, and with the producer's answer to one request:

* ``rdt.offers`` {transport, devices}: for each device type (null: all that the producer has) the
  candidate transports there, each with the reason why the producer cannot use it, "" if it can.
* ``rdt.explain`` {question}: a third process asks a consumer. The answer is an explanation.

Neither handler waits for another process's Python. No tensor is moved.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import raise_if_interrupt
from ray.experimental.rdt.consumer import planner
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.session import Session, agent_id_of
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.registry import Transports
from ray.experimental.rdt.transports.selection import AutoTransportPolicy, default_transports
from ray.experimental.rdt.transports.user.registered import BUILT_IN_TRANSPORTS

#: For each device type the candidate transports, and why the producer cannot use them.
ProducerOffers = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Way:
    """One lane or transport, as users see it.

    Attributes:
        name: Its name.
        serves: Whether it can move the tensors, as far as both sides can tell beforehand.
        reason: Why it can or cannot.
    """

    name: str
    serves: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The transport selection for tensors from one process to another. ``str`` of it is a table.

    Attributes:
        subject: The tensors, the producer and the consumer.
        transport: The transport that was named; "" for a plain object.
        ways: By device type at the producer, all lanes and transports in the order in which they
            are tried.
    """

    subject: str
    transport: str
    ways: Mapping[str, Sequence[Way]]

    def used(self, device_type: str = "cpu") -> str | None:
        """Return the name of the lane or transport that is used, None if nothing serves."""
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
    """The knowledge that a consumer needs to explain a transfer to it.

    Attributes:
        subject: See ``Explanation``.
        obj: The object, as far as it is the same for all device types and consumers.
    """

    subject: str
    address: bytes
    offers: ProducerOffers
    obj: planner.TransferObject


class Explainer:
    """One process's part: tells what it can do as a producer, and explains as a consumer."""

    def __init__(self, session: Session, transports: Transports, policy: AutoTransportPolicy):
        self.address = session.address
        self._session = session
        self._transports = transports
        self._policy = policy
        session.serve(protocol.OFFERS, self._on_offers)
        session.serve(protocol.EXPLAIN, self._on_explain)

    def offers(
        self, address: bytes, transport: str, devices: Sequence[str] | None, deadline: Deadline
    ) -> ProducerOffers:
        """Ask the agent at an address what it can do as a producer. Runs on: any thread; blocks.

        Raises:
            AgentError, TimeoutError: It cannot be asked.
        """
        body = {"transport": transport, "devices": None if devices is None else list(devices)}
        return self._session.call(address, protocol.OFFERS, body, deadline.left_s())

    def offers_or_why_not(
        self, address: bytes, transport: str, devices: Sequence[str], deadline: Deadline
    ) -> ProducerOffers:
        """As ``offers``. A producer that cannot be asked can use no transport, for that reason."""
        from ray.experimental.rdt._agent import AgentError

        tried = {each: _candidates(transport, each) for each in devices}
        if not any(tried.values()):
            return {each: {} for each in devices}  # only the agent's lanes: nothing to ask for
        try:
            return self.offers(address, transport, devices, deadline)
        except (AgentError, TimeoutError) as error:
            raise_if_interrupt(error)
            why = f"it cannot be asked: {error}"
            return {each: dict.fromkeys(names, why) for each, names in tried.items()}

    def ask(self, consumer: bytes, question: Question, deadline: Deadline) -> Explanation:
        """Return what the agent at an address would do as the consumer.

        Runs on: any thread; blocks.
        """
        body = asdict(question) | {"timeout_s": deadline.left_s()}
        answer = self._session.call(consumer, protocol.EXPLAIN, body, deadline.left_s())
        found = {
            device_type: [Way(**way) for way in tried]
            for device_type, tried in answer["ways"].items()
        }
        return Explanation(answer["subject"], answer["transport"], found)

    def explain(self, question: Question, deadline: Deadline) -> Explanation:
        """Return what this process would do as the consumer. Runs on: any thread; blocks."""
        found = {
            device_type: self._explain(question, device_type, offers, deadline)
            for device_type, offers in question.offers.items()
        }
        return Explanation(question.subject, question.obj.transport, found)

    def _on_offers(self, peer_id: bytes, body: protocol.Offers) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        devices = body["devices"]
        if devices is None:
            devices = ["cpu", *accelerators.usable_types()]
        return {
            device_type: {
                name: self._unavailable_reason(name, device_type)
                for name in _candidates(body["transport"], device_type)
            }
            for device_type in devices
        }

    def _on_explain(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: consumer, an rdt-call thread."""
        deadline = Deadline.after(float(body.pop("timeout_s")))
        question = Question(**{**body, "obj": planner.TransferObject(*body["obj"])})
        return asdict(self.explain(question, deadline))

    def _explain(
        self,
        question: Question,
        device_type: str,
        producer_offers: Mapping[str, str],
        deadline: Deadline,
    ) -> list[Way]:
        obj = question.obj._replace(
            device_type=device_type,
            default_transports=default_transports(device_type),
            inline_limit=settings().eager_bytes,
            is_local=agent_id_of(question.address) == self._session.agent.agent_id,
        )
        pair = self._policy.pair(question.address)
        # Only transports that the rules allow are made here.
        allowed = [
            candidate.name
            for candidate in planner.plan_transfer(obj, pair)
            if candidate.kind is planner.Kind.TRANSPORT and candidate.serves
        ]
        offers = planner.Offers(
            {name: self._pair_reason(name, device_type, producer_offers) for name in allowed},
            self._agent_lanes(question, device_type, deadline),
        )
        plan = [Way(c.name, c.serves, c.reason) for c in planner.plan_transfer(obj, pair, offers)]
        return plan + _not_tried(obj.transport, {way.name for way in plan})

    def _pair_reason(self, name: str, device_type: str, producer_offers: Mapping[str, str]) -> str:
        """Return why one of both sides cannot use a transport, "" if both can."""
        reason = self._unavailable_reason(name, device_type)
        if reason:
            return f"at the consumer: {reason}"
        reason = producer_offers.get(name, "")
        return f"at the producer: {reason}" if reason else ""

    def _unavailable_reason(self, name: str, device_type: str) -> str:
        """Return why this process cannot use a transport, "" if it can."""
        try:
            self._transports.usable(name, device_type)
        except TransportUnavailable as error:
            return str(error)
        return ""

    def _agent_lanes(
        self, question: Question, device_type: str, deadline: Deadline
    ) -> Mapping[str, str]:
        """Return for each lane of the agent why it cannot be used, "" if it can."""
        from ray.experimental.rdt._agent import AgentError

        if device_type != "cpu" or question.obj.is_foreign:
            return dict.fromkeys(planner.AGENT_LANES, "")
        agent, nothing = self._session.agent, array("Q")
        # The agents choose their lanes when they connect, which a pull of no object makes them do.
        try:
            agent.pull(question.address, os.urandom(16), nothing, nothing).wait(deadline.left_s())
        except (AgentError, TimeoutError) as error:
            raise_if_interrupt(error)
            if not isinstance(error, AgentError) or error.code != "not_found":
                why = f"the producer's agent cannot be reached: {error}"
                return dict.fromkeys(planner.AGENT_LANES, why)
        reasons = dict(agent.explain(question.address))
        return {
            name: "" if reasons[name] == "ok" else reasons[name] for name in planner.AGENT_LANES
        }


def plain(subject: str) -> Explanation:
    """Return the explanation for a value without tensors that RDT carries."""
    reason = "the value has no tensors that RDT carries: it goes as any Ray object"
    return Explanation(subject, "", {"cpu": [Way("object store", True, reason)]})


def _candidates(transport: str, device_type: str) -> Sequence[str]:
    default = default_transports(device_type)
    return planner.candidate_transports(planner.TransferObject(transport, device_type, default))


def _not_tried(transport: str, tried: set[str]) -> list[Way]:
    """Return the built-in transports that are no candidates, and Ray's object store."""
    reason = f"not named; the named transport is {transport!r}"
    others = [name.lower() for name in BUILT_IN_TRANSPORTS if name != "AUTO"]
    return [
        *(Way(name, False, reason) for name in others if name not in tried),
        Way("object store", False, "RDT never copies tensors there; without a transport Ray does"),
    ]
