"""The way of an object that has tensors on devices: each type of device goes its own.

What is in the producer's host memory goes as any object: over the named transport if that carries
it, else over the agent's lanes. What is on a device goes over the first of these that serves the
pair: the named transport, those of the device type (``Accelerator.transports``), ``staged``, which
goes through host memory and serves every pair.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.capture import Envelope
from ray.experimental.rdt.descriptor import Descriptor
from ray.experimental.rdt.landing import Landing, Targets, allocate_on_devices, direct_targets
from ray.experimental.rdt.lanes import (
    AgentPull,
    Exchange,
    check_carries,
    describe_peer,
    fall_back,
    say_used,
)
from ray.experimental.rdt.targets import Target
from ray.experimental.rdt.transports.base import TransportUnavailable

if TYPE_CHECKING:
    from ray.experimental.rdt.links import Links

#: Through host memory: the last way, and the only one that is not tried but relied on.
STAGED = "staged"


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

    Begins the first way that can be begun; ``finish`` goes on to the next where one cannot serve.
    """

    def __init__(
        self,
        links: Links,
        head: Descriptor,
        landing: Landing,
        device_type: str,
        deadline: float,
    ):
        self._links = links
        self._head = head
        self._landing = landing
        self._device_type = device_type
        self._ways = ways(head.transport, device_type)
        self._under_way: AgentPull | Exchange
        self._begin_next(deadline)

    @property
    def lane(self) -> str:
        return self._under_way.lane

    def finish(self, deadline: float) -> None:
        while isinstance(self._under_way, Exchange):
            try:
                self._under_way.move(self._landing, deadline)
                say_used(self._links.session, self._head, self.lane, self._device_type)
                return
            except TransportUnavailable as error:
                self._under_way.abandon()
                self._pass_over(self._under_way.lane, error)
            self._begin_next(deadline)
        self._under_way.wait(deadline)

    def abandon(self) -> None:
        self._under_way.abandon()

    def _begin_next(self, deadline: float) -> None:
        while self._ways:
            name = self._ways.pop(0)
            try:
                transport = self._links.transports.get(name)
                if name != STAGED:
                    check_carries(transport, self._device_type)
                self._under_way = Exchange(
                    self._links.session, transport, self._head, deadline, self._device_type
                )
                return
            except TransportUnavailable as error:
                self._pass_over(name, error)
        session = self._links.session
        self._under_way = AgentPull(session, self._head.address, self._head.key, self._landing)

    def _pass_over(self, name: str, error: TransportUnavailable) -> None:
        if name == STAGED:
            raise error
        if name == self._head.transport:
            fall_back(self._links.session, self._head, error)
        else:
            why = f"RDT lane {name} does not serve {describe_peer(self._head)}: {error}"
            self._links.session.say_once(why, logging.INFO)


def ways(named: str, device_type: str) -> list[str]:
    """The transports to try for memory of one device type, best first.

    Host memory has the agent's lanes after these.
    """
    own = [] if named == "auto" else [named]
    if device_type == "cpu":
        return own
    accelerator = accelerators.usable(device_type)
    others = accelerator.transports if accelerator is not None else ()
    return [*own, *(name for name in others if name != named), STAGED]
