"""nixl: NVIDIA's transfer library, over UCX or libfabric. Host and GPU memory, same host or not.

The consumer's agent reads the producer's registered memory. The producer's Python takes part once
for each object, at its first pull: ``expose`` registers the memory and describes it.

It is refused, and another lane is used:

1. If Ray uses TLS and ``RAY_RDT_ALLOW_CLEAR_TCP`` is not set. UCX does not authenticate peers and
   does not encrypt.
2. Between hosts that do not both have RDMA devices, unless ``RAY_RDT_STRICT_TRANSPORT=1``. UCX then
   emulates remote reads over TCP, slower than RDT's own tcp lane. UCX 1.20 aborts the producer's
   process when it loses a consumer during such a read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import Capabilities, Peer, Route, TransportUnavailable
from ray.experimental.rdt.transports.nixl import engine as nixl_engine
from ray.experimental.rdt.transports.nixl.consumer import Consumer
from ray.experimental.rdt.transports.nixl.endpoint import LazyEndpoint
from ray.experimental.rdt.transports.nixl.engine import Engine
from ray.experimental.rdt.transports.nixl.producer import Producer

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.events import Event
    from ray.experimental.rdt.rpc.session import Session


class NixlTransport:
    """The transport that users name "nixl". Thread-safe. See ``base.OneSided``.

    Args:
        session: Unused: nixl's agents talk to each other.
        open_engine: Makes a nixl agent, at first use.

    Raises:
        TransportUnavailable: nixl is not installed, or Ray is told to use TLS.
    """

    capabilities = Capabilities(
        "nixl", frozenset({"cpu", "cuda"}), two_sided=False, sends_from_host=True
    )

    def __init__(
        self,
        session: Session | None = None,
        open_engine: Callable[[], Engine] = nixl_engine.open_engine,
    ):
        if not settings().clear_tcp:
            raise TransportUnavailable(
                "Ray is told to use TLS and nixl sends in the clear; RAY_RDT_ALLOW_CLEAR_TCP=1 "
                "allows it"
            )
        if open_engine is nixl_engine.open_engine:
            nixl_engine.check_installed()
        self._endpoint = LazyEndpoint(open_engine)
        self._producer = Producer(self._endpoint)
        self._consumer = Consumer(self._endpoint)

    def expose(self, buffers: Sequence[torch.Tensor]) -> Route:
        """See ``OneSided``. Blocks as ``check_writers`` does.

        Raises:
            ValueError: a buffer is on another device than the stream given to ``set_cuda_stream``.
        """
        return self._producer.expose(buffers)

    def read(
        self,
        peer: Peer,
        exposed: Route,
        buffers: Sequence[torch.Tensor],
        deadline: Deadline,
        after: Sequence[Event] = (),
    ) -> None:
        """See ``OneSided``.

        After a failure it waits up to a second for requests in flight. A request that does not end
        even then, because a network or a peer hangs, keeps its memory until it ends. So late bytes
        do no harm, unless the user has given the tensor to receive into.

        Raises:
            TimeoutError: Not all bytes arrived by the deadline, or a GPU still used the buffers.
            NixlError: The transfer failed; its ``code`` is "peer_lost" if the connection broke.
        """
        self._consumer.read(exposed, buffers, deadline, after)

    def withdraw(self, exposed: Route) -> None:
        """See ``OneSided``."""
        self._producer.withdraw(exposed)

    def register_memory(self, tensor: torch.Tensor) -> None:
        """Register a tensor's storage until as many calls of ``deregister_memory``."""
        self._producer.register_memory(tensor)

    def deregister_memory(self, tensor: torch.Tensor) -> None:
        """Undo one ``register_memory``. Raises ValueError if there is none to undo."""
        self._producer.deregister_memory(tensor)

    def has_registered(self, buffers: Sequence[torch.Tensor]) -> bool:
        """Return whether any of this memory is registered by ``register_memory``."""
        return self._producer.has_registered(buffers)

    def check_writers(self, buffers: Sequence[torch.Tensor]) -> None:
        """Wait for the buffers' devices after ``set_cuda_stream(None)``.

        Blocks for half the fetch timeout at most.

        Raises:
            TransportUnavailable: a device has not finished by then; names it.
            ValueError: a buffer is on another device than the stream given to ``set_cuda_stream``.
        """
        self._producer.check_writers(buffers)

    def set_cuda_stream(self, stream: torch.cuda.Stream | None) -> None:
        """Name another stream that writes exposed tensors, besides the current one.

        Objects that are created after this call are read after the stream's work at their creation.
        With None, ``expose`` waits for all streams of the tensors' devices.
        """
        self._producer.set_stream(stream)

    def begin(self) -> None:
        """Start the agent if it is not running. Raises TransportUnavailable."""
        self._endpoint.get()

    @property
    def engine(self) -> Engine:
        """This process's agent; started if it is not running. Raises TransportUnavailable."""
        return self._endpoint.get().engine

    def close(self) -> None:
        """See ``OneSided``."""
        self._producer.close()
        self._endpoint.close()
