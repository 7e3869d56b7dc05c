"""The producer of the nixl transport: memory that other processes may read."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from concurrent.futures import TimeoutError as NotDone
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators import writers
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.real_threads import Future
from ray.experimental.rdt.transports.base import Route, TransportUnavailable
from ray.experimental.rdt.transports.nixl.endpoint import LazyEndpoint
from ray.experimental.rdt.transports.nixl.engine import Engine, NixlError
from ray.experimental.rdt.transports.nixl.plan import KINDS, spans_of
from ray.experimental.rdt.transports.nixl.registration import Lease

if TYPE_CHECKING:
    import torch


class Producer:
    """The memory that one process exposes. Thread-safe.

    Args:
        endpoint: This process's agent.

    Attributes:
        stream: The CUDA stream that the user named, if any.
    """

    def __init__(self, endpoint: LazyEndpoint):
        self.stream: torch.cuda.Stream | None = None
        self._awaits_devices = False
        self._endpoint = endpoint
        self._exposed: dict[int, Lease] = {}
        self._numbers = itertools.count(1)

    def expose(self, buffers: Sequence[torch.Tensor]) -> Route:
        """See ``NixlTransport``. Runs on: producer, an rdt-call thread."""
        spans = spans_of(buffers)
        if not spans.nbytes:
            return {"spans": spans.encode()}
        endpoint = self._endpoint.get()
        self.check_writers(buffers)
        number = next(self._numbers)
        try:
            with contextlib.ExitStack() as undo, accelerators.aside(buffers):
                lease = endpoint.registrations.acquire(spans, buffers)
                undo.callback(endpoint.registrations.release, lease)
                described = _describe(endpoint.engine, number, lease)
                undo.pop_all()
        except NixlError as error:
            raise TransportUnavailable(f"nixl cannot expose this memory: {error}") from error
        self._exposed[number] = lease
        return described

    def withdraw(self, exposed: Route) -> None:
        """See ``NixlTransport``. Runs on: producer, the reaper thread."""
        ended = self._exposed.pop(exposed.get("number", 0), None)
        endpoint = self._endpoint.peek()
        if ended is None or endpoint is None:
            return
        endpoint.registrations.release(ended)

    def register_memory(self, tensor: torch.Tensor) -> None:
        """See ``NixlTransport``. Runs on: any thread of the user's."""
        self._endpoint.get().registrations.pin(tensor)

    def deregister_memory(self, tensor: torch.Tensor) -> None:
        """See ``NixlTransport``. Runs on: any thread of the user's."""
        self._endpoint.get().registrations.unpin(tensor)

    def has_registered(self, buffers: Sequence[torch.Tensor]) -> bool:
        """See ``NixlTransport``. Runs on: any thread."""
        endpoint = self._endpoint.peek()
        return endpoint is not None and endpoint.registrations.has_pinned(spans_of(buffers))

    def set_stream(self, stream: torch.cuda.Stream | None) -> None:
        """See ``NixlTransport.set_cuda_stream``. Runs on: any thread of the user's."""
        self.stream = stream
        self._awaits_devices = stream is None
        writers.name_stream(stream)

    def close(self) -> None:
        """See ``NixlTransport``. The endpoint is closed separately."""
        writers.name_stream(None)
        self._exposed.clear()

    def check_writers(self, buffers: Sequence[torch.Tensor]) -> None:
        """See ``NixlTransport``. Runs on: producer, any thread.

        The capture events order the object after its current and its named stream already.
        """
        devices = {buffer.device for buffer in buffers if not buffer.is_cpu}
        if self.stream is not None:
            others = sorted(str(device) for device in devices - {self.stream.device})
            if others:
                raise ValueError(
                    f"set_nixl_cuda_stream was given a stream on {self.stream.device}, but the "
                    f"object has tensors on {others}"
                )
        elif self._awaits_devices:
            deadline = Deadline.after(settings().fetch_timeout_s / 2)
            for device in sorted(devices, key=str):
                await_device(device, deadline)


def await_device(device: torch.device, deadline: Deadline) -> None:
    """Wait for all streams of a GPU. CUDA has no such wait with a deadline.

    So a thread ``rdt-nixl-sync`` waits. It is abandoned at the deadline, and ends when the GPU has
    done its work.
    """
    import torch

    done: Future[None] = Future()

    def synchronize() -> None:
        try:
            torch.cuda.synchronize(device)
        except Exception as error:  # stored for the caller, who waits for it
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=synchronize, name="rdt-nixl-sync").start()
    try:
        done.result(deadline.left_s())
    except NotDone as error:
        raise TransportUnavailable(
            f"{device} did not finish its work in time; set_nixl_cuda_stream limits the wait to "
            "one stream"
        ) from error


def _describe(engine: Engine, number: int, lease: Lease) -> Route:
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
