"""The composition root: builds the parts of one session and gives each what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.real_threads import Lock
from ray.experimental.rdt.consumer.prefetcher import Prefetcher
from ray.experimental.rdt.consumer.transfer import TransferServices
from ray.experimental.rdt.groups.service import GroupService
from ray.experimental.rdt.observe.explainer import Explainer
from ray.experimental.rdt.observe.metrics import Gauges
from ray.experimental.rdt.owner.owner import Owner, OwnerServices
from ray.experimental.rdt.owner.prefetch_hints import HintSender
from ray.experimental.rdt.owner.streams import TakenStreams
from ray.experimental.rdt.producer.orphan_collector import OrphanCollector
from ray.experimental.rdt.producer.owner_monitor import OwnerMonitor
from ray.experimental.rdt.producer.producer import Producer, ProducerServices
from ray.experimental.rdt.producer.streams import ProducedStreams
from ray.experimental.rdt.producer.transport_server import Server
from ray.experimental.rdt.rpc import process_directory
from ray.experimental.rdt.rpc import session as sessions
from ray.experimental.rdt.transports.registry import Transports
from ray.experimental.rdt.transports.selection import AutoTransportPolicy

if TYPE_CHECKING:
    from ray.experimental.rdt.rpc.session import Session


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
    """The parts of this process's session. Thread-safe."""

    def __init__(self, build: Callable[[Session], SessionParts]):
        self._build = build
        self._lock = Lock()
        self._built: SessionParts | None = None

    def get(self) -> SessionParts:
        """Return the parts; begin a session if there is none. May block: not for the io thread."""
        session, built = sessions.current(), self._built
        if built is None or built.session is not session:
            with self._lock:
                built = self._built
                if built is None or built.session is not session:
                    built = self._built = self._build(session)
        return built

    def peek(self) -> SessionParts | None:
        """Return the parts if a session has begun and not ended."""
        built = self._built
        return built if built is not None and built.session is sessions.peek() else None
