"""The way of an object that has tensors on devices: each type of device goes its own.

What is in the producer's host memory goes as any object: over the named transport if that carries
it, else over the agent's lanes. What is on a device goes over the first of these that serves the
pair: the named transport, those of the device type (``Accelerator.transports``), ``staged``, which
goes through host memory and serves every pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.experimental.rdt.capture import Envelope
from ray.experimental.rdt.deferred import without_turn
from ray.experimental.rdt.descriptor import Descriptor
from ray.experimental.rdt.landing import Landing, Targets, allocate_on_devices, direct_targets
from ray.experimental.rdt.lanes import AgentPull, Exchanges
from ray.experimental.rdt.targets import Target

if TYPE_CHECKING:
    from ray.experimental.rdt.links import Links


class PerDevice:
    """An object with tensors on devices, under way. See ``lanes.Transfer``.

    Args:
        links: This process's parts.
        envelope: The object.
        target: The user's wish.
        deadline: When the fetch gives up.

    Raises:
        RDTError: the named transport cannot serve it, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """

    def __init__(self, links: Links, envelope: Envelope, target: Target, deadline: float):
        import torch

        table = envelope.table
        self._table = table
        self._targets = target.tensors
        wish = torch.device(target.device) if target.device is not None else None
        direct = direct_targets(table, target.tensors)
        self._landing = allocate_on_devices(links.session, table, direct, wish)
        self._shares: list[_Share] = []
        # What has no bytes needs no way.
        types = {
            table.devices.get(region, "cpu")
            for region, nbytes in enumerate(table.regions)
            if nbytes
        }
        try:
            for device_type in sorted(types):
                share = _Share(links, envelope.head, self._landing, device_type, deadline)
                self._shares.append(share)
        except BaseException:
            self.abandon()
            raise

    @property
    def lane(self) -> str:
        return "+".join(share.lane for share in self._shares)

    def finish(self, deadline: float) -> Targets:
        for share in self._shares:
            share.finish(deadline)
        return self._landing.deliver(self._table, self._targets)

    def abandon(self) -> None:
        for share in self._shares:
            share.abandon()


class _Share:
    """The regions of one object that are on one type of device at the producer.

    Those in its host memory have the agent's lanes after the transports.
    """

    def __init__(
        self,
        links: Links,
        head: Descriptor,
        landing: Landing,
        device_type: str,
        deadline: float,
    ):
        self._session = links.session
        self._head = head
        self._landing = landing
        self._exchanges = Exchanges(links, head, device_type, deadline)
        self._pull = None if self._exchanges.current is not None else self._begin_pull()

    @property
    def lane(self) -> str:
        under_way = self._exchanges.current or self._pull
        return under_way.lane if under_way is not None else ""

    def finish(self, deadline: float) -> None:
        with without_turn():
            has_moved = self._exchanges.move(self._landing, deadline)
        if not has_moved:
            self._pull = self._pull or self._begin_pull()
            self._pull.wait(deadline)

    def abandon(self) -> None:
        self._exchanges.abandon()
        if self._pull is not None:
            self._pull.abandon()

    def _begin_pull(self) -> AgentPull:
        return AgentPull(self._session, self._head.address, self._head.key, self._landing)
