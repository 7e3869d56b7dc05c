"""Transports by name. The libraries of a transport are imported when it is first used.

``user/registered.py`` finds the transports that users registered.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.once import Once
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.base import Transport, TransportUnavailable, TwoSided
from ray.experimental.rdt.transports.user import registered
from ray.experimental.rdt.transports.user.transport import UserTransport

#: Lower-case name -> module and class. Users cannot name ``staged``.
_FACTORIES = {
    "cuda_ipc": ("ray.experimental.rdt.transports.cuda_ipc.transport", "CudaIpcTransport"),
    "gloo": ("ray.experimental.rdt.transports.gloo", "GlooTransport"),
    "nccl": ("ray.experimental.rdt.transports.nccl", "NcclTransport"),
    "nixl": ("ray.experimental.rdt.transports.nixl.transport", "NixlTransport"),
    "staged": ("ray.experimental.rdt.transports.staged.transport", "StagedTransport"),
}


class Transports:
    """The transports of one session. Each is created at its first use."""

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._made: dict[str, Once[Transport]] = {}

    def get(self, name: str) -> Transport:
        """Return the transport of this name. Concurrent callers wait for the first.

        Raises:
            TransportUnavailable: The name is unknown, or its library is missing.
        """
        made = self.peek(name)
        if made is not None:
            return made
        make = self._maker(name)  # names that no transport has are not kept
        with self._lock:
            once = self._made.setdefault(name, Once())
        return once.get(make)

    def usable(self, name: str, device_type: str) -> Transport:
        """Return the transport of this name if this process can use it for such memory.

        Raises TransportUnavailable if it cannot.
        """
        transport = self.get(name)
        capabilities = transport.capabilities
        if not capabilities.carries(device_type):
            raise TransportUnavailable(f"{name} does not carry tensors on {device_type}")
        if capabilities.two_sided and not capabilities.is_user_defined:
            cast(TwoSided, transport).check_available()
        return transport

    def peek(self, name: str) -> Transport | None:
        """Return the transport of this name if it was created."""
        with self._lock:
            made = self._made.get(name)
        return None if made is None else made.peek()

    def users(self, name: str) -> UserTransport | None:
        """Return the transport of this name if a user wrote it.

        Raises:
            TransportUnavailable: It is not registered in this job.
        """
        if name == "auto" or name in _FACTORIES:
            return None
        return cast(UserTransport, self.get(name))

    def _maker(self, name: str) -> Callable[[], Any]:
        try:
            if name in _FACTORIES:
                module, factory = _FACTORIES[name]
                make = getattr(importlib.import_module(module), factory)
                return functools.partial(make, self._session)
            entry = registered.find(name.upper())
        except ImportError as error:
            raise TransportUnavailable(f"transport {name!r} cannot be loaded: {error}") from error
        if entry is None:
            raise TransportUnavailable(
                f"transport {name!r} is not known here; "
                "ray.experimental.register_tensor_transport makes it known"
            )
        return cast(
            "Callable[[], Transport]", functools.partial(UserTransport, self._session, entry)
        )

    def made(self) -> list[Transport]:
        """Return the transports that were created."""
        with self._lock:
            made = [each.peek() for each in self._made.values()]
        return [transport for transport in made if transport is not None]

    def close(self) -> None:
        """Close all transports. Runs on: the thread that shuts Ray down."""
        for transport in self.made():
            transport.close()
