"""The composition root: builds the parts of one session and gives each what it needs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.real_threads import Lock
from ray.experimental.rdt.consumer.prefetcher import Prefetcher
from ray.experimental.rdt.consumer.transfer import TransferServices
from ray.experimental.rdt.groups.service import GroupService
from ray.experimental.rdt.observe.explainer import Explainer
from ray.experimental.rdt.observe.metrics import Gauges
from ray.experimental.rdt.owner.owner import HintSender, Owner, OwnerServices
from ray.experimental.rdt.owner.streams import TakenStreams
from ray.experimental.rdt.producer.owner_monitor import OrphanCollector, OwnerMonitor
from ray.experimental.rdt.producer.producer import Producer, ProducerServices
from ray.experimental.rdt.producer.streams import ProducedStreams
from ray.experimental.rdt.producer.transport_server import Server
from ray.experimental.rdt.rpc import process_directory
from ray.experimental.rdt.rpc.session import Session, begin_session
from ray.experimental.rdt.transports.registry import Transports
from ray.experimental.rdt.transports.selection import AutoTransportPolicy


@dataclass(frozen=True)
class SessionParts:
    """The parts that begin and end with one session."""

    session: Session
    producer: ProducerServices
    owner: OwnerServices
    consumer: TransferServices
    server: Server
    groups: GroupService
    explainer: Explainer

    def stats(self) -> dict[str, int]:
        return {
            "hinted_bytes": self.consumer.prefetcher.nbytes,
            "exposed": self.server.exposed,
            "streams": len(self.producer.streams) + len(self.owner.streams),
            **self.session.agent.stats(),
        }


def build(
    session: Session, producer: Producer, owner: Owner, stats: Callable[[], dict[str, int]]
) -> SessionParts:
    """Build the parts of a session that has begun. Runs on: any thread; blocks for Ray's GCS.

    Args:
        stats: Returns the counters that Ray's metrics show.
    """
    store, transports, policy = producer.store, Transports(session), AutoTransportPolicy(session)
    produced, taken = ProducedStreams(session), TakenStreams(session)
    server = Server(session, store, transports, produced)
    prefetcher = Prefetcher(session, policy)
    orphans = OrphanCollector(session, lambda key: store.by_key(key) is not None, owner.may_own)
    OwnerMonitor(session, produced)
    owner.reconstruction.serve(session)
    session.on_close(transports.close)
    groups = GroupService(session, transports.get)  # type: ignore[arg-type]
    Gauges(session, stats)

    def drop(tokens: list[int]) -> None:
        """Runs on: producer, the reaper thread."""
        for stored in store.drop(tokens):
            server.withdraw(stored)

    session.on_released(drop)
    session.on_tick(prefetcher.drop_stale)
    session.on_tick(owner.on_tick)
    process_directory.publish_worker(session, ray_core.worker_id())
    actor_id = ray_core.actor_id()
    if actor_id is not None:
        session.run_in_background(process_directory.publish_actor, actor_id, session.address)
    return SessionParts(
        session,
        ProducerServices(session, transports, produced, orphans),
        OwnerServices(session, taken, HintSender(session)),
        TransferServices(session, transports, policy, prefetcher),
        server,
        groups,
        Explainer(session, transports, policy),
    )


class CurrentParts:
    """The parts of this process's session. Thread-safe. A forked child has none of the parent's."""

    def __init__(self, build: Callable[[Session], SessionParts]):
        self._build = build
        self._parts: SessionParts | None = None
        # The ``Node`` of a driver's connection to Ray when its last session ended. Each connection
        # has its own.
        self._ended: Callable[[], Any] = object
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = Lock()

    def get(self) -> SessionParts:
        """Return the parts; begin a session if there is none. May block: not for the io thread.

        Raises:
            RuntimeError: Ray is not initialized, or is shutting down.
        """
        parts = self.peek()
        if parts is None:
            with self._lock:
                parts = self._parts = self.peek() or self._begin()
        return parts

    def _begin(self) -> SessionParts:
        ray_core.check_connected()
        # The core continues for a while after ``end`` and still delivers events.
        if ray_core.node() is self._ended():
            raise RuntimeError("Ray is shutting down")
        begun = begin_session()
        try:
            return self._build(begun)
        except BaseException:  # also after an interrupt: the agent must not go on
            begun.close()
            raise

    def peek(self) -> SessionParts | None:
        """Return the parts if a session has begun and not ended."""
        parts = self._parts
        return parts if parts is not None and parts.session.pid == os.getpid() else None

    def end(self) -> None:
        """End the session if there is one. In a driver, none begins until the next ``ray.init``."""
        node = ray_core.node() if ray_core.is_driver() else None
        with self._lock:
            parts = self.peek()
            if parts is not None:
                self._parts = None
            self._ended = object if node is None else weakref.ref(node)
        if parts is not None:
            parts.session.close()
