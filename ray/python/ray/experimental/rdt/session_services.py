"""What one session's parts reach each other through."""

from __future__ import annotations

from dataclasses import dataclass

from ray.experimental.rdt.consumer.prefetcher import Prefetcher
from ray.experimental.rdt.observe.explainer import Explainer
from ray.experimental.rdt.owner.prefetch_hints import HintSender
from ray.experimental.rdt.producer.orphan_collector import ClaimWatch
from ray.experimental.rdt.producer.streams import ProducedStreams, TakenStreams
from ray.experimental.rdt.producer.transport_server import Server
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.registry import Transports
from ray.experimental.rdt.transports.selection import AutoTransportPolicy


@dataclass(frozen=True)
class Links:
    """One session and all that lives and ends with it.

    Attributes:
        session: The agent and its threads.
        transports: The named transports.
        policy: Which of them may be taken although nobody named them.
        server: Sends and exposes this process's objects.
        hints: Hints objects to consumers.
        prefetcher: Objects that owners hinted to this process.
        produced: The streams that this process makes items for.
        taken: The streams that it takes items from.
        explainer: Tells users which way their tensors take.
        claims: This process's objects that no owner has claimed yet.
    """

    session: Session
    transports: Transports
    policy: AutoTransportPolicy
    server: Server
    hints: HintSender
    prefetcher: Prefetcher
    produced: ProducedStreams
    taken: TakenStreams
    explainer: Explainer
    claims: ClaimWatch
