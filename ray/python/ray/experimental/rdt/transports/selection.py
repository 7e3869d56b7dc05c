"""Which transports are tried for an object, and what rules out one that nobody named.

Host memory has the agent's lanes after these. Runs on: consumer, any thread. Nothing is asked of
the producer: what only it knows, it answers to the request itself, and the pair then goes without
that transport for a while.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import LANES, settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.rpc.session import agent_id_of, boot_id_of
from ray.experimental.rdt.transports.nixl.engine import has_rdma

if TYPE_CHECKING:
    from ray.experimental.rdt.rpc.session import Session

#: Through host memory: the last way, and the only one that is not tried but relied on.
STAGED = "staged"

#: To find out that one of these cannot serve a pair costs connections, or memory registered in
#: vain. So it is not tried again for that pair before this time has passed.
_COSTLY = ("nixl", "nccl")
_LEFT_ALONE_S = 60.0

_has_rdma = functools.cache(has_rdma)


class AutoTransportPolicy:
    """One session's judgement of transports that nobody named.

    Args:
        session: This process's.
    """

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        # By producer and transport: until when, and what it failed of.
        self._left_alone: dict[tuple[bytes, str], tuple[Deadline, str]] = {}
        session.on_peer_lost(self._on_peer_lost)

    def unavailable_reason(self, name: str, address: bytes) -> str:
        """What rules a transport out for the producer whose agent is at an address, "" if nothing.

        nixl is for hosts with RDMA devices: on one host, and over TCP, others are faster.
        """
        if name in LANES and name not in settings().lanes:
            return "forbidden by RAY_RDT_LANES"
        is_same_host = boot_id_of(address) == boot_id_of(self._session.address)
        if name == "cuda_ipc" and not is_same_host:
            return "the producer is on another host"
        if name == "nixl" and is_same_host:
            return "on one host only where it is named"
        if name == "nixl" and not _has_rdma():
            return "this host has no RDMA device"
        until, failure = self._left_alone.get((agent_id_of(address), name), (Deadline(0.0), ""))
        return f"it failed a moment ago: {failure}" if not until.has_passed() else ""

    def failed(self, name: str, address: bytes, error: Exception) -> None:
        """Notes that a transport could not serve a pair."""
        if name in _COSTLY:
            until, failure = Deadline.after(_LEFT_ALONE_S), f"{type(error).__name__}: {error}"
            with self._lock:
                self._left_alone[agent_id_of(address), name] = until, failure

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: the reaper thread."""
        with self._lock:
            for entry in [entry for entry in self._left_alone if entry[0] == peer_id]:
                del self._left_alone[entry]


def ways(named: str, device_type: str) -> list[str]:
    """The transports to try for memory of one device type, best first."""
    own = [] if named == "auto" else [named]
    if device_type == "cpu":
        return own or ["nixl"]
    accelerator = accelerators.usable(device_type)
    others = accelerator.transports if accelerator is not None else ()
    return [*own, *(name for name in others if name != named), STAGED]
