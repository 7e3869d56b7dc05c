"""Settings of RDT. Each process reads them from its environment once, at first use.

Every setting has a default that suits most programs. Nothing here writes to the environment.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ray._common.utils import get_system_memory
from ray._private import ray_constants

#: The agent's lanes, and the transports that RDT may select without being asked to.
AGENT_LANES = ("inproc", "map", "cma", "shm", "tcp")
LANES = (*AGENT_LANES, "cuda_ipc", "nixl", "nccl")

_T = TypeVar("_T")


def _read(name: str, default: _T | Callable[[], _T], parse: Callable[[str], _T]) -> _T:
    text = os.environ.get(name)
    if text is None or not text.strip():
        return default() if callable(default) else default
    try:
        return parse(text.strip())
    except ValueError as error:
        raise ValueError(f"environment variable {name}={text!r} cannot be used: {error}") from None


def _variable(name: str, default: _T | Callable[[], _T], parse: Callable[[str], _T]) -> _T:
    """Return a field whose default is read from an environment variable."""
    made: _T = field(default_factory=lambda: _read(name, default, parse))
    return made


def _flag(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false"):
        raise ValueError("expected 0, 1, true or false")
    return text.lower() in ("1", "true")


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < least:
            raise ValueError(f"expected at least {least}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError("expected a number of seconds, more than 0")
    return float(text)


def _lanes(text: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    unknown = sorted(names - set(LANES))
    if unknown:
        raise ValueError(f"unknown lanes {unknown}; known are {list(LANES)}")
    return names


def _clear_tcp() -> bool:
    return not _read("RAY_USE_TLS", False, _flag) or _read("RAY_RDT_ALLOW_CLEAR_TCP", False, _flag)


def _default_copy_threads() -> int:
    return min(4, max(2, (os.cpu_count() or 2) // 4))


def _default_pool_bytes() -> int:
    return int(min(4 << 30, get_system_memory() // 16))


def _default_store_bytes() -> int:
    """Return 60 % of the memory. Ray's object store takes 30 %, and 10 % remains for the rest."""
    return int(get_system_memory() * 0.6)


@dataclass(frozen=True)
class Settings:
    """The settings of one process, as its environment has them when this object is made."""

    #: The value contains CPU objects up to this size.
    eager_bytes: int = _variable("RAY_RDT_EAGER_BYTES", 64 * 1024, _count(0))
    #: Other arrays of at least this size are sent as tensors.
    array_bytes: int = _variable("RAY_RDT_ARRAY_BYTES", 0, _count(0))
    #: The lanes that this process may use, comma separated.
    lanes: frozenset[str] = _variable("RAY_RDT_LANES", frozenset(LANES), _lanes)
    #: No fallback from the named transport.
    strict_transport: bool = _variable("RAY_RDT_STRICT_TRANSPORT", False, _flag)
    copy_threads: int = _variable("RAY_RDT_COPY_THREADS", _default_copy_threads, _count(1))
    #: Connections for one large pull.
    tcp_streams: int = _variable("RAY_RDT_TCP_STREAMS", 4, _count(1))
    #: Free memory that the receive pool may keep.
    pool_bytes: int = _variable("RAY_RDT_POOL_BYTES", _default_pool_bytes, _count(0))
    #: Memory for objects that are pulled before their task needs them.
    hint_bytes: int = _variable("RAY_RDT_HINT_BYTES", 256 << 20, _count(0))
    #: Host memory that stored objects may keep.
    store_bytes: int = _variable("RAY_RDT_STORE_BYTES", _default_store_bytes, _count(0))
    #: How long a return waits for room in the store.
    store_wait_s: float = _variable("RAY_RDT_STORE_WAIT_S", 10.0, _seconds)
    #: This process verifies the objects that it pulls.
    checksum: bool = _variable("RAY_RDT_CHECKSUM", False, _flag)
    #: Ray's own variable: RAY_rdt_fetch_fail_timeout_milliseconds.
    fetch_timeout_s: float = field(
        default_factory=lambda: float(ray_constants.RDT_FETCH_FAIL_TIMEOUT_SECONDS)
    )
    connect_timeout_s: float = _variable("RAY_RDT_CONNECT_TIMEOUT_S", 5.0, _seconds)
    #: Time until a silent network peer counts as lost.
    peer_timeout_s: float = _variable("RAY_RDT_PEER_TIMEOUT_S", 10.0, _seconds)
    #: Time to create a collective group.
    group_timeout_s: float = _variable("RAY_RDT_GROUP_TIMEOUT_S", 60.0, _seconds)
    #: False only where Ray is told to use TLS and RAY_RDT_ALLOW_CLEAR_TCP is not 1.
    clear_tcp: bool = field(default_factory=_clear_tcp)


@functools.cache
def settings() -> Settings:
    """Return the settings of this process.

    Raises:
        ValueError: A variable has an invalid value; the text names the variable.
    """
    return Settings()
