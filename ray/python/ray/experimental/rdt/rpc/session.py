"""The session of a process: its agent, the reaper thread and the requests to and from peers.

A session begins at the first use of RDT and ends with ``ray.shutdown()``. The next ``ray.init()``
gets a new one. A forked child never uses the session of its parent.

Threads: the agent's own (native), ``rdt-reaper`` (waits for the agent's events without the GIL) and
up to eight ``rdt-call-N`` (run requests of peers, which may block). Some requests have their own
threads.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import time
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
#: The namespace of RDT's entries in Ray's GCS key-value store.
KV_NAMESPACE = b"ray_rdt"
_CALL_THREADS = 8
_TICK_S = 2.0
#: How many peers with broken connections are remembered, for requests of theirs that still run.
_REMEMBERED_LOSSES = 1024


class Reply(NamedTuple):
    """An answer to a request, and an action that its thread runs once the answer is sent."""

    body: dict[str, Any]
    then: Callable[[], None]


#: Gets the id of the peer's agent and the body of its request.
Handler = Callable[[bytes, Any], Any]


class CallError(TransferFailed):
    """A request cannot be served. The handler raises it; then ``call`` at the client raises it."""


class Session:
    """The session of one process. ``session_parts.CurrentParts`` begins and ends it."""

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
        # Requests in flight without a waiting caller: the agent cancels a request that is dropped.
        self._oneway: list[Any] = []
        self._oneway_lock = threading.Lock()
        self._handlers: dict[str, Handler] = {}
        self._threads: dict[str, DaemonThreads] = {}
        # Events are numbered. ``_losses``: by peer, the last event that reported it as lost.
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
        """Answer requests of peers named ``op``.

        The handler runs on an ``rdt-call`` thread and may block. The caller gets its exception as a
        CallError with its text. With ``threads`` the handler runs on one of those, and may continue
        after its answer (``Reply``) without a limit. A second thread would have to wait for the GIL
        if the process's Python is busy.
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
        """Send a request to a peer's process and wait for its answer.

        Runs on: any thread; blocks without the GIL.

        Raises:
            CallError: The peer's handler failed.
            AgentError: The peer cannot be reached or was lost.
            TimeoutError: No answer within ``timeout_s``.
        """
        return self.start_call(address, op, body, idempotent)(timeout_s)

    def send_oneway(
        self, address: bytes, op: str, body: Mapping[str, object], idempotent: bool = True
    ) -> None:
        """Send a request and ignore its answer. A peer that is gone is no error."""
        sent = self.agent.call(address, protocol.encode_request(op, body), idempotent)
        with self._oneway_lock:
            self._oneway = [pending for pending in self._oneway if not pending.done]
            self._oneway.append(sent)

    def start_call(
        self, address: bytes, op: str, body: Mapping[str, object], idempotent: bool = True
    ) -> Callable[[float], dict[str, Any]]:
        """Send a request; return a function that waits for its answer as ``call`` does.

        The request is canceled if the function is dropped before the answer has come. If the
        connection breaks before the answer, an ``idempotent`` request is sent again. Any other
        fails with the code "broken".
        """
        pending = self.agent.call(address, protocol.encode_request(op, body), idempotent)

        def wait(timeout_s: float) -> dict[str, Any]:
            answer = protocol.decode_answer(pending.wait(timeout_s))
            if "error" in answer:
                raise CallError(answer["error"], answer["code"])
            return dict(answer["body"])

        return wait

    def is_asker_lost(self) -> bool:
        """Tell whether the connection that delivered this thread's request has broken.

        A handler must not keep anything for the peer then: ``on_peer_lost`` has run already.
        """
        return self._losses.get(self._asker.peer_id, 0) > self._asker.event

    def on_released(self, callback: Callable[[list[int]], None]) -> None:
        """Call back with the tokens of regions without readers (reaper thread)."""
        self._on_released.append(callback)

    def on_peer_lost(self, callback: Callable[[bytes], None]) -> None:
        """Call back with the id of an agent whose connection broke (reaper thread)."""
        self._on_peer_lost.append(callback)

    def on_tick(self, callback: Callable[[], None]) -> None:
        """Call back every two seconds, to drop old entries (reaper thread)."""
        self._on_tick.append(callback)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call back before the agent stops, last registered first."""
        self._on_close.append(callback)

    def run_in_background(self, action: Callable[..., None], *args: Any) -> None:
        """Run an action on an ``rdt-call`` thread; log its error."""
        self._hand_out(self._callers, _run_logged, action, *args)

    def _hand_out(self, threads: DaemonThreads, action: Callable[..., None], *args: Any) -> None:
        try:
            threads.submit(action, *args)
        except RuntimeError:  # the session ends, and peers notice that
            logger.debug("RDT ends and does not run %s", action.__qualname__)

    def log_once(self, message: str, level: int = logging.WARNING) -> None:
        """Log a message unless this session has logged it before."""
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, message)

    def close(self) -> None:
        """Stop the agent and its threads. Idempotent. Runs on: the thread that shuts Ray down."""
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
                except Exception:  # of any kind: the thread has to handle further events
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
        except BaseException as error:  # of any kind: the peer waits for an answer
            logger.debug("RDT request of a peer failed", exc_info=True)
            code = error.code if isinstance(error, TransferFailed) else ""
            answer = protocol.encode_error(f"{type(error).__name__}: {error}", code)
        self.agent.reply(call_id, answer, False)
        if then is not None:
            _run_logged(then)


class _Asker(threading.local):
    """The peer whose request the running thread serves, and the number of the request's event."""

    peer_id = b""
    event = 0


def _run_logged(action: Callable[..., None], *args: Any) -> None:
    try:
        action(*args)
    except Exception:  # of any kind: no caller waits for the action
        logger.warning("RDT background task %s failed", action.__qualname__, exc_info=True)


def agent_id_of(address: bytes) -> bytes:
    """Return the id of the agent at an address: 16 bytes after a mark (4) and a version (2)."""
    return address[6:22]


def boot_id_of(address: bytes) -> bytes:
    """Return the id of the boot of an agent's host: the next 16 bytes of its address."""
    return address[22:38]


def begin_session() -> Session:
    """Begin a session of a process that is connected to Ray."""
    started = time.monotonic()
    session = Session(_cluster_secret(), ray_core.node_ip_address())
    logger.debug("RDT session began in %.1f ms", 1e3 * (time.monotonic() - started))
    return session


def _cluster_secret() -> bytes:
    """Return the secret that all agents of the cluster share; create it if there is none."""
    fresh = secrets.token_bytes(32)
    ray_core.kv_put(_SECRET_KEY, fresh, KV_NAMESPACE, overwrite=False)
    secret = ray_core.kv_get(_SECRET_KEY, KV_NAMESPACE)
    if not secret:
        raise RuntimeError("Ray's GCS did not keep the secret that RDT agents share")
    return bytes(secret)
