"""This process's nixl agent, its registrations and the peers that it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.nixl.engine import NixlEngine
from ray.experimental.rdt.transports.nixl.registration import Registrations
from ray.experimental.rdt.transports.nixl.remotes import Remotes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Endpoint:
    """The parts that live as long as the agent."""

    engine: NixlEngine
    registrations: Registrations
    remotes: Remotes


def _find_segment(tensor: torch.Tensor) -> tuple[int, int] | None:
    accelerator = accelerators.usable(tensor.device.type)
    return accelerator.segment(tensor) if accelerator is not None else None


class LazyEndpoint:
    """The endpoint, made when it is first needed. Thread-safe.

    Args:
        open_engine: Makes the agent.
    """

    def __init__(self, open_engine: Callable[[], NixlEngine]):
        self._open_engine = open_engine
        self._lock = threading.Lock()
        self._made: Endpoint | None = None
        self._is_closed = False

    def get(self) -> Endpoint:
        """Return the endpoint. Raises TransportUnavailable if it cannot be made or was closed."""
        with self._lock:
            if self._is_closed:
                raise TransportUnavailable("nixl has been closed in this process")
            if self._made is None:
                engine = self._open_engine()
                self._made = Endpoint(engine, Registrations(engine, _find_segment), Remotes(engine))
            return self._made

    def peek(self) -> Endpoint | None:
        """Return the endpoint if it was made and is open."""
        return self._made

    def close(self) -> None:
        """Close the endpoint; none is made after this. Idempotent."""
        with self._lock:
            made, self._made = self._made, None
            self._is_closed = True
        if made is not None:
            made.engine.close()
