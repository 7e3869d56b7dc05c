"""Memory that the bytes of an object land in: receive-pool blocks or the user's own tensors."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.capture import Table, build_tensors

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.session import Session

Targets = Sequence["torch.Tensor"]

#: A region of at least this many bytes gets a block of its own, so that keeping one large tensor
#: does not keep the memory of all the others.
_OWN_BLOCK_BYTES = 1 << 20

_ALIGNMENT = 64


@dataclass(frozen=True)
class Landing:
    """Where a pull's bytes land.

    Attributes:
        places: For each region its buffer and the offset in it.
        addresses: For each region its address, as uint64.
        lengths: For each region its bytes, as uint64.
        direct: Regions that land in a tensor of the user's, and that tensor.
    """

    places: list[tuple[Any, int]]
    addresses: array[int]
    lengths: array[int]
    direct: Mapping[int, torch.Tensor]

    def flat(self) -> list[torch.Tensor]:
        """The regions as flat uint8 tensors, for a transport to fill."""
        import torch

        empty = torch.empty(0, dtype=torch.uint8)
        return [
            self.direct[region].view(-1).view(torch.uint8)
            if region in self.direct
            else torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=offset)
            if nbytes
            else empty
            for region, ((buffer, offset), nbytes) in enumerate(zip(self.places, self.lengths))
        ]

    def deliver(self, table: Table, targets: Targets | None) -> Targets:
        """The object's tensors over the memory, now that the bytes are there."""
        if targets is None:
            return build_tensors(table, self.places)
        if len(self.direct) == len(table.regions):
            return targets
        return fill(targets, build_tensors(table, self.places, self.direct))


def allocate(
    session: Session,
    regions: Sequence[int],
    direct: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> Landing:
    """Memory for all regions of an object.

    Args:
        session: Its agent's receive pool gives the blocks.
        regions: The bytes of each region.
        direct: Regions that go straight into a tensor of the user's.
    """
    places: list[tuple[Any, int]] = []
    addresses, packed = array("Q"), 0
    for region, nbytes in enumerate(regions):
        if region in direct or nbytes >= _OWN_BLOCK_BYTES:
            continue
        packed += _round_up(nbytes)
    shared = session.agent.allocate(packed) if packed else None
    at = 0
    for region, nbytes in enumerate(regions):
        if region in direct:
            places.append((None, 0))
            addresses.append(direct[region].data_ptr())
        elif nbytes >= _OWN_BLOCK_BYTES:
            block = session.agent.allocate(nbytes)
            places.append((block, 0))
            addresses.append(block.address)
        else:
            places.append((shared, at))
            addresses.append(shared.address + at if shared is not None else 0)
            at += _round_up(nbytes)
    return Landing(places, addresses, array("Q", regions), direct)


def direct_targets(table: Table, targets: Targets | None) -> dict[int, torch.Tensor]:
    """Regions that are exactly one contiguous target's bytes, and that target."""
    if targets is None:
        return {}
    users: dict[int, list[int]] = {}
    for index, row in enumerate(table.rows):
        users.setdefault(row[0], []).append(index)
    direct = {}
    for region, (first, *others) in users.items():
        target, row = targets[first], table.rows[first]
        is_exact = row[4] is None and target.nbytes == table.regions[region]
        is_plain = target.is_contiguous() and target.device.type == "cpu" and not row[5] & ~1
        if not others and is_exact and is_plain:
            direct[region] = target
    return direct


def fill(targets: Targets, tensors: Targets) -> Targets:
    """Copies the tensors into the user's."""
    import torch

    with torch.no_grad():
        for target, tensor in zip(targets, tensors):
            if target is not tensor:
                target.copy_(tensor)
    return targets


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
