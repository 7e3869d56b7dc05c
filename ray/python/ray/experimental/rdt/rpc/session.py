"""The part of RDT that a process has once: its agent, the reaper thread and requests to peers.

A session begins at the first use of RDT and ends with ``ray.shutdown()``; the next ``ray.init()``
gets a new one. A forked child never uses its parent's.

Threads: the agent's own (native), ``rdt-reaper`` (waits for the agent's events without the GIL) and
up to eight ``rdt-call-N`` (run requests of peers, which may block). Requests may have threads of
their own.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import AGENT_LANES, settings
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.common.thread_pool import DaemonThreads
from ray.experimental.rdt.rpc import protocol

logger = logging.getLogger("ray.rdt")

_SECRET_KEY = b"secret"
#: Of RDT's entries in Ray's GCS key-value store.
KV_NAMESPACE = b"ray_rdt"
_CALL_THREADS = 8
_TICK_S = 2.0
#: Peers whose connection broke and who may have a request that is still served.
_REMEMBERED_LOSSES = 1024


class Reply(NamedTuple):
    """An answer to a request, and what its thread goes on with once that is on its way."""

    body: dict[str, Any]
    then: Callable[[], None]


#: Gets the id of the peer's agent and the body of its request.
Handler = Callable[[bytes, Any], Any]


class CallError(TransferFailed):
    """A request cannot be served. The handler raises it, and so does ``call`` at the asker."""


class Session:
    """One process's share of RDT. Made by ``current()``.

    Attributes:
        agent: The native agent.
        address: The agent's endpoint, as descriptors carry it.
    """

    def __init__(self, secret: bytes, bind_ip: str):
        from ray.experimental.rdt._agent import Agent

        options = settings()
        self.agent = Agent(
            secret=secret,
            bind_ip=bind_ip,
            lanes=options.lanes.intersection(AGENT_LANES),
            copy_threads=options.copy_threads,
            tcp_streams=options.tcp_streams,
            pool_bytes=options.pool_bytes,
            connect_timeout_s=options.connect_timeout_s,
            peer_timeout_s=options.peer_timeout_s,
            clear_tcp=options.clear_tcp,
        )
        self.address: bytes = self.agent.address
        assert agent_id_of(self.address) == self.agent.agent_id
        self.pid = os.getpid()
        self._logged: set[str] = set()
        # Requests under way whose answers nobody waits for: the agent gives up one that is let go.
        self._oneway: list[Any] = []
        self._oneway_lock = threading.Lock()
        self._handlers: dict[str, Handler] = {}
        self._threads: dict[str, DaemonThreads] = {}
        # Events are numbered: which told last that a peer is lost, and which brought the request
        # that a thread serves.
        self._events = itertools.count(1)
        self._losses: dict[bytes, int] = {}
        self._asker = _Asker()
        self._on_released: list[Callable[[list[int]], None]] = []
        self._on_peer_lost: list[Callable[[bytes], None]] = []
        self._on_close: list[Callable[[], None]] = []
        self._on_tick: list[Callable[[], None]] = []
        self._callers = DaemonThreads(_CALL_THREADS, "rdt-call")
        self._reaper = threading.Thread(target=self._reap, name="rdt-reaper")
        self._reaper.start()

    def serve(self, op: str, handler: Handler, threads: DaemonThreads | None = None) -> None:
        """Answers requests of peers named ``op``.

        The handler runs on an ``rdt-call`` thread and may block; an exception of it reaches the
        caller as a CallError with its text. With ``threads`` it runs on one of those, and may go on
        after its answer (``Reply``) for as long as it likes: where the process's Python is busy,
        each thread more that took part would have to wait for the GIL.
        """
        self._handlers[op] = handler
        if threads is not None:
            self._threads[op] = threads

    def call(
        self,
        address: bytes,
        op: str,
        body: Mapping[str, object],
        timeout_s: float,
        idempotent: bool = True,
    ) -> dict[str, Any]:
        """Asks a peer's process and waits for its answer.

        Runs on: any thread; blocks without the GIL.

        Raises:
            CallError: the peer's handler failed.
            AgentError: the peer cannot be reached or was lost.
            TimeoutError: no answer within ``timeout_s``.
        """
        return self.start_call(address, op, body, idempotent)(timeout_s)

    def send_oneway(
        self, address: bytes, op: str, body: Mapping[str, object], idempotent: bool = True
    ) -> None:
        """Sends a request whose answer nobody needs; a peer that is gone is no error."""
        sent = self._send(address, op, body, idempotent)
        with self._oneway_lock:
            self._oneway = [pending for pending in self._oneway if not pending.done]
            self._oneway.append(sent)

    def start_call(
        self, address: bytes, op: str, body: Mapping[str, object], idempotent: bool = True
    ) -> Callable[[float], dict[str, Any]]:
        """Sends a request; the returned function waits for its answer as ``call`` does.

        The request is given up when the function is let go before the answer has come. If the
        connection breaks before the answer, an ``idempotent`` request is sent again, and any other
        fails with the code "broken".
        """
        pending = self._send(address, op, body, idempotent)

        def wait(timeout_s: float) -> dict[str, Any]:
            answer = protocol.decode_answer(pending.wait(timeout_s))
            if "error" in answer:
                raise CallError(answer["error"], answer["code"])
            return dict(answer["body"])

        return wait

    def is_asker_lost(self) -> bool:
        """Whether the connection has broken that brought the request which this thread serves.

        What a handler keeps for a peer until ``on_peer_lost`` it may not keep then: that has been.
        """
        return self._losses.get(self._asker.peer_id, 0) > self._asker.event

    def on_released(self, callback: Callable[[list[int]], None]) -> None:
        """Calls back with the tokens of regions that nobody reads any more (reaper thread)."""
        self._on_released.append(callback)

    def on_peer_lost(self, callback: Callable[[bytes], None]) -> None:
        """Calls back with the id of an agent whose connection broke (reaper thread)."""
        self._on_peer_lost.append(callback)

    def on_tick(self, callback: Callable[[], None]) -> None:
        """Calls back every two seconds, for what grows old (reaper thread)."""
        self._on_tick.append(callback)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Calls back before the agent stops, last registered first."""
        self._on_close.append(callback)

    def _send(self, address: bytes, op: str, body: Mapping[str, object], idempotent: bool) -> Any:
        return self.agent.call(address, protocol.encode_request(op, body), idempotent)

    def run_in_background(self, action: Callable[..., None], *args: Any) -> None:
        """Runs an action on an ``rdt-call`` thread; what it raises is logged."""
        self._hand_out(self._callers, _run_logged, action, *args)

    def _hand_out(self, threads: DaemonThreads, action: Callable[..., None], *args: Any) -> None:
        try:
            threads.submit(action, *args)
        except RuntimeError:  # the session ends, which peers see by themselves
            logger.debug("RDT ends and leaves %s", action.__qualname__)

    def log_once(self, message: str, level: int = logging.WARNING) -> None:
        """Logs a message unless this session has logged the same before."""
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, message)

    def close(self) -> None:
        """Stops the agent and its threads. Runs on: whoever shuts Ray down. Idempotent."""
        callbacks, self._on_close = self._on_close, []
        for callback in reversed(callbacks):
            callback()
        self.agent.stop()
        self._callers.close()
        if not self._reaper.is_current():
            self._reaper.join(timeout=5)

    def _reap(self) -> None:
        """Runs on: the reaper thread, for the session's life."""
        next_tick = time.monotonic() + _TICK_S
        while True:
            events = self.agent.next_events(max(0.0, next_tick - time.monotonic()))
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK_S
                for on_tick in self._on_tick:
                    _run_logged(on_tick)
            for event in events:
                kind = event[0]
                if kind == "stopped":
                    return
                try:
                    self._on_event(kind, event)
                except Exception:
                    logger.exception("RDT could not handle the agent's event %r", kind)

    def _on_event(self, kind: str, event: tuple[Any, ...]) -> None:
        if kind == "released":
            for on_released in self._on_released:
                on_released(event[1])
        elif kind == "log":
            logger.log(logging.getLevelName(event[1].upper()), "%s", event[2])
        elif kind == "call":
            threads = self._threads.get(protocol.op_of(event[3]), self._callers)
            self._hand_out(threads, self._answer, *event[1:], next(self._events))
        elif kind == "lost":
            self._losses.pop(event[1], None)
            self._losses[event[1]] = next(self._events)
            if len(self._losses) > _REMEMBERED_LOSSES:
                del self._losses[next(iter(self._losses))]
            for on_peer_lost in self._on_peer_lost:
                on_peer_lost(event[1])

    def _answer(self, call_id: int, peer_id: bytes, payload: bytes, event: int = 0) -> None:
        """Runs on: an rdt-call thread, or one of the op's own."""
        self._asker.peer_id, self._asker.event = peer_id, event
        then = None
        try:
            op = protocol.op_of(payload)
            handler = self._handlers.get(op)
            if handler is None:
                raise CallError(f"this process does not serve {op!r}")
            body = handler(peer_id, protocol.body_of(payload))
            if isinstance(body, Reply):
                body, then = body
            answer = protocol.encode_answer(body)
        except BaseException as error:  # its caller waits for it
            logger.debug("RDT request of a peer failed", exc_info=True)
            code = error.code if isinstance(error, TransferFailed) else ""
            answer = protocol.encode_error(f"{type(error).__name__}: {error}", code)
        self.agent.reply(call_id, answer, False)
        if then is not None:
            _run_logged(then)


