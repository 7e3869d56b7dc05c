"""A stand-in for Session over Unix sockets, and a process that stores and sends buffers."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Client, Listener
from types import SimpleNamespace
from typing import Any

import torch

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.groups.membership import Membership
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.transports.base import Peer
from ray.experimental.rdt.transports.gloo import GlooTransport
from ray.experimental.rdt.transports.process_group.link import Link
from ray.experimental.rdt.transports.process_group.transport import serve_links

_NOISE_NBYTES = (1 << 20) - 3  # shares no period with segments and slots


class CallError(Exception):
    """The peer answered with an error."""


class FakeSession:
    """The part of a Session that transports and groups use. One process may have several."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rdt-")
        path = os.path.join(self._folder.name, "s")
        self.address = path.encode()
        self.agent = SimpleNamespace(agent_id=os.urandom(16))
        self._handlers: dict[str, Callable[[bytes, dict], dict]] = {}
        self._on_lost: list[Callable[[bytes], None]] = []
        self._on_close: list[Callable[[], None]] = []
        self._on_tick: list[Callable[[], None]] = []
        self._told: list[Callable[[float], dict]] = []
        self._callers = ThreadPoolExecutor(8)
        self._listener = Listener(path, "AF_UNIX", backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, op, handler):
        self._handlers[op] = handler

    def on_peer_lost(self, callback):
        self._on_lost.append(callback)

    def on_tick(self, callback):
        self._on_tick.append(callback)

    def tick(self) -> None:
        """Run the reaper's task of every two seconds."""
        for callback in self._on_tick:
            callback()

    def on_close(self, callback):
        self._on_close.append(callback)

    def lose(self, agent_id: bytes) -> None:
        """Report a broken connection of a peer, as the agent does."""
        for callback in self._on_lost:
            callback(agent_id)

    def call(self, address, op, body, timeout_s, idempotent=True):
        return self.start_call(address, op, body)(timeout_s)

    def send_oneway(self, address, op, body, idempotent=True):
        with suppress(OSError):
            self._told.append(self.start_call(address, op, body))

    def start_call(self, address, op, body, idempotent=True):
        connection = Client(address.decode(), "AF_UNIX")
        connection.send((self.agent.agent_id, op, protocol.pack(body)))

        def wait(timeout_s):
            if not connection.poll(timeout_s):
                raise TimeoutError(f"{op} was not answered within {timeout_s} s")
            answer, error = connection.recv()
            if error:
                raise CallError(error)
            return answer

        return wait

    def close(self):
        for callback in reversed(self._on_close):
            callback()
        self._listener.close()
        self._folder.cleanup()

    def _accept(self):
        with suppress(OSError, EOFError):
            while True:
                self._callers.submit(self._answer, self._listener.accept())

    def _answer(self, connection):
        with suppress(OSError, EOFError), connection:
            peer_id, op, body = connection.recv()
            try:
                connection.send((self._handlers[op](peer_id, protocol.unpack(body)), ""))
            except Exception as error:
                connection.send(({}, f"{type(error).__name__}: {error}"))


class Node:
    """One process's share: a session, a transport and objects by name."""

    def __init__(self, make_transport=GlooTransport):
        self.session = FakeSession()
        self.groups = Membership()
        self.transport = make_transport(self.session, "127.0.0.1", self.groups)
        self.objects: dict[str, list[torch.Tensor]] = {}
        self.send_errors: list[Exception] = []
        self.send_delay_s = 0.0
        self._senders: list[threading.Thread] = []
        self._is_ending = threading.Event()
        serve_links(self.session, lambda name: self.transport)
        self.session.serve("send", self._on_send)
        self.session.serve("put", self._on_put)

    @property
    def peer(self) -> Peer:
        """This node as others see it."""
        return Peer(self.session.address, self.session.agent.agent_id)

    def put(self, peer: Peer, name: str, sizes: list[int], seed: int) -> None:
        """Make another node store buffers with the bytes of ``pattern``."""
        self.session.call(peer.address, "put", {"name": name, "sizes": sizes, "seed": seed}, 30)

    def fetch(self, peer: Peer, name: str, buffers, timeout_s: float = 20.0) -> None:
        """Receive as the consumer's fetch does."""
        deadline = Deadline.after(timeout_s)
        route = self.transport.route(peer, deadline)
        body = {"name": name, "route": route, "timeout_s": timeout_s}
        self.session.call(peer.address, "send", body, timeout_s)
        self.transport.receive(route, buffers, deadline)

    def close(self) -> None:
        self._is_ending.set()
        self.transport.close()
        self.session.close()
        for sender in self._senders:  # one that outlived Python would end the process badly
            sender.join(20)

    def _on_put(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        self.objects[body["name"]] = pattern(body["sizes"], body["seed"])
        return {}

    def _on_send(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        sender = threading.Thread(target=self._send, args=(peer_id, body), daemon=True)
        self._senders.append(sender)
        sender.start()
        return {}

    def _send(self, peer_id: bytes, body: dict[str, Any]) -> None:
        self._is_ending.wait(self.send_delay_s)
        deadline = Deadline.after(body["timeout_s"])
        try:
            self.transport.send(body["route"], self.objects[body["name"]], deadline)
        except Exception as error:
            self.send_errors.append(error)


def pattern(sizes, seed: int) -> list[torch.Tensor]:
    """Buffers whose bytes tell sender, object and place apart."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (_NOISE_NBYTES,), dtype=torch.uint8, generator=generator)
    buffers = []
    for index, nbytes in enumerate(sizes):
        start = (index * 7919) % (_NOISE_NBYTES // 2)
        part = noise[start:]
        whole, rest = divmod(nbytes, part.numel())
        buffers.append(torch.cat([part] * whole + [part[:rest]]))
    return buffers


def open_links(node: Node) -> list[Link]:
    """The open links of a node."""
    return list(node.transport._links._by_id.values())


def blanks(sizes) -> list[torch.Tensor]:
    """Buffers to receive into."""
    return [torch.zeros(n, dtype=torch.uint8) for n in sizes]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
