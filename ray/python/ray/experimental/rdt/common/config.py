"""Settings of RDT. Each process reads them from its environment once, at first use.

Every setting has a default that suits most programs. Nothing here writes to the environment.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ray._common.utils import get_system_memory
from ray._private import ray_constants

#: The agent's lanes, and the transports that RDT may select without being asked to.
AGENT_LANES = ("inproc", "cma", "shm", "tcp")
LANES = (*AGENT_LANES, "cuda_ipc", "nixl", "nccl")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Settings:
    """The settings of one process. Each field's comment names its environment variable."""

    eager_bytes: int  # RAY_RDT_EAGER_BYTES: the value contains CPU objects up to this size
    array_bytes: int  # RAY_RDT_ARRAY_BYTES: other arrays of at least this size are sent as tensors
    lanes: frozenset[str]  # RAY_RDT_LANES: lanes this process may use, comma separated
    strict_transport: bool  # RAY_RDT_STRICT_TRANSPORT: no fallback from the named transport
    copy_threads: int  # RAY_RDT_COPY_THREADS
    tcp_streams: int  # RAY_RDT_TCP_STREAMS: connections for one large pull
    pool_bytes: int  # RAY_RDT_POOL_BYTES: free memory that the receive pool may keep
    hint_bytes: int  # RAY_RDT_HINT_BYTES: memory for objects pulled before their task needs them
    store_bytes: int  # RAY_RDT_STORE_BYTES: host memory that stored objects may keep
    store_wait_s: float  # RAY_RDT_STORE_WAIT_S: how long a return waits for room in the store
    checksum: bool  # RAY_RDT_CHECKSUM: this process verifies the objects that it pulls
    fetch_timeout_s: float  # RAY_rdt_fetch_fail_timeout_milliseconds
    connect_timeout_s: float  # RAY_RDT_CONNECT_TIMEOUT_S
    peer_timeout_s: float  # RAY_RDT_PEER_TIMEOUT_S: time until a silent network peer counts as lost
    group_timeout_s: float  # RAY_RDT_GROUP_TIMEOUT_S: time to create a collective group
    clear_tcp: bool  # False only where Ray is told to use TLS and RAY_RDT_ALLOW_CLEAR_TCP is not 1


@functools.cache
def settings() -> Settings:
    """Return the settings of this process.

    Raises:
        ValueError: A variable has an invalid value; the text names the variable.
    """
    return Settings(
        eager_bytes=_read("RAY_RDT_EAGER_BYTES", 64 * 1024, _count(0)),
        array_bytes=_read("RAY_RDT_ARRAY_BYTES", 0, _count(0)),
        lanes=_read("RAY_RDT_LANES", frozenset(LANES), _lanes),
        strict_transport=_read("RAY_RDT_STRICT_TRANSPORT", False, _flag),
        copy_threads=_read("RAY_RDT_COPY_THREADS", _default_copy_threads(), _count(1)),
        tcp_streams=_read("RAY_RDT_TCP_STREAMS", 4, _count(1)),
        pool_bytes=_read("RAY_RDT_POOL_BYTES", _default_pool_bytes(), _count(0)),
        hint_bytes=_read("RAY_RDT_HINT_BYTES", 256 << 20, _count(0)),
        store_bytes=_read("RAY_RDT_STORE_BYTES", _default_store_bytes(), _count(0)),
        store_wait_s=_read("RAY_RDT_STORE_WAIT_S", 10.0, _seconds),
        checksum=_read("RAY_RDT_CHECKSUM", False, _flag),
        fetch_timeout_s=float(ray_constants.RDT_FETCH_FAIL_TIMEOUT_SECONDS),
        connect_timeout_s=_read("RAY_RDT_CONNECT_TIMEOUT_S", 5.0, _seconds),
        peer_timeout_s=_read("RAY_RDT_PEER_TIMEOUT_S", 10.0, _seconds),
        group_timeout_s=_read("RAY_RDT_GROUP_TIMEOUT_S", 60.0, _seconds),
        clear_tcp=_clear_tcp(),
    )


def _read(name: str, default: _T, parse: Callable[[str], _T]) -> _T:
    text = os.environ.get(name)
    if text is None or not text.strip():
        return default
    try:
        return parse(text.strip())
    except ValueError as error:
        raise ValueError(f"environment variable {name}={text!r} cannot be used: {error}") from None


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
    if not _read("RAY_USE_TLS", False, _flag):
        return True
    return _read("RAY_RDT_ALLOW_CLEAR_TCP", False, _flag)


def _default_copy_threads() -> int:
    return min(4, max(2, (os.cpu_count() or 2) // 4))


def _default_pool_bytes() -> int:
    return int(min(4 << 30, get_system_memory() // 16))


def _default_store_bytes() -> int:
    """Return 60 % of the memory. Ray's object store takes 30 %, and 10 % remains for the rest."""
    return int(get_system_memory() * 0.6)