class _Asker(threading.local):
    """Whose request the running thread serves, and which of the agent's events brought it."""

    peer_id = b""
    event = 0


def _run_logged(action: Callable[..., None], *args: Any) -> None:
    try:
        action(*args)
    except Exception:
        logger.warning("RDT could not finish %s", action.__qualname__, exc_info=True)


def agent_id_of(address: bytes) -> bytes:
    """The id of the agent at an address: 16 bytes after a mark (4) and a version (2)."""
    return address[6:22]


def boot_id_of(address: bytes) -> bytes:
    """What tells the running kernel of the agent at an address from others: the next 16 bytes."""
    return address[22:38]


_lock = threading.Lock()
_session: Session | None = None
#: The node of Ray's that a driver was connected to when its last session ended; each connection has
#: its own.
_ended: Callable[[], Any] = object


def current() -> Session:
    """The process's session; begins it if there is none.

    Raises:
        RuntimeError: Ray is not initialized, or is shutting down.
    """
    global _session
    session = _session
    if session is not None and session.pid == os.getpid():
        return session
    with _lock:
        if _session is None or _session.pid != os.getpid():
            _session = _begin()
        return _session


def peek() -> Session | None:
    """The process's session if it has one."""
    session = _session
    return session if session is not None and session.pid == os.getpid() else None


