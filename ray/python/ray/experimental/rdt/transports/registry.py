"""Transports by name. One line each; a transport's libraries are imported only when it is made."""

from __future__ import annotations

import importlib
import threading
from typing import cast

from ray.experimental.rdt.session import Session
from ray.experimental.rdt.transports.base import Transport, TransportUnavailable

#: Lower-case name -> module and class. ``auto`` is no transport: it means the agent's own lanes.
_FACTORIES = {
    "gloo": ("ray.experimental.rdt.transports.gloo", "GlooTransport"),
    "nccl": ("ray.experimental.rdt.transports.nccl", "NcclTransport"),
    "nixl": ("ray.experimental.rdt.transports.nixl", "NixlTransport"),
}


class Transports:
    """The transports of one session, each made at its first use.

    Args:
        session: What the transports talk to their peers through.
    """

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._made: dict[str, Transport] = {}

    def get(self, name: str) -> Transport:
        """The transport of this name.

        Raises:
            TransportUnavailable: it has no module here, or its library is missing.
        """
        with self._lock:
            if name not in self._made:
                self._made[name] = self._make(name)
            return self._made[name]

    def _make(self, name: str) -> Transport:
        if name not in _FACTORIES:
            raise TransportUnavailable(f"transport {name!r} is not known in this process")
        module, factory = _FACTORIES[name]
        try:
            make = getattr(importlib.import_module(module), factory)
        except ImportError as error:
            raise TransportUnavailable(f"transport {name!r} cannot be loaded: {error}") from error
        return cast(Transport, make(self._session))

    def made(self) -> list[Transport]:
        """Those in use so far."""
        with self._lock:
            return list(self._made.values())

    def close(self) -> None:
        """Closes all. Runs on: whoever shuts Ray down."""
        for transport in self.made():
            transport.close()
