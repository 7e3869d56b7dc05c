"""Two transports of RDT's own kind (``transports/base.py``) whose steps a test can script.

``user_transports.SCRIPT`` says what goes wrong in a process: "send", "receive", "expose" and "read"
are "late", "raise", "unavailable" or "stale". A process that imports this knows both by name.
"""

from __future__ import annotations

import os
import select
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.tensor_transport_manager import TensorTransportManager
from ray.experimental.rdt.transports import registry
from ray.experimental.rdt.transports.base import (
    Capabilities,
    Peer,
    Route,
    TransportUnavailable,
)
from ray.experimental.rdt.transports.user import registered
from tests.integration import user_transports

Buffers = Sequence[torch.Tensor]


def play(step: str) -> None:
    what = user_transports.SCRIPT.get(step)
    if what == "unavailable":
        raise TransportUnavailable(f"scripted to be unavailable in {step}")
    if what == "stale":
        del user_transports.SCRIPT[step]
        raise TransportUnavailable(f"scripted to be stale in {step}", retryable=True)
    user_transports.play(step)


class FakeOneSided:
    """Through a file that the producer writes once. See ``base.OneSided``."""

    capabilities = Capabilities("fake_reads", frozenset({"cpu"}), two_sided=False)

    def __init__(self, session: Any):
        self._paths: set[str] = set()

    def expose(self, buffers: Buffers) -> Route:
        play("expose")
        handle, path = tempfile.mkstemp(dir="/dev/shm", prefix="rdt-")
        self._paths.add(path)
        with open(handle, "wb") as file:
            for buffer in buffers:
                file.write(memoryview(buffer.numpy()))
        return {"path": path}

    def read(
        self,
        peer: Peer,
        exposed: Route,
        buffers: Buffers,
        deadline: Deadline,
        after: Sequence[Event] = (),
    ) -> None:
        play("read")
        with open(exposed["path"], "rb", buffering=0) as file:
            for buffer in buffers:
                if file.readinto(memoryview(buffer.numpy())) != buffer.numel():
                    raise OSError(f"{exposed['path']} is too short")

    def withdraw(self, exposed: Route) -> None:
        self._paths.discard(exposed["path"])
        os.unlink(exposed["path"])

    def close(self) -> None:
        while self._paths:
            os.unlink(self._paths.pop())


class FakeTwoSided:
    """Through a named pipe for each transfer. See ``base.TwoSided``."""

    capabilities = Capabilities("fake_sends", frozenset({"cpu"}), two_sided=True)

    def __init__(self, session: Any):
        self._pipes: dict[str, int] = {}
        self._senders: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        session.on_peer_lost(self._on_peer_lost)

    def check_available(self) -> None:
        """Every process can use it."""

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Shows the end of the pipe to whoever waits for a sender that will not open it."""
        for path in [path for path, sender in self._senders.items() if sender == peer_id]:
            with suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    def route(self, peer: Peer, deadline: Deadline) -> Route:
        with self._lock:
            if self._is_closed:
                raise OSError("the transport is closed")
            path = os.path.join(tempfile.mkdtemp(prefix="rdt-"), "pipe")
            os.mkfifo(path)
            # Open from now on: no sender waits for a receiver that has died.
            self._pipes[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            self._senders[path] = peer.agent_id
        return {"path": path}

    def send(self, route: Route, buffers: Buffers, deadline: Deadline) -> None:
        # Open first, so that the receiver sees the end of what failed.
        # Never made anew: a receiver that failed has removed it.
        with os.fdopen(os.open(route["path"], os.O_WRONLY), "wb", buffering=0) as pipe:
            play("send")
            for buffer in buffers:
                view = memoryview(buffer.numpy())
                while view:
                    view = view[pipe.write(view) :]

    def abandon(self, route: Route, may_send: bool) -> None:
        with self._lock:
            pipe = self._pipes.pop(route["path"], None)
        if pipe is not None:
            os.close(pipe)

    def receive(
        self, route: Route, buffers: Buffers, deadline: Deadline, after: Sequence[Event] = ()
    ) -> None:
        path = route["path"]
        with self._lock:
            if self._is_closed:
                raise OSError("the transport is closed")
            pipe = self._pipes.pop(path)
        try:
            play("receive")
            for buffer in buffers:
                view = memoryview(buffer.numpy())
                while view:
                    view = view[_read(pipe, view, deadline) :]
        finally:
            self._end(path, pipe)

    def _end(self, path: str, pipe: int) -> None:
        # In this order: a sender that has not opened it yet finds nothing to wait for.
        self._senders.pop(path)
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
        os.close(pipe)

    def close(self) -> None:
        """Ends what was never received."""
        with self._lock:
            self._is_closed = True
        while self._pipes:
            self._end(*self._pipes.popitem())


def _read(pipe: int, view: memoryview, deadline: Deadline) -> int:
    """Reads some bytes, once there is a writer."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    while True:
        left = deadline.left_s()
        if left <= 0 or not waiting.poll(left * 1000):
            raise TimeoutError("nothing was sent")
        with suppress(BlockingIOError):
            count = os.readv(pipe, [view])
            if not count:
                raise OSError("the sender ended early")
            return count


def _register() -> None:
    for factory in (FakeOneSided, FakeTwoSided):
        name = factory.capabilities.name
        registry._FACTORIES[name] = (__name__, factory.__name__)
        registered._registered[name.upper()] = registered.RegisteredTransport(
            name.upper(), ("cpu",), TensorTransportManager, torch.Tensor
        )


_register()