def end() -> None:
    """Ends the process's session if it has one; in a driver none begins until ``ray.init``."""
    global _session, _ended
    node = ray_core.node() if ray_core.is_driver() else None
    with _lock:
        session, _session = _session, None
        _ended = object if node is None else weakref.ref(node)
    if session is not None and session.pid == os.getpid():
        session.close()


def _begin() -> Session:
    ray_core.check_connected()
    # The core goes on for a while after ``end``, and events of its still come.
    if ray_core.node() is _ended():
        raise RuntimeError("Ray is shutting down")
    started = time.monotonic()
    session = Session(_cluster_secret(), ray_core.node_ip_address())
    logger.debug("RDT session began in %.1f ms", 1e3 * (time.monotonic() - started))
    return session


def _cluster_secret() -> bytes:
    """The secret that all agents of the cluster share; the first to need it makes it."""
    fresh = secrets.token_bytes(32)
    ray_core.kv_put(_SECRET_KEY, fresh, KV_NAMESPACE, overwrite=False)
    secret = ray_core.kv_get(_SECRET_KEY, KV_NAMESPACE)
    if not secret:
        raise RuntimeError("Ray's GCS did not keep the secret that RDT agents share")
    return bytes(secret)


def _forget_in_child() -> None:
    """A forked child has none of the parent's threads: it starts anew if it ever needs RDT."""
    global _session, _lock
    _lock = threading.Lock()
    _session = None


os.register_at_fork(after_in_child=_forget_in_child)
