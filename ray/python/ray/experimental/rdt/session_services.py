"""Services of one session that transfers use."""

from __future__ import annotations

from dataclasses import dataclass

from ray.experimental.rdt.consumer.prefetcher import Prefetcher
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.transports.registry import Transports
from ray.experimental.rdt.transports.selection import AutoTransportPolicy


@dataclass(frozen=True)
class Links:
    """Services of one session that transfers use.

    Attributes:
        session: The agent and its threads.
        transports: The named transports.
        policy: Which of them may be taken although nobody named them.
        prefetcher: Objects that owners hinted to this process.
    """

    session: Session
    transports: Transports
    policy: AutoTransportPolicy
    prefetcher: Prefetcher
