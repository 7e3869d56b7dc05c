"""Plan of a transfer: the candidates that can bring an object here, in the order of preference.

Pure: no I/O, clock, threads or Ray. The fetch follows the plan, and ``explain`` prints it, so that
the two cannot differ. Reasons that only the producer or an attempt can know come in as data.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ray.exceptions import RayError

from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.rpc.checksums import ChecksumMismatch
from ray.experimental.rdt.serialization.envelope import Envelope
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.selection import Pair, rule_of

#: The reason of candidates after a named transport in strict mode.
STRICT = "RAY_RDT_STRICT_TRANSPORT=1 forbids any lane but the named transport"

#: The agent's lanes between two processes, best first, and their conditions. An object that several
#: consumers of a host pull goes over map, although cma is better for one of them.
AGENT_LANES = {
    "cma": "on one host, and the kernel lets this process read the producer's memory",
    "map": "on one host, for large objects that several consumers pull",
    "shm": "on one host",
    "tcp": "the producer's agent can be reached",
}


class Kind(enum.Enum):
    """The part of RDT that makes the transfer."""

    LOCAL = enum.auto()
    INLINE = enum.auto()
    PREFETCHED = enum.auto()
    SHARED = enum.auto()
    TRANSPORT = enum.auto()
    AGENT = enum.auto()


class Fallback(enum.Enum):
    """The failures of a candidate after which the next one is tried."""

    NEVER = enum.auto()
    IF_UNAVAILABLE = enum.auto()
    IF_FAILED = enum.auto()
    ALWAYS = enum.auto()


class Candidate(NamedTuple):
    """One lane or transport that may bring an object.

    Attributes:
        fallback: When the next candidate is tried after it.
        serves: Whether it can be used, as far as is known.
        reason: Why it can or cannot be used.
    """

    name: str
    kind: Kind
    fallback: Fallback = Fallback.NEVER
    serves: bool = True
    reason: str = ""


class TransferObject(NamedTuple):
    """The properties of an object that decide how its memory of one device type is transferred.

    Attributes:
        transport: The named transport, lower case, or "auto".
        default_transports: The transports that this process tries for such memory, best first.
        nbytes: The size of the object, None if there is no object yet.
        inline_limit: The largest object whose bytes are in its value. For the explanation only.
        is_prefetched: Whether a pull has begun before the fetch.
        is_shareable: Whether the named transport can give this process the producer's own memory.
        is_foreign: Whether it is data that only a user's transport can move.
    """

    transport: str = "auto"
    device_type: str = "cpu"
    default_transports: Sequence[str] = ()
    nbytes: int | None = None
    inline_limit: int = 0
    is_local: bool = False
    is_inline: bool = False
    is_prefetched: bool = False
    is_shareable: bool = False
    is_user_defined: bool = False
    is_foreign: bool = False

    @classmethod
    def of(cls, envelope: Envelope, is_local: bool = False) -> TransferObject:
        """Return the properties of an object in host memory that has arrived as a value."""
        head, table = envelope.head, envelope.table
        has_regions = table.rows and not (table.devices and head.nbytes)
        return cls(
            transport=head.transport,
            nbytes=head.nbytes,
            is_local=is_local,
            is_inline=envelope.eager is not None,
            is_user_defined=head.is_user_defined,
            is_foreign=head.is_user_defined and not has_regions,
        )

    @property
    def is_empty(self) -> bool:
        """Tell whether it consists of tensors without bytes, which no transport has to move."""
        return self.nbytes == 0 and not self.is_foreign


@dataclass(frozen=True)
class Offers:
    """The answers of both agents and transports. The fetch does not ask; it tries.

    Attributes:
        transports: For each transport why it cannot be used, "" if it can. Unknown ones are tried.
        agent_lanes: The same for the agent's lanes. The fetch leaves the choice to the agent.
    """

    transports: Mapping[str, str] = field(default_factory=dict)
    agent_lanes: Mapping[str, str] = field(default_factory=lambda: {"agent": ""})


NOTHING_ASKED = Offers()


def plan_transfer(
    obj: TransferObject, pair: Pair | None, offers: Offers = NOTHING_ASKED
) -> list[Candidate]:
    """Return all candidates, best first.

    Args:
        pair: What is known of its producer and this process, None if the object is here.
        offers: What both sides said they can do.
    """
    plan = [_local(obj), _inline(obj)]
    if pair is None:
        return plan
    if obj.is_prefetched:
        plan.append(Candidate("prefetched", Kind.PREFETCHED, Fallback.ALWAYS))
    if obj.is_shareable:
        plan.append(Candidate(obj.transport, Kind.SHARED, Fallback.IF_UNAVAILABLE))
    plan += [_transport(name, obj, pair, offers) for name in candidate_transports(obj)]
    if obj.device_type == "cpu":
        plan += [_agent_lane(name, obj, offers) for name in offers.agent_lanes]
    return _obey_strict(plan, obj) if pair.is_strict else plan


def _local(obj: TransferObject) -> Candidate:
    why = "the producer is another process"
    if obj.is_local:
        why = "the consumer is the producer and gets the same tensors"
    return Candidate("inproc", Kind.LOCAL, serves=obj.is_local, reason=why)


def _inline(obj: TransferObject) -> Candidate:
    where = "in the value" if obj.is_inline else "not in the value"
    why = f"the {obj.nbytes} bytes are {where}"
    if obj.nbytes is None:
        why = f"for objects of up to {obj.inline_limit} bytes in host memory only"
    return Candidate("eager", Kind.INLINE, serves=obj.is_inline, reason=why)


def candidate_transports(obj: TransferObject) -> Sequence[str]:
    """Return the transports that are tried, best first."""
    if obj.transport == "auto":
        return obj.default_transports
    if obj.is_user_defined or obj.device_type == "cpu":
        return (obj.transport,)
    return (obj.transport, *(name for name in obj.default_transports if name != obj.transport))


def _transport(name: str, obj: TransferObject, pair: Pair, offers: Offers) -> Candidate:
    fallback, reason = Fallback.IF_FAILED, ""
    if rule_of(name).is_last_resort:
        fallback = Fallback.NEVER
    elif name == obj.transport:
        fallback = Fallback.IF_UNAVAILABLE
    else:
        reason = _auto_unavailable_reason(name, pair)
    if obj.is_empty:
        reason = "the object has no bytes"
    reason = reason or offers.transports.get(name, "")
    why = f"both sides have it, and it carries tensors on {obj.device_type}"
    return Candidate(name, Kind.TRANSPORT, fallback, not reason, reason or why)


def _auto_unavailable_reason(name: str, pair: Pair) -> str:
    rule = rule_of(name)
    if name in pair.forbidden:
        return "forbidden by RAY_RDT_LANES"
    if not rule.between_hosts and not pair.is_same_host:
        return "the producer is on another host"
    if not rule.on_one_host and pair.is_same_host:
        return "on one host only where it is named"
    if rule.needs_rdma and not pair.has_rdma:
        return "this host has no RDMA device"
    failure = pair.failures.get(name)
    return f"it failed within the last minute: {failure}" if failure else ""


def _agent_lane(name: str, obj: TransferObject, offers: Offers) -> Candidate:
    reason = "moves torch tensors only" if obj.is_foreign else offers.agent_lanes[name]
    why = reason or AGENT_LANES.get(name, "")
    return Candidate(name, Kind.AGENT, serves=not reason, reason=why)


def _obey_strict(plan: list[Candidate], obj: TransferObject) -> list[Candidate]:
    """Rule out what comes after the named transport."""
    named = [c.kind is Kind.TRANSPORT and c.name == obj.transport for c in plan]
    if obj.is_empty or not any(named):
        return plan
    at = named.index(True) + 1
    later = [c._replace(serves=False, reason=STRICT) if c.serves else c for c in plan[at:]]
    return plan[:at] + later


def may_fall_back(candidate: Candidate, error: Exception, is_late: bool) -> bool:
    """Tell whether the next candidate is tried after this one failed.

    Args:
        is_late: Whether the time for the whole fetch is over.
    """
    if candidate.fallback is Fallback.NEVER:
        return False
    if candidate.fallback is Fallback.ALWAYS:
        return not is_late
    if isinstance(error, (TransportUnavailable, ChecksumMismatch)):
        return True
    if candidate.fallback is Fallback.IF_UNAVAILABLE or is_late:
        return False
    is_final = isinstance(error, (MemoryError, RayError))
    if isinstance(error, TransferFailed):
        is_gone = error.code in ("not_found", "changed")
        is_final = is_final or is_gone or error.may_still_write
    return not is_final
