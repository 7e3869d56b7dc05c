"""Transports by name. One line each; a transport's libraries are imported only when it is made.

Those that users registered are no lines here: ``registered.py`` finds them.
"""

from __future__ import annotations

import importlib
from typing import cast

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.once import Once
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.base import Transport, TransportUnavailable
from ray.experimental.rdt.transports.user import registered
from ray.experimental.rdt.transports.user.transport import UserTransport

#: Lower-case name -> module and class. ``auto`` is no transport: it means the best lane for each
#: pair. ``staged`` is none that users name.
_FACTORIES = {
    "cuda_ipc": ("ray.experimental.rdt.transports.cuda_ipc.transport", "CudaIpcTransport"),
    "gloo": ("ray.experimental.rdt.transports.gloo", "GlooTransport"),
    "nccl": ("ray.experimental.rdt.transports.nccl", "NcclTransport"),
    "nixl": ("ray.experimental.rdt.transports.nixl.transport", "NixlTransport"),
    "staged": ("ray.experimental.rdt.transports.staged.transport", "StagedTransport"),
}


class Transports:
    """The transports of one session, each made at its first use.

    Args:
        session: What the transports talk to their peers through.
    """

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._made: dict[str, Once[Transport]] = {}

    def get(self, name: str) -> Transport:
        """The transport of this name; several that ask at once wait for the first.

        Raises:
            TransportUnavailable: it has no module here, or its library is missing.
        """
        with self._lock:
            made = self._made.setdefault(name, Once())
        return made.get(lambda: self._make(name))

    def peek(self, name: str) -> Transport | None:
        """The transport of this name if it was made."""
        with self._lock:
            made = self._made.get(name)
        return None if made is None else made.peek()

    def users(self, name: str) -> UserTransport | None:
        """The transport of this name if a user wrote it.

        Raises:
            TransportUnavailable: nobody in this job has registered it.
        """
        if name == "auto" or name in _FACTORIES:
            return None
        return cast(UserTransport, self.get(name))

    def _make(self, name: str) -> Transport:
        if name not in _FACTORIES:
            return cast(Transport, self._make_users(name))
        module, factory = _FACTORIES[name]
        try:
            make = getattr(importlib.import_module(module), factory)
        except ImportError as error:
            raise TransportUnavailable(f"transport {name!r} cannot be loaded: {error}") from error
        return cast(Transport, make(self._session))

    def _make_users(self, name: str) -> UserTransport:
        try:
            entry = registered.find(name.upper())
        except ImportError as error:
            raise TransportUnavailable(f"transport {name!r} cannot be loaded: {error}") from error
        if entry is None:
            raise TransportUnavailable(
                f"transport {name!r} is not known here; "
                "ray.experimental.register_tensor_transport makes it known"
            )
        return UserTransport(self._session, entry)

    def made(self) -> list[Transport]:
        """Those in use so far."""
        with self._lock:
            made = [each.peek() for each in self._made.values()]
        return [transport for transport in made if transport is not None]

    def close(self) -> None:
        """Closes all. Runs on: whoever shuts Ray down."""
        for transport in self.made():
            transport.close()
