"""Transport selection where the user named none: rules as data, and the known facts of a pair.

``consumer/planner.py`` applies the rules. Runs on: any thread; never blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import LANES, settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.rpc.session import Session, agent_id_of, boot_id_of
from ray.experimental.rdt.transports.nixl.engine import has_rdma

#: Stages device memory in host memory.
_STAGED = "staged"

#: Tried for host memory before the agent's lanes.
_HOST_TRANSPORTS = ("nixl",)

_RETRY_AFTER_S = 60.0

_has_rdma = functools.cache(has_rdma)


@dataclass(frozen=True)
class AutoRule:
    """The conditions under which a transport is tried although the user did not name it.

    Attributes:
        on_one_host: Whether it is tried between processes of one host.
        between_hosts: Whether it is tried between hosts.
        needs_rdma: Whether it is tried only on hosts with RDMA devices.
        is_costly: Whether a failed attempt is expensive, in connections or registered memory. It
            is then not repeated for this pair for a while.
        is_last_resort: Whether it serves every pair, so that nothing is tried after it.
    """

    on_one_host: bool = True
    between_hosts: bool = True
    needs_rdma: bool = False
    is_costly: bool = False
    is_last_resort: bool = False


#: On one host and over TCP, other lanes are faster than nixl.
AUTO_RULES: Mapping[str, AutoRule] = {
    "cuda_ipc": AutoRule(between_hosts=False),
    "nccl": AutoRule(is_costly=True),
    "nixl": AutoRule(on_one_host=False, needs_rdma=True, is_costly=True),
    _STAGED: AutoRule(is_last_resort=True),
}
_DEFAULT_RULE = AutoRule()


def rule_of(name: str) -> AutoRule:
    """Return the rule of a transport."""
    return AUTO_RULES.get(name, _DEFAULT_RULE)


def default_transports(device_type: str) -> Sequence[str]:
    """Return the transports that this process tries for memory of a device type, best first."""
    if device_type == "cpu":
        return _HOST_TRANSPORTS
    accelerator = accelerators.usable(device_type)
    return (*(accelerator.transports if accelerator is not None else ()), _STAGED)


class Pair(NamedTuple):
    """The known facts of a producer and this process before any attempt.

    Attributes:
        is_same_host: Whether both are on one host.
        has_rdma: Whether this host has an RDMA device.
        forbidden: Lanes and transports that ``RAY_RDT_LANES`` forbids unless they are named.
        is_strict: Whether a named transport must not be replaced by another lane.
        failures: Transports whose attempt failed for this pair a short time ago, and the error.
    """

    is_same_host: bool = True
    has_rdma: bool = False
    forbidden: frozenset[str] = frozenset()
    is_strict: bool = False
    failures: Mapping[str, str] = MappingProxyType({})


class AutoTransportPolicy:
    """Remembers for one session which automatic attempts failed."""

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        # By producer and transport: until when it is not tried, and the error.
        self._failures: dict[tuple[bytes, str], tuple[Deadline, str]] = {}
        session.on_peer_lost(self._on_peer_lost)

    def pair(self, address: bytes) -> Pair:
        """Return what is known of the producer whose agent has this address."""
        peer_id = agent_id_of(address)
        with self._lock:
            failures = {
                name: failure
                for (peer, name), (until, failure) in self._failures.items()
                if peer == peer_id and not until.has_passed()
            }
        return Pair(
            is_same_host=boot_id_of(address) == boot_id_of(self._session.address),
            has_rdma=_has_rdma(),
            forbidden=frozenset(LANES) - settings().lanes,
            is_strict=settings().strict_transport,
            failures=failures,
        )

    def failed(self, name: str, address: bytes, error: Exception) -> None:
        """Record that an automatic attempt failed."""
        if rule_of(name).is_costly:
            failure = f"{type(error).__name__}: {error}"
            with self._lock:
                entry = Deadline.after(_RETRY_AFTER_S), failure
                self._failures[agent_id_of(address), name] = entry

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: the reaper thread."""
        with self._lock:
            for entry in [entry for entry in self._failures if entry[0] == peer_id]:
                del self._failures[entry]
