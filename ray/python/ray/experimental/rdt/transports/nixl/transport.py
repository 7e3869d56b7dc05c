"""nixl: NVIDIA's transfer library, over UCX or libfabric. Host and GPU memory, same host or not.

Not run with GPU memory or an RDMA device so far: written from nixl's sources and documentation.

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

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports import base
from ray.experimental.rdt.transports.calls import call
from ray.experimental.rdt.transports.nixl import engine as nixl_engine
from ray.experimental.rdt.transports.nixl.endpoint import Endpoint
from ray.experimental.rdt.transports.nixl.plan import KINDS, spans_of
from ray.experimental.rdt.transports.nixl.registration import Lease

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.rpc.session import Session


class NixlTransport:
    """The transport that users name "nixl". Thread-safe. See ``base.OneSided``.

    ``open_engine`` makes a nixl agent, at first use. The session is unused: nixl's agents talk to
    each other.

    Raises:
        TransportUnavailable: nixl is not installed, or Ray is told to use TLS.
    """

    capabilities = base.Capabilities(
        "nixl", frozenset({"cpu", "cuda"}), two_sided=False, sends_from_host=True
    )

    def __init__(
        self,
        session: Session | None = None,
        open_engine: Callable[[], nixl_engine.NixlEngine] = nixl_engine.open_engine,
    ):
        base.check_clear_allowed("nixl does not encrypt")
        if open_engine is nixl_engine.open_engine:
            nixl_engine.check_installed()
        self._open_engine = open_engine
        self._lock = threading.Lock()
        self._endpoint: Endpoint | None = None
        self._is_closed = False
        self._stream: torch.cuda.Stream | None = None
        self._awaits_devices = False
        self._exposed: dict[int, Lease] = {}
        self._numbers = itertools.count(1)

    def endpoint(self) -> Endpoint:
        """Return this process's agent. The first call starts it. Raises TransportUnavailable."""
        with self._lock:
            if self._is_closed:
                raise base.TransportUnavailable("nixl has been closed in this process")
            if self._endpoint is None:
                self._endpoint = Endpoint(self._open_engine())
            return self._endpoint

    def expose(self, buffers: base.Buffers) -> base.Route:
        """See ``OneSided``. Blocks and raises as ``check_writers`` does."""
        spans = spans_of(buffers)
        if not spans.nbytes:
            return {"spans": spans.encode()}
        endpoint = self.endpoint()
        self.check_writers(buffers)
        number = next(self._numbers)
        try:
            with contextlib.ExitStack() as undo, accelerators.capture_safe(buffers):
                lease = endpoint.registrations.acquire(spans, buffers)
                undo.callback(endpoint.registrations.release, lease)
                described = _describe(endpoint.engine, number, lease)
                undo.pop_all()
        except nixl_engine.NixlError as error:
            raise base.TransportUnavailable(f"nixl cannot expose this memory: {error}") from error
        self._exposed[number] = lease
        return described

    def read(
        self,
        peer: base.Peer,
        exposed: base.Route,
        buffers: base.Buffers,
        deadline: Deadline,
        after: base.Events = (),
    ) -> None:
        """See ``OneSided``.

        After a failure it waits up to a second for requests in flight. A request that does not end
        even then, because a network or a peer hangs, keeps its memory until it ends. So late bytes
        do no harm, unless the user has given the tensor to receive into.

        Raises:
            TimeoutError: Not all bytes arrived by the deadline, or a GPU still used the buffers.
            NixlError: The transfer failed; its ``code`` is "peer_lost" if the connection broke.
        """
        if "agent" in exposed or any(buffer.numel() for buffer in buffers):
            self.endpoint().read(exposed, buffers, deadline, after)

    def withdraw(self, exposed: base.Route) -> None:
        ended, endpoint = self._exposed.pop(exposed.get("number", 0), None), self._endpoint
        if ended is not None and endpoint is not None:
            endpoint.registrations.release(ended)

    def register_memory(self, tensor: torch.Tensor) -> None:
        """Register a tensor's storage until as many calls of ``deregister_memory``."""
        self.endpoint().registrations.pin(tensor)

    def deregister_memory(self, tensor: torch.Tensor) -> None:
        """Undo one ``register_memory``. Raises ValueError if there is none to undo."""
        self.endpoint().registrations.unpin(tensor)

    def has_registered(self, buffers: base.Buffers) -> bool:
        """Return whether any of this memory is registered by ``register_memory``."""
        endpoint = self._endpoint
        return endpoint is not None and endpoint.registrations.has_pinned(spans_of(buffers))

    def check_writers(self, buffers: base.Buffers) -> None:
        """Wait for the buffers' devices after ``set_cuda_stream(None)``.

        Blocks for half the fetch timeout at most.

        Raises:
            TransportUnavailable: a device has not finished by then; names it.
            ValueError: a buffer is on another device than the stream given to ``set_cuda_stream``.
        """
        devices = {buffer.device for buffer in buffers if not buffer.is_cpu}
        if self._stream is not None:
            others = sorted(str(device) for device in devices - {self._stream.device})
            if others:
                raise ValueError(
                    f"set_nixl_cuda_stream was given a stream on {self._stream.device}, but the "
                    f"object has tensors on {others}"
                )
        elif self._awaits_devices:
            deadline = Deadline.after(settings().fetch_timeout_s / 2)
            for device in sorted(devices, key=str):
                _await_device(device, deadline)

    def set_cuda_stream(self, stream: torch.cuda.Stream | None) -> None:
        """Name another stream that writes exposed tensors, besides the current one.

        Objects that are created after this call are read after the stream's work at their creation.
        With None, ``expose`` waits for all streams of the tensors' devices.
        """
        self._stream = stream
        self._awaits_devices = stream is None
        accelerators.name_stream(stream)

    def close(self) -> None:
        accelerators.name_stream(None)
        self._exposed.clear()
        with self._lock:
            endpoint, self._endpoint = self._endpoint, None
            self._is_closed = True
        if endpoint is not None:
            endpoint.engine.close()


def _await_device(device: torch.device, deadline: Deadline) -> None:
    """Wait for all streams of a GPU. CUDA has no such wait with a deadline, so a thread waits."""
    import torch

    synchronize = partial(torch.cuda.synchronize, device)
    try:
        call("synchronize", synchronize, deadline, "rdt-nixl-sync")
    except TimeoutError as error:
        raise base.TransportUnavailable(
            f"{device} did not finish its work in time; set_nixl_cuda_stream limits the wait to "
            "one stream"
        ) from error


def _describe(engine: nixl_engine.NixlEngine, number: int, lease: Lease) -> base.Route:
    """Describe the memory of a lease for consumers."""
    registered = ((name, lease.registered(kind)) for kind, name in enumerate(KINDS))
    blobs = [engine.describe(name, rows) for name, rows in registered if len(rows)]
    return {
        "agent": engine.name,
        "number": number,
        "version": lease.version,
        "reach": engine.reach,
        "metadata": blobs,
        "spans": lease.spans.encode(),
    }
